"""The loaded engines of a TensorRT session, each with the buffers that are its own."""

# Tests: tests/backends/trt/test_session.py.
from __future__ import annotations

from contextlib import ExitStack
from math import prod

import numpy as np

from paliedge.backends.cuda import DeviceBuffer, PinnedBuffer, Stream
from paliedge.backends.session import FloatArray, IntArray, present_name
from paliedge.backends.trt.buffers import CacheLayout, Small, SmallTensors, TrtCache
from paliedge.backends.trt.engine import LoadedEngine
from paliedge.bundle.manifest import CODES_PER_MASK, MASK_SIZE, Target
from paliedge.errors import EngineMismatchError

DECODE, PREFILL = 0, 1
"""The decoder's profiles, in the order that they are built."""


class LoadedVision:
    """The vision encoder's engine and buffers."""

    def __init__(
        self,
        engine: LoadedEngine,
        pixels_shape: tuple[int, ...],
        features_shape: tuple[int, int],
        stream: Stream,
        *,
        integrated: bool,
    ) -> None:
        with ExitStack() as owner:
            owner.callback(engine.close)
            num_bytes = 4 * prod(pixels_shape)
            self.pixels = owner.enter_context(PinnedBuffer(num_bytes))
            self._on_device = None if integrated else owner.enter_context(DeviceBuffer(num_bytes, stream))
            self.features = owner.enter_context(DeviceBuffer(4 * prod(features_shape), stream))
            self._context = engine.new_context(0, stream)
            owner.callback(self._context.close)
            self._context.set_shapes({"pixel_values": pixels_shape})
            self._context.take_memory(owner.enter_context(DeviceBuffer(self._context.lay_out(), stream)))
            source = self._on_device.address if self._on_device else self.pixels.device_address
            self._context.bind({"pixel_values": source, "image_features": self.features.address})
            self._owner = owner.pop_all()

    def enqueue(self, stream: Stream) -> None:
        if self._on_device:
            stream.copy(self._on_device.address, self.pixels.address, self.pixels.num_bytes)
        self._context.enqueue(stream)

    def close(self) -> None:
        self._owner.close()


class LoadedMasks:
    """The mask decoder's engine and buffers; one mask at a time."""

    def __init__(self, engine: LoadedEngine, stream: Stream, *, integrated: bool) -> None:
        codes = Small("mask_codes", np.int64, (1, CODES_PER_MASK))
        masks = Small("masks", np.float32, (1, MASK_SIZE, MASK_SIZE))
        with ExitStack() as owner:
            owner.callback(engine.close)
            self._small = SmallTensors((codes,), (masks,), integrated=integrated, stream=stream, owner=owner)
            self._context = engine.new_context(0, stream)
            owner.callback(self._context.close)
            self._context.set_shapes({codes.name: codes.shape})
            self._context.take_memory(owner.enter_context(DeviceBuffer(self._context.lay_out(), stream)))
            self._context.bind(self._small.addresses)
            self._owner = owner.pop_all()

    def decode(self, codes: IntArray, stream: Stream) -> FloatArray:
        """codes [16] -> a mask [64, 64]."""
        self._small.arrays["mask_codes"][0] = codes
        self._small.upload(stream)
        self._context.enqueue(stream)
        self._small.download(stream)
        stream.synchronize()
        mask: FloatArray = self._small.arrays["masks"][0].copy()
        return mask

    def close(self) -> None:
        self._owner.close()


