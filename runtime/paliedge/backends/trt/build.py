"""Build a bundle's engines on the machine that will run them.

Its graphs one after the other, each in a child process; nothing is published before all are done. Knows
TensorRT by its version only; the child does the rest.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from paliedge.backends.trt.builder_process import BuildCost, BuildEvent, BuildOrder
from paliedge.backends.trt.flavours import TARGETS, TensorRt, find_flavours, load_flavour
from paliedge.backends.trt.match import Part, choose_target, describe, describe_gpu, find_engine, parts_of, probe_gpu
from paliedge.backends.trt.profiles import design_engine
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.digests import describe_file
from paliedge.bundle.layer_list import LAYER_LIST, read_layer_list
from paliedge.bundle.manifest import Engine, Flavour, Graph, Manifest, Plan
from paliedge.bundle.publish import engine_staging, publish_engine, wait_for_folder
from paliedge.errors import (
    BuildError,
    BundleError,
    EngineMismatchError,
    MissingExtraError,
    PaliEdgeError,
    ResourceError,
)
from paliedge.planning.memory import (
    available_memory,
    check_build_memory,
    check_run_memory,
    estimate_decoder_workspace,
    estimate_vision_workspace,
)
from paliedge.planning.traffic import describe_step

SMALLEST_WORKSPACE = 1 << 30
"""Bytes that a kernel may use for itself unless told; small, because on a Jetson they are the model's too."""

Report = Callable[[str], None]
Progress = Callable[[str, float], None]


def build_engine(
    folder: Path,
    flavour: Flavour | None = None,
    *,
    workspace: int | None = None,
    force: bool = False,
    report: Report = lambda line: None,
    on_progress: Progress = lambda part, progress: None,
) -> Engine:
    """Build plans for this machine and add them to the bundle; one that is there already is returned.

    Args:
        flavour: the first that is installed unless given: TensorRT, then TensorRT for RTX.
        workspace: bytes that a kernel may use besides weights and activations; unless given 1 GiB, or
            twice the largest activations where that is more.
        force: build even if the bundle has such an engine.
        report: gets a line a stage.
        on_progress: gets the part's name and how much of it is done, from 0 to 1.

    Raises:
        BundleError: see `Bundle`.
        MissingExtraError: no such TensorRT here.
        DeviceError: no GPU, and this TensorRT needs one to build.
        EngineMismatchError: the bundle has no graphs that this TensorRT takes.
        ResourceError: the build does not fit in the memory that is free.
        BuildError: the builder refused a graph, failed or was killed.
        OutputError: the bundle cannot be written to.
    """
    folder = folder.resolve()
    manifest = Bundle(folder, check_hashes=False, check_engines=False).manifest
    try:
        trt = load_flavour(flavour) if flavour else _first_flavour()
    except MissingExtraError:
        _check_that_it_is_for_gpus(manifest)  # or what is missing would have nothing to build
        raise
    capability, gpu = describe_gpu(trt)
    with wait_for_folder(folder, lambda: report("waiting for another build of this bundle")):
        bundle = Bundle(folder, check_engines=False)
        existing = find_engine(bundle.manifest, trt, capability)
        if existing and not force and _is_whole(folder, report):
            report(f"the bundle has an engine for {describe(trt, capability)} already")
            return existing
        target = choose_target(bundle.manifest, trt)
        workspace = workspace or _default_workspace(bundle.manifest)
        check_build_memory(bundle.manifest, target, sum(available_memory()))
        _check_that_it_will_run(bundle.manifest, trt, report)
        engine = design_engine(bundle.manifest, trt, target, capability, gpu)
        with engine_staging(folder) as staging:
            _take_timing_cache(bundle, engine, staging)
            for part in parts_of(engine):
                report(f"building {part} for {describe(trt, capability)} from {target}'s graphs")
                cost = run_order(part, make_order(bundle, engine, part, staging, workspace), on_progress)
                report(
                    f"built {part} in {cost.seconds:.0f} s, {cost.peak_memory / 1e9:.1f} GB of host memory at its peak"
                )
            if (listed := _layer_list(staging / engine.decoder.file)).is_file():
                report(describe_step(read_layer_list(listed), bundle.manifest))
            engine = _name_files(engine, staging)
            publish_engine(folder, bundle.manifest, staging, engine)
    return engine


def _first_flavour() -> TensorRt:
    errors = []
    for found in find_flavours():
        if not isinstance(found, PaliEdgeError):
            return found
        errors.append(found)
    raise MissingExtraError(
        expected=" or ".join(error.expected for error in errors),
        found="; ".join(error.found for error in errors),
        action=f"{errors[0].action} For a desktop GPU: {errors[-1].action}",
    )


def _check_that_it_is_for_gpus(manifest: Manifest) -> None:
    known = {name for names in TARGETS.values() for name in names}
    if not known & set(manifest.targets):
        raise EngineMismatchError(
            expected=f"graphs for a target of TensorRT: {', '.join(sorted(known))}",
            found=f"a bundle for {', '.join(manifest.targets)}",
            action="Export it again: `paliedge export CHECKPOINT -o BUNDLE --target jetpack7`, or another of them.",
        )


