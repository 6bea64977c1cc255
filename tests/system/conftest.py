"""Bundles that this machine exports and other processors answer with, and the scenes that they are asked about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.shapes.scenes import HELD_OUT_SEED, make_scene
from benchmarks.signed_weights import sign_weights
from paliedge_export.exporter import export_bundle
from tests.paths import SHAPES_CHECKPOINT
from tests.system.answering import AS_IT_IS, Answers, answer_all
from tests.system.roots import build_wheel

PRECISIONS = ("fp32", "fp16", "int8", "int4")
SIGNED, FLOAT16 = "signed", "float16"
"""int8 as it was exported before weights lost their sign, and fp16 with float16 products, as TensorRT's graphs have."""
BUNDLES = (*PRECISIONS, SIGNED)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles of the shapes model by precision, and the two of other arithmetic."""
    folder = tmp_path_factory.mktemp("bundles")
    for precision in PRECISIONS:
        export_bundle(str(SHAPES_CHECKPOINT), folder / precision, precision=precision, compare=False)  # type: ignore[arg-type]
    export_bundle(str(SHAPES_CHECKPOINT), folder / FLOAT16, targets=["jetpack6"], precision="fp16", compare=False)
    sign_weights(folder / "int8", folder / SIGNED)
    return folder


@pytest.fixture(scope="session")
def draw_scenes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Held-out scenes with the labels of what is in them, as a file."""

    def draw(number: int) -> Path:
        path = tmp_path_factory.mktemp("scenes") / f"{number}.npz"
        scenes = [make_scene(HELD_OUT_SEED + index) for index in range(number)]
        labels = [";".join(sorted({item.label for item in scene.objects})) for scene in scenes]
        np.savez(path, images=np.stack([np.asarray(scene.image) for scene in scenes]), labels=np.array(labels))
        return path

    return draw


@pytest.fixture(scope="session")
def answers_here(bundles: Path) -> Callable[[Path], Answers]:
    """This machine's own answers, with exact products."""

    def ask(scenes: Path) -> Answers:
        found = answer_all(scenes, [str(bundles / name) for name in BUNDLES])
        return {Path(name).name: answers for name, answers in found.items()}

    return ask


def by_name(found: Answers) -> Answers:
    """What was answered elsewhere, by the bundles' names here."""
    names = {name: (AS_IT_IS if name.startswith(AS_IT_IS) else "") + Path(name).name for name in found}
    return {names[name]: answers for name, answers in found.items()}
