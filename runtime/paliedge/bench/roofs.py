"""How fast this machine reads memory and multiplies, measured just before and after: what MBU and MFU are shares of.

`python -m paliedge.bench.roofs THREADS` prints the CPU's as JSON.
"""

# Tests: tests/bench/test_conditions.py.
from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import numpy as np

from paliedge.backends.arithmetic import INTEGERS, best_seconds
from paliedge.bench.record import Roofs
from paliedge.errors import MissingExtraError

_PROBE_BYTES = 1 << 28
_PROBE_WIDTH = 1 << 14
_MATRIX = 1536
_REPEATS = 10
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What BLAS libraries ask, once, when they are loaded."""


def measure_cpu_apart(num_threads: int) -> Roofs:
    """`measure_cpu` in a process of its own, whose memory and threads are its own; no roofs where that fails."""
    command = [sys.executable, "-m", "paliedge.bench.roofs", str(num_threads)]
    threads = dict.fromkeys(_THREAD_VARIABLES, str(num_threads))
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, **threads})
    if done.returncode:
        return no_roofs(f"the probe ended with {done.returncode}")
    return msgspec.json.decode(done.stdout, type=Roofs)


def no_roofs(reason: str) -> Roofs:
    """Of a machine that could not be probed."""
    return Roofs(read_bytes_per_s=None, flops_per_s=None, how=f"not measured: {reason}")


def higher(first: Roofs, second: Roofs) -> Roofs:
    """The better of two probes, figure by figure: a neighbour that took its share of the machine is no roof."""
    return Roofs(
        read_bytes_per_s=_larger(first.read_bytes_per_s, second.read_bytes_per_s),
        flops_per_s=_larger(first.flops_per_s, second.flops_per_s),
        how=first.how,
        int8_ops_per_s=_larger(first.int8_ops_per_s, second.int8_ops_per_s),
    )


def _larger(first: float | None, second: float | None) -> float | None:
    return max(first or 0, second or 0) or None


def measure_cpu(num_threads: int) -> Roofs:
    """By NumPy's float32 products, and ONNX Runtime's of integers where it is installed, the best of several times.

    Bytes by a matrix and a vector, which is what a decode step does: several rows are read at once, and faster than one
    long array is summed up.
    """
    vector = np.ones(_PROBE_WIDTH, np.float32)
    matrix = np.ones((_PROBE_BYTES // vector.nbytes, _PROBE_WIDTH), np.float32)
    square = np.ones((_MATRIX, _MATRIX), np.float32)
    how = f"numpy, float32: a matrix of {_PROBE_BYTES >> 20} MiB times a vector; matrices of {_MATRIX} x {_MATRIX}"
    integers = _measure_integers(num_threads)
    return Roofs(
        read_bytes_per_s=matrix.nbytes / best_seconds(lambda: matrix @ vector, _REPEATS),
        flops_per_s=2 * _MATRIX**3 / best_seconds(lambda: square @ square, _REPEATS),
        how=f"{how}, and of 8-bit integers by onnxruntime" if integers else how,
        int8_ops_per_s=integers,
    )


def _measure_integers(num_threads: int) -> float | None:
    """None without an ONNX Runtime that works: NumPy's products of integers are no roof."""
    try:
        from paliedge.backends.ort import load_graph
    except MissingExtraError:
        return None
    session = load_graph(INTEGERS, num_threads)
    square = {"a": np.ones((_MATRIX, _MATRIX), np.uint8), "b": np.ones((_MATRIX, _MATRIX), np.uint8)}
    return 2 * _MATRIX**3 / best_seconds(lambda: session.run(None, square), _REPEATS)


def measure_gpu() -> Roofs:
    """By copies inside the GPU's memory; how fast it multiplies is not measured."""
    from paliedge.backends.cuda import DeviceBuffer, Event, Stream

    with (
        Stream() as stream,
        Event() as start,
        Event() as end,
        DeviceBuffer(_PROBE_BYTES, stream) as source,
        DeviceBuffer(_PROBE_BYTES, stream) as target,
    ):

        def copy() -> float:
            start.record(stream)
            stream.copy(target.address, source.address, _PROBE_BYTES)
            end.record(stream)
            stream.synchronize()
            return end.elapsed_ms(start) / 1000

        best = min(copy() for _ in range(_REPEATS))
    how = f"copies of {_PROBE_BYTES >> 20} MiB in the GPU's memory, read and written bytes together"
    return Roofs(read_bytes_per_s=2 * _PROBE_BYTES / best, flops_per_s=None, how=how)


if __name__ == "__main__":
    print(msgspec.json.encode(measure_cpu(int(sys.argv[1]))).decode())
