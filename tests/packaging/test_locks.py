"""What is installed is what is written down: locks fit pyproject.toml, environments fit their locks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.locks import LOCKS, Locked, Machine, parse, pip, read_lock, versions
from tests.paths import ROOT

PYTHONS = ("3.10.12", "3.11.2", "3.12.3", "3.13.5")
MACHINES = [Machine(python, processor, 35) for python in PYTHONS for processor in ("x86_64", "aarch64")]
UNIVERSAL = ("build", "runtime", "jetpack", "export", "test")
NOT_LOCKED = re.compile(r"torch|triton|cuda-toolkit|nvidia-(?!ml-py).*")
"""torch and what its CUDA builds bring: see locks/lock.py."""


@pytest.fixture(scope="module")
def locking() -> ModuleType:
    """locks/lock.py, which is a script."""
    spec = importlib.util.spec_from_file_location("lock", LOCKS / "lock.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["lock"] = module
    spec.loader.exec_module(module)
    return module


def test_there_is_a_file_for_each_lock(locking: ModuleType) -> None:
    assert {path.stem for path in LOCKS.glob("*.txt")} - {"latest"} == set(locking.LOCK_BY_NAME)


@pytest.mark.parametrize("path", sorted(LOCKS.glob("*.txt")), ids=lambda path: path.stem)
def test_a_lock_is_versions_and_hashes_without_addresses_and_torch(path: Path) -> None:
    locked = parse(path.read_text())
    assert locked
    assert not [one.name for one in locked if NOT_LOCKED.fullmatch(one.name)]


@pytest.mark.parametrize("name", UNIVERSAL)
@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: f"{machine.minor} {machine.processor}")
def test_a_lock_has_one_version_of_each_package(name: str, machine: Machine) -> None:
    applying = [one.name for one in read_lock(name) if one.applies(machine.environment())]
    assert len(applying) == len(set(applying))


def requirements(extras: tuple[str, ...]) -> list[Requirement]:
    """What pyproject.toml asks for, as it stands there: the installed metadata may be of another day."""
    text = (ROOT / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    named = [re.search(rf"^{name} = \[(.*?)\](?:\s*$|\s*#)", text, re.MULTILINE | re.DOTALL) for name in extras]
    assert dependencies
    assert all(named)
    strings = [found for part in (dependencies, *named) if part for found in re.findall(r"^[^#\n]*", part[1], re.M)]
    return [Requirement(found) for line in strings for found in re.findall(r'"([^"]+)"', line)]


def broken(locked: list[Locked], extras: tuple[str, ...], machine: Machine) -> list[str]:
    """The requirements that a lock does not meet on a machine."""
    environment, found = machine.environment(), versions(locked, machine)
    wanted = [one for one in requirements(extras) if not one.marker or one.marker.evaluate(environment)]
    wanted = [one for one in wanted if not NOT_LOCKED.fullmatch(canonicalize_name(one.name))]
    return [str(one) for one in wanted if not one.specifier.contains(found.get(canonicalize_name(one.name), "0"))]


@pytest.mark.parametrize("name", [name for name in UNIVERSAL if name != "build"])
def test_a_lock_meets_pyproject_on_every_machine(name: str, locking: ModuleType) -> None:
    for machine in MACHINES:
        assert broken(read_lock(name), locking.LOCK_BY_NAME[name].extras, machine) == [], machine


@pytest.mark.parametrize(("name", "python"), [("python3.10", "3.10.12"), ("oldest", "3.11.2")])
def test_the_other_sets_meet_pyproject(name: str, python: str, locking: ModuleType) -> None:
    extras = locking.LOCK_BY_NAME[name].extras
    assert broken(read_lock(name), extras, Machine(python, "x86_64", 36)) == []


def test_the_oldest_set_is_the_oldest(locking: ModuleType) -> None:
    """No version of a package that pyproject.toml names lies between its floor and what is locked."""
    found = versions(read_lock("oldest"))
    floors = {canonicalize_name(one.name): one for one in requirements(locking.TEST_EXTRAS)}
    for name in ("numpy", "av", "transformers", "onnx", "pillow", "onnxruntime", "peft"):
        (floor,) = [one.version for one in floors[canonicalize_name(name)].specifier if one.operator == ">="]
        assert found[name].startswith(floor) or found[name] == floor, (name, found[name], floor)


def test_a_version_that_pyproject_does_not_allow_is_seen(locking: ModuleType) -> None:
    changed = [*read_lock("runtime")]
    place = next(place for place, one in enumerate(changed) if one.name == "msgspec")
    changed[place] = Locked("msgspec", "0.19.0", "", changed[place].hashes)
    assert broken(changed, ("cpu",), MACHINES[2]) == ["msgspec>=0.20"]


def test_locks_are_what_resolving_them_again_gives(locking: ModuleType) -> None:
    """With every version kept that fits: what is asked for by now and in no lock is seen."""
    assert locking.find_stale() == []


def test_every_hash_is_the_registrys(locking: ModuleType) -> None:
    assert locking.find_wrong_hashes() == []


@pytest.mark.parametrize("name", ["uv", "runtime"])
def test_a_hash_changed_by_hand_is_found(
    name: str, locking: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in LOCKS.glob("*.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = tmp_path / f"{name}.txt"
    changed.write_text(re.sub(r"sha256:[0-9a-f]{8}", "sha256:00000000", changed.read_text(), count=1))
    monkeypatch.setattr(locking, "LOCKS", tmp_path)
    (wrong,) = locking.find_wrong_hashes([name])
    assert wrong.startswith(f"{name}: ")


def test_the_lock_of_the_build_is_what_makes_the_wheel(locking: ModuleType) -> None:
    declared = re.search(r'^requires = \["([^"]+)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared
    assert declared[1] in locking.LOCK_BY_NAME["build"].requires
    wanted = Requirement(declared[1])
    assert wanted.specifier.contains(versions(read_lock("build"))[canonicalize_name(wanted.name)])


def test_a_lock_with_a_package_too_few_is_stale(
    locking: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in LOCKS.glob("*.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    runtime = (tmp_path / "runtime.txt").read_text()
    without = re.sub(r"^tqdm==.*?(?=^\S)", "", runtime, flags=re.MULTILINE | re.DOTALL)
    assert without != runtime
    (tmp_path / "runtime.txt").write_text(without)
    monkeypatch.setattr(locking, "LOCKS", tmp_path)
    assert locking.find_stale(["build", "runtime"]) == ["runtime"]


def installed() -> dict[str, str]:
    found = importlib.metadata.distributions()
    return {canonicalize_name(one.metadata["Name"]): one.version for one in found}


def differences(lock: list[Locked], environment: dict[str, str]) -> set[str]:
    """Packages that are in one of the two alone, or in another version."""
    wanted = versions([*lock, *read_lock("build")])
    apart = {name for name, _ in wanted.items() ^ environment.items()}
    own = {"paliedge", "pip", "setuptools", "wheel"}
    return {name for name in apart if name not in own and not NOT_LOCKED.fullmatch(name)}


def test_this_environment_is_its_lock() -> None:
    """make leaves a copy of the lock in what it has made."""
    copy = Path(sys.prefix, "lock.txt")
    assert copy.is_file(), "not an environment of the Makefile's: run `make test`"
    assert differences(parse(copy.read_text()), installed()) == set()


def test_an_environment_that_differs_is_seen() -> None:
    lock = parse(Path(sys.prefix, "lock.txt").read_text())
    here = installed()
    assert differences(lock, {**here, "numpy": "1.0"}) == {"numpy"}
    assert differences(lock, {**here, "leftpad": "1.0"}) == {"leftpad"}
    assert differences(lock, {name: version for name, version in here.items() if name != "msgspec"}) == {"msgspec"}


def test_everything_installed_fits_together() -> None:
    pip("check")


def test_a_wrong_hash_is_refused(tmp_path: Path) -> None:
    (entry,) = [one for one in read_lock("build") if one.name == "pluggy"]
    lock = tmp_path / "lock.txt"
    lock.write_text(f"pluggy=={entry.version} --hash=sha256:{'0' * 64}\n")
    with pytest.raises(AssertionError, match="DO NOT MATCH THE HASHES"):
        pip("install", "--no-deps", "--require-hashes", f"--target={tmp_path}", "--no-cache-dir", "-r", lock)


def test_the_makefile_installs_torch_as_the_locks_were_made_for(locking: ModuleType) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert f"TORCH ?= {locking.TORCH}\n" in makefile
    done = subprocess.run(["make", "-n", ".venv/elsewhere"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode  # no rule makes an environment out of no lock


def test_make_takes_hashes_wherever_it_installs_from_a_lock() -> None:
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if "-r " in line and "INSTALL" in line]
    assert len(lines) == 2
    assert all("--no-deps --require-hashes" in line for line in lines)
