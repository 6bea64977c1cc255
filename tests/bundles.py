"""Bundles with engines of the fake TensorRT, one of each kind for all tests. Read only."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.paths import SHAPES_CHECKPOINT

if TYPE_CHECKING:
    from paliedge import PaliGemma
    from paliedge.backends.ort import OrtSession
    from paliedge.bundle.bundle import Bundle
    from tests.fakes.cuda_runtime import FakeCuda
    from tests.fakes.machine import Machine

VERSIONS = {"jetpack6": "10.3.0", "jetpack7": "10.16.2"}
"""The TensorRT that builds each target's graphs."""
RTX_VERSION = "1.7.1.116"
TINY: dict[str, dict[str, Any]] = {
    "paligemma": {"head_dim": 128, "num_heads": 2},
    "paligemma2": {"head_dim": 16, "num_heads": 4, "num_kv_heads": 2},
}
"""Rows of the KV cache that fill an aligned piece of memory, and rows that need padding between tensors."""
SUBJECTS = (*TINY, "shapes")
MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 24, 8
TWO_BOARDS = pytest.mark.parametrize(
    ("target", "gpu"),
    [("jetpack6", True), ("jetpack7", False)],
    indirect=True,
    ids=["jetpack6-integrated", "jetpack7-discrete"],
)
"""Where all four pairs would show nothing new."""


def copy_bundle(bundle: Path, folder: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(bundle, folder / "bundle"))


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles for both targets, in fp16, without engines."""
    from paliedge_export.exporter import export_bundle
    from tests.tiny import make_tiny

    folder = tmp_path_factory.mktemp("bundles")
    made = {}
    for name in SUBJECTS:
        checkpoint = SHAPES_CHECKPOINT
        if name in TINY:
            checkpoint = folder / f"{name}.checkpoint"
            make_tiny(checkpoint, name, **TINY[name])
        made[name] = folder / name
        export_bundle(
            str(checkpoint),
            made[name],
            targets=tuple(VERSIONS),
            max_prompt_tokens=MAX_PROMPT_TOKENS,
            max_new_tokens=MAX_NEW_TOKENS,
            compare=False,
        )
    return made


@pytest.fixture(scope="session")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes model in int8 for `cpu`."""
    from paliedge_export.exporter import export_bundle

    folder = tmp_path_factory.mktemp("int8") / "bundle"
    export_bundle(str(SHAPES_CHECKPOINT), folder, precision="int8", compare=False)
    return folder


@pytest.fixture(scope="session")
def built(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same with an engine of each version for compute capability 8.7."""
    from paliedge.backends.trt.build import build_engine
    from tests.fakes.cuda_runtime import FakeCuda
    from tests.fakes.machine import fake_machine

    folder = tmp_path_factory.mktemp("built")
    made = {name: Path(shutil.copytree(bundle, folder / name)) for name, bundle in bundles.items()}
    for target, version in VERSIONS.items():
        with fake_machine(tmp_path_factory.mktemp("machine"), tensorrt=version, cuda=FakeCuda()):
            for bundle in made.values():
                assert build_engine(bundle).target == target
    return made


def open_reference(bundle: Bundle, target: str) -> OrtSession:
    """ONNX Runtime on a target's graphs, as TensorRT runs them: where it has an empty cache at prefill,
    TensorRT has one hidden row, which changes the order of additions and so the last digits."""
    import numpy as np

    from paliedge.backends.ort import OrtSession

    session = OrtSession(bundle, target, num_threads=1)
    hidden = {name: np.zeros((1, past.shape[1], 1, past.shape[3]), past.dtype) for name, past in session._empty.items()}
    session._empty = hidden
    return session


@pytest.fixture(scope="session")
def reference(built: dict[str, Path]) -> Iterator[Callable[[str, str], PaliGemma]]:
    """A subject's model on ONNX Runtime, on a target's graphs."""
    from paliedge import PaliGemma
    from paliedge.bundle.bundle import Bundle

    loaded: dict[tuple[str, str], PaliGemma] = {}

    def load(name: str, target: str) -> PaliGemma:
        if (name, target) not in loaded:
            bundle = Bundle(built[name])
            loaded[name, target] = PaliGemma(bundle, open_reference(bundle, target))
        return loaded[name, target]

    with ExitStack() as owner:
        yield load
        for model in loaded.values():
            owner.callback(model.close)


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=VERSIONS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["discrete", "integrated"])
def gpu(request: pytest.FixtureRequest) -> FakeCuda:
    from tests.fakes.cuda_runtime import FakeCuda

    return FakeCuda(integrated=request.param)


@pytest.fixture
def machine(target: str, gpu: FakeCuda, built: dict[str, Path], tmp_path: Path) -> Iterator[Machine]:
    """A machine with the TensorRT of the target; at the end it must have got everything back."""
    from tests.fakes.machine import fake_machine

    with fake_machine(tmp_path / "machine", tensorrt=VERSIONS[target], cuda=gpu) as made:
        yield made
