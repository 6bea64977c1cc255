"""The child process that turns one ONNX graph into one plan: `python -m paliedge.backends.trt.builder_process`.

It reads a BuildOrder as JSON from stdin and writes a BuildEvent a line to stdout. In a process of its
own, so that the builder's memory is given back at its end, and its crash is not the program's. Knows
no bundle.
"""

# Tests: tests/backends/trt/test_build.py and test_build_kills.py.
from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from paliedge.backends.trt.flavours import TensorRt, load_flavour, make_logger, quiet_deprecations
from paliedge.backends.trt.layers import list_layers
from paliedge.bundle.layer_list import write_layer_list
from paliedge.bundle.manifest import Flavour, Range
from paliedge.errors import BuildError, PaliEdgeError

_MAX_MESSAGES = 8


class BuildOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What to build: paths of files, profiles as input name to shapes, workspace in bytes.

    `layers` is where the list of the engine's layers goes. `timing_cache` is read if it is there, and written.
    """

    flavour: Flavour
    onnx: str
    plan: str
    layers: str
    timing_cache: str | None
    profiles: tuple[dict[str, Range], ...]
    workspace: int
    parent: int


class BuildCost(msgspec.Struct, frozen=True, kw_only=True):
    """What a build took: seconds, and the bytes of memory that were resident at its peak."""

    seconds: float
    peak_memory: int


class BuildEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What the child says: how far it is, from 0 to 1; at the end what it took, or why it failed."""

    progress: float | None = None
    cost: BuildCost | None = None
    error: str | None = None
    action: str | None = None


def build_plan(order: BuildOrder, on_progress: Callable[[float], None]) -> None:
    """Build and write a plan.

    Raises:
        BuildError: the graph is not accepted, or the builder fails.
        MissingExtraError, EngineMismatchError: see `load_flavour`.
    """
    trt = load_flavour(order.flavour)
    messages: list[str] = []
    details: list[str] | None = [] if trt.compiles_on_device else None
    logger = make_logger(trt, messages, details)
    try:
        builder = trt.module.Builder(logger)
    except TypeError as error:  # the bindings' answer to a null pointer
        action = "It needs an NVIDIA GPU and its driver: see `paliedge doctor`."
        raise _failed(trt, "no builder", messages, action) from error
    network = builder.create_network(trt.network_flags())
    parser = trt.module.OnnxParser(network, logger)
    if not parser.parse_from_file(order.onnx):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [f"{error.node_operator()} at node '{error.node_name()}': {error.desc()}" for error in errors]
        raise _failed(trt, f"a graph that its parser refuses, {Path(order.onnx).name}", reasons, _REPORT)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.module.MemoryPoolType.WORKSPACE, order.workspace)
    trt.set_builder_flags(config)
    config.profiling_verbosity = trt.module.ProfilingVerbosity.DETAILED
    for shapes in order.profiles:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape.min, shape.opt, shape.max)
        config.add_optimization_profile(profile)
    monitor = _make_monitor(trt, on_progress)
    config.progress_monitor = monitor
    known = Path(order.timing_cache) if order.timing_cache else None
    timing_cache = trt.attach_timing_cache(config, known.read_bytes() if known and known.is_file() else b"")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failed(trt, f"a failure to build {Path(order.onnx).name}", messages, _REPORT)
    _write(Path(order.plan), plan)
    if known and timing_cache is not None:
        _write(known, timing_cache.serialize())
    del builder, network, parser, config, timing_cache  # or the engine, if it is loaded, comes on top of them
    if found := list_layers(trt, plan, details):
        write_layer_list(Path(order.layers), found)


_REPORT = "Report this with `paliedge doctor --json`; meanwhile use `--backend cpu`."


def _failed(trt: TensorRt, found: str, messages: list[str], action: str) -> BuildError:
    reasons = "; ".join(" ".join(message.split()) for message in messages[:_MAX_MESSAGES])
    return BuildError(
        expected=f"a plan from {trt.module.__name__} {trt.version}",
        found=f"{found}: {reasons}" if reasons else found,
        action=action,
    )


def _make_monitor(trt: TensorRt, on_progress: Callable[[float], None]) -> Any:
    """Reports how many of the outermost phase's steps are done."""

    class Monitor(trt.module.IProgressMonitor):  # type: ignore[misc, name-defined]  # of the module at hand
        def __init__(self) -> None:
            trt.module.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            if parent is None:
                self.steps[name] = num_steps

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.steps:
                on_progress(min(1.0, (step + 1) / max(1, self.steps[name])))
            return True

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

    return Monitor()


def _write(path: Path, content: Any) -> None:
    with path.open("wb") as stream:
        stream.write(memoryview(content))
        stream.flush()
        os.fsync(stream.fileno())


def _end_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, so that nothing builds for nobody."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that ordered this build is gone")


def _volunteer_for_the_oom_killer() -> None:
    """Where memory runs out, end the build and not the desktop; best effort."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=BuildOrder)
    _end_with_parent(order.parent)
    _volunteer_for_the_oom_killer()

    events = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not stand among the events

    def say(event: BuildEvent) -> None:
        events.write(msgspec.json.encode(event) + b"\n")
        events.flush()

    started = time.perf_counter()
    try:
        with quiet_deprecations():
            build_plan(order, lambda progress: say(BuildEvent(progress=progress)))
    except PaliEdgeError as error:
        say(BuildEvent(error=error.found, action=error.action))
        raise SystemExit(1) from error
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(BuildEvent(cost=BuildCost(seconds=time.perf_counter() - started, peak_memory=peak_memory)))


if __name__ == "__main__":
    main()
