"""How fast this machine reads memory and multiplies, measured just before: what MBU and MFU are shares of.

`python -m paliedge.benching.roofs THREADS` prints the CPU's as JSON.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from paliedge.benching.record import Roofs

_PROBE_BYTES = 1 << 28
_MATRIX = 1536
_REPEATS = 6


def measure_cpu_apart(num_threads: int) -> Roofs:
    """`measure_cpu` in a process of its own, whose memory is not this one's; no roofs where that fails."""
    command = [sys.executable, "-m", "paliedge.benching.roofs", str(num_threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode:
        return no_roofs(f"the probe ended with {done.returncode}")
    return msgspec.json.decode(done.stdout, type=Roofs)


def no_roofs(reason: str) -> Roofs:
    """Of a machine that could not be probed."""
    return Roofs(read_bytes_per_s=None, flops_per_s=None, how=f"not measured: {reason}")


def measure_cpu(num_threads: int) -> Roofs:
    """By NumPy, the best of several times."""
    return Roofs(
        read_bytes_per_s=_read_bandwidth(num_threads),
        flops_per_s=_flops(),
        how=f"numpy: sums of {_PROBE_BYTES >> 20} MiB by {num_threads} threads; float32 products, {_MATRIX} wide",
    )


def measure_gpu() -> Roofs:
    """By copies inside the GPU's memory; how fast it multiplies is not measured."""
    from paliedge.cuda import DeviceBuffer, Event, Stream

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


def _read_bandwidth(num_threads: int) -> float:
    array = np.ones(_PROBE_BYTES // 8)
    pieces = np.array_split(array, num_threads)
    with ThreadPoolExecutor(num_threads) as pool:
        return array.nbytes / _best(lambda: list(pool.map(np.sum, pieces)))


def _flops() -> float:
    matrix = np.ones((_MATRIX, _MATRIX), np.float32)
    return 2 * _MATRIX**3 / _best(lambda: matrix @ matrix)


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    print(msgspec.json.encode(measure_cpu(int(sys.argv[1]))).decode())
