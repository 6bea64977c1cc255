"""The images: rules that a Dockerfile keeps, locks that are complete for it, and the x86 image's steps for real.

No container engine takes part. What the build stage of Dockerfile.x86 does is done here in a folder, line by line; the
JetPack ones do the same with another lock.
"""

from __future__ import annotations

import email
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from paliedge import __version__
from tests.locks import LOCKS, Machine, download, pip, read_lock, versions
from tests.paths import ROOT

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
COMPILERS = {"cc", "gcc", "g++", "clang", "nvcc", "make"}
each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix[1:])


class Step(NamedTuple):
    """One instruction of a Dockerfile; several lines are joined to one."""

    word: str
    text: str


def read_stages(text: str) -> list[list[Step]]:
    """The instructions from each FROM to the next; the ARGs before the first are a stage of their own."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    stages: list[list[Step]] = [[]]
    for line in lines.replace("\\\n", " ").splitlines():
        if line.strip():
            step = Step(*line.strip().split(maxsplit=1))
            if step.word == "FROM":
                stages.append([])
            stages[-1].append(step)
    return stages


def texts(stage: list[Step], word: str) -> list[str]:
    return [step.text for step in stage if step.word == word]


def broken_rules(text: str) -> Iterator[str]:
    """What a Dockerfile does that ours must not do."""
    heads, *stages = read_stages(text)
    build, final = stages[0], stages[-1]
    (base,) = texts(heads, "ARG")
    if len(stages) != 2 or texts(build, "FROM") != ["${BASE} AS build"] or texts(final, "FROM") != ["${BASE}"]:
        yield "two stages, both from BASE"
    if not re.fullmatch(r"BASE=[\w./-]+:[\w.-]+", base) or base.endswith("latest"):
        yield "a base with a tag"
    if texts(final, "USER") != ["10001"] or not any("useradd --uid 10001" in run for run in texts(final, "RUN")):
        yield "a user with a number, and no root"
    if texts(final, "ENV") != ["PATH=/opt/paliedge/bin:$PATH ORT_DISABLE_TELEMETRY=1"]:
        yield "our commands first, and no telemetry"
    if texts(final, "ENTRYPOINT") != ['["paliedge"]']:
        yield "the entry point"
    if not any(check.endswith('CMD ["paliedge", "info", "--json"]') for check in texts(final, "HEALTHCHECK")):
        yield "a health check"
    if [copied for copied in texts(final, "COPY") if copied.startswith("--from")] != [
        "--from=build /opt/paliedge /opt/paliedge"
    ]:
        yield "the environment alone from the build stage"
    yield from broken_run_rules(texts(build, "RUN"), texts(final, "RUN"))
    if re.search(r"curl|wget|://", text) or texts(build + final, "ADD"):
        yield "nothing from an address"


def broken_run_rules(build: list[str], final: list[str]) -> Iterator[str]:
    commands = [command.strip() for run in build + final for command in run.split("&&")]
    for command in commands:
        words = set(shlex.split(command))
        if "pip install" in command and not {"--no-deps"} < words & {"--no-deps", "--require-hashes", "--no-index"}:
            yield "hashes for everything that pip fetches"
        if "apt-get install" in command and "--no-install-recommends" not in words:
            yield "no recommended packages"
    if any("apt-get update" in run and "rm -rf /var/lib/apt/lists/*" not in run for run in build + final):
        yield "apt's lists go in the layer that brought them"
    if any("pip" in run for run in final):
        yield "no pip in the final stage"
    installed = {word for run in final for word in shlex.split(run) if "apt-get install" in run}
    if any(word.endswith("-dev") or word == "build-essential" or word in COMPILERS - {"make"} for word in installed):
        yield "no compiler in the final stage"
    if not any(COMPILERS.issubset(re.split(r"[\s;]+", run)) and "exit 1" in run for run in final):
        yield "a check that no compiler is left"


@each_dockerfile
def test_a_dockerfile_keeps_the_rules(path: Path) -> None:
    assert list(broken_rules(path.read_text())) == []


BREAK = {
    "latest": ("-bookworm\n", "-bookworm:latest\n", "a base with a tag"),
    "no tag": (":3.12.14-slim-bookworm\n", "\n", "a base with a tag"),
    "root": ("USER 10001", "USER root", "a user with a number, and no root"),
    "root again": ("WORKDIR /data\n", "USER 0\n", "a user with a number, and no root"),
    "a shell": ('ENTRYPOINT ["paliedge"]', "ENTRYPOINT paliedge", "the entry point"),
    "no health check": ("HEALTHCHECK", "ENV A=", "a health check"),
    "telemetry": (" ORT_DISABLE_TELEMETRY=1", "", "our commands first, and no telemetry"),
    "no hashes": ("--require-hashes ", "", "hashes for everything that pip fetches"),
    "dependencies": (
        "pip install --no-deps --no-index",
        "pip install --no-index",
        "hashes for everything that pip fetches",
    ),
    "an index": (" --no-index", "", "hashes for everything that pip fetches"),
    "pip at the end": ("&& mkdir /data", "&& pip install --no-deps --no-index x", "no pip in the final stage"),
    "a download": ("&& mkdir /data", "&& curl x | sh", "nothing from an address"),
    "an address": ("COPY docker/smoke.sh", "ADD docker/smoke.sh", "nothing from an address"),
    "a compiler": ("&& mkdir /data", "&& apt-get install gcc", "no compiler in the final stage"),
    "headers": ("&& mkdir /data", "&& apt-get install python3-dev", "no compiler in the final stage"),
    "recommended": ("&& mkdir /data", "&& apt-get install python3", "no recommended packages"),
    "lists": ("&& mkdir /data", "&& apt-get update", "apt's lists go in the layer that brought them"),
    "unchecked": ("nvcc make; do", "make; do", "a check that no compiler is left"),
    "all of the build": ("--from=build /opt/paliedge", "--from=build /", "the environment alone from the build stage"),
    "one stage": ("FROM ${BASE}\n", "FROM build\n", "two stages, both from BASE"),
}


@pytest.mark.parametrize(("old", "new", "rule"), BREAK.values(), ids=BREAK)
def test_a_broken_rule_is_seen(old: str, new: str, rule: str) -> None:
    text = (DOCKER / "Dockerfile.x86").read_text()
    assert old in text
    assert rule in list(broken_rules(text.replace(old, new)))


@each_dockerfile
def test_what_a_dockerfile_copies_is_there_and_not_ignored(path: Path) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    _, build, final = read_stages(path.read_text())
    lock = lock_name(build)
    copied = [text.split()[:-1] for text in texts(build + final, "COPY") if not text.startswith("--from")]
    for source in [name.replace("${LOCK}", lock) for names in copied for name in names]:
        assert (ROOT / source).exists(), source
        assert source in allowed or f"{Path(source).parent}/*{Path(source).suffix}" in allowed, source


def lock_name(build: list[Step]) -> str:
    """The default of a build stage's ARG LOCK."""
    (lock,) = [text.removeprefix("LOCK=") for text in texts(build, "ARG")]
    return lock


