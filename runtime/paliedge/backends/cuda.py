"""The little of CUDA that a session needs: memory, one stream, events, graphs. The only module that imports it.

Every resource is a context manager that frees itself, and every call is checked. Addresses are plain
integers. Knows neither TensorRT nor models.
"""

# Tests: tests/backends/trt/test_memory.py.
from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from paliedge.errors import DeviceError, MissingExtraError, ResourceError

try:
    from cuda.bindings import runtime as cudart
except (ImportError, OSError) as error:
    raise MissingExtraError(
        expected="the Python bindings of CUDA",
        found="no package cuda-bindings",
        action='Run `pip install "paliedge[tensorrt]"`.',
    ) from error

ALIGNMENT = 256
"""Bytes; TensorRT wants every tensor's address at a multiple of it."""
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class GpuInfo:
    """The GPU at hand; memory in bytes. An integrated one shares the host's memory."""

    name: str
    compute_capability: str
    integrated: bool
    free_memory: int
    total_memory: int

    def __str__(self) -> str:
        kind = "integrated, " if self.integrated else ""
        sizes = f"{self.free_memory / 1e9:.1f} of {self.total_memory / 1e9:.1f} GB free"
        return f"{self.name}, {kind}compute capability {self.compute_capability}, {sizes}"


def gpu_info() -> GpuInfo:
    """Describe the first GPU.

    Raises:
        DeviceError: there is none, or no driver that this CUDA can use.
    """
    try:
        count = _call(cudart.cudaGetDeviceCount)
    except DeviceError as error:
        driver, runtime = cuda_versions()
        raise _no_gpu(f"{error.found} (driver for CUDA {driver}, bindings for {runtime})") from error
    if not count:
        raise _no_gpu("none")
    kinds = cudart.cudaDeviceAttr
    major, minor, integrated = (
        _call(cudart.cudaDeviceGetAttribute, kind, 0)
        for kind in (
            kinds.cudaDevAttrComputeCapabilityMajor,
            kinds.cudaDevAttrComputeCapabilityMinor,
            kinds.cudaDevAttrIntegrated,
        )
    )
    name = _call(cudart.cudaGetDeviceProperties, 0).name.split(b"\0")[0].decode(errors="replace")
    free, total = _call(cudart.cudaMemGetInfo)
    return GpuInfo(name, f"{major}.{minor}", bool(integrated), free, total)


def cuda_versions() -> tuple[str, str]:
    """Of the driver, "none" without one, and of these bindings' runtime: the driver's must not be older."""
    return tuple(  # type: ignore[return-value]  # there are two
        f"{number // 1000}.{number % 1000 // 10}" if number else "none"
        for number in (_call(cudart.cudaDriverGetVersion), _call(cudart.cudaRuntimeGetVersion))
    )


