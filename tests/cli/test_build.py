"""`paliedge build` as a user meets it: TensorRT for RTX builds the shapes model here, and no GPU runs it."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from paliedge.backends.trt.match import PARTS
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import MANIFEST
from paliedge.cli import main
from paliedge.cli.demo import DEMO_SCENES
from paliedge.errors import BuildError
from paliedge.model import SHIPPED_BUNDLE
from paliedge.planning.memory import FreeMemory
from tests.cli.test_predict import LABELS, SCENE, run
from tests.paths import SHAPES_CHECKPOINT

COMMAND = [sys.executable, "-c", "from paliedge.cli import main; main()"]
PART = re.compile(r"built (vision_encoder|decoder|mask_decoder) in \d+ s, \d+\.\d GB of host memory at its peak")


def run_without_gpu(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def run_on_terminal(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, and what a terminal gets from stderr."""
    terminal, its_other_end = pty.openpty()
    command = [*COMMAND, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=its_other_end, text=True) as child:
        os.close(its_other_end)
        shown = b""
        try:
            while piece := os.read(terminal, 4096):
                shown += piece
        except OSError:  # Linux's way to say that the other end is closed
            os.close(terminal)
        stdout = child.communicate()[0]
    return child.returncode, stdout, shown.decode()


@dataclass(frozen=True)
class Built:
    """A bundle that was exported and built by the verbs, and what the build said."""

    folder: Path
    stdout: str
    terminal: str


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    targets = [word for name in ("jetpack6", "jetpack7", "rtx") for word in ("--target", name)]
    assert run("export", SHAPES_CHECKPOINT, "-o", folder, *targets).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def built(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(exported, folder)
    code, stdout, terminal = run_on_terminal("build", folder, "--flavour", "rtx")
    assert code == 0, terminal
    return Built(folder, stdout, terminal)


def test_a_build_says_what_it_made(built: Built) -> None:
    (engine,) = Bundle(built.folder).manifest.engines
    assert (engine.flavour, engine.target, engine.precision, engine.compute_capability) == ("rtx", "rtx", "fp16", "any")
    assert engine.mask_decoder is not None
    plans = (engine.vision_encoder, engine.decoder, engine.mask_decoder)
    for line, plan in zip(built.stdout.splitlines(), plans, strict=True):
        size = (built.folder / plan.file).stat().st_size
        assert size > 100_000
        assert line == f"{built.folder / plan.file}: {size / 1e6:.1f} MB"


def test_a_terminal_sees_progress_in_one_line_a_part(built: Built) -> None:
    shown = built.terminal.replace("\r\n", "\n").split("\n")
    assert len(shown) == 11
    assert shown.pop() == ""
    assert re.fullmatch(r"a token moves \S+ MB, 1\.\d\d times the \S+ MB that it must", shown.pop())
    for part, (starts, progress, ends) in zip(PARTS, (shown[:3], shown[3:6], shown[6:]), strict=True):
        assert re.fullmatch(rf"building {part} for TensorRT for RTX \S+ from rtx's graphs", starts)
        steps = [int(step) for step in re.findall(rf"\r  {part} +(\d+)%", progress)]
        assert len(steps) > (0 if part == "mask_decoder" else 2)
        assert steps == sorted(steps)
        assert steps[-1] <= 100
        found = PART.fullmatch(ends)
        assert found
        assert found[1] == part


def test_info_shows_the_engine(built: Built) -> None:
    result = run("info", built.folder)
    assert result.exit_code == 0
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("engine rtx "))
    assert line.endswith("for compute capability any, fp16, from rtx's graphs")
    (engine,) = json.loads(run("info", built.folder, "--json").stdout)["engines"]
    assert engine["version"] in line


def test_without_a_gpu_onnx_runtime_answers_and_one_line_says_why(built: Built, exported: Path) -> None:
    result = run_without_gpu("detect", SCENE, LABELS, "-m", built.folder)
    assert result.returncode == 0
    assert result.stdout == run("detect", SCENE, LABELS, "-m", exported).stdout != ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("using ONNX Runtime on the CPU (not rtx: ")
    assert "`paliedge doctor`" in line


def test_an_engine_that_is_asked_for_by_name_needs_a_gpu(built: Built) -> None:
    result = run_without_gpu("detect", SCENE, LABELS, "-m", built.folder, "--backend", "rtx")
    assert (result.returncode, result.stdout) == (1, "")
    expected, _found, action = result.stderr.splitlines()
    assert expected == "error: expected an NVIDIA GPU with its driver"
    assert "`--backend cpu`" in action


