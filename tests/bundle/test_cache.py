"""The user's cache: what is in it, and that it can be emptied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.cache import bundles_folder, clear_cache, list_cache
from paliedge.cli import main
from paliedge.model import SHIPPED_BUNDLE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "paliedge"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["cache", *arguments])


def test_an_empty_cache_is_listed_and_cleared() -> None:
    assert list_cache() == []
    assert clear_cache() == []
    assert run("list").stdout.strip().startswith("0.0 MB  in ")
    assert run("list", "--json").stdout == "[]\n"


def test_what_is_in_it_is_listed_with_sizes_and_goes(cache: Path) -> None:
    Bundle(SHIPPED_BUNDLE)  # whose digests are noted
    folder = bundles_folder() / "me-model-0123"
    folder.mkdir(parents=True)
    (folder / "decoder.weights").write_bytes(bytes(3_000_000))
    entries = json.loads(run("list", "--json").stdout)
    assert [entry["name"] for entry in entries] == ["me-model-0123", "notes on verified files"]
    assert entries[0]["size"] == 3_000_000
    assert "3.0 MB  me-model-0123" in run("list").stdout
    result = run("clear")
    assert result.exit_code == 0
    assert "3.0 MB  removed from" in result.stdout
    assert [path for path in cache.rglob("*") if path.is_file()] == []
