"""The user's cache: bundles that were made of checkpoints, and notes on files that were verified."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple


class CachedEntry(NamedTuple):
    """Something in the cache: a name for people, its size in bytes, the file or folder."""

    name: str
    size: int
    path: Path


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/paliedge`, or `~/.cache/paliedge`.

    Raises:
        RuntimeError: the user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paliedge"


def bundles_folder() -> Path:
    """Where bundles lie that were made of checkpoints, a folder each."""
    return cache_root() / "bundles"


def digests_file() -> Path:
    """Notes on files whose digests were verified."""
    return cache_root() / "verified.json"


def list_cache() -> list[CachedEntry]:
    """All that is in the cache, bundles first."""
    bundles = [path for path in _items(bundles_folder()) if path.is_dir()]
    entries = [CachedEntry(path.name, _size_of(path), path) for path in bundles]
    if digests_file().is_file():
        entries.append(CachedEntry("notes on verified files", digests_file().stat().st_size, digests_file()))
    return entries


def clear_cache() -> list[CachedEntry]:
    """Remove all of it; returns what that was."""
    entries = list_cache()
    for entry in entries:
        if entry.path.is_dir():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink()
    return entries


def _items(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