def _is_whole(folder: Path, report: Report) -> bool:
    """Whether the engines that the manifest names are there as they were built."""
    try:
        Bundle(folder)
    except BundleError as error:
        report(f"building again: {error.found}")
        return False
    return True


def make_order(bundle: Bundle, engine: Engine, part: Part, staging: Path, workspace: int) -> BuildOrder:
    """What the child process is told: to build one of the engine's plans into `staging`."""
    graph: Graph = getattr(bundle.manifest.targets[engine.target], part)
    plan: Plan = getattr(engine, part)
    return BuildOrder(
        flavour=engine.flavour,
        onnx=str(bundle.path(graph.file)),
        plan=str(staging / plan.file),
        layers=str(_layer_list(staging / plan.file)),
        timing_cache=str(staging / engine.timing_cache) if engine.timing_cache else None,
        profiles=plan.profiles,
        workspace=workspace,
        parent=os.getpid(),
    )


def run_order(part: Part, order: BuildOrder, on_progress: Progress) -> BuildCost:
    """Build a plan in a child process, and end that process with this one.

    Raises:
        BuildError: the child said why it failed, or died.
    """
    command = [sys.executable, "-m", "paliedge.backends.trt.builder_process"]
    last = BuildEvent(error="an end without a word")
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with suppress(BrokenPipeError), child.stdin:  # one that died at once is explained below
                child.stdin.write(msgspec.json.encode(order))
            for line in child.stdout:
                event = msgspec.json.decode(line, type=BuildEvent)
                if event.progress is None:
                    last = event
                else:
                    on_progress(part, event.progress)
            code = child.wait()
        except BaseException:
            child.kill()
            raise
        errors.seek(0)
        noise = errors.read().decode(errors="replace").strip().splitlines()
    if code or last.cost is None:
        raise _explain(part, code, last, noise)
    return last.cost


def _explain(part: str, code: int, failure: BuildEvent, noise: list[str]) -> BuildError:
    if code == -signal.SIGKILL:
        found = "a process that the system killed, as it does when memory runs out"
        action = "See `paliedge plan` for what a build needs; close other programs or add swap."
    elif code < 0:
        found = f"a crash with {signal.Signals(-code).name}" + (f": {noise[-1]}" if noise else "")
        action = "Report this with `paliedge doctor --json`; meanwhile use `--backend cpu`."
    else:
        found = failure.error or ""
        if failure.action is None and noise:
            found = f"{found}: {noise[-1]}"
        action = failure.action or "Report this with `paliedge doctor --json`."
    return BuildError(expected=f"a plan of the {part} from its builder", found=found, action=action)


def _default_workspace(manifest: Manifest) -> int:
    """At 896 pixels one layer's scores alone take more than half a gigabyte, and a kernel may want them twice."""
    largest = max(estimate_vision_workspace(manifest.model), estimate_decoder_workspace(manifest))
    return max(SMALLEST_WORKSPACE, 2 * largest)


def _check_that_it_will_run(manifest: Manifest, trt: TensorRt, report: Report) -> None:
    """Nothing to say without a GPU: the engines are for another machine then, as portable ones may be."""
    gpu = probe_gpu()
    if isinstance(gpu, PaliEdgeError):
        return
    try:
        check_run_memory(manifest, available_memory().available if gpu.integrated else gpu.free_memory)
    except ResourceError as error:
        if not trt.compiles_on_device:
            raise
        report(f"they will not run on this GPU: {error.expected}, {error.found}")


def _layer_list(plan: Path) -> Path:
    return plan.with_suffix(LAYER_LIST)


def _take_timing_cache(bundle: Bundle, engine: Engine, staging: Path) -> None:
    """Start from what an earlier build of this flavour measured; TensorRT looks whether it fits."""
    for older in reversed(bundle.manifest.engines):
        if engine.timing_cache and older.timing_cache and older.flavour == engine.flavour:
            with suppress(OSError):  # it is only a help
                shutil.copyfile(bundle.path(older.timing_cache), staging / engine.timing_cache)
            return


def _name_files(engine: Engine, staging: Path) -> Engine:
    """Name each file after its part, what it is for, and its content: no two ever share a name."""
    label = f"{engine.flavour}-{engine.version}-cc{engine.compute_capability}".replace("+", "-")

    def rename(name: str) -> str:
        digest = describe_file(staging / name).sha256[:12]
        stem, suffix = name.split(".")
        named = f"{stem}.{label}.{digest}.{suffix}"
        (staging / name).rename(staging / named)
        if (listed := _layer_list(staging / name)).is_file():
            listed.rename(_layer_list(staging / named))
        return named

    has_timing = engine.timing_cache and (staging / engine.timing_cache).is_file()
    plans: dict[str, Plan] = {part: getattr(engine, part) for part in parts_of(engine)}
    return msgspec.structs.replace(
        engine,
        **{part: msgspec.structs.replace(plan, file=rename(plan.file)) for part, plan in plans.items()},
        timing_cache=rename(engine.timing_cache) if engine.timing_cache and has_timing else None,
    )
