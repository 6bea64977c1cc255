"""x86 without VNNI, emulated: Haswell (AVX2) and Nehalem (SSE4.2, no AVX), with the wheels that a user has."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paliedge.backends import ort
from paliedge.backends.arithmetic import probe
from paliedge.bundle.bundle import Bundle
from tests.locks import LOCKS, pip
from tests.paths import ROOT, SHAPES_CHECKPOINT
from tests.system.answering import AS_IT_IS, Answers, distance, equal, furthest
from tests.system.conftest import BUNDLES, SIGNED, by_name
from tests.system.roots import require

QEMU = "qemu-x86_64-static"
SATURATING, EXACT = "Haswell", "Nehalem"
CPUS = (SATURATING, EXACT)
"""A machine that has no VNNI stands for the first itself."""
NUM_SCENES = 2


@pytest.fixture(scope="module")
def saturates() -> bool:
    """Whether this machine's own kernels cut sums of 8-bit products: it has AVX2 and no VNNI."""
    exact, ort._EXACT = ort._EXACT, ()
    try:
        return bool(probe("signed", lambda path: ort.load_graph(path, num_threads=1)).wrong)
    finally:
        ort._EXACT = exact


@pytest.fixture(scope="module")
def run_as(saturates: bool, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run this Python with the runtime's wheels, as another processor; its standard output."""
    require(QEMU)
    packages = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", f"--target={packages}", "--require-hashes", "-r", LOCKS / "runtime.txt")
    pip("install", "--no-deps", f"--target={packages}", "--no-index", wheel)

    def run(cpu: str, *arguments: str) -> str:
        variables = {"PYTHONPATH": f"{packages}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
        variables |= {"HOME": str(packages), "PYTHONDONTWRITEBYTECODE": "1"}
        # -S: this environment's packages stay out; the interpreter is a program, no link of a virtual environment
        emulated = [] if saturates and cpu == SATURATING else [QEMU, "-cpu", cpu]
        command = [*emulated, os.path.realpath(sys.executable), "-S", *arguments]
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

    def ask(cpu: str) -> Answers:
        out = tmp_path_factory.mktemp("answers") / f"{cpu}.json"
        asked = [str(bundles / name) for name in BUNDLES]
        asked += [AS_IT_IS + str(bundles / SIGNED)] if cpu == SATURATING else []
        run_as(cpu, "-m", "tests.system.answering", str(scenes), str(out), *asked)
        return by_name(json.loads(out.read_text()))

    with ThreadPoolExecutor() as pool:
        return dict(zip(CPUS, pool.map(ask, CPUS), strict=True))


@pytest.mark.parametrize("cpu", CPUS)
def test_fp32_and_fp16_give_this_machines_tokens(cpu: str, here: Answers, there: dict[str, Answers]) -> None:
    for name in ("fp32", "fp16"):
        assert equal(here[name], there[cpu][name]) == 1
        assert furthest(here[name], there[cpu][name]) < 1e-3


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", ["int8", "int4", SIGNED])
def test_integers_are_as_near_to_fp32_as_here(cpu: str, name: str, here: Answers, there: dict[str, Answers]) -> None:
    """The products are the same to the last bit; floats between them that differ in their last bits round apart."""
    elsewhere, own = (distance(answers["fp32"], answers[name]) for answers in (there[cpu], here))
    assert elsewhere == pytest.approx(own, rel=0.1)
    one_answer = 1 / len(here["fp32"]["answers"])
    assert equal(there[cpu]["fp32"], there[cpu][name]) >= equal(here["fp32"], here[name]) - one_answer


@pytest.mark.parametrize("cpu", CPUS)
def test_every_product_is_exact(cpu: str, there: dict[str, Answers]) -> None:
    assert there[cpu]["arithmetic"] == {"eight_bit": {}, "signed": {}, "blocks": {}, "float16": {}}


def test_without_the_remedy_the_probe_tells_and_answers_are_off(
    run_as: Callable[..., str], here: Answers, there: dict[str, Answers]
) -> None:
    """A control: what the tests above would see of products that are cut at 16 bits."""
    code = "from paliedge.backends import ort; ort._EXACT = (); "
    said = run_as(SATURATING, "-c", code + "print(ort.examine_arithmetic('signed'))")
    assert re.fullmatch(r"8-bit products of signed weights: wrong, \S+ of the right sum with int8 weights\n", said)
    answers = there[SATURATING]
    assert distance(answers["fp32"], answers[AS_IT_IS + SIGNED]) > 2 * distance(here["fp32"], here[SIGNED])


JUDGE = """
import sys
from pathlib import Path
from paliedge_export.exporter import export_bundle
from paliedge_export.options import Quantization
export_bundle(
    sys.argv[1], Path(sys.argv[2]), targets=["cpu", "jetpack6", "jetpack7"], precision="int8",
    quantization=Quantization(Path(sys.argv[3])),
)
"""
NUM_JUDGED = 6


def test_the_exporters_gate_gives_the_same_verdict(saturates: bool, tmp_path: Path) -> None:
    """int8 for ONNX Runtime and for TensorRT, judged where products saturate and where not; one of the two is here."""
    require(QEMU)
    samples = tmp_path / "samples"
    samples.mkdir()
    lines = (SHAPES_CHECKPOINT / "calibration/samples.jsonl").read_text().splitlines()
    chosen = [line for line in lines if int(json.loads(line)["image"].split(".")[0]) < NUM_JUDGED]
    (samples / "samples.jsonl").write_text("\n".join(chosen))
    for name in {json.loads(line)["image"] for line in chosen}:
        shutil.copy(SHAPES_CHECKPOINT / "calibration" / name, samples)
    comparisons = []
    for name, before in (("here", []), ("there", [QEMU, "-cpu", EXACT if saturates else SATURATING])):
        python = os.path.realpath(sys.executable) if before else sys.executable
        command = [*before, python, "-c", JUDGE, str(SHAPES_CHECKPOINT), str(tmp_path / name), str(samples)]
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
    return [ROOT / "runtime", ROOT / "export", *map(Path, site.getsitepackages())]
