"""Read locks/*.txt: what each one installs on a given Python and processor."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker, default_environment
from packaging.utils import canonicalize_name

from tests.paths import ROOT

LOCKS = ROOT / "locks"
_ENTRY = re.compile(r"([a-z0-9-]+)==(\S+)(?: ; (.*?))?((?: --hash=sha256:[0-9a-f]{64})+)")


@dataclass(frozen=True)
class Locked:
    """One line of a lock, its backslashes joined."""

    name: str
    version: str
    marker: str
    hashes: str

    def applies(self, environment: dict[str, str]) -> bool:
        return not self.marker or Marker(self.marker).evaluate(environment)


@dataclass(frozen=True)
class Machine:
    """An interpreter, a processor and the minor version of glibc: what wheels and markers are chosen by."""

    python: str
    processor: str
    glibc: int

    @property
    def minor(self) -> str:
        return ".".join(self.python.split(".")[:2])

    def environment(self) -> dict[str, str]:
        """What markers say there, whatever this machine is."""
        version = {"python_version": self.minor, "python_full_version": self.python}
        system = {"os_name": "posix", "sys_platform": "linux", "platform_system": "Linux"}
        cpython = {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
        this_machine = {name: str(value) for name, value in default_environment().items()}
        return {**this_machine, **version, **system, **cpython, "platform_machine": self.processor}

    def pip_options(self) -> list[str]:
        """Wheels for it alone, the newest tag first, as its own pip would prefer them."""
        tags = [f"manylinux_2_{minor}_{self.processor}" for minor in range(self.glibc, 16, -1)]
        named = ["--only-binary=:all:", "--implementation=cp", f"--python-version={self.python}"]
        named.append("--ignore-requires-python")  # pip asks its own interpreter; uv has asked the right one
        named += [f"--abi={abi}" for abi in ("cp" + self.minor.replace(".", ""), "abi3", "none")]
        return named + [f"--platform={tag}" for tag in (*tags, f"manylinux2014_{self.processor}")]


def parse(text: str) -> list[Locked]:
    """Every entry; an AssertionError for anything else than exact versions with hashes."""
    lines = [line for line in text.replace(" \\\n    ", " ").splitlines() if line]
    entries = [_ENTRY.fullmatch(line) for line in lines]
    odd = [line for line, entry in zip(lines, entries, strict=True) if not entry]
    assert not odd, odd
    return [Locked(entry[1], entry[2], entry[3] or "", entry[4]) for entry in entries if entry]


def read_lock(name: str) -> list[Locked]:
    return parse((LOCKS / f"{name}.txt").read_text())


def versions(locked: Iterable[Locked], machine: Machine | None = None) -> dict[str, str]:
    """The version of each package on `machine`; unless given, on this one."""
    environment = machine.environment() if machine else {k: str(v) for k, v in default_environment().items()}
    return {canonicalize_name(one.name): one.version for one in locked if one.applies(environment)}


def write_for(machine: Machine, name: str, file: Path) -> Path:
    """The lock as `machine` reads it: pip itself takes markers from the interpreter that runs it."""
    environment = machine.environment()
    lines = [f"{one.name}=={one.version}{one.hashes}" for one in read_lock(name) if one.applies(environment)]
    file.write_text("\n".join([*lines, ""]))
    return file


def pip(*arguments: str | Path) -> None:
    """This interpreter's pip; an AssertionError with what it said."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def download(machine: Machine, name: str, folder: Path) -> Path:
    """Every wheel of a lock for `machine`, each hash compared."""
    folder.mkdir(parents=True)
    lock = write_for(machine, name, folder / "lock.txt")
    pip("download", "--no-deps", "--require-hashes", f"--dest={folder}", *machine.pip_options(), "-r", lock)
    lock.unlink()
    return folder
