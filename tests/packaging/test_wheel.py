"""What is in the wheel, and what installing it brings."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.paths import ROOT

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


def test_core_and_cpu_install_within_the_budget_and_run_the_demo(wheel: Path, tmp_path: Path) -> None:
    """At most 30 packages and 60 MB of wheels, ours included; then the demo, with nothing else there."""
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "-q", "-d", str(wheels), f"{wheel}[cpu]"], check=True, capture_output=True)
    files = list(wheels.iterdir())
    assert len(files) <= MAX_PACKAGES
    assert sum(path.stat().st_size for path in files) <= MAX_WHEEL_BYTES
    for absent in ("torch", "transformers", "onnx-", "opencv"):
        assert not any(path.name.startswith(absent) for path in files)

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--no-index", "--find-links", str(wheels), "paliedge[cpu]"]
    subprocess.run(install, check=True, capture_output=True)
    demo = subprocess.run(
        [environment / "bin" / "paliedge", "demo"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "detect" in demo.stdout
    assert list((tmp_path / "demo_output").glob("*.png"))
    check = "import paliedge, sys; from paliedge.cli.bundles import DEMO_SCENES as d; "
    check += "paliedge.PaliGemma.load().detect(next(d.glob('*.png')), ['red circle']); "
    check += "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    subprocess.run([python, "-c", check], check=True, cwd=tmp_path)


def test_nothing_in_the_project_names_a_registry_or_unpickles() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    suspicious = re.compile(
        r"https?://[^\s\"']*(?:pypi|pythonhosted|npmjs|debian)\.|^\s*(?:import|from) pickle|allow_pickle=True|\beval\(",
        re.MULTILINE,
    )
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".toml", ".md", ".yaml", ".json") and path != Path(__file__):
            assert not suspicious.search(path.read_text()), name
