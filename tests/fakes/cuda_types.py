"""Names and handles of the CUDA runtime's Python bindings, with the real numbers."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidPitchValue = 12
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyDefault = 4


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrIntegrated = 18
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


OK = cudaError_t.cudaSuccess
CONSTANTS = {"cudaHostAllocMapped": 2, "cudaStreamNonBlocking": 1}
ENUMS = (cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode, cudaDeviceAttr)


@dataclass(frozen=True)
class Operation:
    """Something that a stream does when its time comes; `scratch` is memory that it must have for itself."""

    run: Callable[[], None]
    scratch: tuple[int, int] = (0, 0)


class Handle:
    """What CUDA gives for a thing of its own; TensorRT takes its number."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number


class StreamHandle(Handle):
    queue: list[Operation]
    captured: list[Operation] | None = None
    capture_is_broken = False
    capturing_thread: int | None = None


class EventHandle(Handle):
    stream: StreamHandle | None = None
    happened: float | None = None


class GraphHandle(Handle):
    operations: list[Operation]


class GraphExecHandle(Handle):
    operations: list[Operation]


HandleT = TypeVar("HandleT", bound=Handle)