def test_the_build_stages_differ_in_their_lock_and_the_systems_packages_alone() -> None:
    """So that what is done below for x86 says something about the JetPack images."""

    def steps(path: Path) -> list[Step]:
        _, build, _ = read_stages(path.read_text())
        kept = [step for step in build if "apt-get" not in step.text and step.word != "ARG"]
        same = re.compile(r" --(system-site-packages|ignore-installed)|(?<= ) +|\"")
        return [Step(step.word, same.sub("", step.text)) for step in kept]

    assert [lock_name(read_stages(path.read_text())[1]) for path in DOCKERFILES] == ["jetpack", "jetpack", "export"]
    assert steps(DOCKERFILES[0]) == steps(DOCKERFILES[1]) == steps(DOCKERFILES[2])


@each_dockerfile
def test_hadolint_has_no_complaint(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert hadolint, "hadolint is not installed; the extra dev brings it"
    linted = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True, check=False)
    assert (linted.returncode, linted.stdout) == (0, "")


class Image(NamedTuple):
    """What an image has: a lock, and the interpreter and processor that read it."""

    lock: str
    root: str
    machine: Machine


IMAGES = {
    "build": Image("build", "hatchling", Machine("3.10.12", "aarch64", 35)),
    "jetpack6": Image("jetpack", "paliedge[cpu,tensorrt]", Machine("3.10.12", "aarch64", 35)),
    "jetpack7": Image("jetpack", "paliedge[cpu,tensorrt]", Machine("3.12.3", "aarch64", 39)),
    "x86": Image("export", "paliedge[cpu,export]", Machine("3.12.3", "x86_64", 36)),
    "x86, Python 3.11": Image("export", "paliedge[cpu,export]", Machine("3.11.2", "x86_64", 36)),
    "x86, Python 3.13": Image("export", "paliedge[cpu,export]", Machine("3.13.0", "x86_64", 36)),
}
NEVER = {"torch", "transformers", "tensorrt", "opencv-python", "opencv-python-headless"}
FOR_EXPORT = {"onnx", "ml-dtypes", "safetensors"}


