"""The commands of the pages work, and their outputs are what they print."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, README, blocks, name_of
from tests.paths import ROOT

BIN = Path(sys.executable).parent
SHAPES = ROOT / "docs" / "shapes.md"


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


@pytest.fixture(scope="module")
def demo_output(project: Path) -> list[str]:
    return run_shell("make demo", project).splitlines()


@cache
def shown_demo(page: Path) -> list[str]:
    """What a page shows of the demo's output."""
    return next(content for content in blocks(page, "console") if content.startswith("$ make demo\n")).splitlines()[1:]


def of_all_pages(language: str) -> list[object]:
    """Every block of a language, called after its page."""
    return [
        pytest.param(block, id=f"{name_of(page)}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, language), 1)
    ]


BASH_LINES = [
    pytest.param(line, id=f"{name_of(page)}: {line}")
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.splitlines()
]


def test_the_first_two_commands_are_the_two_the_project_promises() -> None:
    commands = [line.partition("#")[0].strip() for line in blocks(README, "sh")[0].splitlines()]
    assert commands == ["make demo", "make test"]


def test_the_commands_behind_the_two_run_in_what_they_installed(project: Path) -> None:
    for command in blocks(README, "sh")[1:]:
        assert run_shell(command, project)


def test_make_demo_prints_what_is_shown_and_leaves_pictures(project: Path, demo_output: list[str]) -> None:
    assert demo_output == shown_demo(SHAPES)
    assert len(list((project / "demo_output").glob("*.png"))) == 3


def test_the_readme_shows_how_the_demo_begins(demo_output: list[str]) -> None:
    *shown, dots = shown_demo(README)
    assert dots == "..."
    assert len(shown) >= 3
    assert shown == demo_output[: len(shown)]


@pytest.mark.parametrize("command", BASH_LINES)
def test_every_command_runs(command: str, project: Path) -> None:
    assert run_shell(command, project)


def test_the_pages_show_commands_that_run() -> None:
    assert len(BASH_LINES) >= 10


@pytest.mark.parametrize("code", of_all_pages("python"))
def test_every_python_example_runs(code: str, project: Path) -> None:
    assert subprocess.run([sys.executable, "-c", code], cwd=project, check=True, capture_output=True).stdout
