"""Publish an engine into a bundle, killed at each step that the file system sees, one process a step.

`python -m tests.fakes.kill_points BUNDLE FOLDER` prints how many steps there are; an assertion ends it
where a kill left something that is no whole bundle.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Engine
from paliedge.bundle.publish import engine_staging, publish_engine

_OVERWRITES = 9
"""Exit code of a publication that writes over a file of the bundle, of which a kill would leave half."""
_STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "tempfile.mkdtemp"}


def replace_engine(folder: Path, content: str) -> Engine:
    """Publish files of this content in the place of the bundle's first engine."""
    manifest = Bundle(folder).manifest
    old = manifest.engines[0]
    names = [
        f"{part}.{content}.{suffix}" for part, suffix in (("vision", "plan"), ("decoder", "plan"), ("e", "timing"))
    ]
    engine = msgspec.structs.replace(
        old,
        vision_encoder=msgspec.structs.replace(old.vision_encoder, file=names[0]),
        decoder=msgspec.structs.replace(old.decoder, file=names[1]),
        timing_cache=names[2],
    )
    with engine_staging(folder) as staging:
        for name in names:
            (staging / name).write_text(content * 1000)
        publish_engine(folder, manifest, staging, engine)
    return engine


def run_until_step(folder: Path, number: int) -> bool:
    """Publish in another process that dies before its `number`-th step; returns whether it did."""
    process = os.fork()
    if process == 0:
        steps = count(1)

        def die(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _STEPS and next(steps) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                path = Path(arguments[0])
                if path.parent == folder and path.is_file() and not path.name.startswith("."):
                    os._exit(_OVERWRITES)

        sys.addaudithook(die)
        replace_engine(folder, "new")
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def check_whole(folder: Path, source: Path, before: list[Engine], after: list[Engine]) -> None:
    """The old engine or the new one, every named file intact; the next publication leaves nothing else."""
    bundle = Bundle(folder)
    bundle.verify_hashes()
    assert list(bundle.manifest.engines) in (before, after)
    last = replace_engine(folder, "last")
    Bundle(folder).verify_hashes()
    lists = Bundle(source).manifest.layer_lists.values()  # the new engines have none
    kept = {path.name for path in source.iterdir()} - set(before[0].files) - set(lists)
    assert {path.name for path in folder.iterdir()} == kept | set(last.files)


def main() -> None:
    source, scratch = map(Path, sys.argv[1:])
    before = list(Bundle(source).manifest.engines)
    reference = Path(shutil.copytree(source, scratch / "reference"))
    after = [replace_engine(reference, "new"), *before[1:]]
    for number in count(1):
        folder = Path(shutil.copytree(source, scratch / str(number)))
        killed = run_until_step(folder, number)
        check_whole(folder, source, before, after)
        shutil.rmtree(folder)
        if not killed:
            print(number - 1)
            return


if __name__ == "__main__":
    main()
