"""The smallest complete fine-tune teaches the shapes model a question, as an adapter and as whole weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.shapes.fine_tune import fine_tune
from benchmarks.shapes.largest import QUESTION, largest, write_examples
from benchmarks.shapes.scenes import CLASSES, make_scene
from paliedge import PaliGemma
from paliedge_export.exporter import export_bundle
from tests.paths import SHAPES_CHECKPOINT

ASKED = range(700_001_000, 700_001_030)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("examples"), range(700_000_000, 700_000_100))


def answers(model: PaliGemma) -> list[tuple[str, str]]:
    scenes = [make_scene(seed, photographs=True) for seed in ASKED]
    return [(model.ask(scene.image, QUESTION).text, largest(scene)) for scene in scenes]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by PEFT
@pytest.mark.parametrize(("full", "rate"), [(False, 4e-3), (True, 1e-3)])
def test_a_question_is_learned(full: bool, rate: float, examples: Path, tmp_path: Path) -> None:
    losses = fine_tune(str(SHAPES_CHECKPOINT), examples, tmp_path / "out", full=full, steps=30, batch=8, rate=rate)
    assert losses[-1] < losses[0] / 4
    assert (tmp_path / "out" / ("model.safetensors" if full else "adapter_model.safetensors")).exists()
    export_bundle(str(tmp_path / "out"), tmp_path / "bundle")
    with PaliGemma.load() as before, PaliGemma.load(tmp_path / "bundle") as after:
        unlearned, learned = answers(before), answers(after)
    assert not any(found in CLASSES for found, _ in unlearned)
    assert sum(found in CLASSES for found, _ in learned) > 0.8 * len(ASKED)
    assert sum(found == wanted for found, wanted in learned) > len(ASKED) / 4
