"""Write docker/locks/*.txt: what each image installs, as exact versions with the sha256 of the one wheel that fits.

    python docker/lock.py                                   # resolve again and write every lock
    python docker/lock.py runtime-aarch64-cp310 --python PATH_OF_PYTHON_3.10
    python docker/lock.py --check                           # fetch what is locked, every hash compared

pip resolves for an image's platform on any machine, but it takes environment markers (`python_version < "3.11"`) from
the interpreter that runs it: each lock is made by an interpreter of its image's Python version. The processor in a
marker is still this machine's, so tests/packaging/test_docker.py follows every marker again, for the image's own.
TensorRT is in no lock: it comes with JetPack.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCKER = Path(__file__).parent
PROJECT = DOCKER.parent / "pyproject.toml"
LOCKS = DOCKER / "locks"


@dataclass(frozen=True)
class Target:
    """The interpreter, the processor and the minor version of glibc that one lock is for."""

    python: str
    machine: str
    glibc: int
    extras: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def minor(self) -> str:
        return ".".join(self.python.split(".")[:2])

    def platforms(self) -> list[str]:
        """The wheel tags that this glibc takes, the newest first, as pip on the machine itself would prefer them."""
        if self.machine == "any":
            return ["any"]
        return [f"manylinux_2_{minor}_{self.machine}" for minor in range(self.glibc, 16, -1)] + [
            f"manylinux2014_{self.machine}"
        ]

    def pip_options(self) -> list[str]:
        abi = "cp" + self.minor.replace(".", "")
        chosen = ["--only-binary=:all:", "--implementation=cp", f"--python-version={self.python}", f"--abi={abi}"]
        return chosen + [f"--platform={name}" for name in self.platforms()]


# JetPack 6 is Ubuntu 22.04 with CUDA 12.6, JetPack 7.2 Ubuntu 24.04 with CUDA 13.2, the x86 images are Debian 12.
# cuda-bindings follow CUDA's versions and call what the board has: JetPack 7 gets its own minor version. There are no
# wheels of 12.6; within a major version CUDA keeps to its binary interface, so JetPack 6 gets the newest of 12.
TARGETS = {
    "build": Target("3.10.12", "any", 0),
    "runtime-aarch64-cp310": Target("3.10.12", "aarch64", 35, ("cpu", "tensorrt"), ("cuda-bindings<13",)),
    "runtime-aarch64-cp312": Target("3.12.3", "aarch64", 39, ("cpu", "tensorrt"), ("cuda-bindings>=13.2,<13.3",)),
    "runtime-x86_64-cp311": Target("3.11.2", "x86_64", 36, ("cpu",)),
    "runtime-x86_64-cp312": Target("3.12.3", "x86_64", 36, ("cpu",)),
    "export-x86_64-cp311": Target("3.11.2", "x86_64", 36, ("cpu", "export")),
    "export-x86_64-cp312": Target("3.12.3", "x86_64", 36, ("cpu", "export")),
}


def read_project() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib.loads(PROJECT.read_text())
    raise SystemExit("lock.py: writing takes Python 3.11 or later, which reads TOML; --python names older ones")


def requirements(target: Target) -> list[str]:
    """What pyproject.toml asks for: for an image its core and extras, for the lock `build` what makes the wheel."""
    declared = read_project()
    if target.machine == "any":
        return list(declared["build-system"]["requires"])
    extras = declared["project"]["optional-dependencies"]
    missing = [name for name in target.extras if name not in extras]
    if missing:
        raise SystemExit(f"lock.py: pyproject.toml has no extra {', '.join(missing)}; it has {', '.join(extras)}")
    named = [text for name in target.extras for text in extras[name]]
    return [*declared["project"]["dependencies"], *named, *target.also]


def minor_version(python: str) -> str | None:
    """The version, as "3.10", of an interpreter that has pip; None for anything else."""
    ask = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    try:
        asked = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return asked.stdout.strip() or None


def interpreter(minor: str, given: list[str]) -> str:
    on_path = shutil.which(f"python{minor}")
    candidates = [*given, sys.executable, *([on_path] if on_path else [])]
    for python in candidates:
        if minor_version(python) == minor:
            return python
    raise SystemExit(
        f"lock.py: resolving for Python {minor} takes an interpreter of that version with pip; there is none among "
        f"{', '.join(candidates)}: name one with --python PATH"
    )


def run_pip(python: str, *arguments: str) -> str:
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"lock.py: pip failed with {done.returncode}: {' '.join(command)}")
    return done.stdout


def lock_line(item: dict[str, Any]) -> str:
    """One entry of pip's report as `numpy==2.2.6 --hash=sha256:...`."""
    name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
    archive = item["download_info"]["archive_info"]
    return f"{name}=={item['metadata']['version']} --hash=sha256:{archive['hashes']['sha256']}"


def write(name: str, pythons: list[str]) -> None:
    target = TARGETS[name]
    wanted = requirements(target)
    with tempfile.TemporaryDirectory() as nowhere:
        report = run_pip(
            interpreter(target.minor, pythons),
            *["install", "--dry-run", "--ignore-installed", "--quiet", "--report=-", f"--target={nowhere}"],
            *[*target.pip_options(), *wanted],
        )
    lines = sorted(lock_line(item) for item in json.loads(report)["install"])
    head = [
        f"# Made by docker/lock.py {name}, for Python {target.minor} on {target.machine}, from:",
        f"# {' '.join(wanted)}",
    ]
    (LOCKS / f"{name}.txt").write_text("\n".join([*head, *lines, ""]))
    print(f"{name}: {len(lines)} packages")


def check(name: str, folder: Path) -> None:
    """Fetch every locked wheel for its platform; pip refuses one whose hash differs or that is not there."""
    into = folder / name
    options = ["--quiet", "--no-deps", "--require-hashes", f"--dest={into}", *TARGETS[name].pip_options()]
    run_pip(sys.executable, "download", *options, f"--requirement={LOCKS / name}.txt")
    wheels = list(into.glob("*.whl"))
    print(f"{name}: {len(wheels)} wheels, {sum(path.stat().st_size for path in wheels) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write or check docker/locks/*.txt.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which locks (default: all): {', '.join(TARGETS)}")
    parser.add_argument("--check", action="store_true", help="fetch what is locked instead of resolving again")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="keep the wheels that --check fetches there")
    parser.add_argument("--python", action="append", default=[], metavar="PATH", help="an interpreter to resolve with")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(TARGETS))
    if unknown:
        parser.error(f"no lock is called {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    names = options.names or list(TARGETS)
    if not options.check:
        for name in names:
            write(name, options.python)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            check(name, options.wheels or Path(scratch))


if __name__ == "__main__":
    main()