class LoadedDecoder:
    """The decoder's engine and the buffers that all caches share."""

    def __init__(
        self,
        engine: LoadedEngine,
        target: Target,
        layout: CacheLayout,
        max_prefix: int,
        hidden_size: int,
        stream: Stream,
    ) -> None:
        self._engine = engine
        self._layout = layout
        self._hidden_size = hidden_size
        self._in_place = target.cache_update == "in_place"
        with ExitStack() as owner:
            owner.callback(engine.close)
            self._check_aliases()
            size = max(self._lay_out(DECODE, 1, stream), self._lay_out(PREFILL, max_prefix, stream))
            self._scratch = owner.enter_context(DeviceBuffer(size, stream))
            self.prefix = owner.enter_context(DeviceBuffer(4 * max_prefix * hidden_size, stream))
            self.pinned_prefix = owner.enter_context(PinnedBuffer(4 * max_prefix * hidden_size))
            self._positions = owner.enter_context(DeviceBuffer(8 * max_prefix, stream))
            self._put_positions(max_prefix, stream)
            rows = 0 if self._in_place else layout.num_bytes(max_prefix)
            self._rows = owner.enter_context(DeviceBuffer(rows, stream))
            self._hidden_row = owner.enter_context(DeviceBuffer(layout.padded_heads * layout.row_bytes, stream))
            self._owner = owner.pop_all()

    def close(self) -> None:
        self._owner.close()

    def run_prefill(self, cache: TrtCache, length: int, stream: Stream) -> None:
        """Put prefill of `length` tokens on the stream; the rows of the cache are theirs then."""
        context = cache.contexts[PREFILL]
        context.set_shapes(self._shapes(PREFILL, length))
        context.take_memory(self._scratch)
        context.bind(self._outputs(cache, length))
        context.enqueue(stream)
        self.store_rows(cache, 0, length, stream)

    def bind(self, cache: TrtCache, stream: Stream) -> None:
        """Give a cache its two contexts, once."""
        if cache.contexts:
            return
        layout, small = self._layout, cache.small.addresses
        own = layout.addresses(cache.memory.address, layout.capacity)
        decode = self._engine.new_context(DECODE, stream)
        decode.set_shapes(self._shapes(DECODE, 1))
        decode.take_memory(self._scratch)
        decode.bind(small | own | self._outputs(cache, 1))
        prefill = self._engine.new_context(PREFILL, stream)
        past = own if self._in_place else dict.fromkeys(own, self._hidden_row.address)
        prefill.bind(small | {"inputs_embeds": self.prefix.address, "position_ids": self._positions.address} | past)
        cache.contexts = {DECODE: decode, PREFILL: prefill}

    def store_rows(self, cache: TrtCache, first: int, count: int, stream: Stream) -> None:
        """Copy the `count` new rows of every layer behind the `first` ones; nothing where the graph did it."""
        if self._in_place:
            return
        width = self._layout.row_bytes
        target, pitch = cache.memory.address + first * width, self._layout.capacity * width
        stream.copy_rows(target, pitch, self._rows.address, count * width, count * width, self._layout.num_strips)

    def _lay_out(self, profile: int, length: int, stream: Stream) -> int:
        """Bytes of activations of a step on `length` tokens."""
        context = self._engine.new_context(profile, stream)
        try:
            context.set_shapes(self._shapes(profile, length))
            return context.lay_out()
        finally:
            context.close()

    def _shapes(self, profile: int, length: int) -> dict[str, tuple[int, ...]]:
        """Of all inputs of a step on `length` tokens."""
        layout = self._layout
        past = layout.shape(layout.capacity if profile == DECODE or self._in_place else 1)
        return {
            "inputs_embeds": (1, length, self._hidden_size),
            "position_ids": (1, length),
            "prefix_length": (1,),
            "allowed_ids": (1, 2),
            **dict.fromkeys(layout.names, past),
        }

    def _outputs(self, cache: TrtCache, length: int) -> dict[str, int]:
        """Where the cache outputs of a step on `length` tokens lie: in the cache, or where rows wait to be copied."""
        layout = self._layout
        if self._in_place:
            addresses = layout.addresses(cache.memory.address, layout.capacity)
        else:
            addresses = layout.addresses(self._rows.address, length)
        return {present_name(name): address for name, address in addresses.items()}

    def _check_aliases(self) -> None:
        """The engine's idea of what lies in one place must be ours."""
        wanted = {present_name(name): name for name in self._layout.names} if self._in_place else {}
        found = self._engine.aliases
        if found is not None and found != wanted:
            raise EngineMismatchError(
                expected=f"an engine that updates {len(wanted)} cache tensors in place",
                found=f"one that updates {len(found)}",
                action="Build it again: `paliedge build BUNDLE --force`.",
            )

    def _put_positions(self, count: int, stream: Stream) -> None:
        """1, 2, ... [count] int64: prefill reads as many of them as it has tokens."""
        with PinnedBuffer(8 * count) as host:
            host.content[: 8 * count].view(np.int64)[:] = np.arange(1, count + 1)
            stream.copy(self._positions.address, host.address, 8 * count)
            stream.synchronize()
