"""The few facts about an ONNX graph that a builder asks for, read without the package onnx, which starts slowly.

The format is protocol buffers; field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DTYPES = {1: "FLOAT", 7: "INT64", 10: "HALF", 16: "BF16"}
_Fields = dict[int, list[Any]]


@dataclass(frozen=True)
class Tensor:
    """An input or output; sizes that vary are names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxGraph:
    """A graph. `aliases`: outputs of TensorScatter to the graph inputs that they update."""

    opset: int
    operators: frozenset[str]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    aliases: dict[str, str]
    weight_files: frozenset[str]


def read_onnx(path: Path) -> OnnxGraph:
    model = _fields(path.read_bytes())
    graph = _fields(model[7][0])
    nodes = [_fields(node) for node in graph[1]]
    inputs = tuple(_read_tensor(content) for content in graph[11])
    names = {tensor.name for tensor in inputs}
    aliases = {
        node[2][0].decode(): node[1][0].decode()
        for node in nodes
        if node[4][0] == b"TensorScatter" and node[1][0].decode() in names
    }
    return OnnxGraph(
        opset=next(opset[2][0] for opset in map(_fields, model[8]) if not opset[1] or not opset[1][0]),
        operators=frozenset(node[4][0].decode() for node in nodes),
        inputs=inputs,
        outputs=tuple(_read_tensor(content) for content in graph[12]),
        aliases=aliases,
        weight_files=frozenset(
            entry[2][0].decode()
            for initializer in graph[5]
            for entry in map(_fields, _fields(initializer)[13])
            if entry[1][0] == b"location"
        ),
    )


def _read_tensor(content: bytes) -> Tensor:
    info = _fields(content)
    tensor = _fields(_fields(info[2][0])[1][0])
    sizes = [_fields(size) for size in _fields(tensor[2][0])[1]] if tensor[2] else []
    shape = tuple(size[2][0].decode() if size[2] else size[1][0] for size in sizes)
    return Tensor(info[1][0].decode(), _DTYPES[tensor[1][0]], shape)


def _fields(content: bytes) -> _Fields:
    """A message's fields by number: integers, and the bytes of everything else."""
    found: _Fields = defaultdict(list)
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(content, place)
            found[tag >> 3].append(value)
            continue
        if kind == 2:
            size, place = _varint(content, place)
        else:
            size = {1: 8, 5: 4}[kind]
        found[tag >> 3].append(content[place : place + size])
        place += size
    return found


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
