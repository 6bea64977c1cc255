"""Put a finished bundle in its place in one step, and engines into a bundle, whatever happens meanwhile."""

# Tests: tests/bundle/test_bundle.py.
from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from paliedge.bundle.digests import describe_file
from paliedge.bundle.layer_list import LAYER_LIST
from paliedge.bundle.manifest import MANIFEST, Engine, Manifest, write_manifest
from paliedge.errors import OutputError, UsageError

_ASIDE = ".old"
_ENGINES = ".engines.new-"
_ENGINE_SUFFIXES = (".plan", ".timing", LAYER_LIST)


@contextmanager
def publish_bundle(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success it takes the place of `folder` in one step.

    A kill at any moment leaves the old bundle, the new one, or none where there was none. What a
    killed run left behind is removed by the next one for the same `folder`.

    Raises:
        UsageError: `folder` holds something that is no bundle, or cannot be made.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UsageError(
            expected=f"a new folder, an empty one or a bundle at {folder}",
            found="other content",
            action="Name another output folder.",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            expected=f"a place for {folder}", found=f"{error.strerror}", action="Name another output folder."
        ) from error
    prefix = f".{folder.name}.new-"
    for leftover in folder.parent.glob(f"{glob.escape(prefix)}*"):
        with _lock_folder(leftover) as locked:
            if locked and leftover.suffix == _ASIDE and not folder.exists():
                leftover.rename(folder)
            elif locked:
                shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    with _lock_folder(staging):
        try:
            yield staging
            staging.chmod(0o755)
            for path in (*staging.iterdir(), staging):
                _sync(path)
            with _lock_folder(folder, wait=True):  # not while a build publishes its engines there
                _replace_folder(staging, folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def wait_for_folder(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the folder's advisory lock; calls `on_wait` where another process has it, then waits."""
    with _lock_folder(folder) as free:
        if free:
            yield
            return
    on_wait()
    with _lock_folder(folder, wait=True):
        yield


@contextmanager
def engine_staging(folder: Path) -> Iterator[Path]:
    """A folder inside the bundle for plans in the making; what a killed build left is removed first.

    Raises:
        OutputError: the bundle cannot be written to.
    """
    try:
        for leftover in folder.glob(f"{_ENGINES}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=_ENGINES, dir=folder))
    except OSError as error:
        raise OutputError(
            expected=f"room and permission to write engines into {folder}",
            found=error.strerror or "an error of the file system",
            action="Copy the bundle to a place that you may write to, and build there.",
        ) from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish_engine(folder: Path, manifest: Manifest, staging: Path, engine: Engine) -> None:
    """Move the engine's files from `staging` into the bundle, then name them in its manifest in one step.

    An engine for the same flavour, version and GPU is replaced. A kill at any moment leaves the old
    manifest or the new one, and at most files that none names; the next build removes those.
    """
    files = {path.name: describe_file(path) for path in sorted(staging.iterdir())}
    for name in files:
        _sync(staging / name)
        (staging / name).replace(folder / name)
    _sync(folder)
    kept = tuple(other for other in manifest.engines if _key(other) != _key(engine))
    named = {name for other in (*kept, engine) for name in other.files}
    lists = {name: str(Path(name).with_suffix(LAYER_LIST)) for name in named}
    lists = {name: listed for name, listed in lists.items() if listed in manifest.files | files}
    named |= set(lists.values())
    older = {name: file for name, file in manifest.files.items() if not name.endswith(_ENGINE_SUFFIXES)}
    older |= {name: file for name, file in manifest.files.items() if name in named}
    changes = {"engines": (*kept, engine), "files": older | files, "layer_lists": lists}
    write_manifest(folder, msgspec.structs.replace(manifest, **changes))
    for path in folder.iterdir():
        if path.suffix in _ENGINE_SUFFIXES and path.name not in named:
            path.unlink(missing_ok=True)


def _key(engine: Engine) -> tuple[str, str, str]:
    return engine.flavour, engine.version, engine.compute_capability


@contextmanager
def _lock_folder(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the folder's advisory lock; yields whether it was free. The system drops it with the process."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # gone meanwhile: another publisher removed it
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _replace_folder(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`; afterwards `new` is what was there before, or is gone."""
    if not old.exists():
        new.rename(old)
        return
    if not _exchange(new, old):  # a file system without the exchange: a moment without a bundle
        aside = new.with_name(new.name + _ASIDE)
        old.rename(aside)
        new.rename(old)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step: Linux renameat2 with RENAME_EXCHANGE, which Python does not offer."""
    at_working_folder, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    names = (os.fsencode(first), os.fsencode(second))
    return bool(renameat2(at_working_folder, names[0], at_working_folder, names[1], rename_exchange) == 0)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
