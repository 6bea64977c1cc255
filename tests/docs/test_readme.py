"""The README's commands work, and its outputs are what they print."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench_report, precision_table
from benchmarks.shapes.precisions import find_losses
from paliedge.bundle.bundle import Bundle
from paliedge.model import SHIPPED_BUNDLE
from tests.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return [content for name, content in BLOCKS if name == language]


def run_shell(command: str, folder: Path) -> str:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    for name in ("MAKEFLAGS", "MAKELEVEL"):  # `make test` runs this test; the reader's make is not its child
        environment.pop(name, None)
    result = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's files by their names, in a place of its own."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("Makefile", "benchmarks", "locks", "pyproject.toml", "runtime", "export"):
        (folder / name).symlink_to(ROOT / name)
    environment = folder / ".venv" / "export"
    environment.mkdir(parents=True)
    (environment / "bin").symlink_to(BIN)  # stands for what `make demo` installs
    (environment / "lock.txt").touch()
    (environment / "ready").touch()
    return folder


def test_the_first_two_commands_are_the_two_the_project_promises() -> None:
    assert blocks("sh")[0].split("\n")[:2] == ["make demo", "make test"]


def test_make_demo_prints_what_the_readme_shows_and_leaves_pictures(project: Path) -> None:
    output = run_shell("make demo", project)
    shown = next(content for content in blocks("console") if content.startswith("$ make demo\n"))
    assert output.splitlines() == shown.splitlines()[1:]
    assert len(list((project / "demo_output").glob("*.png"))) == 3


@pytest.mark.parametrize("command", [line for block in blocks("bash") for line in block.splitlines()])
def test_every_command_of_the_readme_runs(command: str, project: Path) -> None:
    assert run_shell(command, project)


@pytest.mark.parametrize("code", blocks("python"))
def test_every_python_example_of_the_readme_runs(code: str, project: Path) -> None:
    assert subprocess.run([sys.executable, "-c", code], cwd=project, check=True, capture_output=True).stdout


def test_every_file_that_the_readme_links_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_precision_tables_are_made_from_the_stored_results() -> None:
    assert precision_table.render() in README


def test_the_performance_section_is_made_from_the_stored_results() -> None:
    assert bench_report.render() in README


def test_no_precision_costs_more_than_it_may() -> None:
    exports = json.loads((RESULTS / "shapes_precisions.json").read_text())["exports"]
    assert {(one["target"], one["precision"]) for one in exports} >= {
        (target, precision) for target in ("cpu", "jetpack6", "jetpack7") for precision in ("fp16", "int8", "int4")
    }
    assert all(one["scores"]["num_scenes"] == 500 for one in exports)
    assert find_losses(exports) == []


def test_bundles_are_as_small_and_as_planned() -> None:
    engines = json.loads((RESULTS / "peers_3b.json").read_text())["engines"]
    for name, largest in (("paliedge int8", 3.2e9), ("paliedge int4", 2.6e9)):
        assert engines[name]["bundle_bytes"] <= largest
        assert abs(engines[name]["plan_over_files"] - 1) <= 0.05
    reduced, whole = (engines[name]["decoder_bytes"] for name in ("paliedge int4, reduced head", "paliedge int4"))
    assert reduced < 0.7 * whole


def test_the_scores_are_those_of_the_shipped_bundle() -> None:
    scores = json.loads((ROOT / "benchmarks" / "results" / "shapes_quality.json").read_text())
    assert scores["bundle"] == Bundle(SHIPPED_BUNDLE).manifest.sha256


def test_the_scores_are_what_the_project_asks_of_them() -> None:
    """Masks that can be used, and a confidence that ranks boxes better than none does."""
    scores = json.loads((RESULTS / "shapes_quality.json").read_text())["scores"]
    assert scores["num_scenes"] == 500
    assert scores["segment_mean_iou"] >= 0.8
    assert scores["segment_mean_iou_only_asked"] >= 0.8
    assert scores["detect_ap50"] > scores["detect_ap50_unscored"]


def test_the_readmes_figures_are_the_stored_ones() -> None:
    """Each number in a table with a `from` column stands in that JSON file."""
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| `(\w+\.json)` `([\w./]+)` \|$", README, re.MULTILINE)
    assert len(rows) >= 8
    for name, figure, file, place in rows:
        value = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
        for key in place.split("/"):
            value = value[int(key)] if isinstance(value, list) else value[key]
        digits = len(figure.partition(".")[2])
        assert round(float(value), digits) == float(figure), name
