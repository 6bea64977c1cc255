"""What a bundle needs on a device and what to run there: memory, what fits, a recommendation.

By arithmetic from the manifest: nothing is loaded, built or measured. Knows no TensorRT and prints
nothing. What is an estimate is called one where it is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from paliedge.bundle.manifest import Graph, Manifest, Model, Precision
from paliedge.errors import ResourceError, UsageError
from paliedge.planning.devices import DEVICES, TARGET_NAMES, Device
from paliedge.planning.roofline import (
    SCHEMES,
    Parameters,
    Scheme,
    Times,
    Workload,
    cache_bytes_per_token,
    count_parameters,
    estimate_times,
    scheme_for,
)

BUILD_FACTOR = 3.5
"""Peak memory of a build over the weights of the graph that is built, TensorRT for RTX on a CPU. Vision
encoder and decoder are built one after the other, each in a process of its own, so the larger one counts."""
OVERHEAD_BYTES = 600_000_000
"""Estimate of what a process with TensorRT holds before it has any weights: a log of TensorRT 8
shows 229 MiB for the CUDA context and 341 MiB for the libraries of its kernels (NVIDIA/TensorRT issue 2217)."""

_BYTES_16, _BYTES_32 = 2, 4
_NARROWEST_HEAD = 64
_ABOUT_AS_FAST = 0.9

Residency = Literal["both", "sequential", "none"]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one precision takes on a device.

    Attributes:
        vision, decoder: weights, which an engine exceeds by about 1 %.
        cache: keys and values of one request.
        vision_workspace, decoder_workspace: activations, see `estimate_vision_workspace`.
        overhead: `OVERHEAD_BYTES`.
        both: everything together.
        sequential: the larger of the two stages, the vision encoder being freed before the decoder is loaded.
        table: the whole embedding table, even beside a reduced head; mapped from a file on the host and not
            counted as resident.
        build_peak: estimate, while the larger of the two engines is built.
    """

    vision: int
    decoder: int
    cache: int
    vision_workspace: int
    decoder_workspace: int
    overhead: int
    both: int
    sequential: int
    table: int
    build_peak: int


@dataclass(frozen=True)
class PrecisionEstimate:
    """One precision on one device.

    Attributes:
        precision: name of the scheme.
        memory: see there.
        residency: "both" engines stay loaded; "sequential", one at a time; "none", it does not fit.
            One at a time, every image waits for two loads from disk, which no time here counts.
        build_swap: bytes of swap that a build needs beside the usable memory; 0 where the host builds.
        floor: at the data sheet's bandwidth and compute; nothing can be faster.
        sustained: at what the device reaches in practice.
    """

    precision: str
    memory: MemoryEstimate
    residency: Residency
    build_swap: int
    floor: Times
    sustained: Times


@dataclass(frozen=True)
class DeviceEstimate:
    """A bundle on a device.

    Attributes:
        precisions: widest first.
        recommended: the precision to export in, None where none fits.
    """

    device: Device
    parameters: Parameters
    request: Workload
    precisions: tuple[PrecisionEstimate, ...]
    recommended: PrecisionEstimate | None


class FreeMemory(NamedTuple):
    """Bytes. Swap helps a build; an engine that runs from it is of no use."""

    available: int
    swap: int


def estimate_device(
    manifest: Manifest, device: Device, *, prompt_tokens: int = 16, new_tokens: int = 10
) -> DeviceEstimate:
    """What `manifest`'s model needs and reaches on `device`, for one request at a time.

    Args:
        manifest: of a bundle that was opened, so that its files are those it names.
        device: where it shall run.
        prompt_tokens: of the text, with its first and last token.
        new_tokens: of the answer.

    Raises:
        UsageError: more tokens than the bundle's limits.
    """
    vision, limits = manifest.model.vision, manifest.limits
    _check_limit("prompt tokens", prompt_tokens, limits.prefix - vision.num_image_tokens)
    _check_limit("new tokens", new_tokens, limits.new_tokens)
    parameters = count_parameters(manifest)
    request = Workload(vision.num_image_tokens + prompt_tokens, new_tokens)
    estimates = tuple(_estimate_precision(manifest, parameters, device, scheme, request) for scheme in SCHEMES)
    return DeviceEstimate(
        device=device,
        parameters=parameters,
        request=request,
        precisions=estimates,
        recommended=_recommend(estimates),
    )


def _check_limit(what: str, found: int, limit: int) -> None:
    if not 1 <= found <= limit:
        raise UsageError(
            expected=f"1 to {limit} {what}, this bundle's limit",
            found=f"{found}",
            action="Plan for fewer, or export the checkpoint with a higher limit.",
        )


