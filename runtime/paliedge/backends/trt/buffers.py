"""The memory that a TensorRT session's steps work on: small tensors, and a KV cache as one block."""

# Tests: tests/backends/trt/test_memory.py.
from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from paliedge.backends.cuda import CudaGraph, DeviceBuffer, PinnedBuffer, Stream, align
from paliedge.backends.trt.engine import Context
from paliedge.bundle.manifest import ITEMSIZE, Target


class Small(NamedTuple):
    """A small tensor that every step has."""

    name: str
    dtype: npt.DTypeLike
    shape: tuple[int, ...]


class SmallTensors:
    """A step's small inputs and outputs in one pinned block: one copy there, one back.

    On an integrated GPU there is nothing to copy: the engine reads and writes the host's memory.
    """

    def __init__(
        self, inputs: Sequence[Small], outputs: Sequence[Small], *, integrated: bool, stream: Stream, owner: ExitStack
    ) -> None:
        offset, offsets = 0, {}
        for tensor in (*inputs, *outputs):
            offsets[tensor.name] = offset
            offset += align(np.dtype(tensor.dtype).itemsize * prod(tensor.shape))
        self._split = offsets[outputs[0].name]
        self._host = owner.enter_context(PinnedBuffer(offset))
        device = None if integrated else owner.enter_context(DeviceBuffer(offset, stream))
        self._device = device
        base = device.address if device else self._host.device_address
        self.addresses = {name: base + start for name, start in offsets.items()}
        self.arrays: dict[str, npt.NDArray[Any]] = {
            tensor.name: np.ndarray(tensor.shape, tensor.dtype, self._host.content.data, offsets[tensor.name])
            for tensor in (*inputs, *outputs)
        }

    def upload(self, stream: Stream) -> None:
        if self._device:
            stream.copy(self._device.address, self._host.address, self._split)

    def download(self, stream: Stream) -> None:
        if self._device:
            end = self._host.num_bytes - self._split
            stream.copy(self._host.address + self._split, self._device.address + self._split, end)


class CacheLayout:
    """All layers' keys and values in one block [tensors, heads, rows, head_dim].

    `heads` are the KV heads, or as many as make every tensor's address a multiple of the alignment.
    So rows lie at one pitch through the whole block, and one two-dimensional copy stores a step's.
    """

    def __init__(self, target: Target, capacity: int) -> None:
        caches = [tensor for tensor in target.decoder.inputs if tensor.name.startswith("past_key_values.")]
        _, heads, _, dim = caches[0].shape
        assert isinstance(heads, int)
        assert isinstance(dim, int)
        self.names = [tensor.name for tensor in caches]
        self.capacity = capacity
        self.row_bytes = dim * ITEMSIZE[caches[0].dtype]
        self.padded_heads = heads
        while self.padded_heads * self.row_bytes != align(self.padded_heads * self.row_bytes):
            self.padded_heads += 1
        self._heads, self._dim = heads, dim

    @property
    def num_strips(self) -> int:
        """Runs of rows: one a tensor and padded head."""
        return len(self.names) * self.padded_heads

    def num_bytes(self, rows: int) -> int:
        return self.num_strips * rows * self.row_bytes

    def shape(self, rows: int) -> tuple[int, int, int, int]:
        return (1, self._heads, rows, self._dim)

    def addresses(self, base: int, rows: int) -> dict[str, int]:
        """Where each cache tensor of `rows` rows lies in a block at `base`."""
        stride = self.padded_heads * rows * self.row_bytes
        return {name: base + index * stride for index, name in enumerate(self.names)}


class TrtCache:
    """A KV cache on the GPU with the contexts and the graph that work on it."""

    def __init__(self, layout: CacheLayout, small: SmallTensors, memory: DeviceBuffer) -> None:
        self.length = 0
        self.layout = layout
        self.small = small
        self.memory = memory
        self.contexts: dict[int, Context] = {}
        self.warm = False
        self.graph: CudaGraph | None = None

    def unbind(self) -> None:
        """Forget the engine that it was bound to; what is in it stays."""
        if self.graph:
            self.graph.close()
        for context in self.contexts.values():
            context.close()
        self.contexts, self.graph, self.warm = {}, None, False
