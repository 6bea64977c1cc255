"""A bundle for what a user named: fetched from the hub if it is one there, else made of a checkpoint, once."""

# Tests: tests/export/sharing/test_finding.py.
from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from paliedge.bundle.bundle import read_manifest
from paliedge.bundle.cache import bundles_folder
from paliedge.bundle.manifest import MANIFEST, Precision
from paliedge_export.checkpoint.hub import download, split_revision
from paliedge_export.checkpoint.lora import CONFIG as ADAPTER
from paliedge_export.checkpoint.lora import Adapter
from paliedge_export.exporter import export_bundle

_SMALL = 1_000_000_000
"""Weights in bytes up to which a checkpoint is kept in 32 bits."""
_BYTES_PER_SECOND = 30_000_000
"""Of a 3B checkpoint's weights, exported on two cores; for an estimate."""
_CONFIG = ["config.json", ADAPTER, MANIFEST]


def find_bundle(name: str, ask: Callable[[str], None], report: Callable[[str], None]) -> Path:
    """The folder of a bundle: `name` from the hub, or made of the checkpoint `name` and kept in the user's cache.

    Args:
        name: a hub id, with @REVISION behind it or without, or a checkpoint's folder or .npz.
        ask: gets a question, and returns only if the answer is yes.
        report: gets a line a stage.

    Raises:
        CheckpointError: it is neither, out of reach, or cannot be exported.
    """
    if Path(name).exists():
        return _make(name, _state_of(Path(name)), lambda: _size_of(Path(name)), ask, report)
    repository, revision = split_revision(name)
    folder = download(repository, revision, _CONFIG)
    if (folder / MANIFEST).is_file():
        files = sorted(read_manifest(folder).files)
        return download(repository, folder.name, [MANIFEST, *files])
    # the revision's commit, so that a branch that moves on in between is not mixed
    pinned = f"{repository}@{folder.name}"
    return _make(name, pinned, lambda: _size_on_hub(repository, folder.name), ask, report)


def _make(
    name: str, state: str, size_of: Callable[[], int | None], ask: Callable[[str], None], report: Callable[[str], None]
) -> Path:
    """A bundle of a checkpoint in a certain state; only the first time anything is made."""
    plain = "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in name).strip("-.")
    output = bundles_folder() / f"{plain[-60:]}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
    if (output / MANIFEST).is_file():
        return output
    size = size_of()
    precision: Precision = "fp32" if size is not None and size < _SMALL else "fp16"
    ask(_describe(name, size, precision, output))
    export_bundle(name if Path(name).exists() else state, output, precision=precision, report=report)
    return output


def _describe(name: str, size: int | None, precision: Precision, output: Path) -> str:
    weights = "a checkpoint" if size is None else f"a checkpoint with {size / 1e9:.2f} GB of weights"
    minutes = "some minutes" if size is None else f"about {max(1, round(size / _BYTES_PER_SECOND / 60))} min"
    return (
        f"{name} is {weights}, no bundle. It is exported once, in {precision}, which takes {minutes} and about as much "
        f"room, into {output}. `paliedge cache clear` removes it; `paliedge export` has the other precisions."
    )


def _state_of(path: Path) -> str:
    """What tells this state of a folder or file from a later one."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    status = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return f"{path.resolve()} {status}"


def _size_of(path: Path) -> int | None:
    """Bytes of weights, with those of an adapter's base model; None where that is not known."""
    size = sum(file.stat().st_size for file in (path.glob("*.safetensors") if path.is_dir() else [path]))
    if not (path / ADAPTER).is_file() or (path / "config.json").is_file():
        return size
    base = Adapter(path).base
    rest = _size_of(Path(base)) if Path(base).is_dir() else _size_on_hub(base, None)
    return None if rest is None else size + rest


def _size_on_hub(repository: str, revision: str | None) -> int | None:
    """Bytes of weights; None where the hub cannot be asked, or has no more than an adapter."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(repository, revision=revision, files_metadata=True).siblings or []
    except Exception:  # offline; the download that follows says what is wrong
        return None
    if any(file.rfilename == ADAPTER for file in files):
        return None
    return sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))
