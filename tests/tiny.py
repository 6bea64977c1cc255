"""Tiny random PaliGemma checkpoints, made by transformers, whose answers depend on image and prompt.

A tied model with plain random weights echoes its input token whatever its layers do. So the table
is scaled down, the layers up and the norms spread, until answers differ: a test asserts that they do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from benchmarks.shapes.vocabulary import build_tokenizer, write_tokenizer

IMAGE_SIZE = 56
PATCH_SIZE = 14


def make_tiny(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    num_heads: int = 4,
    num_kv_heads: int = 1,
    head_dim: int = 16,
    hidden_size: int = 48,
    intermediate_size: int = 96,
    num_layers: int = 3,
    image_size: int = IMAGE_SIZE,
    dtype: torch.dtype = torch.float32,
    tied: bool = True,
    gain: float = 0.25,
    **text_options: Any,
) -> PaliGemmaForConditionalGeneration:
    """Write a checkpoint with tokenizer and preprocessing to `folder`; returns the model in float32.

    `gain` is the deviation of the decoder's weights: the smaller, the less a layer makes of an error before it.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(50)
    image_token = tokenizer.get_vocab()["<image>"]
    rows = -(-(image_token + 1) // 64) * 64
    text_class = GemmaConfig if family == "paligemma" else Gemma2Config
    if family == "paligemma2":
        text_options = {"query_pre_attn_scalar": 24, "sliding_window": 4096} | text_options
    text = text_class(
        vocab_size=rows,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=tied,
        **text_options,
    )
    vision = SiglipVisionConfig(
        image_size=image_size,
        patch_size=PATCH_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vision_use_head=False,
    )
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        projection_dim=hidden_size,
        hidden_size=hidden_size,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = "eager"
    model = PaliGemmaForConditionalGeneration(config).eval()
    _spread(model, gain, image_token)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "size": {"height": image_size, "width": image_size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model.float()


def _spread(model: PaliGemmaForConditionalGeneration, gain: float, image_token: int) -> None:
    """Give every tensor the role it has in a trained model: layers that matter, norms that differ, and rows of the
    table that no training has touched, which are never said."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("embed_tokens.weight") or name == "lm_head.weight":
                tensor.normal_(0, 0.02)
                tensor[image_token:] *= 1e-3
            elif "language_model" in name and "norm" in name:
                tensor.normal_(0, 0.3)
            elif "layer_norm" in name or "layernorm" in name:
                tensor.normal_(1 if name.endswith("weight") else 0, 0.2)
            elif "language_model" in name:
                tensor.normal_(0, gain)
            elif "position_embedding" in name:
                tensor.normal_(0, 0.5)
            else:
                tensor.normal_(0, 0.15)
