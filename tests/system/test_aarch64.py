"""The product on aarch64, emulated with the instructions of an Orin's cores: dot products and float16, no more."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from paliedge.cli import main
from tests.locks import Machine
from tests.paths import ROOT
from tests.system.answering import AS_IT_IS, Answers, equal, furthest
from tests.system.conftest import FLOAT16, PRECISIONS, by_name
from tests.system.roots import BUILD, Root, require_arm64

CPU = "cortex-a76"
"""qemu's nearest: a Cortex-A78AE has the same instructions for products."""
FEATURES = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp uscat "
    "ilrcpc flagm paca pacg"
)
NUM_SCENES = 5
SCENES = ROOT / "runtime/paliedge/scenes"
TEST_PACKAGES = (
    *("pytest", "iniconfig", "pluggy", "pygments", "hypothesis", "sortedcontainers", "contourpy", "av"),
    *("jiwer", "rapidfuzz", "pycocotools", "cuda-bindings", "cuda-pathfinder"),
)
MODEL = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
VERBS = (
    ("detect", "yellow star ; green circle"),
    ("segment", "yellow star"),
    ("caption", None),
    ("ocr", None),
)


@pytest.fixture(scope="module")
def root(wheel: Path) -> Root:
    require_arm64()
    made = Root(BUILD / "aarch64", "bookworm", "arm64", Machine("3.11.2", "aarch64", 36))
    made.make()
    core = "processor\t: {}\nBogoMIPS\t: 62.50\nFeatures\t: " + FEATURES
    core += (
        "\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd42\nCPU revision\t: 1\n\n"
    )
    (made.folder / "cpuinfo").write_text(core.format(0) + core.format(1))  # qemu 7.2 shows this machine's
    made.install(wheel, ["runtime"], TEST_PACKAGES)
    made.copy_project()
    assert made.run("python3", "-c", "import platform; print(platform.machine())", QEMU_CPU=CPU).stdout == "aarch64\n"
    return made


