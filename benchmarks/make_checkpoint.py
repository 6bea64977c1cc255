"""Write a PaliGemma checkpoint of real size with random weights, as the hub has it: for memory and speed.

    python -m benchmarks.make_checkpoint FOLDER --model paligemma-3b --image-size 224
    python -m benchmarks.make_checkpoint FOLDER --layers 6    # of full width, for where 3B takes too long

Names, sharding, config.json and token ids are those of google/paligemma-3b-pt-224 and its like;
weights and words are not, so answers mean nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from benchmarks.shapes.vocabulary import IMAGE, LOCATIONS, build_tokenizer, write_tokenizer
from paliedge_export.checkpoint.config import ModelConfig, read_config
from paliedge_export.checkpoint.safetensors_reader import EMBED_TOKENS, Shape, expected_shapes

NUM_ROWS = 257_216
FIRST_LOCATION = 256_000
IMAGE_TOKEN = 257_152
SHARD_BYTES = 1 << 30
_BLOCK = (1 << 22) + 1
"""Random numbers that are made once; tensors are cut from them at changing places."""

TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "paligemma-3b": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
    },
    "paligemma2-3b": {
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 107],
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
}


def hub_config(text: dict[str, Any], image_size: int, num_layers: int | None = None) -> dict[str, Any]:
    """config.json as the hub has it: only what differs from old defaults is written out.

    With `num_layers` both parts, vision encoder and decoder, are that deep, and each layer is as wide as ever.
    """
    num_image_tokens = (image_size // 14) ** 2
    width = text["hidden_size"]
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": num_image_tokens,
        "patch_size": 14,
        "projection_dim": width,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    }
    if image_size != 224:
        vision["image_size"] = image_size
    if num_layers:
        vision["num_hidden_layers"] = num_layers
        text = text | {"num_hidden_layers": num_layers}
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_size": width,
        "ignore_index": -100,
        "image_token_index": IMAGE_TOKEN,
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": width,
        "text_config": text | {"num_image_tokens": num_image_tokens, "torch_dtype": "bfloat16", "vocab_size": NUM_ROWS},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.0.dev0",
        "vision_config": vision,
        "vocab_size": NUM_ROWS,
    }


def make_tokenizer() -> Tokenizer:
    """The shapes model's tokenizer with filler pieces, so that every added token has PaliGemma's id."""
    raw = json.loads(build_tokenizer(50).to_str())
    vocab = raw["model"]["vocab"]
    shift = FIRST_LOCATION - len(vocab)
    for token in raw["added_tokens"]:
        if token["id"] >= len(vocab):
            token["id"] += shift
    vocab |= {f"<unused{index}>": index for index in range(len(vocab), FIRST_LOCATION)}
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    assert tokenizer.token_to_id(LOCATIONS[0]) == FIRST_LOCATION
    assert tokenizer.token_to_id(IMAGE) == IMAGE_TOKEN
    return tokenizer


def hub_name(canonical: str) -> str:
    """The name that transformers 4 gave a tensor, as checkpoints on the hub have it."""
    for root, inner in (("vision_tower.", "vision_model."), ("language_model.", "model.")):
        if canonical.startswith(root):
            return root + inner + canonical.removeprefix(root)
    return canonical


def _shards(config: ModelConfig) -> Iterator[dict[str, Shape]]:
    """The tensors' shapes in groups of about SHARD_BYTES."""
    shapes = {EMBED_TOKENS: (NUM_ROWS, config.text.hidden_size)} | expected_shapes(config)
    shard: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if shard and 2 * sum(map(np.prod, [*shard.values(), shape])) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def write_weights(folder: Path, config: ModelConfig) -> int:
    """Write the shards, one in memory at a time, and their index; returns the weights' size in bytes."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal(_BLOCK, np.float32) * np.float32(0.02)
    random = block.astype(ml_dtypes.bfloat16)
    near_one = (1 + block).astype(ml_dtypes.bfloat16)
    shards = list(_shards(config))
    weight_map: dict[str, str] = {}
    total = 0
    for index, shapes in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, npt.NDArray[Any]] = {}
        for name, shape in shapes.items():
            is_gain = name.startswith("vision_tower") and "norm" in name and name.endswith("weight")
            source = near_one if is_gain else random
            tensors[hub_name(name)] = np.resize(source[rng.integers(_BLOCK // 2) :], shape)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")
    return total


def write_processor(folder: Path, image_size: int, num_image_tokens: int) -> None:
    """preprocessor_config.json as PaliGemma's processor has it."""
    processor = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": num_image_tokens,
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "PaliGemmaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": image_size, "width": image_size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def make_checkpoint(folder: Path, model: str, image_size: int, num_layers: int | None = None) -> int:
    """Write all files of the checkpoint to `folder`, see `hub_config`; returns the weights' size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = hub_config(TEXT_CONFIGS[model], image_size, num_layers)
    write_processor(folder, image_size, (image_size // 14) ** 2)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(make_tokenizer(), folder)
    return write_weights(folder, read_config(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=sorted(TEXT_CONFIGS), default="paligemma-3b")
    parser.add_argument("--image-size", type=int, choices=(224, 448, 896), default=224)
    parser.add_argument("--layers", type=int, help="of vision encoder and decoder; the model's own unless given")
    arguments = parser.parse_args()
    size = make_checkpoint(arguments.folder, arguments.model, arguments.image_size, arguments.layers)
    print(f"{arguments.folder}: {size / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
