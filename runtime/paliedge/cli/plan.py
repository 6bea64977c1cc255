"""The verb `plan`: what a bundle needs and reaches on a device, before anything heavy is tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paliedge.cli.help import command, option
from paliedge.cli.options import bundle_argument, json_option
from paliedge.planning.devices import DEVICES, TARGET_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paliedge.bundle.manifest import Manifest
    from paliedge.planning.devices import Device
    from paliedge.planning.memory import DeviceEstimate, PrecisionEstimate

_STROKE = "at the data sheet's rates / at the sustained ones; kernel launches and preprocessing are not counted"
_RESIDENCY = {"both": "both engines", "sequential": "one engine at a time", "none": "no"}


@command("paliedge plan bundle --device orin-nano-8gb", "paliedge plan bundle")
@bundle_argument
@option(
    "--device", type=click.Choice(list(DEVICES)), help="Plan for this one; without it, one line for each.", group="What"
)
@option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Length of the text prompt.",
    group="What",
)
@option(
    "--new-tokens",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Length of the answer; an object takes five or more.",
    group="What",
)
@json_option("The estimates as JSON.")
def plan(bundle: Path | None, device: str | None, prompt_tokens: int, new_tokens: int, as_json: bool) -> None:
    """Say what a bundle needs and reaches on a device; without BUNDLE, the shipped one.

    Arithmetic alone: bytes against memory, and the time that they and the operations take at the least.
    """
    from paliedge.bundle.bundle import Bundle
    from paliedge.model import SHIPPED_BUNDLE
    from paliedge.planning.memory import estimate_device

    folder = bundle or SHIPPED_BUNDLE
    manifest = Bundle(folder, check_hashes=False).manifest
    chosen = [DEVICES[device]] if device else list(DEVICES.values())
    estimates = [estimate_device(manifest, one, prompt_tokens=prompt_tokens, new_tokens=new_tokens) for one in chosen]
    if as_json:
        import msgspec

        click.echo(json.dumps({"bundle": str(folder), "plans": msgspec.to_builtins(estimates)}))
        return
    _print_bundle(folder, manifest, estimates[0])
    if device:
        _print_device(estimates[0])
    else:
        _print_devices(estimates)


def _print_bundle(folder: Path, manifest: Manifest, estimate: DeviceEstimate) -> None:
    vision, parameters = manifest.model.vision, estimate.parameters
    total = parameters.vision + parameters.layers + parameters.head
    targets = ", ".join(f"{name} {target.precision}" for name, target in sorted(manifest.targets.items()))
    _print_row("bundle", f"{folder}: {manifest.model.family}, {vision.image_size} x {vision.image_size} pixels")
    _print_row("has", f"{total / 1e6:.1f} million parameters; graphs for {targets}")
    prompt = estimate.request.prefix - vision.num_image_tokens
    _print_row(
        "request",
        f"{vision.num_image_tokens} image and {prompt} prompt tokens, {estimate.request.new_tokens} new tokens",
    )


def _print_device(estimate: DeviceEstimate) -> None:
    device = estimate.device
    rates = (device.bandwidth / 1e9, device.fp16_flops / 1e12, device.int8_ops / 1e12)
    _print_row("device", f"{device.name}: {_size(device.usable_bytes)} usable of {_size(device.memory_bytes)}")
    _print_row("data sheet", "{:g} GB/s, {:g} TFLOPS in FP16, {:g} TOPS in INT8, dense".format(*rates))
    shares = f"{device.sustained_bandwidth:.0%} of the bandwidth and {device.sustained_compute:.0%} of the rest"
    _print_row("sustained", f"{shares}, as reached in practice")
    click.echo()
    heads = ("weights", "cache", "workspace", "resident", "one at a time", "build peak", "fits")
    _print_table("memory", heads, [(one.precision, *_memory_cells(one)) for one in estimate.precisions])
    overhead = estimate.precisions[0].memory.overhead
    _print_row("", f"libraries take {_size(overhead)} of each sum; bf16 is as fp16; the embedding table is only mapped")
    click.echo()
    stages = ("vision", "prefill", "a token", "answer")
    _print_table("ms, floor", stages, [(one.precision, *_time_cells(one)) for one in estimate.precisions])
    _print_row("", _STROKE)
    click.echo()
    _print_row("recommended", _advice(estimate))


def _print_devices(estimates: Sequence[DeviceEstimate]) -> None:
    click.echo()
    heads = ("usable", "recommended", "fits", "answer, ms", "swap to build")
    rows = [(estimate.device.key, *_device_cells(estimate)) for estimate in estimates]
    _print_table("device", heads, rows)
    _print_row("", _STROKE)
    _print_row("", "more of one with --device")


def _device_cells(estimate: DeviceEstimate) -> tuple[str, ...]:
    usable, best = _size(estimate.device.usable_bytes), estimate.recommended
    if not best:
        return usable, "none", _RESIDENCY["none"], "-", "-"
    answer = _pair(best.floor.answer, best.sustained.answer)
    swap = _size(best.build_swap) if best.build_swap else "-"
    return usable, best.precision, _RESIDENCY[best.residency], answer, swap


def _memory_cells(estimate: PrecisionEstimate) -> tuple[str, ...]:
    memory = estimate.memory
    sizes = (
        memory.vision + memory.decoder,
        memory.cache,
        memory.vision_workspace + memory.decoder_workspace,
        memory.both,
        memory.sequential,
        memory.build_peak,
    )
    return (*map(_size, sizes), _RESIDENCY[estimate.residency])


def _time_cells(estimate: PrecisionEstimate) -> tuple[str, ...]:
    floor, sustained = estimate.floor, estimate.sustained
    return (
        _pair(floor.vision, sustained.vision),
        _pair(floor.prefill, sustained.prefill),
        _pair(floor.token, sustained.token),
        _pair(floor.answer, sustained.answer),
    )


def _advice(estimate: DeviceEstimate) -> str:
    best = estimate.recommended
    if not best:
        return f"another device or a smaller model: none of these fits {_size(estimate.device.usable_bytes)}"
    targets = " or ".join(f"{name} ({TARGET_NAMES[name]})" for name in estimate.device.targets)
    loaded = "both engines stay loaded"
    if best.residency == "sequential":
        loaded = (
            "one engine at a time (--sequential), vision freed before the decoder loads, "
            "so that each image waits for two loads"
        )
    return f"{best.precision} for {targets}; {loaded}{_build_advice(estimate.device, best)}"


def _build_advice(device: Device, estimate: PrecisionEstimate) -> str:
    if estimate.build_swap:
        return f"; a build wants {_size(estimate.build_swap)} of swap"
    return "" if device.unified else "; a build runs in the host's memory"


def _print_row(name: str, value: str) -> None:
    click.echo(f"{name:<12} {value}")


def _print_table(corner: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, the first one at least as wide as the names above."""
    lines = [(corner, *heads), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    widths[0] = max(widths[0], 12)
    for line in lines:
        cells = [
            f"{line[0]:<{widths[0]}}",
            *(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        click.echo("  ".join(cells).rstrip())


def _pair(floor: float, sustained: float) -> str:
    return f"{_ms(floor)} / {_ms(sustained)}"


def _ms(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


VERBS = (plan,)
