"""The shapes model itself: PaliGemma's architecture at a hundredth of its width, and its checkpoint on disk."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from benchmarks.make_checkpoint import write_processor
from benchmarks.shapes.pool import GRID, PATCH
from benchmarks.shapes.scenes import IMAGE_SIZE
from benchmarks.shapes.vocabulary import IMAGE, LOCATIONS, write_tokenizer

NUM_PATCHES = GRID * GRID
NUM_LAYERS = 7
"""Of the decoder."""


def make_config(tokenizer: Tokenizer, width: int = 128) -> PaliGemmaConfig:
    """The shapes model's dimensions, as transformers' configuration."""
    rows = -(-(tokenizer.get_vocab_size() + 1) // 64) * 64  # PaliGemma, too, stores rows beyond its vocabulary
    vocabulary = tokenizer.get_vocab()
    tokens = {name: vocabulary[f"<{name}>"] for name in ("pad", "bos", "eos")}
    vision = SiglipVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=width,
        vision_use_head=False,
    )
    text = GemmaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=5 * width // 2,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=width // 4,
        max_position_embeddings=512,
        hidden_activation="gelu_pytorch_tanh",
        **{f"{name}_token_id": value for name, value in tokens.items()},
    )
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary[IMAGE],
        projection_dim=width,
        hidden_size=width,
        tie_word_embeddings=True,
        **{f"{name}_token_id": value for name, value in tokens.items()},
    )
    config.text_config.num_image_tokens = NUM_PATCHES
    return config


def _fourier_features(positions: Tensor, width: int, scale: float, seed: int) -> Tensor:
    """Random Fourier features [N, width] whose dot products fall off with distance over about `scale`."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.randn(width // 2, generator=generator) / scale
    angles = positions[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(width / 2)


def make_model(tokenizer: Tokenizer) -> PaliGemmaForConditionalGeneration:
    """A fresh model; neighbouring location tokens and neighbouring patches start out alike."""
    config = make_config(tokenizer)
    config._attn_implementation = "sdpa"
    model = PaliGemmaForConditionalGeneration(config)
    width = config.text_config.hidden_size
    first = tokenizer.get_vocab()[LOCATIONS[0]]
    edges = torch.arange(len(LOCATIONS)) / (len(LOCATIONS) - 1)
    centres = (torch.arange(GRID) + 0.5) / GRID
    half = width // 2
    with torch.no_grad():
        rows = torch.cat([_fourier_features(edges, half, scale, 1) for scale in (0.015, 0.1)], 1)
        model.model.language_model.embed_tokens.weight[first : first + len(LOCATIONS)] = 0.4 * rows
        grid = torch.cat(
            [
                _fourier_features(centres, half, 0.2, 2).repeat_interleave(GRID, 0),
                _fourier_features(centres, half, 0.2, 3).repeat(GRID, 1),
            ],
            1,
        )
        model.model.vision_tower.embeddings.position_embedding.weight.copy_(2 * grid)
        model.model.vision_tower.embeddings.patch_embedding.weight.normal_(0, 0.05)
        model.model.multi_modal_projector.linear.weight.normal_(0, 0.1)
    return model


def deepen(model: PaliGemmaForConditionalGeneration, num_layers: int = NUM_LAYERS) -> None:
    """Give the decoder new layers between its own until it has `num_layers`; they change nothing before training."""
    stack = model.model.language_model.layers
    layers = list(stack)
    missing = num_layers - len(layers)
    for index in reversed(range(missing)):
        place = (index + 1) * len(stack) // missing - 1
        fresh = copy.deepcopy(layers[place])
        with torch.no_grad():
            fresh.self_attn.o_proj.weight.zero_()
            fresh.mlp.down_proj.weight.zero_()
        layers.insert(place + 1, fresh)
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.model.language_model.layers = torch.nn.ModuleList(layers)
    model.config.text_config.num_hidden_layers = num_layers


def save_checkpoint(model: PaliGemmaForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Hugging Face format, bfloat16 weights: every type of graph holds them exactly, and a wheel packs them well."""
    half = PaliGemmaForConditionalGeneration(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    write_processor(folder, IMAGE_SIZE, NUM_PATCHES)
