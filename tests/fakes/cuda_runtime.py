"""The CUDA runtime without a GPU: a module like cuda.bindings.runtime that keeps CUDA's rules.

A stream only collects work, which is done when somebody waits for it: what is read too early is old.
What real CUDA answers with an error gets that error. What it answers with wrong results or a crash
raises a Violation.
"""

from __future__ import annotations

import functools
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.fakes.cuda_types import (
    CONSTANTS,
    ENUMS,
    OK,
    EventHandle,
    GraphExecHandle,
    GraphHandle,
    Handle,
    HandleT,
    Operation,
    StreamHandle,
    cudaDeviceAttr,
    cudaError_t,
    cudaMemcpyKind,
    cudaStreamCaptureMode,
)
from tests.fakes.memory import Kind, Memory, Rules

ALLOCATING = ("cudaMalloc", "cudaHostAlloc")
FREEING = ("cudaFree", "cudaFreeHost", *(f"cuda{kind}Destroy" for kind in ("Stream", "Event", "Graph", "GraphExec")))
_NOT_IN_A_CAPTURE = {*ALLOCATING, "cudaFree", "cudaFreeHost", "cudaStreamSynchronize", "cudaEventSynchronize"}


class FakeCuda:
    """A GPU, its driver and the process that uses them.

    Args:
        integrated: the host's pinned memory has the same address on the GPU.
        compute_capability: such as "8.7".
        memory: bytes that the GPU has.
        absent: what every call returns where there is no GPU or no driver.
        eager: do work at once, as a fast GPU may, and not as late as possible.

    Attributes:
        calls: how often each function was called.
        live, peak: things that are held, and the most that ever were, by kind.
        captured: how many operations each captured graph has.
        reserved: bytes of the GPU that TensorRT holds by itself.
    """

    def __init__(
        self,
        *,
        integrated: bool = False,
        compute_capability: str = "8.7",
        memory: int = 8 << 30,
        absent: cudaError_t = OK,
        eager: bool = False,
    ) -> None:
        self.integrated = integrated
        self.compute_capability = compute_capability
        self.total_memory = memory
        self.absent = absent
        self.eager = eager
        self.rules = Rules()
        self.memory = Memory(self.rules, integrated=integrated)
        self.lock = threading.RLock()
        self.calls: Counter[str] = Counter()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.reserved = 0
        self.captured: list[int] = []
        self._handles: dict[int, Handle] = {}
        self._next_handle = 0x5000
        self._fault: tuple[int, cudaError_t, Sequence[str]] | None = None
        self._was_faulty = False

    def module(self) -> ModuleType:
        """To stand in sys.modules as `cuda.bindings.runtime`."""
        made = ModuleType("cuda.bindings.runtime")
        functions = {name: self._guard(getattr(self, name)) for name in dir(self) if name.startswith("cuda")}
        vars(made).update(functions | CONSTANTS | {kind.__name__: kind for kind in ENUMS})
        return made

    def fail(self, number: int, error: cudaError_t, names: Sequence[str] = ()) -> None:
        """Let the `number`-th call from now on, of those names or of any that frees nothing, return an error."""
        self._fault = (number, error, names)

    def forget_fault(self) -> bool:
        """Whether there was one to come."""
        was_to_come, self._fault = self._fault is not None, None
        return was_to_come

    def born(self, kind: str) -> None:
        self.live[kind] += 1
        self.peak[kind] = max(self.peak[kind], self.live[kind])

    def gone(self, kind: str) -> None:
        self.live[kind] -= 1

    def ledger(self) -> dict[str, int]:
        """What is held, by kind."""
        return {kind: count for kind, count in self.live.items() if count}

    def assert_all_released(self) -> None:
        """Nothing is held, and no rule was broken on the way."""
        if self.ledger():
            gc.collect()
        self.memory.check()
        assert not self.rules.violations, self.rules.violations
        assert not self.ledger(), f"still held: {self.ledger()}"
        assert not self.reserved

    @property
    def free_memory(self) -> int:
        return self.total_memory - self.reserved - sum(allocation.num_bytes for allocation in self.memory.live)

    def enqueue(self, stream: StreamHandle, operation: Operation) -> None:
        if stream.captured is not None:
            stream.captured.append(operation)
            return
        start, size = operation.scratch
        for other in self._handles.values():
            for pending in other.queue if isinstance(other, StreamHandle) and other is not stream else ():
                if pending.scratch[0] < start + size and start < sum(pending.scratch):
                    raise self.rules.broken("two streams work in the same scratch memory at once")
        stream.queue.append(operation)
        if self.eager:
            self._drain(stream)

    def stream(self, number: int) -> StreamHandle:
        """The stream with this number."""
        found = self._handles.get(number)
        if not isinstance(found, StreamHandle):
            raise self.rules.broken(f"{number:#x} is no stream")
        return found

    def cudaGetErrorString(self, error: int) -> tuple[Any, ...]:
        return OK, cudaError_t(error).name.encode()

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return OK, 1

    def cudaDeviceGetAttribute(self, attribute: cudaDeviceAttr, device: int) -> tuple[Any, ...]:
        major, minor = self.compute_capability.split(".")
        values = {
            cudaDeviceAttr.cudaDevAttrIntegrated: int(self.integrated),
            cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor: int(major),
            cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor: int(minor),
        }
        return OK, values[attribute]

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        return OK, SimpleNamespace(name=b"Orin\0\0\0")

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, 12060 if self.absent == OK else 0

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return OK, 12090

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return OK, self.free_memory, self.total_memory

    def cudaMalloc(self, num_bytes: int) -> tuple[Any, ...]:
        return self._allocate("device", num_bytes)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self._drain_all()  # as real cudaFree does
        self.memory.free("device", address)
        self.gone("device")
        return (OK,)

    def cudaHostAlloc(self, num_bytes: int, flags: int) -> tuple[Any, ...]:
        if flags != CONSTANTS["cudaHostAllocMapped"]:
            raise self.rules.broken("pinned memory that is not mapped has no device pointer")
        return self._allocate("pinned", num_bytes)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        if self._was_faulty:  # real cudaFreeHost waits too, which no document promises: good for a clean-up only
            self._drain_all()
        self.memory.free("pinned", address)
        self.gone("pinned")
        return (OK,)

    def cudaHostGetDevicePointer(self, address: int, flags: int) -> tuple[Any, ...]:
        return OK, self.memory.find("pinned", address).device_address

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        made = self._register(StreamHandle, "stream")
        made.queue = []
        return OK, made

    def cudaStreamDestroy(self, stream: StreamHandle) -> tuple[Any, ...]:
        self._drain(stream)
        return self._unregister(stream, StreamHandle, "stream")

    def cudaStreamSynchronize(self, stream: StreamHandle) -> tuple[Any, ...]:
        self._check(stream, StreamHandle)
        self._drain(stream)
        return (OK,)

    def cudaMemsetAsync(self, address: int, value: int, num_bytes: int, stream: StreamHandle) -> tuple[Any, ...]:
        self.memory.view(address, num_bytes, "copy")

        def run() -> None:
            self.memory.view(address, num_bytes, "copy")[:] = value

        return self._put(stream, run)

    def cudaMemcpyAsync(
        self, target: int, source: int, num_bytes: int, kind: cudaMemcpyKind, stream: StreamHandle
    ) -> tuple[Any, ...]:
        return self.cudaMemcpy2DAsync(target, num_bytes, source, num_bytes, num_bytes, 1, kind, stream)

    def cudaMemcpy2DAsync(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
        kind: cudaMemcpyKind,
        stream: StreamHandle,
    ) -> tuple[Any, ...]:
        if kind != cudaMemcpyKind.cudaMemcpyDefault:
            return (cudaError_t.cudaErrorInvalidValue,)
        if width > min(target_pitch, source_pitch):
            return (cudaError_t.cudaErrorInvalidPitchValue,)

        def rows(address: int, pitch: int) -> Any:
            view = self.memory.view(address, (height - 1) * pitch + width, "copy")
            return np.lib.stride_tricks.as_strided(view, (height, width), (pitch, 1))

        def run() -> None:
            rows(target, target_pitch)[:] = rows(source, source_pitch)

        if np.may_share_memory(rows(target, target_pitch), rows(source, source_pitch)):
            raise self.rules.broken("a copy onto itself")
        return self._put(stream, run)

    def cudaEventCreate(self) -> tuple[Any, ...]:
        return OK, self._register(EventHandle, "event")

    def cudaEventDestroy(self, event: EventHandle) -> tuple[Any, ...]:
        return self._unregister(event, EventHandle, "event")

    def cudaEventRecord(self, event: EventHandle, stream: StreamHandle) -> tuple[Any, ...]:
        self._check(event, EventHandle)
        if stream.captured is not None:
            raise self.rules.broken("an event inside a graph has no time")
        event.stream, event.happened = stream, None

        def run() -> None:
            event.happened = time.perf_counter()

        return self._put(stream, run)

    def cudaEventSynchronize(self, event: EventHandle) -> tuple[Any, ...]:
        self._check(event, EventHandle)
        if event.stream is not None:
            self._drain(event.stream)
        return (OK,)

    def cudaEventElapsedTime(self, start: EventHandle, end: EventHandle) -> tuple[Any, ...]:
        for event in (start, end):
            self._check(event, EventHandle)
            if event.stream is None:
                return cudaError_t.cudaErrorInvalidResourceHandle, None
        if start.happened is None or end.happened is None:
            return cudaError_t.cudaErrorNotReady, None
        return OK, (end.happened - start.happened) * 1000

    def cudaStreamBeginCapture(self, stream: StreamHandle, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
        self._check(stream, StreamHandle)
        if stream.captured is not None:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        stream.captured, stream.capture_is_broken, stream.capturing_thread = [], False, threading.get_ident()
        return (OK,)

    def cudaStreamEndCapture(self, stream: StreamHandle) -> tuple[Any, ...]:
        self._check(stream, StreamHandle)
        if stream.captured is None:
            return cudaError_t.cudaErrorInvalidValue, None
        operations, stream.captured, stream.capturing_thread = stream.captured, None, None
        if stream.capture_is_broken:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        self.captured.append(len(operations))
        graph = self._register(GraphHandle, "graph")
        graph.operations = operations
        return OK, graph

    def cudaGraphInstantiate(self, graph: GraphHandle, flags: int) -> tuple[Any, ...]:
        self._check(graph, GraphHandle)
        made = self._register(GraphExecHandle, "graph exec")
        made.operations = graph.operations
        return OK, made

    def cudaGraphDestroy(self, graph: GraphHandle) -> tuple[Any, ...]:
        return self._unregister(graph, GraphHandle, "graph")

    def cudaGraphExecDestroy(self, graph: GraphExecHandle) -> tuple[Any, ...]:
        return self._unregister(graph, GraphExecHandle, "graph exec")

    def cudaGraphLaunch(self, graph: GraphExecHandle, stream: StreamHandle) -> tuple[Any, ...]:
        self._check(graph, GraphExecHandle)
        self._check(stream, StreamHandle)
        for operation in graph.operations:
            self.enqueue(stream, operation)
        return (OK,)

    def _guard(self, function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        """One call at a time, counted, with what may be wrong about any call."""
        name = function.__name__

        @functools.wraps(function)
        def call(*arguments: Any) -> tuple[Any, ...]:
            with self.lock:
                self.calls[name] += 1
                if name == "cudaGetErrorString" or (error := self._obstacle(name)) == OK:
                    return function(*arguments)
                if name == "cudaStreamEndCapture":  # it ends the capture in any case
                    arguments[0].capture_is_broken = True
                    function(*arguments)
                return error, None

        return call

    def _obstacle(self, name: str) -> cudaError_t:
        if self.absent != OK and name not in ("cudaDriverGetVersion", "cudaRuntimeGetVersion"):
            return self.absent
        if self._fault and (name in self._fault[2] if self._fault[2] else name not in FREEING):
            number, error, names = self._fault
            self._fault = (number - 1, error, names) if number > 1 else None
            if number == 1:
                self._was_faulty = True
                return error
        for stream in self._handles.values() if name in _NOT_IN_A_CAPTURE else ():
            if isinstance(stream, StreamHandle) and stream.capturing_thread == threading.get_ident():
                stream.capture_is_broken = True
                self.rules.violations.append(f"{name} during a capture")
                return cudaError_t.cudaErrorStreamCaptureUnsupported
        return OK

    def _allocate(self, kind: Kind, num_bytes: int) -> tuple[Any, ...]:
        if num_bytes > self.free_memory:
            return cudaError_t.cudaErrorMemoryAllocation, None
        self.born(kind)
        return OK, self.memory.allocate(kind, num_bytes).address

    def _put(self, stream: StreamHandle, run: Callable[[], None]) -> tuple[Any, ...]:
        self._check(stream, StreamHandle)
        self.enqueue(stream, Operation(run))
        return (OK,)

    def _drain(self, stream: StreamHandle) -> None:
        while stream.queue:
            stream.queue.pop(0).run()

    def _drain_all(self) -> None:
        for handle in self._handles.values():
            if isinstance(handle, StreamHandle):
                self._drain(handle)

    def _register(self, kind: type[HandleT], name: str) -> HandleT:
        self._next_handle += 0x10
        made = kind(self._next_handle)
        self._handles[int(made)] = made
        self.born(name)
        return made

    def _unregister(self, handle: Handle, kind: type[Handle], name: str) -> tuple[Any, ...]:
        self._check(handle, kind)
        del self._handles[int(handle)]
        self.gone(name)
        return (OK,)

    def _check(self, handle: Handle, kind: type[Handle]) -> None:
        if not isinstance(handle, kind) or self._handles.get(int(handle)) is not handle:
            raise self.rules.broken(f"{handle!r} is no live {kind.__name__}")