def _recommend(estimates: tuple[PrecisionEstimate, ...]) -> PrecisionEstimate | None:
    """The widest precision that is about as fast in practice as the fastest; both engines loaded, if any allows it."""
    fitting = [estimate for estimate in estimates if estimate.residency == "both"]
    fitting = fitting or [estimate for estimate in estimates if estimate.residency == "sequential"]
    fastest = min((estimate.sustained.answer for estimate in fitting), default=0)
    return next((estimate for estimate in fitting if estimate.sustained.answer * _ABOUT_AS_FAST <= fastest), None)


def _estimate_precision(
    manifest: Manifest, parameters: Parameters, device: Device, scheme: Scheme, request: Workload
) -> PrecisionEstimate:
    memory = estimate_memory(manifest, parameters, scheme)
    usable = device.usable_bytes
    return PrecisionEstimate(
        precision=scheme.name,
        memory=memory,
        residency="both" if memory.both <= usable else "sequential" if memory.sequential <= usable else "none",
        build_swap=max(0, memory.build_peak - usable) if device.unified else 0,
        floor=estimate_times(manifest, parameters, scheme, device, request, sustained=False),
        sustained=estimate_times(manifest, parameters, scheme, device, request, sustained=True),
    )


def estimate_memory(manifest: Manifest, parameters: Parameters, scheme: Scheme) -> MemoryEstimate:
    """Bytes of `manifest`'s model in the precision `scheme`; see `MemoryEstimate`."""
    vision = round(parameters.vision * scheme.vision)
    decoder = round(parameters.layers * scheme.layers + parameters.head * scheme.head)
    cache = cache_bytes(manifest)
    vision_workspace = estimate_vision_workspace(manifest.model)
    decoder_workspace = estimate_decoder_workspace(manifest)
    encoding, decoding = vision + vision_workspace, decoder + decoder_workspace + cache
    return MemoryEstimate(
        vision=vision,
        decoder=decoder,
        cache=cache,
        vision_workspace=vision_workspace,
        decoder_workspace=decoder_workspace,
        overhead=OVERHEAD_BYTES,
        both=OVERHEAD_BYTES + encoding + decoding,
        sequential=OVERHEAD_BYTES + max(encoding, decoding),
        table=round(manifest.embedding.rows * manifest.model.text.hidden_size * scheme.head),
        build_peak=estimate_build_peak(max(vision, decoder)),
    )


def estimate_build_peak(weights_bytes: int) -> int:
    """Peak bytes of the process that builds one engine of `weights_bytes`."""
    return OVERHEAD_BYTES + round(BUILD_FACTOR * weights_bytes)


def cache_bytes(manifest: Manifest) -> int:
    """Bytes of one request's keys and values at full capacity, in 16 bits."""
    return cache_bytes_per_token(manifest.model.text) * _capacity(manifest)


def _capacity(manifest: Manifest) -> int:
    return manifest.limits.capacity


