"""The fake CUDA finds what real CUDA would punish; else a test through it would prove nothing."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes.cuda_runtime import ALLOCATING, FakeCuda
from tests.fakes.cuda_types import CONSTANTS, StreamHandle, cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
from tests.fakes.machine import fake_machine
from tests.fakes.memory import GARBAGE, Violation

pytestmark = pytest.mark.bare

DEFAULT = cudaMemcpyKind.cudaMemcpyDefault
THREAD_LOCAL = cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
OK = cudaError_t.cudaSuccess


@pytest.fixture
def gpu() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def cuda(gpu: FakeCuda) -> Any:
    return gpu.module()


@pytest.fixture
def stream(cuda: Any) -> StreamHandle:
    made: StreamHandle = cuda.cudaStreamCreateWithFlags(CONSTANTS["cudaStreamNonBlocking"])[1]
    return made


def pin(cuda: Any, num_bytes: int = 256) -> tuple[int, Any]:
    """Pinned memory: its address, and its bytes."""
    error, address = cuda.cudaHostAlloc(num_bytes, CONSTANTS["cudaHostAllocMapped"])
    assert error == OK
    return address, (ctypes.c_uint8 * num_bytes).from_address(address)


def test_new_memory_is_garbage_and_a_result_is_old_until_the_stream_is_waited_for(
    cuda: Any, stream: StreamHandle
) -> None:
    (device,), (host, content) = cuda.cudaMalloc(256)[1:], pin(cuda)
    assert set(content) == {GARBAGE}
    content[:] = [7] * 256
    cuda.cudaMemsetAsync(device, 3, 256, stream)
    cuda.cudaMemcpyAsync(host, device, 256, DEFAULT, stream)
    assert set(content) == {7}
    assert cuda.cudaStreamSynchronize(stream) == (OK,)
    assert set(content) == {3}


def test_rows_are_copied_with_their_pitches(cuda: Any, stream: StreamHandle) -> None:
    (source, rows), (target, content) = pin(cuda, 64), pin(cuda, 64)
    rows[:] = range(64)
    assert cuda.cudaMemcpy2DAsync(target, 8, source, 16, 9, 2, DEFAULT, stream) == (
        cudaError_t.cudaErrorInvalidPitchValue,
    )
    cuda.cudaMemcpy2DAsync(target + 4, 8, source, 16, 3, 4, DEFAULT, stream)
    cuda.cudaStreamSynchronize(stream)
    assert list(content[4:15]) == [0, 1, 2, *[GARBAGE] * 5, 16, 17, 18]


def beyond_the_end(cuda: Any, stream: StreamHandle) -> None:
    device = cuda.cudaMalloc(256)[1]
    cuda.cudaMemsetAsync(device + 1, 0, 256, stream)


def beyond_the_last_row(cuda: Any, stream: StreamHandle) -> None:
    target, source = (cuda.cudaMalloc(256)[1] for _ in range(2))
    cuda.cudaMemcpy2DAsync(target, 100, source, 64, 64, 3, DEFAULT, stream)


def from_memory_that_is_not_pinned(cuda: Any, stream: StreamHandle) -> None:
    pageable = np.zeros(256, np.uint8)
    cuda.cudaMemcpyAsync(cuda.cudaMalloc(256)[1], pageable.ctypes.data, 256, DEFAULT, stream)


def from_freed_memory(cuda: Any, stream: StreamHandle) -> None:
    source = cuda.cudaMalloc(256)[1]
    cuda.cudaFree(source)
    cuda.cudaMemcpyAsync(cuda.cudaMalloc(256)[1], source, 256, DEFAULT, stream)


def freeing_what_a_copy_waits_for(cuda: Any, stream: StreamHandle) -> None:
    source = pin(cuda)[0]
    cuda.cudaMemcpyAsync(cuda.cudaMalloc(256)[1], source, 256, DEFAULT, stream)
    cuda.cudaFreeHost(source)
    cuda.cudaStreamSynchronize(stream)


def freeing_twice(cuda: Any, stream: StreamHandle) -> None:
    device = cuda.cudaMalloc(256)[1]
    cuda.cudaFree(device)
    cuda.cudaFree(device)


def freeing_the_wrong_way(cuda: Any, stream: StreamHandle) -> None:
    cuda.cudaFree(pin(cuda)[0])


def copying_onto_itself(cuda: Any, stream: StreamHandle) -> None:
    device = cuda.cudaMalloc(256)[1]
    cuda.cudaMemcpyAsync(device, device + 1, 16, DEFAULT, stream)


def a_stream_that_is_gone(cuda: Any, stream: StreamHandle) -> None:
    cuda.cudaStreamDestroy(stream)
    cuda.cudaStreamSynchronize(stream)


def an_event_in_the_place_of_a_stream(cuda: Any, stream: StreamHandle) -> None:
    cuda.cudaStreamSynchronize(cuda.cudaEventCreate()[1])


def pinned_memory_that_no_kernel_reaches(cuda: Any, stream: StreamHandle) -> None:
    cuda.cudaHostAlloc(256, 0)


def writing_beside_pinned_memory(cuda: Any, stream: StreamHandle) -> None:
    address, _ = pin(cuda)
    ctypes.c_uint8.from_address(address + 256).value = 0
    cuda.cudaFreeHost(address)


MISTAKES = (
    beyond_the_end,
    beyond_the_last_row,
    from_memory_that_is_not_pinned,
    from_freed_memory,
    freeing_what_a_copy_waits_for,
    freeing_twice,
    freeing_the_wrong_way,
    copying_onto_itself,
    a_stream_that_is_gone,
    an_event_in_the_place_of_a_stream,
    pinned_memory_that_no_kernel_reaches,
    writing_beside_pinned_memory,
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_found(
    mistake: Callable[[Any, StreamHandle], None], gpu: FakeCuda, cuda: Any, stream: StreamHandle
) -> None:
    with pytest.raises(Violation):
        mistake(cuda, stream)
    with pytest.raises(AssertionError):
        gpu.assert_all_released()


def test_writing_into_freed_pinned_memory_is_found_at_the_end(gpu: FakeCuda, cuda: Any) -> None:
    address, content = pin(cuda)
    cuda.cudaFreeHost(address)
    gpu.assert_all_released()
    content[0] = 0
    with pytest.raises(Violation, match="written once freed"):
        gpu.assert_all_released()


@pytest.mark.parametrize("integrated", [False, True])
def test_a_kernel_reaches_pinned_memory_by_its_device_address(integrated: bool) -> None:
    gpu = FakeCuda(integrated=integrated)
    cuda = gpu.module()
    address, content = pin(cuda)
    device_address = cuda.cudaHostGetDevicePointer(address, 0)[1]
    assert (device_address == address) == integrated
    gpu.memory.view(device_address, 256, "kernel")[:] = 5
    assert set(content) == {5}
    if not integrated:
        with pytest.raises(Violation, match="neither device nor pinned"):
            gpu.memory.view(address, 256, "kernel")


def test_a_capture_is_not_run_but_each_launch_is(cuda: Any, stream: StreamHandle, gpu: FakeCuda) -> None:
    (host, content), (source, values) = pin(cuda), pin(cuda)
    content[:] = [0] * 256
    cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    cuda.cudaMemcpyAsync(host, source, 256, DEFAULT, stream)
    graph = cuda.cudaStreamEndCapture(stream)[1]
    executable = cuda.cudaGraphInstantiate(graph, 0)[1]
    cuda.cudaGraphDestroy(graph)
    for value in (1, 2):
        values[:] = [value] * 256
        cuda.cudaGraphLaunch(executable, stream)
        assert value not in set(content)
        cuda.cudaStreamSynchronize(stream)
        assert set(content) == {value}
    assert gpu.ledger() == {"stream": 1, "pinned": 2, "graph exec": 1}
    cuda.cudaFreeHost(source)
    cuda.cudaGraphLaunch(executable, stream)
    with pytest.raises(Violation, match="freed"):
        cuda.cudaStreamSynchronize(stream)


@pytest.mark.parametrize("forbidden", ["cudaMalloc", "cudaHostAlloc", "cudaFree", "cudaStreamSynchronize"])
def test_what_a_capture_does_not_allow_spoils_it(
    forbidden: str, cuda: Any, stream: StreamHandle, gpu: FakeCuda
) -> None:
    device = cuda.cudaMalloc(256)[1]
    arguments = {"cudaFree": (device,), "cudaStreamSynchronize": (stream,), "cudaHostAlloc": (256, 2)}
    cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    error = getattr(cuda, forbidden)(*arguments.get(forbidden, (256,)))[0]
    assert error == cudaError_t.cudaErrorStreamCaptureUnsupported
    assert cuda.cudaStreamEndCapture(stream) == (cudaError_t.cudaErrorStreamCaptureInvalidated, None)
    assert gpu.rules.violations == [f"{forbidden} during a capture"]
    assert getattr(cuda, forbidden)(*arguments.get(forbidden, (256,)))[0] == OK


def test_time_between_events_is_known_once_both_are_past(cuda: Any, stream: StreamHandle) -> None:
    start, end = (cuda.cudaEventCreate()[1] for _ in range(2))
    cuda.cudaEventRecord(start, stream)
    assert cuda.cudaEventElapsedTime(start, end)[0] == cudaError_t.cudaErrorInvalidResourceHandle
    cuda.cudaEventRecord(end, stream)
    assert cuda.cudaEventElapsedTime(start, end)[0] == cudaError_t.cudaErrorNotReady
    cuda.cudaEventSynchronize(end)
    error, milliseconds = cuda.cudaEventElapsedTime(start, end)
    assert error == OK
    assert milliseconds > 0


def test_what_is_not_given_back_is_found(cuda: Any, gpu: FakeCuda) -> None:
    cuda.cudaMalloc(1)
    with pytest.raises(AssertionError, match=r"still held: \{'device': 1\}"):
        gpu.assert_all_released()


def test_memory_ends_and_calls_fail_when_told_to() -> None:
    gpu = FakeCuda(memory=1000)
    cuda = gpu.module()
    assert cuda.cudaMalloc(1001) == (cudaError_t.cudaErrorMemoryAllocation, None)
    assert cuda.cudaMalloc(600)[0] == OK
    assert cuda.cudaMemGetInfo() == (OK, 400, 1000)
    gpu.fail(2, cudaError_t.cudaErrorLaunchFailure, ALLOCATING)
    assert [cuda.cudaMalloc(1)[0].value, cuda.cudaHostAlloc(1, 2)[0].value, cuda.cudaMalloc(1)[0].value] == [0, 719, 0]


def test_without_a_gpu_every_call_says_so() -> None:
    for error in (cudaError_t.cudaErrorInsufficientDriver, cudaError_t.cudaErrorNoDevice):
        assert FakeCuda(absent=error).module().cudaGetDeviceCount() == (error, None)


def test_everything_is_as_before_once_the_machine_is_gone(tmp_path: Path) -> None:
    import paliedge.backends.cuda as before

    for gpu in (FakeCuda(), None):
        with fake_machine(tmp_path / "machine", cuda=gpu):
            assert "paliedge.backends.cuda" not in sys.modules
            if gpu:
                import paliedge.backends.cuda as during

                assert during is not before
                assert during.gpu_info().name == "Orin"
        import paliedge.backends.cuda as after

        assert after is before is sys.modules["paliedge.backends.cuda"]
        assert "tensorrt" not in sys.modules