@pytest.mark.parametrize("name", ["build", "runtime", "jetpack", "export"])
def test_an_images_lock_has_no_framework(name: str) -> None:
    locked = {one.name for one in read_lock(name)}
    assert not locked & NEVER
    assert FOR_EXPORT & locked == (FOR_EXPORT if name == "export" else set())


@pytest.mark.parametrize("name", ["jetpack", "export"])
def test_every_other_lock_holds_the_runtimes(name: str) -> None:
    assert set(read_lock("runtime")) < set(read_lock(name))


def requires(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        metadata = email.message_from_bytes(archive.read(name))
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def wheels_by_name(folder: Path) -> dict[str, Path]:
    return {canonicalize_name(path.name.split("-")[0]): path for path in folder.iterdir()}


def walk(image: Image, wheels: dict[str, Path], versions: dict[str, str]) -> set[str]:
    """Every package that the root needs on the image, each asserted to be there in a version that fits."""
    marks = image.machine.environment()
    reached: set[tuple[str, str]] = set()
    waiting = [Requirement(image.root)]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        assert name in wheels, f"{wanted} is missing"
        if name in versions:
            assert wanted.specifier.contains(versions[name], prereleases=True), f"{wanted}, but {versions[name]}"
        for extra in {"", *wanted.extras} - {extra for known, extra in reached if known == name}:
            reached.add((name, extra))
            for needed in requires(wheels[name]):
                if needed.marker is None or needed.marker.evaluate({**marks, "extra": extra}):
                    waiting.append(needed)
    return {name for name, _ in reached}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of wheels an image, fetched for its Python and processor, every hash compared by pip."""
    folder = tmp_path_factory.mktemp("wheels")
    for name, image in IMAGES.items():
        download(image.machine, image.lock, folder / name)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", IMAGES)
def test_a_lock_is_all_that_the_image_needs_and_no_more(name: str, fetched: Path, wheel: Path) -> None:
    image = IMAGES[name]
    locked = versions(read_lock(image.lock), image.machine)
    reached = walk(image, {**wheels_by_name(fetched / name), "paliedge": wheel}, locked)
    only_for_editable = {"editables"} if name == "build" else set()
    assert reached - {"paliedge"} == set(locked) - only_for_editable


@pytest.mark.parametrize("missing", ["anyio", "exceptiongroup", "mpmath"])
def test_a_lock_with_a_hole_is_seen(missing: str, fetched: Path, wheel: Path) -> None:
    image = IMAGES["jetpack6"]
    wheels = {**wheels_by_name(fetched / "jetpack6"), "paliedge": wheel}
    del wheels[missing]
    with pytest.raises(AssertionError, match=f"{missing}.* is missing"):
        walk(image, wheels, versions(read_lock("jetpack"), image.machine))


class Replay:
    """Does a build stage's steps in a folder that stands for the image's root."""

    def __init__(self, root: Path, wheels: Path) -> None:
        self.root, self.lock = root, "export"
        self.work = root
        wrapper = root / "bin" / "python3"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        wrapper.chmod(0o755)
        fetched = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_COMPILE": "0"}
        paths = {"PATH": f"{wrapper.parent}:/usr/bin:/bin", "HOME": str(root)}
        self.variables = {**os.environ, **fetched, **paths, "LOCK": self.lock}

    def do(self, step: Step) -> None:
        if step.word == "ENV":
            self.variables.update(re.findall(r"(\w+)=(\S+)", step.text))
        elif step.word == "WORKDIR":
            self.work = self.root / step.text.lstrip("/")
            self.work.mkdir(parents=True)
        elif step.word == "COPY":
            *sources, into = step.text.replace("${LOCK}", self.lock).split()
            for source in sources:
                self.copy(ROOT / source, self.work / into)
        elif step.word == "RUN":
            here = re.sub(r"(?<!\S)/(build|opt|wheel)\b", lambda path: str(self.root) + path[0], step.text)
            ran = subprocess.run(
                ["sh", "-c", here], cwd=self.work, env=self.variables, capture_output=True, text=True, check=False
            )
            assert ran.returncode == 0, f"{here}\n{ran.stdout}\n{ran.stderr}"
        else:
            assert step.word in ("FROM", "ARG"), step

    def copy(self, source: Path, into: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, into, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            into.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, into)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the build stage of Dockerfile.x86 makes with this Python, from wheels that are fetched once."""
    root, wheels = tmp_path_factory.mktemp("image"), tmp_path_factory.mktemp("wheels")
    for name in ("build", "export"):
        pip("download", "--no-deps", "--require-hashes", f"--dest={wheels}", "-r", LOCKS / f"{name}.txt")
    replay = Replay(root, wheels)
    _, build, _ = read_stages((DOCKER / "Dockerfile.x86").read_text())
    for step in build:
        replay.do(step)
    yield root
    shutil.rmtree(root)
    shutil.rmtree(wheels)


def run_in(image: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """With the finished image's variables, a home and no network."""
    paths = {"PATH": f"{image}/opt/paliedge/bin:/usr/bin:/bin", "HOME": str(image)}
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    variables = {**paths, **offline, "ORT_DISABLE_TELEMETRY": "1"}
    return subprocess.run(command, cwd=image, env=variables, capture_output=True, text=True, check=False)


def test_the_x86_image_passes_its_smoke_test(image: Path) -> None:
    smoke = run_in(image, "sh", DOCKER / "smoke.sh")
    assert smoke.returncode == 0, smoke.stderr
    assert smoke.stdout.count("green circle") == 2
    assert {path.name for path in (image / ".cache").iterdir()} == {"paliedge"}, "notes of our own alone"


def test_the_smoke_test_fails_where_nothing_is_found(image: Path, tmp_path: Path) -> None:
    """A `paliedge` that answers everything and finds nothing."""
    idle = tmp_path / "opt" / "paliedge" / "bin"
    idle.mkdir(parents=True)
    (idle / "paliedge").write_text("#!/bin/sh\n")
    (idle / "paliedge").chmod(0o755)
    (idle / "python3").symlink_to(image / "opt" / "paliedge" / "bin" / "python3")
    assert run_in(tmp_path, "sh", DOCKER / "smoke.sh").returncode != 0


def test_the_x86_images_health_check_passes(image: Path) -> None:
    _, _, final = read_stages((DOCKER / "Dockerfile.x86").read_text())
    (check,) = texts(final, "HEALTHCHECK")
    health = run_in(image, *json.loads(check.split("CMD ")[1]))
    assert health.returncode == 0, health.stderr
    json.loads(health.stdout)


def test_the_x86_image_holds_its_lock_and_no_installer(image: Path) -> None:
    ask = "import importlib.metadata as m; print(*{d.metadata['Name'] + '==' + d.version for d in m.distributions()})"
    listed = run_in(image, "python3", "-I", "-c", ask).stdout.split()
    installed = {canonicalize_name(item.split("==")[0]): item.split("==")[1] for item in listed}
    assert installed == {"paliedge": __version__, **versions(read_lock("export"))}
