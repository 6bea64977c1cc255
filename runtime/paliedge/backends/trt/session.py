"""The session on TensorRT: engines, buffers and one CUDA graph a cache.

Nothing is allocated after the first request of a kind, and buffers stay where they are. So a decode step
is one graph launch and one small read. Where the graph leaves it to us, a copy of new cache rows is added.
Knows neither text nor pictures.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paliedge.backends.cuda import DeviceBuffer, Event, PinnedBuffer, Stream, gpu_info
from paliedge.backends.session import FloatArray, GeneratedToken, IdRange, IntArray
from paliedge.backends.trt.buffers import CacheLayout, Small, SmallTensors, TrtCache
from paliedge.backends.trt.engine import LoadedEngine
from paliedge.backends.trt.flavours import TensorRt
from paliedge.backends.trt.parts import DECODE, LoadedDecoder, LoadedMasks, LoadedVision
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Engine
from paliedge.errors import ClosedError, DeviceError


class DeviceFeatures:
    """image_features [N, H] float32 on the GPU; an array by `np.asarray`. Its memory is reused once it is gone."""

    def __init__(self, buffer: DeviceBuffer, shape: tuple[int, int], session: TrtSession, device_ms: float) -> None:
        self.buffer = buffer
        self.shape = shape
        self.device_ms = device_ms
        self._session = session

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        features = self._session.read_features(self)
        return features if dtype is None else features.astype(dtype)

    def __del__(self) -> None:
        self._session.reuse(self.buffer)


class TrtSession:
    """Vision encoder and decoder of one engine. One request runs at a time; others wait.

    Args:
        bundle: its hashes are already checked.
        engine: one of the bundle's, built for `trt` and this GPU.
        trt: the TensorRT that built it.
        use_cuda_graph: replay each decode step as one graph.
        sequential: keep only one of the two large engines in memory, for boards that cannot hold both.

    Raises:
        DeviceError: no GPU, or it has too little memory.
        EngineMismatchError: TensorRT refuses a plan.
    """

    has_device_clock = True
    arithmetic: tuple[str, ...] = ()
    max_batch = 1
    """Engines are built for one request, as it comes from a camera; further ones wait."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        trt: TensorRt,
        *,
        use_cuda_graph: bool = True,
        sequential: bool = False,
    ) -> None:
        manifest = bundle.manifest
        limits, vision, text = manifest.limits, manifest.model.vision, manifest.model.text
        self._bundle = bundle
        self._engine = engine
        self._trt = trt
        self._use_cuda_graph = use_cuda_graph
        self._sequential = sequential
        self._integrated = gpu_info().integrated
        self._target = manifest.targets[engine.target]
        self.has_mask_decoder = engine.mask_decoder is not None
        self._features_shape = (vision.num_image_tokens, text.hidden_size)
        self._pixels_shape = (1, 3, vision.image_size, vision.image_size)
        self._max_prefix = limits.prefix
        self._layout = CacheLayout(self._target, limits.capacity)
        self._lock = threading.RLock()
        self._owner = ExitStack()
        self._closed = False
        self.graph_capture_s: float | None = None
        self._idle_features: list[DeviceBuffer] = []
        self._caches: list[TrtCache] = []
        self._vision: LoadedVision | None = None
        self._decoder: LoadedDecoder | None = None
        self._masks: LoadedMasks | None = None
        try:
            self._stream = self._owner.enter_context(Stream())
            self._start, self._end = (self._owner.enter_context(Event()) for _ in range(2))
            if not sequential:
                self._load_decoder()
            self._load_vision()  # what the first request needs
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        with suppress(Exception):  # a constructor that failed early, an interpreter that is going down
            self.close()

    def close(self) -> None:
        """Give everything back to the GPU."""
        with self._lock:
            self._closed = True
            self._unload_vision()
            self._unload_decoder()
            if self._masks is not None:
                self._masks.close()
                self._masks = None
            self._caches.clear()
            self._idle_features.clear()
            self._owner.close()

    def encode_image(self, pixel_values: FloatArray) -> DeviceFeatures:
        with self._working():
            vision = self._load_vision()
            vision.pixels.content[: pixel_values.nbytes].view(np.float32)[:] = pixel_values.reshape(-1)
            self._start.record(self._stream)
            vision.enqueue(self._stream)
            buffer = self._idle_features.pop() if self._idle_features else self._new_device(vision.features.num_bytes)
            self._stream.copy(buffer.address, vision.features.address, buffer.num_bytes)
            return DeviceFeatures(buffer, self._features_shape, self, self._finish())

    def new_cache(self, batch: int = 1) -> TrtCache:
        assert batch == 1
        with self._working():
            hidden_size = self._features_shape[1]
            inputs = (
                Small("inputs_embeds", np.float32, (1, 1, hidden_size)),
                Small("position_ids", np.int64, (1, 1)),
                Small("prefix_length", np.int64, (1,)),
                Small("allowed_ids", np.int64, (1, 2)),
            )
            outputs = (Small("next_token", np.int64, (1,)), Small("log_prob", np.float32, (1,)))
            small = SmallTensors(inputs, outputs, integrated=self._integrated, stream=self._stream, owner=self._owner)
            cache = TrtCache(self._layout, small, self._new_device(self._layout.num_bytes(self._layout.capacity)))
            self._caches.append(cache)
            return cache

    def prefill(
        self,
        cache: TrtCache,
        image_features: Sequence[DeviceFeatures],
        prompt_embeds: FloatArray,
        allowed: IdRange,
        row: int = 0,
    ) -> GeneratedToken:
        parts: list[DeviceFeatures | FloatArray] = [
            one if isinstance(one, DeviceFeatures) and one._session is self else np.asarray(one, np.float32)
            for one in image_features  # another session, which may be busy, copies what is its own
        ]
        parts.append(prompt_embeds)
        with self._working():
            decoder = self._load_decoder()
            decoder.bind(cache, self._stream)
            length = sum(part.shape[0] for part in parts)
            cache.length = length
            cache.small.arrays["prefix_length"][0] = length
            cache.small.arrays["allowed_ids"][0] = allowed
            self._start.record(self._stream)
            self._put_prefix(decoder, parts)
            cache.small.upload(self._stream)
            decoder.run_prefill(cache, length, self._stream)
            cache.small.download(self._stream)
            return self._read_step(cache)

    def decode(self, cache: TrtCache, inputs_embeds: FloatArray, allowed: Sequence[IdRange]) -> list[GeneratedToken]:
        with self._working():
            decoder = self._load_decoder()
            decoder.bind(cache, self._stream)
            cache.small.arrays["inputs_embeds"][0] = inputs_embeds
            cache.small.arrays["position_ids"][0, 0] = cache.length + 1
            self._launch_decode(cache, allowed)
            decoder.store_rows(cache, cache.length, 1, self._stream)
            cache.length += 1
            return [self._read_step(cache)]

    def repeat_decode(self, cache: TrtCache, allowed: Sequence[IdRange]) -> list[GeneratedToken]:
        with self._working():
            self._load_decoder().bind(cache, self._stream)
            self._launch_decode(cache, allowed)
            return [self._read_step(cache)]

    def move_row(self, cache: TrtCache, source: int, target: int) -> None:
        assert source == target == 0

    def decode_masks(self, codes: IntArray) -> FloatArray:
        with self._working():
            if self._masks is None:
                graph, plan = self._target.mask_decoder, self._engine.mask_decoder
                assert graph is not None
                assert plan is not None
                engine = LoadedEngine(self._trt, self._checked(plan.file), graph)
                self._masks = LoadedMasks(engine, self._stream, integrated=self._integrated)
            return np.stack([self._masks.decode(row, self._stream) for row in codes])

    def read_features(self, features: DeviceFeatures) -> FloatArray:
        """Copy image features to the host."""
        with self._working(), PinnedBuffer(4 * prod(features.shape)) as host:
            self._stream.copy(host.address, features.buffer.address, 4 * prod(features.shape))
            self._stream.synchronize()
            array: FloatArray = host.content[: 4 * prod(features.shape)].view(np.float32)
            copied: FloatArray = array.reshape(features.shape).copy()
            return copied

    def reuse(self, buffer: DeviceBuffer) -> None:
        """Take back the memory of image features that nobody holds any more."""
        self._idle_features.append(buffer)

    def _launch_decode(self, cache: TrtCache, allowed: Sequence[IdRange]) -> None:
        """A decode step on what lies in the cache's small tensors; its clock begins here."""
        cache.small.arrays["allowed_ids"][:] = allowed
        if self._use_cuda_graph and cache.warm and cache.graph is None:
            started = time.perf_counter()
            with self._stream.capture() as captured:
                self._enqueue_decode(cache)
            cache.graph = captured[0]
            self.graph_capture_s = time.perf_counter() - started
        self._start.record(self._stream)
        if cache.graph:
            cache.graph.launch(self._stream)
        else:  # the first step of a cache: TensorRT does lazy work that no graph must hold
            self._enqueue_decode(cache)
            cache.warm = True

    def _enqueue_decode(self, cache: TrtCache) -> None:
        cache.small.upload(self._stream)
        cache.contexts[DECODE].enqueue(self._stream)
        cache.small.download(self._stream)

    def _put_prefix(self, decoder: LoadedDecoder, parts: Sequence[DeviceFeatures | FloatArray]) -> None:
        """Images' features and prompt embeddings behind one another, where prefill reads them."""
        offset = 0
        for part in parts:
            num_bytes = 4 * prod(part.shape)
            if isinstance(part, DeviceFeatures):
                source = part.buffer.address
            else:
                host = decoder.pinned_prefix.content[offset : offset + num_bytes].view(np.float32)
                host[:] = part.reshape(-1)
                source = decoder.pinned_prefix.address + offset
            self._stream.copy(decoder.prefix.address + offset, source, num_bytes)
            offset += num_bytes

    def _read_step(self, cache: TrtCache) -> GeneratedToken:
        device_ms = self._finish()
        arrays = cache.small.arrays
        return GeneratedToken(int(arrays["next_token"][0]), float(arrays["log_prob"][0]), device_ms)

    def _finish(self) -> float:
        """Wait for the stream; returns the milliseconds since `_start`, as the GPU saw them."""
        self._end.record(self._stream)
        self._stream.synchronize()
        return self._end.elapsed_ms(self._start)

    def _let_work_end(self) -> None:
        """A request that failed half way left work on the stream; an engine must not go before it is done."""
        with suppress(DeviceError):
            self._stream.synchronize()

    def _new_device(self, num_bytes: int) -> DeviceBuffer:
        return self._owner.enter_context(DeviceBuffer(num_bytes, self._stream))

    def _checked(self, name: str) -> Path:
        """A plan's path, its file being what it was when it was last read and checked."""
        self._bundle.verify_hashes(trust_notes=True)
        return self._bundle.path(name)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """The session to oneself, while it is open."""
        with self._lock:
            if self._closed:
                raise ClosedError
            yield

    def _load_vision(self) -> LoadedVision:
        if self._vision is None:
            if self._sequential:
                self._unload_decoder()
            path = self._checked(self._engine.vision_encoder.file)
            engine = LoadedEngine(self._trt, path, self._target.vision_encoder)
            self._vision = LoadedVision(
                engine, self._pixels_shape, self._features_shape, self._stream, integrated=self._integrated
            )
        return self._vision

    def _unload_vision(self) -> None:
        if self._vision is not None:
            self._let_work_end()
            self._vision.close()
            self._vision = None

    def _load_decoder(self) -> LoadedDecoder:
        if self._decoder is None:
            if self._sequential:
                self._unload_vision()
            path = self._checked(self._engine.decoder.file)
            engine = LoadedEngine(self._trt, path, self._target.decoder)
            self._decoder = LoadedDecoder(
                engine, self._target, self._layout, self._max_prefix, self._features_shape[1], self._stream
            )
        return self._decoder

    def _unload_decoder(self) -> None:
        if self._decoder is not None:
            self._let_work_end()
            for cache in self._caches:
                cache.unbind()
            self._decoder.close()
            self._decoder = None
