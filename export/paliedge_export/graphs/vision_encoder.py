"""The vision encoder's graph: SigLIP and the projector, pixel_values -> image_features.

image_features [B, N, H] have the scale of the decoder's inputs_embeds: the projector's output as it
is, not divided by sqrt(H) (transformers before 5 divided, because its decoder multiplied again).
"""

# Tests: tests/test_parity.py.
from __future__ import annotations

import numpy as np

from paliedge_export.checkpoint.config import ModelConfig, VisionConfig
from paliedge_export.graphs.builder import GraphBuilder, layer_output
from paliedge_export.targets import Lowering


def add_vision_encoder(graph: GraphBuilder, config: ModelConfig, lowering: Lowering) -> None:
    """pixel_values [B, 3, S, S] float32 -> image_features [B, N, H] float32."""
    vision = config.vision
    size = vision.image_size
    pixels = graph.input("pixel_values", np.float32, ("batch", 3, size, size))
    x = _embed_patches(graph, vision, pixels)
    for index in range(vision.num_layers):
        name = f"vision_tower.encoder.layers.{index}"
        normed = _norm(graph, vision, f"{name}.layer_norm1", x)
        x = graph.op("Add", x, _attend(graph, vision, f"{name}.self_attn", normed, lowering))
        hidden = graph.linear(_norm(graph, vision, f"{name}.layer_norm2", x), f"{name}.mlp.fc1")
        hidden = graph.op("Gelu", hidden, approximate="tanh")
        fed = graph.linear(hidden, f"{name}.mlp.fc2", per_token=True)
        x = graph.op("Add", x, fed, name=layer_output(name))
    x = _norm(graph, vision, "vision_tower.post_layernorm", x)
    features = graph.linear(x, "multi_modal_projector.linear")
    shape = ("batch", vision.num_image_tokens, config.text.hidden_size)
    graph.output(features, "image_features", np.float32, shape)


def _embed_patches(graph: GraphBuilder, vision: VisionConfig, pixels: str) -> str:
    """Patches as a matrix product, which every backend runs in the compute type: [B, 3, S, S] -> [B, N, D]."""
    name = "vision_tower.embeddings"
    grid, patch = vision.grid, vision.patch_size
    x = graph.op("Reshape", pixels, graph.ints(0, 3, grid, patch, grid, patch))
    x = graph.op("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
    x = graph.op("Reshape", x, graph.ints(0, grid * grid, 3 * patch * patch))
    x = graph.linear(x, f"{name}.patch_embedding")
    return graph.op("Add", x, graph.weight(f"{name}.position_embedding.weight"))


def _attend(graph: GraphBuilder, vision: VisionConfig, name: str, x: str, lowering: Lowering) -> str:
    """Full attention of every patch to every patch, fused QKV: [B, N, D] -> [B, N, D].

    Where a TensorRT is meant, scores and softmax stay in the compute type: that is the pattern its
    fused kernels replace, and they accumulate in float32 inside.
    """
    qkv = graph.linear(x, f"{name}.qkv_proj")
    width, heads = vision.hidden_size, vision.num_heads
    dim = width // heads
    if lowering.operators == "contrib":
        query, key, value = graph.split(qkv, [width] * 3, axis=-1)
        attended = graph.op("MultiHeadAttention", query, key, value, domain="com.microsoft", num_heads=heads)
        return graph.linear(attended, f"{name}.out_proj", per_token=True)
    parts = graph.split(graph.op("Reshape", qkv, graph.ints(0, 0, 3 * heads, dim)), [heads] * 3, axis=2)
    parts = [graph.op("Transpose", part, perm=[0, 2, 1, 3]) for part in parts]
    # The factor goes to the query, which keeps scores small in 16 bit.
    parts[0] = graph.op("Mul", parts[0], graph.constant(dim**-0.5))
    query, key, value = (graph.compute(part) for part in parts)
    if lowering.operators == "fused":
        attended = graph.op("Attention", query, key, value, scale=1.0)
    else:
        scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 1, 3, 2]))
        attended = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
    attended = graph.op("Transpose", graph.cast(attended, np.float32), perm=[0, 2, 1, 3])
    return graph.linear(graph.op("Reshape", attended, graph.ints(0, 0, width)), f"{name}.out_proj", per_token=True)


def _norm(graph: GraphBuilder, vision: VisionConfig, name: str, x: str) -> str:
    weight, bias = graph.weight(f"{name}.weight"), graph.weight(f"{name}.bias")
    return graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=vision.eps)