def test_verify_reads_the_plans_too(built: Built, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(built.folder, folder)
    plan = folder / Bundle(folder).manifest.engines[0].decoder.file
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    result = run("verify", folder, "--backend", "cpu")
    assert result.exit_code == 3
    assert plan.name in result.stderr


def test_a_second_build_finds_the_first(built: Built) -> None:
    before = (built.folder / MANIFEST).stat()
    result = run("build", built.folder, "--flavour", "rtx")
    assert (result.exit_code, result.stdout) == (0, built.stdout)
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(r"the bundle has an engine for TensorRT for RTX \S+ already", line)
    assert (built.folder / MANIFEST).stat() == before


def test_force_builds_again_without_progress_in_a_log(built: Built, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(built.folder, folder)
    result = run("build", folder, "--flavour", "rtx", "--force", "--json")
    assert result.exit_code == 0
    assert [bool(PART.fullmatch(line)) for line in result.stderr.splitlines()] == [*[False, True] * 3, False]
    assert "%" not in result.stderr
    engine = json.loads(result.stdout)
    assert [engine] == json.loads(run("info", folder, "--json").stdout)["engines"]
    plans = {engine[part]["file"] for part in PARTS}
    assert {path.name for path in folder.glob("*.plan")} == plans
    assert not list(folder.glob(".engines*"))


def test_a_bundle_for_the_cpu_alone_is_told_how_to_be_exported(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(SHIPPED_BUNDLE, folder)
    result = run("build", folder, "--flavour", "rtx")
    assert (result.exit_code, result.stdout) == (4, "")
    expected, found, action = result.stderr.splitlines()
    assert "target rtx or jetpack7 or jetpack6" in expected
    assert found.strip() == "found a bundle for cpu"
    assert action.strip() == "Export it again: `paliedge export CHECKPOINT -o BUNDLE --target rtx`."


@pytest.mark.parametrize(
    ("free", "found"), [(FreeMemory(400_000_000, 0), "0.4 GB free"), (FreeMemory(10**8, 2 * 10**8), "0.3 GB free")]
)
def test_a_build_that_does_not_fit_is_refused_with_figures(
    free: FreeMemory, found: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paliedge.backends.trt.build.available_memory", lambda: free)
    before = sorted(exported.iterdir())
    result = run("build", exported, "--flavour", "rtx")
    assert (result.exit_code, result.stdout) == (4, "")
    assert re.search(r"expected 0\.6 GB of memory and swap to build the decoder of 'rtx': 3\.5 x its", result.stderr)
    assert f"found {found}" in result.stderr
    assert "Add 1 GB of swap." in result.stderr
    assert sorted(exported.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["absent"], 3, "no bundle.json there"),
        (["x" * 300], 3, "no bundle.json there"),
        ([SHIPPED_BUNDLE, "--flavour", "cuda"], 2, "'cuda' is not one of"),
        ([SHIPPED_BUNDLE, "--workspace", "0"], 2, "x>=1"),
        ([], 2, "Missing argument"),
    ],
)
def test_errors_have_their_exit_code(arguments: list[object], exit_code: int, words: str) -> None:
    result = run("build", "--flavour", "rtx", *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("flavour", "module", "action"),
    [("tensorrt", "tensorrt", "apt install"), ("rtx", "tensorrt_rtx", 'pip install "paliedge[rtx]"')],
)
def test_a_flavour_that_is_not_installed_is_told_how_to_be(
    flavour: str, module: str, action: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = run("build", exported, "--flavour", flavour)
    assert (result.exit_code, result.stdout) == (1, "")
    assert action in result.stderr
    result = run("build", SHIPPED_BUNDLE, "--flavour", flavour)
    assert result.exit_code == 4, "it has nothing to build anyway"
    assert "found a bundle for cpu" in result.stderr


def test_without_any_tensorrt_both_ways_to_one_are_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    result = run("build", exported)
    assert result.exit_code == 1
    assert "apt install" in result.stderr
    assert 'pip install "paliedge[rtx]"' in result.stderr


@pytest.mark.parametrize("harm", ["lost", "longer", "altered"])
def test_an_engine_that_is_not_as_it_was_built_is_refused_and_built_again(
    harm: str, built: Built, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(built.folder, folder)
    plan = next(folder.glob("decoder.*.plan"))
    content = bytearray(plan.read_bytes())
    plan.unlink()
    if harm != "lost":
        content[1000] ^= 1
        plan.write_bytes(content + (b"more" if harm == "longer" else b""))
    result = run("detect", DEMO_SCENES / "scene-1.png", "yellow star", "-m", folder)
    assert result.exit_code == 3
    assert f"paliedge build {folder}" in result.stderr
    result = run("build", folder, "--flavour", "rtx")
    assert result.exit_code == 0
    assert "building again" in result.stderr
    assert run("detect", DEMO_SCENES / "scene-1.png", "yellow star", "-m", folder).exit_code == 0


def test_options_reach_the_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def build(folder: Path, flavour: str | None, **options: Any) -> None:
        asked.append({"folder": folder, "flavour": flavour, **options})
        raise BuildError(expected="a", found="b", action="c")

    monkeypatch.setattr("paliedge.backends.trt.build.build_engine", build)
    assert run("build", "B").exit_code == 1
    assert run("build", "B", "--flavour", "rtx", "--workspace", "64", "--force").exit_code == 1
    environment = {"MODEL": "B", "FLAVOUR": "tensorrt", "WORKSPACE": "2", "FORCE": "1"}
    assert run("build", env={f"PALIEDGE_{name}": value for name, value in environment.items()}).exit_code == 1
    names = ("folder", "flavour", "workspace", "force")
    assert [tuple(one[name] for name in names) for one in asked] == [
        (Path("B"), None, None, False),
        (Path("B"), "rtx", 64 << 20, True),
        (Path("B"), "tensorrt", 2 << 20, True),
    ]


def test_an_error_stands_below_the_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: object, **options: Any) -> None:
        options["report"]("building decoder")
        options["on_progress"]("decoder", 0.5)
        raise BuildError(expected="a plan", found="none", action="Look.")

    monkeypatch.setattr("paliedge.backends.trt.build.build_engine", build)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["build", "B"], standalone_mode=False) == 1
    assert capsys.readouterr().err.split("\n")[:3] == ["building decoder", "\r  decoder  50%", "error: expected a plan"]
