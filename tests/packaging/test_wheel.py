"""What is in the wheel, and what installing it brings."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.locks import LOCKS, Machine, download
from tests.paths import ROOT, SHAPES_CHECKPOINT

MAX_PACKAGES = 30
MAX_WHEEL_BYTES = 60_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_is_the_two_packages_as_git_has_them(wheel: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "runtime", "export"], cwd=ROOT, capture_output=True, text=True)
    tracked = {name.split("/", 1)[1] for name in listed.stdout.split()}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == tracked
    assert {"paliedge/py.typed", "paliedge/shapes/bundle.json", "paliedge_export/py.typed"} <= packed


def test_the_wheel_carries_its_licence_and_its_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "paliedge = paliedge.cli:main" in entry_points


JETSONS = {"jetpack6": Machine("3.10.12", "aarch64", 35), "jetpack7": Machine("3.12.3", "aarch64", 39)}


@pytest.mark.parametrize("machine", JETSONS.values(), ids=JETSONS)
def test_core_and_cpu_stay_within_the_budget_on_a_jetson(wheel: Path, machine: Machine, tmp_path: Path) -> None:
    """At most 30 packages and 60 MB of wheels, ours included, for the board's processor and Python."""
    files = [wheel, *download(machine, "runtime", tmp_path / "wheels").iterdir()]
    names = {path.name.split("-")[0] for path in files}
    assert {"paliedge", "onnxruntime", "numpy", "pillow", "tokenizers"} <= names
    assert not names & {"torch", "transformers", "onnx", "opencv_python", "opencv_python_headless"}
    assert len(files) <= MAX_PACKAGES
    assert sum(path.stat().st_size for path in files) <= MAX_WHEEL_BYTES


def test_core_and_cpu_alone_run_the_demo(wheel: Path, tmp_path: Path) -> None:
    """In an environment with nothing else, and no way to fetch anything more."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    subprocess.run([*install, "--require-hashes", "-r", LOCKS / "runtime.txt"], check=True, capture_output=True)
    subprocess.run([*install, wheel], check=True, capture_output=True)
    offline = {"HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    demo = subprocess.run(
        [environment / "bin" / "paliedge", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env=offline,
    )
    assert "detect" in demo.stdout
    assert len(list((tmp_path / "demo_output").glob("*.png"))) == 3
    for absent in ("torch", "transformers", "onnx"):
        assert subprocess.run([python, "-c", f"import {absent}"], capture_output=True, check=False).returncode != 0


def test_the_shipped_checkpoint_is_small() -> None:
    assert (SHAPES_CHECKPOINT / "model.safetensors").stat().st_size <= 12_000_000


def test_nothing_in_the_project_names_a_registry_or_unpickles() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    suspicious = re.compile(
        r"https?://[^\s\"']*(?:pypi|pythonhosted|npmjs|debian)\."
        r"|^\s*(?:import|from) pickle|allow_pickle=True|(?<!\.)\beval\(",
        re.MULTILINE,
    )
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".toml", ".md", ".yaml", ".json") and path != Path(__file__):
            assert not suspicious.search(path.read_text()), name
