"""Versions outside of what pyproject.toml allows are named, by doctor and beside the error that they may be behind."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from paliedge.cli import main
from paliedge.diagnostics import installed
from paliedge.diagnostics.doctor import examine
from paliedge.diagnostics.installed import find_outside


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make packages look as if they were of other versions."""

    def set_versions(**versions: str) -> None:
        real = importlib.metadata.version
        monkeypatch.setattr(installed, "version", lambda name: versions.get(name.replace("-", "_")) or real(name))

    return set_versions


def test_this_environment_is_within() -> None:
    assert list(find_outside()) == []


@pytest.mark.parametrize(
    ("package", "found"),
    [("onnxruntime", "1.22.0"), ("onnxruntime", "1.40.0"), ("transformers", "5.0.0"), ("click", "7.1"), ("av", "13.0")],
)
def test_a_version_outside_is_named(package: str, found: str, pretend: Callable[..., None]) -> None:
    pretend(**{package: found})
    (outside,) = find_outside()
    assert (outside.package, outside.version) == (package, found)
    assert f"{package} {found}, where paliedge allows " in str(outside)
    assert outside.action.startswith(f'Run `pip install "{package}')


def test_doctor_names_it(pretend: Callable[..., None]) -> None:
    pretend(onnxruntime="1.22.0")
    (finding,) = [finding for finding in examine(()) if finding.topic == "versions"]
    assert "onnxruntime 1.22.0" in finding.value
    assert finding.status == "note"


def test_an_error_names_it(pretend: Callable[..., None], tmp_path: Path) -> None:
    quiet = CliRunner().invoke(main, ["info", str(tmp_path)])
    assert "which may be the cause" not in quiet.output
    pretend(numpy="1.20.0")
    result = CliRunner().invoke(main, ["info", str(tmp_path)])
    assert result.exit_code == quiet.exit_code != 0
    assert "note: found numpy 1.20.0, where paliedge allows" in result.output


def test_a_fault_of_an_old_package_names_it(pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AttributeError("module 'numpy' has no attribute 'long'")

    monkeypatch.setattr("paliedge.diagnostics.doctor.examine", fail)
    pretend(numpy="1.20.0")
    result = CliRunner().invoke(main, ["doctor"])
    assert isinstance(result.exception, AttributeError)
    assert "note: found numpy 1.20.0" in result.output
