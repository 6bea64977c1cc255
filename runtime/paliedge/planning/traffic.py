"""What a step of an engine moves, by its list of layers, and what it would have to.

A tensor counts once for each kernel that reads or writes it, in full. So the bytes are those of kernels that leave each
other nothing in the GPU's caches: an upper estimate of the traffic.
"""

# Tests: tests/export/test_layers.py.
from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from paliedge.bundle.layer_list import ITEM_BYTES, Layer, LayerList, LayerTensor
from paliedge.bundle.manifest import Manifest

_LARGE = 1 << 20
"""Bytes of constants from which on they are weights."""
_CACHE = re.compile(r"(past_key_values|present)\.")
_ATTENTION = re.compile("_mha_")
_PADDING = re.compile("Repl.*Conc")
"""How the compiler calls a kernel that copies a tensor to make a dimension round."""


class Step(NamedTuple):
    """`rows` requests with `tokens` each.

    Attributes:
        capacity: length of a row's cache.
        heads: of the queries. Keys and values that a kernel writes anew are taken to be written for each of them.
    """

    rows: int
    tokens: int
    capacity: int
    heads: int


def tensor_bytes(tensor: LayerTensor, step: Step) -> float:
    """Its size: of its unknown dimensions the first is the rows, the others the tokens; a single one is both."""
    unknown = [index for index, size in enumerate(tensor.shape) if size < 0]
    sizes = [step.tokens if size < 0 else size for size in tensor.shape]
    if len(unknown) > 1:
        sizes[unknown[0]] = step.rows
    elif _CACHE.match(tensor.name):
        sizes[0] = step.rows
    elif unknown and step.capacity in tensor.shape:
        sizes[unknown[0]] = step.rows * step.heads
    elif unknown:
        sizes[unknown[0]] = step.rows * step.tokens
    return prod(sizes) * ITEM_BYTES[tensor.dtype]


def moved_bytes(layers: Sequence[Layer], step: Step) -> float:
    """What the kernels of one profile read and write in a step."""
    return sum(_kernel_bytes(layer, step) for layer in layers)


def needed_bytes(layers: Sequence[Layer], step: Step) -> float:
    """Each weight once, and each row's cache once."""
    weights = {tensor.name: tensor for layer in layers for tensor in layer.constants}
    caches = {_past(tensor.name): tensor for layer in layers for tensor in layer.inputs if _CACHE.match(tensor.name)}
    return sum(tensor_bytes(tensor, step) for tensor in (*weights.values(), *caches.values()))


def describe_step(found: LayerList, manifest: Manifest) -> str:
    """In a line, what a decode step of one row moves: the decoder's layers are those of its first profile."""
    text = manifest.model.text
    step = Step(rows=1, tokens=1, capacity=manifest.limits.capacity, heads=text.num_heads)
    layers = found.of(0)
    moved, needed = moved_bytes(layers, step), needed_bytes(layers, step)
    return f"a token moves {_in_words(moved)}, {moved / needed:.2f} times the {_in_words(needed)} that it must"


def expanded_weights(layers: Sequence[Layer], step: Step) -> list[Layer]:
    """Kernels that write weights out, larger than they are, for another kernel to read."""
    return [
        layer
        for layer in layers
        if (weights := _sum(layer.constants, step)) >= _LARGE and _sum(layer.outputs, step) >= weights
    ]


def cache_copies(layers: Sequence[Layer], step: Step) -> list[Layer]:
    """Kernels that write as much as the keys or values that they read, and do not do so in their place."""
    return [
        layer
        for layer in layers
        if (read := [tensor for tensor in layer.inputs if _CACHE.match(tensor.name)])
        and _sum(_written(layer), step) >= min(tensor_bytes(tensor, step) for tensor in read)
    ]


def padding_copies(layers: Sequence[Layer]) -> list[Layer]:
    """Kernels that copy a tensor to make a dimension round."""
    return [layer for layer in layers if layer.kind == "kgen" and _PADDING.search(layer.name)]


def num_attentions(layers: Sequence[Layer]) -> int:
    """Kernels that are a whole attention."""
    return sum(bool(_ATTENTION.search(layer.name)) for layer in layers)


def _kernel_bytes(layer: Layer, step: Step) -> float:
    """A cache that is changed where it lies counts with the rows that are new."""
    written = _written(layer)
    kept = {tensor.name for tensor in layer.outputs} - {tensor.name for tensor in written}
    kept |= {_past(name) for name in kept}
    touched = {tensor.name: tensor for tensor in (*layer.inputs, *layer.constants, *written)}
    new = [tensor for tensor in layer.outputs if tensor.name in kept]
    return sum(tensor_bytes(tensor, step) for name, tensor in touched.items() if name not in kept) + sum(
        tensor_bytes(tensor, step) * step.tokens / step.capacity for tensor in new
    )


def _written(layer: Layer) -> list[LayerTensor]:
    """Its outputs but for caches that are among its inputs, by either of their names: they stay where they are."""
    read = {(tensor.name, tensor.shape) for tensor in layer.inputs}
    return [
        tensor
        for tensor in layer.outputs
        if not _CACHE.match(tensor.name) or not {(tensor.name, tensor.shape), (_past(tensor.name), tensor.shape)} & read
    ]


def _past(name: str) -> str:
    return name.replace("present.", "past_key_values.")


def _in_words(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _sum(tensors: Sequence[LayerTensor], step: Step) -> float:
    return sum(tensor_bytes(tensor, step) for tensor in tensors)