def estimate_vision_workspace(model: Model) -> int:
    """Bytes of activations of the vision encoder on one image, an estimate that errs upwards.

    Layers reuse one another's memory, so one layer counts: its residual stream in 32 bits, and the larger
    of attention and MLP. Attention holds queries, keys and values in 16 bits, and all scores in 32, as if
    it were not fused. The manifest does not say how many heads there are: at most one for 64 channels is
    assumed. The MLP holds its width twice in 16 bits, before and after the activation.
    """
    vision = model.vision
    tokens, width = vision.num_image_tokens, vision.hidden_size
    num_heads = max(1, width // _NARROWEST_HEAD)
    attention = 3 * tokens * width * _BYTES_16 + num_heads * tokens * tokens * _BYTES_32
    mlp = 2 * tokens * vision.intermediate_size * _BYTES_16
    return tokens * width * _BYTES_32 + max(attention, mlp)


def estimate_decoder_workspace(manifest: Manifest) -> int:
    """Bytes of activations of the longest prefill, an estimate that errs upwards.

    As for the vision encoder, with these differences. Scores are of the whole prefix against the cache's
    capacity. Gate and up have 16 bits. The logits of the last position have 32 and are held beside them.
    So are the prefix's rows of the cache: where graphs leave storing to the runtime, they wait for that.
    """
    text, tokens = manifest.model.text, manifest.limits.prefix
    projected = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    attention = tokens * projected * _BYTES_16 + text.num_heads * tokens * _capacity(manifest) * _BYTES_32
    mlp = 2 * tokens * text.intermediate_size * _BYTES_16
    residual = tokens * text.hidden_size * _BYTES_32
    rows = cache_bytes_per_token(text) * tokens
    return residual + max(attention, mlp) + manifest.embedding.rows * _BYTES_32 + rows


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> FreeMemory:
    """What Linux could give to new processes now. A container's own limit is not looked at.

    Raises:
        ResourceError: the file is not Linux's.
    """
    try:
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available, swap = (int(rows[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ResourceError(
            expected=f"MemAvailable and SwapFree in {meminfo}", found="none", action="Run this on Linux."
        ) from error
    return FreeMemory(available, swap)


def check_build_memory(manifest: Manifest, target_name: str, available_bytes: int) -> None:
    """Refuse a build that cannot fit.

    Args:
        manifest: of an opened bundle.
        target_name: one of its targets.
        available_bytes: free memory and free swap together, see `available_memory`.

    Raises:
        ResourceError: with the figures, and what would fit.
    """
    target = manifest.targets[target_name]
    sizes = {"vision encoder": target.vision_encoder, "decoder": target.decoder}
    part, weights = max(((part, _graph_bytes(manifest, graph)) for part, graph in sizes.items()), key=lambda x: x[1])
    peak = estimate_build_peak(weights)
    if peak > available_bytes:
        raise ResourceError(
            expected=f"{_gb(peak)} of memory and swap to build the {part} of '{target_name}': "
            f"{BUILD_FACTOR} x its {_gb(weights)} of {target.precision} weights and {_gb(OVERHEAD_BYTES)}",
            found=f"{_gb(available_bytes)} free",
            action=" ".join(_what_would_fit(manifest, target_name, peak, available_bytes)),
        )


def check_run_memory(manifest: Manifest, room_bytes: int) -> Residency:
    """Whether both engines fit; a bundle whose engines cannot run, not even one at a time, is refused.

    Args:
        manifest: of an opened bundle.
        room_bytes: memory that the GPU can have; swap does not count.

    Raises:
        ResourceError: with the figures, and what would fit.
    """
    precision = _precision(manifest)
    needed = estimate_memory(manifest, count_parameters(manifest), scheme_for(precision))
    if needed.sequential <= room_bytes:
        return "both" if needed.both <= room_bytes else "sequential"
    advice = [f"Close other programs, or take a larger device: {_and(_boards_with(needed.sequential))}."]
    advice += _advise_precision(manifest, precision, "it", lambda memory: memory.sequential, room_bytes)
    raise ResourceError(
        expected=f"{_gb(needed.sequential)} of memory to run {manifest.producer.checkpoint} in {precision}, "
        f"one engine at a time ({_gb(needed.both)} with both)",
        found=f"{_gb(room_bytes)} free",
        action=" ".join(advice),
    )


def _precision(manifest: Manifest) -> Precision:
    """Of the targets, which are all exported in one; fp16 for a bundle without any, which no export writes."""
    return next((target.precision for target in manifest.targets.values()), "fp16")


def _advise_precision(
    manifest: Manifest, precision: Precision, what: str, bytes_of: Callable[[MemoryEstimate], int], room_bytes: int
) -> list[str]:
    """A sentence that names the widest precision below `precision` in which `what` fits; none where none does."""
    own, parameters = scheme_for(precision), count_parameters(manifest)
    for scheme in SCHEMES:
        needed = bytes_of(estimate_memory(manifest, parameters, scheme))
        if scheme.layers < own.layers and needed <= room_bytes:
            return [f"In {scheme.name} {what} takes {_gb(needed)}."]
    return []


def _boards_with(num_bytes: int) -> tuple[str, ...]:
    return tuple(device.name for device in DEVICES.values() if device.usable_bytes >= num_bytes)


def _graph_bytes(manifest: Manifest, graph: Graph) -> int:
    return sum(manifest.files[name].size for name in graph.weights)


def _what_would_fit(manifest: Manifest, target_name: str, peak: int, available_bytes: int) -> list[str]:
    """Sentences: swap, a narrower precision, a larger device."""
    advice = [f"Add {math.ceil((peak - available_bytes) / 1e9)} GB of swap."]
    precision = manifest.targets[target_name].precision
    advice += _advise_precision(manifest, precision, "a build", lambda memory: memory.build_peak, available_bytes)
    boards = [device for device in DEVICES.values() if device.unified and target_name in device.targets]
    larger = next((board for board in boards if board.usable_bytes >= peak), None)
    if larger:
        advice.append(f"{larger.name} with {TARGET_NAMES[target_name]} has enough as it is.")
    return advice


def _and(names: tuple[str, ...]) -> str:
    return " and ".join(names)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
