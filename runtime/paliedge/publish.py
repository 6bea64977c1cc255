"""Put a finished bundle in its place in one step, whatever happens meanwhile."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paliedge.errors import UsageError
from paliedge.manifest import MANIFEST

_ASIDE = ".old"


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
            expected=f"{folder} to be new, empty or a bundle",
            found="other content",
            action="Name another output folder.",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            expected=f"a place for {folder}", found=f"{error.strerror}", action="Name another output folder."
        ) from None
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
            _replace_folder(staging, folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _lock_folder(folder: Path) -> Iterator[bool]:
    """Hold the folder's advisory lock; yields whether it was free. The system drops it with the process."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # gone meanwhile: another publisher removed it
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
