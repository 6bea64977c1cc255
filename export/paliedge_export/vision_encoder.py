"""The vision encoder's graph: SigLIP and the projector, pixel_values -> image_features.

image_features [B, N, H] have the scale of the decoder's inputs_embeds: the projector's output as it
is, not divided by sqrt(H) (transformers before 5 divided, because its decoder multiplied again).
"""

from __future__ import annotations

import numpy as np

from paliedge_export.checkpoint import Checkpoint
from paliedge_export.config import ModelConfig, VisionConfig
from paliedge_export.graph import GraphBuilder


def add_vision_encoder(graph: GraphBuilder, checkpoint: Checkpoint, config: ModelConfig) -> None:
    """pixel_values [B, 3, S, S] float32 -> image_features [B, N, H] float32."""
    vision = config.vision
    size = vision.image_size
    pixels = graph.input("pixel_values", np.float32, ("batch", 3, size, size))
    x = _embed_patches(graph, checkpoint, vision, pixels)
    for index in range(vision.num_layers):
        name = f"vision_tower.encoder.layers.{index}"
        x = graph.op(
            "Add",
            x,
            _attend(graph, checkpoint, vision, name, _norm(graph, checkpoint, vision, f"{name}.layer_norm1", x)),
        )
        hidden = _linear(
            graph, checkpoint, f"{name}.mlp.fc1", _norm(graph, checkpoint, vision, f"{name}.layer_norm2", x)
        )
        hidden = graph.op("Gelu", hidden, approximate="tanh")
        x = graph.op("Add", x, _linear(graph, checkpoint, f"{name}.mlp.fc2", hidden))
    x = _norm(graph, checkpoint, vision, "vision_tower.post_layernorm", x)
    features = _linear(graph, checkpoint, "multi_modal_projector.linear", x)
    shape = ("batch", vision.num_image_tokens, config.text.hidden_size)
    graph.output(features, "image_features", np.float32, shape)


def _embed_patches(graph: GraphBuilder, checkpoint: Checkpoint, vision: VisionConfig, pixels: str) -> str:
    """Patches as a matrix product, which every backend runs in the compute type: [B, 3, S, S] -> [B, N, D]."""
    name = "vision_tower.embeddings"
    grid, patch = vision.grid, vision.patch_size
    x = graph.op("Reshape", pixels, graph.ints(0, 3, grid, patch, grid, patch))
    x = graph.op("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
    x = graph.op("Reshape", x, graph.ints(0, grid * grid, 3 * patch * patch))
    kernel = checkpoint[f"{name}.patch_embedding.weight"].reshape(vision.hidden_size, -1)
    x = graph.linear(x, f"{name}.patch_embedding", kernel, checkpoint[f"{name}.patch_embedding.bias"])
    positions = checkpoint[f"{name}.position_embedding.weight"]
    return graph.op("Add", x, graph.weight(f"{name}.position_embedding.weight", positions, np.float32))


def _attend(graph: GraphBuilder, checkpoint: Checkpoint, vision: VisionConfig, name: str, x: str) -> str:
    """Full attention of every patch to every patch, fused QKV."""
    parts = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
    weight = np.concatenate([checkpoint[f"{part}.weight"] for part in parts])
    bias = np.concatenate([checkpoint[f"{part}.bias"] for part in parts])
    qkv = graph.linear(x, f"{name}.self_attn.qkv_proj", weight, bias)
    query, key, value = graph.split(qkv, [vision.hidden_size] * 3, axis=-1)
    attended = graph.op("MultiHeadAttention", query, key, value, domain="com.microsoft", num_heads=vision.num_heads)
    return _linear(graph, checkpoint, f"{name}.self_attn.out_proj", attended)


def _norm(graph: GraphBuilder, checkpoint: Checkpoint, vision: VisionConfig, name: str, x: str) -> str:
    weight, bias = (
        graph.weight(f"{name}.{part}", checkpoint[f"{name}.{part}"], np.float32) for part in ("weight", "bias")
    )
    return graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=vision.eps)


def _linear(graph: GraphBuilder, checkpoint: Checkpoint, name: str, x: str) -> str:
    return graph.linear(x, name, checkpoint[f"{name}.weight"], checkpoint[f"{name}.bias"])
