"""The decoder's attention: projections, rotary positions, and scores."""

# Tests: tests/test_parity.py and tests/export/graphs/test_graph_traps.py.
from __future__ import annotations

import numpy as np

from paliedge_export.checkpoint.config import TextConfig
from paliedge_export.graphs.builder import GraphBuilder

MASKED_16_BIT = -3e4
"""The same inside the range of float16, for an operator that adds the mask itself."""


def rotation_of(graph: GraphBuilder, text: TextConfig, positions: str) -> tuple[str, str]:
    """Cosine and sine [B, S, 1, head_dim] of the rotary position embedding, the first half of the sines negative."""
    exponents = np.arange(0, text.head_dim, 2, dtype=np.float32) / np.float32(text.head_dim)
    frequencies = (1.0 / np.float32(text.rope_theta) ** exponents).astype(np.float32)
    columns = graph.op("Unsqueeze", graph.op("Cast", positions, to=1), graph.ints(2, 3))
    cosine = graph.op("Cos", graph.op("Mul", columns, graph.constant(np.concatenate([frequencies, frequencies]))))
    sine = graph.op("Sin", graph.op("Mul", columns, graph.constant(np.concatenate([-frequencies, frequencies]))))
    return cosine, sine


def _rotate(graph: GraphBuilder, text: TextConfig, x: str, rotation: tuple[str, str]) -> str:
    """Rotate the first half of each head against the second: x [B, S, heads, head_dim]."""
    cosine, sine = rotation
    first, second = graph.split(x, [text.head_dim // 2] * 2, axis=-1)
    swapped = graph.op("Concat", second, first, axis=-1)
    return graph.op("Add", graph.op("Mul", x, cosine), graph.op("Mul", swapped, sine))


def project(
    graph: GraphBuilder, text: TextConfig, name: str, x: str, rotation: tuple[str, str]
) -> tuple[str, str, str]:
    """Query, key and value [B, S, heads, head_dim], the first two rotated."""
    heads, groups = text.num_heads, text.num_kv_heads
    qkv = graph.op("Reshape", graph.linear(x, name), graph.ints(0, 0, heads + 2 * groups, text.head_dim))
    query_and_key, value = graph.split(qkv, [heads + groups, groups], axis=2)
    query, key = graph.split(_rotate(graph, text, query_and_key, rotation), [heads, groups], axis=2)
    return query, key, value


def _by_group(graph: GraphBuilder, text: TextConfig, x: str) -> str:
    """Queries [B, S, heads, head_dim] -> [B, kv heads, S * heads / kv heads, head_dim]: a matrix product a group."""
    groups, dim = text.num_kv_heads, text.head_dim
    if groups > 1:
        x = graph.op("Reshape", x, graph.ints(0, 0, groups, -1, dim))
        x = graph.op("Transpose", x, perm=[0, 2, 1, 3, 4])
    return graph.op("Reshape", x, graph.ints(0, groups, -1, dim))


def attend_fused(graph: GraphBuilder, text: TextConfig, query: str, keys: str, values: str, mask: str) -> str:
    """ONNX's operator, which every TensorRT from 10.15 on has kernels for: -> [B, S, heads * head_dim]."""
    query = graph.op("Mul", query, graph.constant(text.query_scale))
    query = graph.compute(graph.op("Transpose", query, perm=[0, 2, 1, 3]))
    attended = graph.cast(graph.op("Attention", query, keys, values, mask, scale=1.0), np.float32)
    attended = graph.op("Transpose", attended, perm=[0, 2, 1, 3])
    return graph.op("Reshape", attended, graph.ints(0, 0, text.attention_width))


def attend_written_out(
    graph: GraphBuilder, text: TextConfig, query: str, keys: str, values: str, mask: str | None = None
) -> str:
    """Grouped-query attention in matrix products, softcap and softmax in float32; mask [B, 1, S, 1, T]."""
    groups, dim = text.num_kv_heads, text.head_dim
    shared = text.num_heads // groups
    query = graph.compute(graph.op("Mul", _by_group(graph, text, query), graph.constant(text.query_scale)))
    scores = graph.matmul(query, graph.op("Transpose", keys, perm=[0, 1, 3, 2]))
    if text.attn_softcap:
        scores = _softcap(graph, scores, text.attn_softcap)
    if mask:
        width = graph.op("Shape", mask, start=4, end=5)
        per_head = graph.op("Concat", graph.ints(0, groups, -1, shared), width, axis=0)
        scores = graph.op("Add", graph.op("Reshape", scores, per_head), mask)
    weights = graph.compute(graph.op("Softmax", scores, axis=-1))
    if mask:
        weights = graph.op("Reshape", weights, graph.op("Concat", graph.ints(0, groups, -1), width, axis=0))
    attended = graph.matmul(weights, values)
    if groups > 1:
        attended = graph.op("Reshape", attended, graph.ints(0, groups, -1, shared, dim))
        attended = graph.op("Transpose", attended, perm=[0, 2, 1, 3, 4])
    return graph.op("Reshape", attended, graph.ints(0, -1, text.attention_width))


def _softcap(graph: GraphBuilder, x: str, cap: float) -> str:
    return graph.op("Mul", graph.op("Tanh", graph.op("Div", x, graph.constant(cap))), graph.constant(cap))
