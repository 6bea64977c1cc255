"""The decoder's KV cache in the graph: who stores the new rows, and who sees whom."""

# Tests: tests/test_parity.py and tests/export/graphs/test_graph_traps.py.
from __future__ import annotations

from typing import Protocol

import numpy as np

from paliedge_export.checkpoint.config import TextConfig
from paliedge_export.graphs.builder import GraphBuilder

_MASKED = -1e9
"""Added to a hidden score. Finite, and added once: two infinities would make NaN."""


def put_out(graph: GraphBuilder, text: TextConfig, index: int, part: str, new: str) -> str:
    """New rows [B, S, kv heads, head_dim] as the output that they are: [B, kv heads, S, head_dim]."""
    name, shape = f"present.{index}.{part}", ("batch", text.num_kv_heads, "sequence", text.head_dim)
    graph.output(graph.compute(_rows(graph, text, new)), name, graph.compute_type, shape)
    return name


class Cache(Protocol):
    def mask(self, positions: str, prefix_length: str) -> str:
        """[B, 1, S, T] float32, 0 where a query sees a key, else a number that hides it."""
        ...

    def extend(self, index: int, part: str, new: str) -> str:
        """Take the rows [B, S, kv heads, head_dim] of layer `index`; returns all [B, kv heads, T, head_dim]."""
        ...


class RowCache:
    """Keys are the cache's P rows and behind them the S new ones, which are put out."""

    def __init__(self, graph: GraphBuilder, text: TextConfig, start: str) -> None:
        self._graph = graph
        self._text = text
        self._start = start
        self._past = _cache_inputs(graph, text, "capacity")

    def mask(self, positions: str, prefix_length: str) -> str:
        graph, start = self._graph, self._start
        past_position = _positions(graph, self._past[0, "key"], axis=2)
        new_position = _positions(graph, positions, axis=1)
        query_position = graph.op("Unsqueeze", new_position, graph.ints(1))
        causal = graph.op("LessOrEqual", new_position, query_position)
        position = graph.op("Add", start, new_position)
        in_prefix = graph.op("Less", position, graph.op("Unsqueeze", prefix_length, graph.ints(1)))
        new = graph.op("Or", causal, graph.op("Unsqueeze", in_prefix, graph.ints(1, 2)))
        filled = graph.op("Unsqueeze", graph.op("Less", past_position, start), graph.ints(1, 2))
        past = graph.op("And", filled, graph.op("GreaterOrEqual", query_position, graph.constant(0, np.int64)))
        return _mask(graph, graph.op("Concat", past, new, axis=-1))

    def extend(self, index: int, part: str, new: str) -> str:
        rows = put_out(self._graph, self._text, index, part, new)
        return self._graph.op("Concat", self._past[index, part], rows, axis=2)


class InPlaceCache:
    """Keys are the cache's rows, the S new rows among them."""

    def __init__(self, graph: GraphBuilder, text: TextConfig, start: str, capacity: int) -> None:
        self._graph = graph
        self._text = text
        self._capacity = capacity
        self._write_index = graph.op("Squeeze", start, graph.ints(1))
        self._past = _cache_inputs(graph, text, capacity)

    def mask(self, positions: str, prefix_length: str) -> str:
        graph = self._graph
        position = graph.constant(np.arange(self._capacity), np.int64)
        query_position = graph.op("Unsqueeze", graph.op("Sub", positions, graph.ints(1)), graph.ints(1, 3))
        causal = graph.op("LessOrEqual", position, query_position)
        in_prefix = graph.op("Less", position, graph.op("Unsqueeze", prefix_length, graph.ints(1, 2, 3)))
        return _mask(graph, graph.op("Or", causal, in_prefix))

    def extend(self, index: int, part: str, new: str) -> str:
        graph, text = self._graph, self._text
        rows = graph.compute(_rows(graph, text, new))
        name = f"present.{index}.{part}"
        graph.op("TensorScatter", self._past[index, part], rows, self._write_index, name=name, axis=-2)
        shape = ("batch", text.num_kv_heads, self._capacity, text.head_dim)
        graph.output(name, name, graph.compute_type, shape)
        return name


def _cache_inputs(graph: GraphBuilder, text: TextConfig, capacity: int | str) -> dict[tuple[int, str], str]:
    shape = ("batch", text.num_kv_heads, capacity, text.head_dim)
    return {
        (index, part): graph.input(f"past_key_values.{index}.{part}", graph.compute_type, shape)
        for index in range(text.num_layers)
        for part in ("key", "value")
    }


def _positions(graph: GraphBuilder, x: str, axis: int) -> str:
    """0, 1, ... along an axis of `x`."""
    size = graph.op("Squeeze", graph.op("Shape", x, start=axis, end=axis + 1), graph.ints(0))
    return graph.op("Range", graph.constant(0, np.int64), size, graph.constant(1, np.int64))


def _mask(graph: GraphBuilder, visible: str) -> str:
    return graph.op("Where", visible, graph.constant(0.0), graph.constant(_MASKED))


def _rows(graph: GraphBuilder, text: TextConfig, x: str) -> str:
    """Keys or values as a cache holds them: [B, S, kv heads, head_dim] -> [B, kv heads, S, head_dim]."""
    if text.num_kv_heads > 1:
        return graph.op("Transpose", x, perm=[0, 2, 1, 3])
    return graph.op("Reshape", x, graph.ints(0, 1, -1, text.head_dim))  # needs no copy
