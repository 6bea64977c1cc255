"""optimum finds the exporter by itself, and its command does what `paliedge export` does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from paliedge.bundle.bundle import Bundle
from tests.tiny import make_tiny

OPTIMUM = Path(sys.executable).parent / "optimum-cli"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(OPTIMUM), "export", "paliedge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_optimums_command_makes_a_bundle(tmp_path: Path) -> None:
    make_tiny(tmp_path / "checkpoint", "paligemma")
    options = ("--precision", "fp16", "--max-new-tokens", "9", "--no-compare")
    done = run("--model", tmp_path / "checkpoint", tmp_path / "bundle", *options)
    assert done.returncode == 0, done.stderr
    manifest = Bundle(tmp_path / "bundle").manifest
    assert manifest.targets["cpu"].precision == "fp16"
    assert manifest.limits.new_tokens == 9


def test_its_errors_and_exit_codes_are_paliedges_own(tmp_path: Path) -> None:
    done = run("--model", tmp_path / "nothing", tmp_path / "bundle")
    assert done.returncode == 1
    assert "expected a checkpoint folder or a hub id" in done.stderr
    assert not (tmp_path / "bundle").exists()
    assert run("--model", tmp_path, tmp_path / "bundle", "--precision", "fp3").returncode == 2
