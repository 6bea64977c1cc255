"""Write locks/*.txt: exact versions with hashes of all that is installed, for every supported Python and processor.

    make lock                                       # resolve anew, to the newest versions that pyproject.toml allows
    .venv/uv/bin/python locks/lock.py              # add what pyproject.toml asks for now, keep the rest
    .venv/uv/bin/python locks/lock.py --check      # say which lock is not what pyproject.toml asks for; write nothing

uv resolves for Pythons and processors that are not here. torch is in no lock, since its CPU builds have other hashes
on every machine: make installs it by itself, and its CUDA packages where its build wants them. TensorRT comes with
JetPack.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

LOCKS = Path(__file__).parent
PROJECT = LOCKS.parent / "pyproject.toml"
TORCH = "torch==2.13.0"
"""As the Makefile pins it."""
WITH_TORCH = (
    *("torch", "triton", "cuda-toolkit", "nvidia-cublas", "nvidia-cuda-cupti", "nvidia-cuda-nvrtc"),
    *("nvidia-cuda-runtime", "nvidia-cudnn-cu13", "nvidia-cufft", "nvidia-cufile", "nvidia-curand", "nvidia-cusolver"),
    *("nvidia-cusparse", "nvidia-cusparselt-cu13", "nvidia-nccl-cu13", "nvidia-nvjitlink", "nvidia-nvshmem-cu13"),
    "nvidia-nvtx",
)
UNIVERSAL = ("--universal", "--python-version", "3.10")
BACKPORTS = ("exceptiongroup", "importlib-metadata", "tomli", "zipp")
"""Of what newer Pythons have themselves."""
TEST_EXTRAS = ("cpu", "export", "reference", "bench", "eval", "optimum", "polygons", "video", "rtx", "dev")


@dataclass(frozen=True)
class Lock:
    """What one file is made from.

    Attributes:
        extras: of pyproject.toml.
        requires: further requirements; without extras the only ones.
        within: a lock whose versions it shares.
        below: bounds that pyproject.toml does not have.
        options: of uv.
        leave_out: packages that are needed and not written down.
    """

    extras: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    within: str | None = None
    below: tuple[str, ...] = ()
    options: tuple[str, ...] = UNIVERSAL
    leave_out: tuple[str, ...] = ()


LOCK_BY_NAME = {
    "uv": Lock(requires=("uv",)),
    "build": Lock(requires=("hatchling>=1.26", "editables")),  # hatchling wants editables for `pip install -e`
    "runtime": Lock(("cpu",)),
    # JetPack 7.2 has CUDA 13.2 and cuda-bindings call what the board has; pyproject.toml holds JetPack 6 to CUDA 12.
    "jetpack": Lock(("cpu", "tensorrt"), within="runtime", below=("cuda-bindings<13.3",)),
    "export": Lock(("cpu", "export"), within="runtime"),
    "test": Lock(TEST_EXTRAS, within="export"),
    "python3.10": Lock(TEST_EXTRAS, within="test", options=("--python-version", "3.10"), leave_out=BACKPORTS),
    "oldest": Lock(TEST_EXTRAS, options=("--python-version", "3.11", "--resolution", "lowest-direct")),
}


LATEST = Lock(TEST_EXTRAS, options=())
"""Of the Python at hand, on the day that it is made: it is not kept."""


def compile_lock(lock: Lock, output: Path, *options: str) -> None:
    """Resolve one lock into `output`; versions that stand there already are kept where they still fit."""
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--generate-hashes"]
    command += ["--python", sys.executable, "--no-python-downloads", "--system-certs", "--no-header", "--no-annotate"]
    command += [*lock.options, *options, "--output-file", str(output)]
    command += [part for package in WITH_TORCH for part in ("--no-emit-package", package)]
    command += [part for package in lock.leave_out for part in ("--no-emit-package", package)]
    command += [part for extra in lock.extras for part in ("--extra", extra)]
    with tempfile.TemporaryDirectory() as scratch:
        bounds = Path(scratch, "bounds.txt")
        bounds.write_text("\n".join([TORCH, *lock.below, ""]))
        command += ["--constraint", str(bounds)]
        if lock.extras:
            command += ["--constraint", str(LOCKS / "build.txt")]
        if lock.within:
            command += ["--constraint", str(LOCKS / f"{lock.within}.txt")]
        if lock.requires:
            Path(scratch, "requires.in").write_text("\n".join([*lock.requires, ""]))
        command.append(str(PROJECT if lock.extras else Path(scratch, "requires.in")))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"lock.py: {output.stem}: uv ended with {done.returncode}\n{done.stderr}")


def find_stale(names: Sequence[str] = tuple(LOCK_BY_NAME)) -> list[str]:
    """The locks that are not what resolving them again, with their own versions preferred, gives."""

    def is_stale(name: str) -> bool:
        text = (LOCKS / f"{name}.txt").read_text()
        again = Path(scratch, f"{name}.txt")
        again.write_text(text)
        compile_lock(LOCK_BY_NAME[name], again)
        return again.read_text() != text

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor() as pool:  # uv waits for the registry
        return [name for name, stale in zip(names, pool.map(is_stale, names), strict=True) if stale]


def read_hashes(file: Path) -> dict[str, frozenset[str]]:
    """The hashes of each `name==version`."""
    found: dict[str, set[str]] = {}
    entry = ""
    for line in file.read_text().splitlines():
        entry = entry if line.startswith(" ") else line.split()[0]
        found.setdefault(entry, set()).update(re.findall(r"sha256:([0-9a-f]{64})", line))
    return {name: frozenset(hashes) for name, hashes in found.items()}


def find_wrong_hashes(names: Sequence[str] = tuple(LOCK_BY_NAME)) -> list[str]:
    """Versions with a hash that is not the registry's: uv keeps those of a lock that it goes on with."""

    def look(name: str) -> list[str]:
        fresh = Path(scratch, f"{name}.txt")
        compile_lock(LOCK_BY_NAME[name], fresh, "--constraint", str(LOCKS / f"{name}.txt"))
        known = read_hashes(fresh)
        return [
            f"{name}: {one}"
            for one, hashes in read_hashes(LOCKS / f"{name}.txt").items()
            if hashes - known.get(one, set())
        ]

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor() as pool:
        return [wrong for found in pool.map(look, names) for wrong in found]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write or check locks/*.txt.")
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a lock is stale")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    parser.add_argument("--latest", type=Path, metavar="FILE", help="write the newest for this Python there, no more")
    options = parser.parse_args()
    if options.check:
        odd = find_stale() + find_wrong_hashes()
        raise SystemExit(f"lock.py: not as resolved: {', '.join(odd)}; run `make lock`" if odd else 0)
    if options.latest:
        compile_lock(LATEST, options.latest, "--upgrade")
        return
    for name in LOCK_BY_NAME:
        compile_lock(LOCK_BY_NAME[name], LOCKS / f"{name}.txt", *(["--upgrade"] if options.upgrade else []))
        print(f"{name}: {len(read_hashes(LOCKS / f'{name}.txt'))} versions")


if __name__ == "__main__":
    main()
