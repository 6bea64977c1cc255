"""Builds that are killed, and builds that meet."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paliedge.backends.trt.build import build_engine
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.publish import wait_for_folder
from tests.bundles import copy_bundle
from tests.fakes.cuda_runtime import FakeCuda
from tests.fakes.machine import Machine, fake_machine
from tests.fakes.tensorrt import GO
from tests.paths import ROOT

NUM_KILLS = 10
BUILDER = """
import signal, sys
from pathlib import Path
from paliedge.backends.trt.build import build_engine
from tests.fakes.cuda_runtime import FakeCuda
from tests.fakes.machine import fake_machine

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a script's background has it ignored
bundle, folder, seconds, force = sys.argv[1:]
with fake_machine(Path(folder), cuda=FakeCuda()) as machine:
    machine.break_builder("", seconds=float(seconds))
    print("ready", flush=True)
    build_engine(Path(bundle), force=force == "force", report=lambda line: print(line, flush=True))
"""


@contextmanager
def building(bundle: Path, folder: Path, seconds: float, force: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process that builds, past its imports."""
    command: list[str | Path] = [sys.executable, "-c", BUILDER, bundle, folder, str(seconds), force]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        except BaseException:
            process.kill()
            raise


@pytest.fixture
def bundle(bundles: dict[str, Path], tmp_path: Path) -> Path:
    return copy_bundle(bundles["paligemma"], tmp_path)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with fake_machine(tmp_path / "machine", cuda=FakeCuda()) as made:
        yield made


def is_running(process: int) -> bool:
    """Not dead, and no zombie that nobody has asked about."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_gone(process: int) -> None:
    deadline = time.monotonic() + 5
    while is_running(process):
        assert time.monotonic() < deadline, f"process {process} still builds for nobody"
        time.sleep(0.01)


def leftovers(bundle: Path) -> set[str]:
    """What the manifest does not name."""
    return {path.name for path in bundle.iterdir()} - set(Bundle(bundle).manifest.files) - {"bundle.json"}


def test_a_kill_at_any_moment_leaves_a_whole_bundle_and_no_child(bundle: Path, machine: Machine) -> None:
    build_engine(bundle)
    rng = random.Random(0)
    interrupted = 0
    for _ in range(NUM_KILLS):
        num_builds = len(machine.builds())
        with building(bundle, machine.folder, 0.25, "force") as process:
            time.sleep(rng.uniform(0.05, 0.65))
            process.kill()
        for build in machine.builds()[num_builds:]:
            assert_gone(build["process"])
        opened = Bundle(bundle)
        opened.verify_hashes()
        assert len(opened.manifest.engines) == 1
        interrupted += bool(leftovers(bundle))
        with wait_for_folder(bundle, pytest.fail):
            pass
    assert interrupted > NUM_KILLS // 3, "the kills came between two builds"
    engine = build_engine(bundle, force=True)
    assert leftovers(bundle) == set()
    assert set(engine.files) < set(Bundle(bundle).manifest.files)


def test_a_child_that_builds_for_hours_ends_with_its_parent(bundle: Path, machine: Machine) -> None:
    with building(bundle, machine.folder, 3600) as process:
        while not machine.builds():
            time.sleep(0.01)
        (build,) = machine.builds()
        assert is_running(build["process"])
        os.kill(process.pid, signal.SIGKILL)
    assert_gone(build["process"])
    assert Bundle(bundle).manifest.engines == ()
    machine.break_builder("")
    build_engine(bundle)
    assert leftovers(bundle) == set()


def test_an_interrupt_ends_the_child_and_leaves_nothing(bundle: Path, machine: Machine) -> None:
    with building(bundle, machine.folder, 3600) as process:
        while not machine.builds():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.wait(10)
    assert_gone(machine.builds()[0]["process"])
    assert leftovers(bundle) == set()


def test_an_error_of_the_caller_ends_the_child(bundle: Path, machine: Machine) -> None:
    """And does not wait for it."""

    def fail(part: str, progress: float) -> None:
        raise RuntimeError("no place to show progress")

    machine.break_builder("", seconds=60)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="no place"):
        build_engine(bundle, on_progress=fail)
    assert time.monotonic() < started + 10
    assert_gone(machine.builds()[0]["process"])
    assert leftovers(bundle) == set()


def test_two_builds_at_once_are_one(bundle: Path, machine: Machine) -> None:
    with building(bundle, machine.folder, 60) as first:
        while not machine.builds():
            time.sleep(0.01)
        with building(bundle, machine.folder, 60) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "waiting for another build of this bundle\n"
            (machine.folder / GO).touch()
            said, _ = second.communicate(timeout=60)
        assert first.wait(60) == second.returncode == 0
    assert said == "the bundle has an engine for TensorRT 10.3.0 on compute capability 8.7 already\n"
    assert len(machine.builds()) == 2
    assert len(Bundle(bundle).manifest.engines) == 1
    assert leftovers(bundle) == set()


def test_a_kill_at_each_step_of_publishing_leaves_a_whole_bundle(
    bundle: Path, machine: Machine, tmp_path: Path
) -> None:
    build_engine(bundle)
    (tmp_path / "steps").mkdir()
    command: list[str | Path] = [sys.executable, "-m", "tests.fakes.kill_points", bundle, tmp_path / "steps"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15
