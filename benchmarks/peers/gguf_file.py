"""A Gemma checkpoint as a GGUF file, by the rules of llama.cpp's converter: `python -m benchmarks.peers.gguf_file`.

    python -m benchmarks.peers.gguf_file GEMMA FILE.gguf   # float16 matrices, float32 norms

What is particular to Gemma: norm weights are stored minus 1 in checkpoints and as they are in GGUF; the head
is the embedding table, which llama.cpp takes when there is no `output.weight`; the scale of the embeddings
is llama.cpp's own business. Needs the package gguf.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives numpy the bfloat16 that safetensors asks it for
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
"""Gemma's tensors in transformers and in GGUF, without the layer in front."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Kinds of tokens, as GGUF numbers them."""
MOSTLY_F16 = 1
Array = npt.NDArray[Any]


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` to `blk.3.ffn_up.weight`."""
    layer = re.match(r"model\.layers\.(\d+)\.(.+)", name)
    return f"blk.{layer[1]}.{_NAMES[layer[2]]}" if layer else _NAMES[name]


def gguf_tensors(folder: Path) -> Iterator[tuple[str, Array]]:
    """Every tensor under its GGUF name: norms float32 and plus 1, matrices float16."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(folder / file, framework="np") as shard:
            tensor = np.asarray(shard.get_tensor(name))
        if "norm" in name:
            yield gguf_name(name), tensor.astype(np.float32) + 1
        else:
            yield gguf_name(name), tensor.astype(np.float16)


def gguf_metadata(config: dict[str, Any]) -> dict[str, int | float]:
    """The architecture's numbers, by their keys without `gemma.` in front."""
    return {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }


def read_vocabulary(tokenizer: Path, num_rows: int) -> tuple[list[str], list[int]]:
    """Every id's text and kind; rows behind the last token are unused, as llama.cpp's converter pads."""
    raw = json.loads(tokenizer.read_text())
    texts = [f"[PAD{index}]" for index in range(num_rows)]
    kinds = [UNUSED] * num_rows
    for text, index in raw["model"]["vocab"].items():
        texts[index], kinds[index] = text, NORMAL
    for token in raw["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return texts, [UNKNOWN if text == "<unk>" else kind for text, kind in zip(texts, kinds, strict=True)]


def write_gguf(folder: Path, path: Path) -> None:
    """Write the checkpoint in `folder`, one tensor in memory at a time: shapes go first, then the numbers."""
    gguf: Any = importlib.import_module("gguf")
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "gemma")
    writer.add_file_type(MOSTLY_F16)
    for key, value in gguf_metadata(config).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"gemma.{key}", value)
    _add_vocabulary(writer, folder, config)
    for name, tensor in gguf_tensors(folder):
        writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in gguf_tensors(folder):
        writer.write_tensor_data(tensor)
    writer.close()


def _add_vocabulary(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    texts, kinds = read_vocabulary(folder / "tokenizer.json", config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores([float(-index) for index in range(len(texts))])
    writer.add_token_types(kinds)
    for kind in ("bos", "eos", "pad"):
        getattr(writer, f"add_{kind}_token_id")(config[f"{kind}_token_id"])


def describe_gguf(path: Path) -> dict[str, Any]:
    """The tensors' bytes and types, by their names without the layer.

    All of them are what a step reads, since the embedding table is the head.
    """
    reader: Any = importlib.import_module("gguf").GGUFReader(path)
    types: dict[str, Counter[str]] = {}
    for tensor in reader.tensors:
        name = re.sub(r"blk\.\d+\.", "blk.*.", tensor.name)
        types.setdefault(name, Counter())[tensor.tensor_type.name] += 1
    return {
        "bytes_per_token": int(sum(tensor.n_bytes for tensor in reader.tensors)),
        "tensors": {name: dict(found) for name, found in types.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gemma", type=Path, help="or a GGUF file, with --describe")
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--describe", action="store_true")
    arguments = parser.parse_args()
    if arguments.describe:
        print(json.dumps(describe_gguf(arguments.gemma)))
    else:
        write_gguf(arguments.gemma, arguments.file)


if __name__ == "__main__":
    main()
