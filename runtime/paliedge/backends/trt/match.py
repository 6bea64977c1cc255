"""Which of a bundle's engines and targets fits this machine's TensorRT and GPU."""

# Tests: tests/backends/trt/test_build.py and tests/backends/test_select.py.
from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from paliedge.backends.cuda import GpuInfo
from paliedge.backends.trt.flavours import ANY_GPU, TensorRt
from paliedge.bundle.manifest import Engine, Manifest
from paliedge.errors import (
    EngineMismatchError,
    PaliEdgeError,
)

Part = Literal["vision_encoder", "decoder", "mask_decoder"]
PARTS: tuple[Part, ...] = ("vision_encoder", "decoder", "mask_decoder")


def parts_of(engine: Engine) -> list[Part]:
    """Which plans it has."""
    return [part for part in PARTS if getattr(engine, part) is not None]


def describe(trt: TensorRt, capability: str) -> str:
    """Such as "TensorRT 10.3.0 on compute capability 8.7"."""
    name = "TensorRT" if trt.flavour == "tensorrt" else "TensorRT for RTX"
    return f"{name} {trt.version}" + ("" if capability == ANY_GPU else f" on compute capability {capability}")


def probe_gpu() -> GpuInfo | PaliEdgeError:
    """The GPU, or why there is none."""
    try:
        from paliedge.backends.cuda import gpu_info

        return gpu_info()
    except PaliEdgeError as error:
        return error


def describe_gpu(trt: TensorRt) -> tuple[str, str]:
    """Compute capability and name of the GPU that plans will be good for.

    Raises:
        MissingExtraError, DeviceError: it needs a GPU, and there is none to ask.
    """
    if trt.compiles_on_device:
        return ANY_GPU, "any"
    gpu = probe_gpu()
    if isinstance(gpu, PaliEdgeError):
        raise gpu
    return gpu.compute_capability, gpu.name


def engine_for(manifest: Manifest, trt: TensorRt) -> Engine | None:
    """The bundle's engine that this TensorRT can run on this machine's GPU."""
    return find_engine(manifest, trt, describe_gpu(trt)[0])


def find_engine(manifest: Manifest, trt: TensorRt, capability: str) -> Engine | None:
    """The engine that was built for exactly this flavour, version and GPU."""
    for engine in manifest.engines:
        if (engine.flavour, engine.version, engine.compute_capability) == (trt.flavour, trt.version, capability):
            return engine
    return None


def choose_target(manifest: Manifest, trt: TensorRt) -> str:
    """The best of the bundle's targets that this TensorRT takes.

    Raises:
        EngineMismatchError: there is none.
    """
    for target in trt.targets:
        if target in manifest.targets:
            return target
    raise EngineMismatchError(
        expected=f"graphs for {describe(trt, ANY_GPU)}: target {' or '.join(trt.targets)}",
        found=f"a bundle for {', '.join(manifest.targets)}",
        action=f"Export it again: `paliedge export CHECKPOINT -o BUNDLE --target {trt.targets[0]}`.",
    )
