"""x86 without VNNI, emulated: Haswell (AVX2) and Nehalem (SSE4.2, no AVX), with the wheels that a user has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from paliedge.bundle import Bundle
from tests.locks import LOCKS, pip
from tests.paths import ROOT, SHAPES_CHECKPOINT
from tests.system.answering import AS_IT_IS, Answers, equal, furthest
from tests.system.conftest import BUNDLES, SIGNED, by_name
from tests.system.roots import require

QEMU = "qemu-x86_64-static"
SATURATING = "Haswell"
CPUS = (SATURATING, "Nehalem")
NUM_SCENES = 3


@pytest.fixture(scope="module")
def run_as(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run this Python with the runtime's wheels, as another processor; its standard output."""
    require(QEMU)
    site = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", f"--target={site}", "--require-hashes", "-r", LOCKS / "runtime.txt")
    pip("install", "--no-deps", f"--target={site}", "--no-index", wheel)

    def run(cpu: str, *arguments: str) -> str:
        variables = {"PYTHONPATH": f"{site}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
        variables |= {"HOME": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
        # -S: this environment's packages stay out; the interpreter is a program, no link of a virtual environment
        command = [QEMU, "-cpu", cpu, os.path.realpath(sys.executable), "-S", *arguments]
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def scenes(draw_scenes: Callable[[int], Path]) -> Path:
    return draw_scenes(NUM_SCENES)


@pytest.fixture(scope="module")
def here(scenes: Path, answers_here: Callable[[Path], Answers]) -> Answers:
    return answers_here(scenes)


@pytest.fixture(scope="module")
def there(
    run_as: Callable[..., str], bundles: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Answers]:
    """By processor the answers with every bundle; where products saturate, with int8 weights as they are, too."""
    found = {}
    for cpu in CPUS:
        out = tmp_path_factory.mktemp("answers") / f"{cpu}.json"
        asked = [str(bundles / name) for name in BUNDLES]
        asked += [AS_IT_IS + str(bundles / SIGNED)] if cpu == SATURATING else []
        run_as(cpu, "-m", "tests.system.answering", str(scenes), str(out), *asked)
        found[cpu] = by_name(json.loads(out.read_text()))
    return found


@pytest.mark.parametrize("cpu", CPUS)
def test_fp32_and_fp16_give_this_machines_tokens(cpu: str, here: Answers, there: dict[str, Answers]) -> None:
    for name in ("fp32", "fp16"):
        assert equal(here[name], there[cpu][name]) == 1
        assert furthest(here[name], there[cpu][name]) < 1e-3


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", ["int8", "int4", SIGNED])
def test_integers_are_as_near_to_fp32_as_here(cpu: str, name: str, here: Answers, there: dict[str, Answers]) -> None:
    """The products are the same to the last bit; what is left are floats between them that round apart."""
    assert equal(there[cpu]["fp32"], there[cpu][name]) >= equal(here["fp32"], here[name]) - 1 / len(here["fp32"])
    assert equal(here[name], there[cpu][name]) >= 0.9
    assert furthest(here[name], there[cpu][name]) < 0.2


@pytest.mark.parametrize("cpu", CPUS)
def test_every_product_is_exact(cpu: str, there: dict[str, Answers]) -> None:
    assert there[cpu]["arithmetic"] == {"eight_bit": {}, "blocks": {}, "float16": {}}


def test_without_the_remedy_the_probe_tells_and_answers_are_off(
    run_as: Callable[..., str], here: Answers, there: dict[str, Answers]
) -> None:
    """A control: what the tests above would see of products that are cut at 16 bits."""
    code = "from paliedge import ort_session\nort_session._EXACT = ()\nprint(ort_session.examine_arithmetic('eight_bit'))"
    assert "wrong" in run_as(SATURATING, "-c", code)
    assert "int8 weights" in run_as(SATURATING, "-c", code)
    off = there[SATURATING][AS_IT_IS + SIGNED]
    assert equal(here[SIGNED], off) < 0.9 or furthest(here[SIGNED], off) > 0.2


JUDGE = """
import sys
from pathlib import Path
from paliedge_export.exporter import export_bundle
export_bundle(sys.argv[1], Path(sys.argv[2]), targets=["cpu", "jetpack6", "jetpack7"], precision="int8")
"""


def test_the_exporters_gate_gives_the_same_verdict(tmp_path: Path) -> None:
    """int8 for ONNX Runtime and for TensorRT, judged here and where products saturate."""
    require(QEMU)
    comparisons = []
    for name, before in (("here", []), ("there", [QEMU, "-cpu", SATURATING])):
        command = [*before, sys.executable, "-c", JUDGE, str(SHAPES_CHECKPOINT), str(tmp_path / name)]
        if before:
            command[len(before)] = os.path.realpath(sys.executable)
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, _packages())), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        comparisons.append(Bundle(tmp_path / name).manifest.comparisons)
    assert set(comparisons[0]) == {"cpu", "jetpack6", "jetpack7"}
    for target, judged in comparisons[0].items():
        other = comparisons[1][target]
        assert other.image_features.mean == pytest.approx(judged.image_features.mean, abs=2e-4), target
        assert other.last_hidden.mean == pytest.approx(judged.last_hidden.mean, abs=2e-3), target
        assert other.token_match == pytest.approx(judged.token_match, abs=0.02), target
        assert other.box_iou == pytest.approx(judged.box_iou, abs=0.02), target


def _packages() -> list[Path]:
    """Where this environment's packages and the project lie, for its interpreter outside of it."""
    import site

    return [ROOT / "runtime", ROOT / "export", *map(Path, site.getsitepackages())]
