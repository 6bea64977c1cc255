"""Digests of files, and the notes in the user's cache of those that were verified."""

# Tests: tests/bundle/test_bundle.py.
from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from paliedge.bundle.cache import digests_file
from paliedge.bundle.manifest import File


def sha256_from_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_file(path: Path) -> File:
    """Size and digest of a file, for the manifest."""
    return File(size=path.stat().st_size, sha256=sha256_from_file(path))


def digest_key(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


def read_known_digests() -> dict[str, str]:
    try:
        return msgspec.json.decode(digests_file().read_bytes(), type=dict[str, str])
    except (OSError, RuntimeError, UnicodeDecodeError, msgspec.DecodeError):
        return {}


def write_known_digests(digests: dict[str, str]) -> None:
    """Best effort: without a writable cache the next start reads the files again."""
    try:
        target = digests_file()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        partial.write_bytes(msgspec.json.encode(digests))
        partial.replace(target)
    except (OSError, RuntimeError):
        pass