def align(num_bytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


_ResourceT = TypeVar("_ResourceT", bound="_Resource")


class _Resource:
    """Something that CUDA gave and wants back, once."""

    def __init__(self, handle: Any, free: Callable[[Any], Any]) -> None:
        self.handle = handle
        self._free: Callable[[Any], Any] | None = free

    def __enter__(self: _ResourceT) -> _ResourceT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._free is not None:
            free, self._free = self._free, None
            _call(free, self.handle)

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """For what a constructor does once it has the resource."""
        try:
            yield
        except BaseException:
            self.close()
            raise


class DeviceBuffer(_Resource):
    """Memory of the GPU, zeroed."""

    def __init__(self, num_bytes: int, stream: Stream) -> None:
        self.num_bytes = align(max(1, num_bytes))
        self.address = int(_call(cudart.cudaMalloc, self.num_bytes))
        super().__init__(self.address, cudart.cudaFree)
        with self._closed_on_error():
            _call(cudart.cudaMemsetAsync, self.address, 0, self.num_bytes, stream.handle)


class PinnedBuffer(_Resource):
    """Page-locked memory of the host, zeroed; the GPU reaches it at `device_address`.

    Attributes:
        content: its bytes [num_bytes] uint8.
        device_address: on an integrated GPU the same memory, so that nothing needs copying.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = align(max(1, num_bytes))
        self.address = int(_call(cudart.cudaHostAlloc, self.num_bytes, cudart.cudaHostAllocMapped))
        super().__init__(self.address, cudart.cudaFreeHost)
        with self._closed_on_error():
            self.device_address = int(_call(cudart.cudaHostGetDevicePointer, self.address, 0))
        memory = (ctypes.c_uint8 * self.num_bytes).from_address(self.address)
        self.content: Bytes = np.ctypeslib.as_array(memory)
        self.content[:] = 0


class Stream(_Resource):
    """A stream beside the default one; copies and launches on it happen in their order."""

    def __init__(self) -> None:
        super().__init__(
            _call(cudart.cudaStreamCreateWithFlags, cudart.cudaStreamNonBlocking), cudart.cudaStreamDestroy
        )

    def synchronize(self) -> None:
        """Wait for all that was put on the stream."""
        _call(cudart.cudaStreamSynchronize, self.handle)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Copy between any two addresses, host's (pinned) or GPU's; returns at once."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDefault
        _call(cudart.cudaMemcpyAsync, target, source, num_bytes, kind, self.handle)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, num_rows: int
    ) -> None:
        """Copy `num_rows` pieces of `width` bytes that lie a pitch apart."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDefault
        _call(cudart.cudaMemcpy2DAsync, target, target_pitch, source, source_pitch, width, num_rows, kind, self.handle)

    @contextmanager
    def capture(self) -> Iterator[list[CudaGraph]]:
        """What is put on the stream inside goes into a graph instead, the one item of the list afterwards."""
        graphs: list[CudaGraph] = []
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call(cudart.cudaStreamBeginCapture, self.handle, mode)
        try:
            yield graphs
        except BaseException:
            error, graph = cudart.cudaStreamEndCapture(self.handle)  # the stream is usable again, whatever it says
            if error == cudart.cudaError_t.cudaSuccess:
                cudart.cudaGraphDestroy(graph)
            raise
        graphs.append(CudaGraph(_call(cudart.cudaStreamEndCapture, self.handle)))


class CudaGraph(_Resource):
    """A captured piece of work; its shapes and addresses are those of the capture for ever."""

    def __init__(self, captured: Any) -> None:
        try:
            super().__init__(_call(cudart.cudaGraphInstantiate, captured, 0), cudart.cudaGraphExecDestroy)
        finally:
            _call(cudart.cudaGraphDestroy, captured)

    def launch(self, stream: Stream) -> None:
        _call(cudart.cudaGraphLaunch, self.handle, stream.handle)


class Event(_Resource):
    """A moment on a stream."""

    def __init__(self) -> None:
        super().__init__(_call(cudart.cudaEventCreate), cudart.cudaEventDestroy)

    def record(self, stream: Stream) -> None:
        _call(cudart.cudaEventRecord, self.handle, stream.handle)

    def elapsed_ms(self, since: Event) -> float:
        """Milliseconds between two moments that are both past."""
        return float(_call(cudart.cudaEventElapsedTime, since.handle, self.handle))


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call CUDA; returns what stands behind the error code: nothing, a value or a tuple.

    Raises:
        ResourceError: there is no memory left.
        DeviceError: the call failed.
    """
    error, *values = function(*arguments)
    if error != cudart.cudaError_t.cudaSuccess:
        text = cudart.cudaGetErrorString(error)[1]
        found = f"{getattr(error, 'name', error)}: {text.decode() if isinstance(text, bytes) else text}"
        if error == cudart.cudaError_t.cudaErrorMemoryAllocation:
            raise out_of_memory(found)
        raise DeviceError(
            expected=f"success of {function.__name__}",
            found=found,
            action="Run `paliedge doctor`, and start a new process: a GPU that has failed once needs one.",
        )
    return values[0] if len(values) == 1 else tuple(values)


def out_of_memory(found: str) -> ResourceError:
    """What to say where the GPU has no memory left."""
    return ResourceError(
        expected="enough memory of the GPU for engines, cache and activations",
        found=found,
        action="Close other programs, use --sequential to keep one engine at a time, or see `paliedge plan`.",
    )


def _no_gpu(found: str) -> DeviceError:
    return DeviceError(
        expected="an NVIDIA GPU with its driver",
        found=found,
        action="Run `paliedge doctor`, or use `--backend cpu`.",
    )