@pytest.fixture(scope="module", autouse=True)
def bare_tests(root: Root) -> Iterator[Future[subprocess.CompletedProcess[str]]]:
    """The project's own tests, beside all others: there is a second core."""
    command = ("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "bare and not whole")
    with ThreadPoolExecutor() as pool:
        yield pool.submit(lambda: root.run(*command, QEMU_CPU=CPU, check=False))


@pytest.fixture(scope="module")
def paliedge(root: Root) -> Callable[..., str]:
    """The command in the root; its standard output."""
    return lambda *arguments, **options: root.run("paliedge", *arguments, QEMU_CPU=CPU, **options).stdout


def test_the_demo_runs_and_the_bundle_is_as_exported(root: Root, paliedge: Callable[..., str]) -> None:
    assert "yellow star" in paliedge("demo", "--save", "/out/demo")
    assert len(list((root.path / "out/demo").glob("*.png"))) == 3
    assert "golden answers equal" in paliedge("verify")


@pytest.mark.parametrize(("verb", "ask"), VERBS)
def test_a_verb_answers_as_on_x86(verb: str, ask: str | None, paliedge: Callable[..., str]) -> None:
    words = [ask] if ask else []
    here = CliRunner().invoke(main, [verb, str(SCENES), *words, "--json"], catch_exceptions=False).stdout
    there = paliedge(verb, "/src/runtime/paliedge/scenes", *words, "--json")
    pairs = list(zip(*([json.loads(line) for line in text.splitlines()] for text in (here, there)), strict=True))
    assert len(pairs) == 3
    for x86, arm in pairs:
        for key in ("token_ids", "text", "finish_reason"):
            assert arm[key] == x86[key]
        assert [one["box"] for one in arm["detections"]] == [one["box"] for one in x86["detections"]]
        assert arm["log_probs"] == pytest.approx(x86["log_probs"], abs=1e-4)


@pytest.fixture(scope="module")
def answers(
    root: Root, bundles: Path, draw_scenes: Callable[[int], Path], answers_here: Callable[[Path], Answers]
) -> tuple[Answers, Answers]:
    """x86's and aarch64's, of every precision and of the two bundles whose arithmetic is not to be trusted."""
    scenes = draw_scenes(NUM_SCENES)
    for name in (*PRECISIONS, FLOAT16):
        shutil.copytree(bundles / name, root.path / "out" / name, dirs_exist_ok=True)
    shutil.copy(scenes, root.path / "out/scenes.npz")
    asked = [f"/out/{name}" for name in PRECISIONS] + [f"{AS_IT_IS}/out/{FLOAT16}"]
    command = ("python3", "-m", "tests.system.answering", "/out/scenes.npz", "/out/arm.json", *asked)
    root.run(*command, QEMU_CPU=CPU)
    return answers_here(scenes), by_name(json.loads((root.path / "out/arm.json").read_text()))


def test_fp32_gives_the_same_tokens(answers: tuple[Answers, Answers]) -> None:
    x86, arm = answers
    assert equal(x86["fp32"], arm["fp32"]) == 1
    assert furthest(x86["fp32"], arm["fp32"]) < 1e-3


@pytest.mark.parametrize(("name", "allowed"), [("fp16", 0.0), ("int8", 0.15), ("int4", 0.15)])
def test_a_precision_is_as_near_to_fp32_as_on_x86(
    name: str, allowed: float, answers: tuple[Answers, Answers], capsys: pytest.CaptureFixture[str]
) -> None:
    x86, arm = answers
    there, here = equal(arm["fp32"], arm[name]), equal(x86["fp32"], x86[name])
    with capsys.disabled():
        same = equal(x86[name], arm[name])
        print(f"\n{name}: answers equal to fp32's {there:.2f} on aarch64, {here:.2f} on x86; to x86's {same:.2f}")
    assert there >= here - allowed


def test_8_bit_products_are_exact_and_float16_sums_are_told(answers: tuple[Answers, Answers]) -> None:
    """A control: the same fp16 weights multiplied in float16 are refused where their answers are off."""
    _, arm = answers
    assert arm["arithmetic"]["eight_bit"] == arm["arithmetic"]["blocks"] == {}
    if arm["arithmetic"]["float16"]:
        assert equal(arm["fp32"], arm[AS_IT_IS + FLOAT16]) < 0.9
    else:
        assert equal(arm["fp32"], arm[AS_IT_IS + FLOAT16]) > 0.9


def test_a_graph_of_float16_products_is_refused(root: Root, answers: tuple[Answers, Answers]) -> None:
    assert answers[1]["arithmetic"]["float16"], "this ONNX Runtime adds up in float32: its graphs need no refusal"
    ask = ("caption", "/src/runtime/paliedge/scenes", "-m", f"/out/{FLOAT16}")
    refused = root.run("paliedge", *ask, check=False, QEMU_CPU=CPU)
    assert refused.returncode == 4
    assert "--target cpu" in refused.stderr


BENCH = """
from paliedge.bench import runner
from paliedge.bench.roofs import no_roofs
from paliedge.cli import main
runner._measure_roofs = lambda *arguments, **options: no_roofs("emulated")
main({arguments!r})
"""
"""All of it but the roofs, which take minutes under qemu."""


@pytest.fixture
def board(root: Root) -> Any:
    """The root with an Orin Nano's files in it."""
    files = {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
        "sys/firmware/devicetree/base/model": MODEL + "\0",
        "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/in1_label": "VDD_IN\n",
        "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/in1_input": "5000\n",
        "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr1_input": "1200\n",
        "usr/bin/nvpmodel": "#!/bin/sh\necho 'NV Power Mode: MAXN_SUPER'\necho 2\n",
    }
    for name, content in files.items():
        (root.path / name).parent.mkdir(parents=True, exist_ok=True)
        (root.path / name).write_text(content)
    (root.path / "usr/bin/nvpmodel").chmod(0o755)
    yield root
    for name in files:
        (root.path / name).unlink()


def test_doctor_reads_a_boards_files(board: Root, paliedge: Callable[..., str]) -> None:
    found = {one["topic"]: one["value"] for one in json.loads(paliedge("doctor", "--json"))}
    assert found["jetson"] == MODEL
    assert found["jetpack"] == "6.2 (L4T 36.4.3)"
    assert found["power mode"] == "MAXN_SUPER"
    assert "8-bit products: exact" in found["arithmetic"]


def test_plan_and_bench_run_on_a_board(board: Root, paliedge: Callable[..., str]) -> None:
    assert "orin-nano-8gb" in paliedge("plan")
    options = ("--runs", "2", "--max-new-tokens", "4", "--scenario", "single-stream", "--no-cold-start", "--json")
    arguments = ["bench", "/src/runtime/paliedge/scenes", "-m", "/out/int8", *options]
    record = json.loads(board.run("python3", "-c", BENCH.format(arguments=arguments), QEMU_CPU=CPU).stdout)
    assert record["conditions"]["board"] == MODEL
    assert record["conditions"]["power mode"] == "MAXN_SUPER"
    assert record["conditions"]["arithmetic"].startswith("8-bit products: exact")
    assert "asimddp" in record["conditions"]["instructions"]
    assert record["runs"][0]["energy"]["watts"] == pytest.approx(6.0, rel=0.2)


def test_the_tests_that_need_neither_torch_nor_onnx(
    bare_tests: Future[subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    ran = bare_tests.result()
    with capsys.disabled():
        print("\naarch64:", ran.stdout.strip().splitlines()[-1])
    assert ran.returncode == 0, ran.stdout[-5000:]
