"""`paliedge doctor` as a user meets it: on a machine without a GPU, for good bundles and for anything else."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from paliedge.bundle.manifest import MANIFEST
from paliedge.diagnostics.doctor import examine
from paliedge.model import SHIPPED_BUNDLE
from tests.cli.test_predict import run

Findings = list[dict[str, str]]


def examine_as_json(*bundles: object, exit_code: int) -> Findings:
    result = run("doctor", *bundles, "--json")
    assert (result.exit_code, result.stderr) == (exit_code, "")
    findings: Findings = json.loads(result.stdout)
    assert all(set(finding) == {"topic", "value", "status", "action"} for finding in findings)
    return findings


@pytest.fixture(scope="module")
def without_gpu() -> subprocess.CompletedProcess[str]:
    """The verb in a process that sees no GPU, wherever it runs."""
    command = [sys.executable, "-c", "from paliedge.cli import main; main()", "doctor"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_shipped_bundle_runs_on_a_machine_without_a_gpu(without_gpu: subprocess.CompletedProcess[str]) -> None:
    assert (without_gpu.returncode, without_gpu.stderr) == (0, "")
    lines = without_gpu.stdout.splitlines()
    marks = {line[4:].split("  ")[0]: line[:2] for line in lines if line[:2].strip()}
    assert marks["numpy"] == marks["memory"] == marks[f"bundle {SHIPPED_BUNDLE}"] == "ok"
    assert marks["gpu"] == "--"
    assert "!!" not in marks.values()
    assert "can run cpu's graphs" in without_gpu.stdout


def test_what_to_do_stands_below_what_was_found(without_gpu: subprocess.CompletedProcess[str]) -> None:
    lines = without_gpu.stdout.splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith("--  gpu "))
    start = next(line for line in lines if line.startswith("ok  python ")).index(platform.python_version())
    assert lines[place + 1] == " " * start + "Bundles run on the CPU; engines need an NVIDIA GPU and its driver."


def test_json_has_the_same_findings_in_the_same_order() -> None:
    findings = examine_as_json(exit_code=0)
    topics = [finding["topic"] for finding in findings]
    assert topics[:3] == ["system", "python", "jetson"]
    assert topics[-1] == "  on ONNX Runtime"
    text = run("doctor").stdout
    places = [text.index(f"  {topic}") for topic in topics]
    assert places == sorted(places)
    assert all(finding["action"] in text for finding in findings)
    assert run("doctor", env={"PALIEDGE_JSON": "1"}).stdout.startswith("[{")


def test_a_bundle_that_is_not_there_gives_1_and_the_others_are_looked_at(tmp_path: Path) -> None:
    findings = examine_as_json(tmp_path / "absent", SHIPPED_BUNDLE, exit_code=1)
    statuses = {finding["topic"]: finding["status"] for finding in findings}
    assert statuses[f"bundle {tmp_path / 'absent'}"] == "problem"
    assert statuses[f"bundle {SHIPPED_BUNDLE}"] == statuses["  on ONNX Runtime"] == "ok"
    result = run("doctor", tmp_path / "absent", SHIPPED_BUNDLE)
    assert result.exit_code == 1
    assert f"!!  bundle {tmp_path / 'absent'}" in result.stdout
    assert "`paliedge export CHECKPOINT -o BUNDLE`" in result.stdout


def test_nothing_that_is_named_ends_in_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {"empty": b"", "text": b"no JSON", "binary": b"\xff\0", "list": b"[" * 100_000}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_bytes(content)
    (tmp_path / "folder" / MANIFEST).mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    names = ["empty", "text", "binary", "list", "folder", "loop", "loop/deeper", "empty/bundle.json", "x" * 300]
    monkeypatch.chdir(tmp_path)
    findings = examine_as_json(*names, exit_code=1)
    assert [finding["topic"] for finding in findings if finding["status"] == "problem"] == [
        f"bundle {name}" for name in names
    ]
    assert all(finding["action"] for finding in findings if finding["status"] != "ok")
    assert run("doctor", *names).exit_code == 1
    assert examine([Path("a\0b")])[-1].status == "problem"  # what no shell can say, a program can


def test_nothing_is_written(tmp_path: Path) -> None:
    """As a health check runs it: on a system that is read-only."""
    run("doctor", env={"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)})
    assert not list(tmp_path.iterdir())
