"""Names of bundles that are no folders, on a machine with the exporter and on one without it."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import click
import pytest

from paliedge.cli import naming
from paliedge.errors import MissingExtraError, UsageError
from paliedge.model import SHIPPED_BUNDLE


@pytest.mark.parametrize("name", [None, SHIPPED_BUNDLE, Path("nothing-here"), Path("/no/such/folder")])
def test_folders_and_misspelt_ones_stay_what_they_are(name: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "entry_points", lambda **keywords: pytest.fail("the exporter was asked"))
    assert naming.find_bundle(name, yes=False) == name


def finder(value: str) -> EntryPoints:
    return EntryPoints([EntryPoint(name="find", value=value, group="paliedge.bundles")])


@pytest.mark.parametrize("there", [finder("no_such_package.at_all:find"), EntryPoints([])])
def test_without_the_exporter_the_extra_is_named(there: EntryPoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "entry_points", lambda **keywords: there)
    with pytest.raises(MissingExtraError, match=r"paliedge\[cpu,export\]"):
        naming.find_bundle(Path("google/paligemma-3b-mix-224"), yes=True)


def ask_twice(name: str, ask: object, report: object) -> Path:
    assert callable(ask)
    ask(f"make one of {name}?")
    return Path("made")


def test_a_terminal_is_asked_and_a_script_needs_yes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(naming, "entry_points", lambda **keywords: finder(f"{__name__}:ask_twice"))
    name = Path("me/model@main")
    assert naming.find_bundle(name, yes=True) == Path("made")
    with pytest.raises(UsageError, match="--yes"):
        naming.find_bundle(name, yes=False)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(click, "confirm", lambda *arguments, **keywords: True)
    assert naming.find_bundle(name, yes=False) == Path("made")
    assert capsys.readouterr().err.count("make one of me/model@main?") == 3
