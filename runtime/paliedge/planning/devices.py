"""The devices that a bundle can be planned for: memory, bandwidth, arithmetic, and what they sustain.

Knows no model and no bundle. Bandwidth, memory and the rates of Thor and H200 are the makers' data sheets.
The tensor rates of the Orins are SMs x clock x 1024 (FP16) or 2048 (INT8) multiply-adds, dense, GPU
alone: data sheets print twice that for sparse weights and add the DLA. Sustained factors are shares of
those figures. The other Orins are taken to behave like AGX Orin.

- Reading memory was measured at 75 % on AGX Orin, 95 % on Thor and 90 % on H200.
- A whole PaliGemma prefix (vision and prefill) was measured at 53 % of the FP16 rate on AGX Orin.
- 40 % on Thor and 50 % on H200 are estimates of the same.
"""

# Tests: tests/planning/test_memory.py.
from __future__ import annotations

from dataclasses import dataclass

_GIB = 2**30
_ORIN_NANO_LEFT = 5_200_000_000
_KEPT_BY_SYSTEM = 8 * _GIB - _ORIN_NANO_LEFT
"""What the system of a Jetson keeps for itself.

Of an Orin Nano's 8 GiB Linux sees 7.4, and a user measured 5.2 GB left for the GPU after start. A larger
board's system is the same, so the same amount is taken off there. A board without a desktop has rather more.
"""


@dataclass(frozen=True)
class Device:
    """One device in one power mode.

    Attributes:
        key: what `--device` takes.
        name: what people call it.
        memory_bytes: data sheet; on a Jetson CPU and GPU share it.
        usable_bytes: what is left for weights, cache and workspace.
        bandwidth: bytes per second, data sheet.
        fp16_flops: dense FP16 operations per second, a multiply-add being two.
        int8_ops: the same for INT8; on Thor also FP8.
        sustained_bandwidth: share of `bandwidth` that is reached in practice.
        sustained_compute: share of `fp16_flops` and `int8_ops` that is reached in practice.
        targets: the lowerings that run there, best first.
        unified: CPU and GPU share the memory, so that an engine is built in the same memory.
    """

    key: str
    name: str
    memory_bytes: int
    usable_bytes: int
    bandwidth: float
    fp16_flops: float
    int8_ops: float
    sustained_bandwidth: float
    sustained_compute: float
    targets: tuple[str, ...]
    unified: bool = True


def _orin(key: str, name: str, gib: int, bandwidth: float, fp16_tflops: float, int8_tops: float) -> Device:
    return Device(
        key=key,
        name=name,
        memory_bytes=gib * _GIB,
        usable_bytes=gib * _GIB - _KEPT_BY_SYSTEM,
        bandwidth=bandwidth * 1e9,
        fp16_flops=fp16_tflops * 1e12,
        int8_ops=int8_tops * 1e12,
        sustained_bandwidth=0.75,
        sustained_compute=0.53,
        targets=("jetpack7", "jetpack6"),
    )


_ALL = (
    _orin("orin-nano-8gb", "Jetson Orin Nano 8GB, Super mode", 8, 102, 16.7, 33.4),
    _orin("orin-nano-8gb-15w", "Jetson Orin Nano 8GB, 15 W", 8, 68, 10.2, 20.5),
    _orin("orin-nx-16gb", "Jetson Orin NX 16GB, 25 W", 16, 102.4, 15.0, 30.1),
    _orin("agx-orin-64gb", "Jetson AGX Orin 64GB", 64, 204.8, 42.6, 85.2),
    Device(
        key="thor",
        name="Jetson AGX Thor 128GB",
        memory_bytes=128 * _GIB,
        usable_bytes=128 * _GIB - _KEPT_BY_SYSTEM,
        bandwidth=273e9,
        fp16_flops=258e12,
        int8_ops=517e12,
        sustained_bandwidth=0.95,
        sustained_compute=0.40,
        targets=("jetpack7",),
    ),
    Device(
        key="h200",
        name="H200",
        memory_bytes=141_000_000_000,
        usable_bytes=141_000_000_000,  # the system lives in the host's memory
        bandwidth=4800e9,
        fp16_flops=989e12,
        int8_ops=1979e12,
        sustained_bandwidth=0.90,
        sustained_compute=0.50,
        targets=("rtx",),
        unified=False,
    ),
)

DEVICES: dict[str, Device] = {device.key: device for device in _ALL}
"""Every known device by its key, smallest first."""

TARGET_NAMES = {"jetpack7": "JetPack 7.2", "jetpack6": "JetPack 6.2", "rtx": "TensorRT for RTX"}
"""What a target's graphs run on."""
