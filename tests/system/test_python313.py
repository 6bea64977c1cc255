"""Python 3.13, Debian 13's: what needs no torch, of which there is no CPU build for every Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.locks import Machine, read_lock
from tests.paths import ROOT
from tests.system.roots import BUILD, Root, require

LEFT_OUT = {"transformers", "peft", "optimum", "accelerate"}
"""They need torch."""
NO_WHEEL = "tensorrt-rtx-"
"""Comes as a source that fetches its libraries."""
NOT_HERE = (
    "--ignore=tests/packaging",  # makes environments of its own
    "--ignore=tests/cli/test_build.py",  # builds engines
    "--ignore=tests/export/test_tensorrt_rtx.py",
    "--deselect=tests/cli/test_bundles.py::test_export_prints_one_line_and_makes_a_bundle_that_answers",  # compares
    "--deselect=tests/fakes/test_names.py::test_tensorrts_names_are_the_real_ones",
    "--deselect=tests/bench/test_conditions.py::test_the_power_mode_and_the_revision_of_the_code_are_told",  # no git
)


@pytest.fixture(scope="module")
def root(wheel: Path) -> Root:
    require("debootstrap", "unshare")
    made = Root(BUILD / "python3.13", "trixie", "amd64", Machine("3.13.5", "x86_64", 36))
    made.make()
    names = {one.name for one in read_lock("test")} - LEFT_OUT
    names = {name for name in names if not name.startswith(NO_WHEEL)}
    made.install(wheel, ["build"], names)
    made.copy_project()
    return made


def test_the_commands_run(root: Root) -> None:
    assert root.run("python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout == "3.13\n"
    root.run("paliedge", "export", "/src/benchmarks/shapes/checkpoint", "-o", "/out/bundle", "--no-compare")
    assert "yellow star" in root.run("paliedge", "demo", "-m", "/out/bundle", "--save", "/out/demo").stdout


def test_what_needs_no_torch_passes(root: Root, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--without-torch", *NOT_HERE)
    ran = root.run(*command, check=False, limit_s=900)
    listing = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    listed = subprocess.run(listing, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    num_all = int(re.findall(r"(\d+) tests collected", listed)[-1])
    summary = ran.stdout.strip().splitlines()[-1]
    num_passed = int(re.findall(r"(\d+) passed", summary)[-1])
    with capsys.disabled():
        print(f"\nPython 3.13: {num_passed} of {num_all} tests; {num_all - num_passed} need torch or are left to 3.11")
    assert ran.returncode == 0, ran.stdout[-6000:]
    assert num_passed > num_all / 3
