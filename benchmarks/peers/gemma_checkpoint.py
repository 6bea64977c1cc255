"""The language model of a PaliGemma checkpoint as a checkpoint of its own, as transformers keeps Gemma.

Engines that know no images convert from that, as their users do. Names and shapes change nothing in the
numbers: every tensor is copied bit by bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from paliedge_export.checkpoint.config import ModelConfig, read_config
from paliedge_export.checkpoint.safetensors_reader import EMBED_TOKENS, LM_HEAD, Array, Checkpoint

ROOT_NAME = "language_model."
MAX_POSITIONS = 8192
"""Gemma's own; every comparison stays far below."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def gemma_config(config: ModelConfig, num_rows: int) -> dict[str, Any]:
    """config.json of the language model alone, with a vocabulary of as many ids as its table has rows."""
    text = config.text
    return {
        "architectures": ["GemmaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "head_dim": text.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": MAX_POSITIONS,
        "model_type": "gemma",
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "num_key_value_heads": text.num_kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": text.eps,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": True,
        "vocab_size": num_rows,
    }


def _shards(checkpoint: Checkpoint) -> Iterator[dict[str, Array]]:
    """The tensors under Gemma's names: the table, then layer by layer, then the last norm."""
    groups: dict[str, list[str]] = {}
    for name in checkpoint:
        if name.startswith(ROOT_NAME):
            groups.setdefault(name.split(".")[2] if ".layers." in name else name, []).append(name)
    for names in groups.values():
        yield {name.replace(ROOT_NAME, "model.", 1): checkpoint[name] for name in names}


def write_gemma(paligemma: Path, folder: Path) -> None:
    """Write `folder`: GemmaForCausalLM with the weights of the checkpoint `paligemma`.

    Raises:
        ValueError: the checkpoint is of PaliGemma 2, or its head is not its embedding table.
    """
    config = read_config(paligemma)
    checkpoint = Checkpoint(paligemma, config)
    if config.family != "paligemma" or LM_HEAD in checkpoint:
        raise ValueError(f"expected a PaliGemma 1 with a tied head; found another one in {paligemma}")
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(_shards(checkpoint)):
        file = f"model-{index:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    num_rows = checkpoint.shape(EMBED_TOKENS)[0]
    (folder / "config.json").write_text(json.dumps(gemma_config(config, num_rows), indent=2) + "\n")
    for name in _TOKENIZER:
        if (paligemma / name).is_file():
            shutil.copyfile(paligemma / name, folder / name)
