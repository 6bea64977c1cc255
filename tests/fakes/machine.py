"""A machine with a GPU and TensorRT, all fake: what a program imports here, and in processes that it starts."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tests.fakes.tensorrt import Settings, make_module
from tests.paths import ROOT

if TYPE_CHECKING:
    from paliedge.bundle.manifest import Flavour
    from tests.fakes.cuda_runtime import FakeCuda

MODULES: dict[str, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
_FRESH = tuple(
    f"paliedge.backends.{name}" for name in ("cuda", "trt.engine", "trt.buffers", "trt.parts", "trt.session")
)
"""They import CUDA, or what does."""
_CUDA = ("cuda", "cuda.bindings", "cuda.bindings.runtime")
_IN_CHILDREN = """
import sys
from pathlib import Path
from tests.fakes.tensorrt import Settings, make_module
sys.modules[__name__] = make_module(Settings.read(Path({path!r})))
"""


@dataclass
class Machine:
    """What a test knows of the machine that the program under test does not.

    Attributes:
        cuda: the GPU; None where CUDA's bindings are missing.
        modules: the TensorRTs, by flavour.
    """

    folder: Path
    cuda: FakeCuda | None
    settings: dict[str, Settings]
    modules: dict[str, ModuleType]

    @property
    def gpu(self) -> FakeCuda:
        assert self.cuda is not None
        return self.cuda

    def break_builder(self, fault: str, part: str = "", seconds: float = 0.0, flavour: Flavour = "tensorrt") -> None:
        """Let the next builds go wrong, or take their time."""
        self.settings[flavour] = replace(self.settings[flavour], fault=fault, part=part, seconds=seconds)
        self.settings[flavour].write(self.folder / f"{flavour}.json")

    def builds(self) -> list[dict[str, Any]]:
        """What was asked of the builder, in order."""
        log = self.folder / "builds.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@contextmanager
def fake_machine(
    folder: Path,
    *,
    tensorrt: str | None = "10.3.0",
    rtx: str | None = None,
    cuda: FakeCuda | None = None,
    must_release: bool = True,
) -> Iterator[Machine]:
    """Stand in the place of CUDA and TensorRT until the end, when everything must have been given back.

    Args:
        folder: for what belongs to the machine.
        tensorrt, rtx: versions; None where it is not installed.
        cuda: the GPU; None where CUDA's bindings are missing.
    """
    folder.mkdir(exist_ok=True)
    capability = cuda.compute_capability if cuda else "8.7"
    versions = {"tensorrt": tensorrt, "rtx": rtx}
    settings = {
        flavour: Settings(flavour, version, capability, str(folder / "builds.jsonl"))
        for flavour, version in versions.items()
        if version
    }
    modules = {flavour: _make_module(chosen, cuda) for flavour, chosen in settings.items()}
    machine = Machine(folder, cuda, settings, modules)
    path = [_write_children_modules(folder, settings), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(path), "XDG_CACHE_HOME": str(folder / "cache")}
    standing_in: dict[str, ModuleType | None] = {name: modules.get(flavour) for flavour, name in MODULES.items()}
    standing_in |= _cuda_modules(cuda)
    with _environment(environment), _modules(standing_in):
        yield machine
        if cuda and must_release:
            cuda.assert_all_released()


def _make_module(settings: Settings, cuda: FakeCuda | None) -> ModuleType:
    if cuda is None:
        return make_module(settings)
    from tests.fakes.tensorrt_engine import runtime_class

    return make_module(settings, {"Runtime": runtime_class(settings, cuda)})


def _write_children_modules(folder: Path, settings: dict[str, Settings]) -> str:
    """A folder of modules for the processes that build."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    for flavour, chosen in settings.items():
        chosen.write(folder / f"{flavour}.json")
        (site / f"{MODULES[flavour]}.py").write_text(_IN_CHILDREN.format(path=str(folder / f"{flavour}.json")))
    return str(site)


def _cuda_modules(cuda: FakeCuda | None) -> dict[str, ModuleType | None]:
    if cuda is None:
        return dict.fromkeys(_CUDA)
    made = dict(zip(_CUDA, (ModuleType("cuda"), ModuleType("cuda.bindings"), cuda.module()), strict=True))
    vars(made["cuda"])["bindings"] = made["cuda.bindings"]
    vars(made["cuda.bindings"])["runtime"] = made["cuda.bindings.runtime"]
    return dict(made)


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _modules(standing_in: dict[str, ModuleType | None]) -> Iterator[None]:
    """Other modules; None is one that cannot be imported. Ours that import CUDA are imported afresh, then as before."""
    homes = {name: name.rpartition(".") for name in _FRESH}
    packages = {name: importlib.import_module(package) for name, (package, _, _) in homes.items()}
    names = (*standing_in, *_FRESH)
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    attributes = {name: getattr(packages[name], short, None) for name, (_, _, short) in homes.items()}
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(standing_in)  # type: ignore[arg-type]  # None stands for a module that is not there
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        for name, module in attributes.items():
            package, short = packages[name], homes[name][2]
            if module is not None:
                setattr(package, short, module)
            elif hasattr(package, short):
                delattr(package, short)
