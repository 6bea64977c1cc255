"""What an engine is built for: its parts, and the sizes of their inputs."""

# Tests: tests/backends/trt/test_build.py and tests/export/test_tensorrt_rtx.py.
from __future__ import annotations

from paliedge.backends.trt.flavours import TensorRt
from paliedge.bundle.manifest import Engine, Graph, Manifest, Plan, Range

_PROMPT_TOKENS = 16
"""Of the prompt that prefill is tuned for."""
MAX_ROWS = 4
"""Requests that a decode step of an engine may have."""


def design_engine(manifest: Manifest, trt: TensorRt, target: str, capability: str, gpu: str) -> Engine:
    """What is to be built from a target's graphs, its files not yet named after their content."""
    masks = manifest.targets[target].mask_decoder
    return Engine(
        target=target,
        flavour=trt.flavour,
        version=trt.version,
        compute_capability=capability,
        gpu=gpu,
        precision=manifest.targets[target].precision,
        vision_encoder=Plan(file="vision_encoder.plan", profiles=vision_profiles(manifest, target)),
        decoder=Plan(file="decoder.plan", profiles=decoder_profiles(manifest, target)),
        mask_decoder=Plan(file="mask_decoder.plan", profiles=(_profile(masks, {}),)) if masks else None,
        timing_cache=None if trt.compiles_on_device else "engine.timing",
    )


def vision_profiles(manifest: Manifest, target: str) -> tuple[dict[str, Range], ...]:
    """One picture at a time."""
    return (_profile(manifest.targets[target].vision_encoder, {}),)


def decoder_profiles(manifest: Manifest, target: str) -> tuple[dict[str, Range], ...]:
    """Decode, then prefill.

    Decode is one token for each of up to `MAX_ROWS` rows, prefill one row, with room for a second that it never gets.
    Only where the first dimension is open in every profile does the builder make all products two-dimensional: then
    the profiles share their weights, 8-bit heads are not multiplied out in each step, and caches are not copied.
    "capacity" is dynamic where the runtime stores the rows; prefill then reads one hidden row, as none is not allowed.
    """
    limits, num_image_tokens = manifest.limits, manifest.model.vision.num_image_tokens
    capacity = limits.capacity
    decoder = manifest.targets[target].decoder
    typical = min(num_image_tokens + _PROMPT_TOKENS, limits.prefix)
    prefix = (num_image_tokens + 1, typical, limits.prefix)
    return (
        _profile(decoder, {"batch": (1, 1, MAX_ROWS), "sequence": (1, 1, 1), "capacity": (capacity,) * 3}),
        _profile(decoder, {"batch": (1, 1, 2), "sequence": prefix, "capacity": (1, 1, 1)}),
    )


def _profile(graph: Graph, sizes: dict[str, tuple[int, int, int]]) -> dict[str, Range]:
    """Minimum, optimum and maximum of every input; `sizes` are those of named dimensions, batch is 1 unless given."""
    sizes = {"batch": (1, 1, 1), **sizes}
    return {
        tensor.name: Range(
            *(
                tuple(sizes[size][index] if isinstance(size, str) else size for size in tensor.shape)
                for index in range(3)
            )
        )
        for tensor in graph.inputs
    }
