"""The score is 1 where everything is right and falls with each kind of mistake."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import pytest

from benchmarks.shapes.evaluate import evaluate
from benchmarks.shapes.goals import CHOOSING, FIRST_SAMPLE, JUDGED, LEAST, MOST, lacking
from benchmarks.shapes.scenes import HELD_OUT_SEED, box_example, caption, make_scene
from benchmarks.shapes.scores import Answers, Boxes, Scorer, find_losses
from paliedge import Detection, EncodedImage, Generation, GenerationOptions, Mask, PaliGemma, Timings
from paliedge.bundle.bundle import Bundle
from paliedge.model import SHIPPED_BUNDLE


def boxes_of(detections: list[tuple[int, int, list[float], float]], num_scenes: int = 4) -> Boxes:
    boxes = Boxes()
    for index in range(num_scenes):
        truth: dict[str, Any] = {"id": index + 1, "image_id": index, "category_id": 1, "iscrowd": 0}
        boxes.ground_truth.append(truth | {"bbox": [10, 10, 20, 20], "area": 400})
    for image, category, box, score in detections:
        boxes.detections.append({"image_id": image, "category_id": category, "bbox": box, "score": score})
    return boxes


RIGHT = [(index, 1, [10.0, 10.0, 20.0, 20.0], 0.9) for index in range(4)]


@pytest.mark.parametrize(
    ("detections", "low", "high"),
    [
        pytest.param(RIGHT, 1, 1, id="all-right"),
        pytest.param(RIGHT[:2], 0.49, 0.52, id="half-missed"),
        pytest.param([(i, 1, [18.0, 18.0, 20.0, 20.0], 0.9) for i in range(4)], 0, 0, id="boxes-off"),
        pytest.param([(i, 2, [10.0, 10.0, 20.0, 20.0], 0.9) for i in range(4)], 0, 0, id="wrong-class"),
        pytest.param([*RIGHT, *((i, 1, [50.0, 50.0, 9.0, 9.0], 0.95) for i in range(4))], 0.3, 0.7, id="sure-ghosts"),
        pytest.param([*RIGHT, *((i, 1, [50.0, 50.0, 9.0, 9.0], 0.1) for i in range(4))], 1, 1, id="unsure-ghosts"),
    ],
)
def test_ap50(detections: list[tuple[int, int, list[float], float]], low: float, high: float) -> None:
    assert low - 1e-9 <= ap50(detections) <= high + 1e-9


def test_without_scores_unsure_ghosts_cost_as_much_as_sure_ones() -> None:
    ghosts = [(index, 1, [50.0, 50.0, 9.0, 9.0], 0.1) for index in range(4)]
    assert ap50([*ghosts, *RIGHT], "detect_ap50_unscored") < 0.8


def ap50(detections: list[tuple[int, int, list[float], float]], name: str = "detect_ap50") -> float:
    boxes = boxes_of(detections)
    values = [{"counting": [1.0], "colour": [1.0]} for _ in range(4)]
    return Scorer(Answers(4, boxes, boxes, values, [(0, 1)] * 4)).scores()[name]


class Oracle:
    """Stands where the model does: finds the scene by its pixels and says what is there."""

    def __init__(self) -> None:
        self.manifest = Bundle(SHIPPED_BUNDLE, check_hashes=False).manifest
        self._scenes = [make_scene(seed) for seed in SEEDS]
        self._scene = self._scenes[0]

    def encode(self, image: object) -> EncodedImage:
        self._scene = next(scene for scene in self._scenes if np.array_equal(scene.image, cast(Any, image)))
        return EncodedImage(np.zeros((1, 1), np.float32), (112, 112), 1.0, 1.0)

    def detect(self, image: EncodedImage, labels: list[str], options: GenerationOptions | None = None) -> Generation:
        found = []
        for item in box_example(self._scene, labels).targets:
            x1, y1, x2, y2 = item.box
            values = item.mask[y1:y2, x1:x2].astype(np.float32) - 0.5
            box = tuple(float(edge) for edge in item.box)
            mask = Mask(values, cast(Any, box), (112, 112))
            found.append(Detection(item.label, cast(Any, box), cast(Any, box), (-0.1,) * 5, (), mask))
        return dataclasses.replace(say(""), detections=tuple(found))

    segment = detect

    def caption(self, image: EncodedImage) -> Generation:
        return say(caption(self._scene))

    def ask(self, image: EncodedImage, question: str) -> Generation:
        words = question.rstrip("?").split()
        if words[0] == "how":
            return say(str(sum(item.shape == words[2].removesuffix("s") for item in self._scene.objects)))
        return say(next(item.colour for item in self._scene.objects if item.shape == words[-1]))

    def ocr(self, image: EncodedImage) -> Generation:
        return say(self._scene.text.text if self._scene.text else "")


NUM_SCENES = 12
SEEDS = range(HELD_OUT_SEED, HELD_OUT_SEED + NUM_SCENES)


def ask(oracle: Oracle) -> Scorer:
    return Scorer(evaluate(cast(PaliGemma, oracle), SEEDS, photographs=False))


def say(text: str) -> Generation:
    return Generation(text, (), (), (), 0, (112, 112), "stop", Timings(0.0, 0.0, 1.0, (1.0,)))


def test_an_oracle_gets_full_marks() -> None:
    scores = ask(Oracle()).scores()
    assert scores["ocr_character_error_rate"] == 0
    for name in (
        "detect_ap50",
        "detect_ap50_unscored",
        "detect_ap50_several_labels",
        "caption_exact_match",
        "segment_mean_iou",
        "segment_mean_iou_only_asked",
    ):
        assert scores[name] == pytest.approx(1), name
    for name in ("counting", "colour", "absent_class_gives_nothing", "no_text_read_where_there_is_none"):
        assert scores[name] == 1, name


@pytest.mark.parametrize(
    ("task", "wrong", "score"),
    [
        ("caption", "a red", "caption_exact_match"),
        ("ask", "many", "counting_and_colour"),
        ("ocr", "#", "ocr_exact_match"),
        ("detect", "", "detect_ap50"),
        ("segment", "", "segment_mean_iou"),
        ("segment", "", "segment_mean_iou_only_asked"),
    ],
)
def test_wrong_answers_score_nothing(task: str, wrong: str, score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle()
    right = oracle.detect

    def answer(image: EncodedImage, labels: object = None, options: GenerationOptions | None = None) -> Generation:
        if task not in ("detect", "segment"):
            return say(wrong)
        found = right(image, cast(Any, labels))
        moved = [
            item._replace(box=cast(Any, tuple(edge + 50 for edge in item.box)), label="moved")
            for item in found.detections
        ]
        return dataclasses.replace(found, detections=tuple(moved))

    monkeypatch.setattr(oracle, task, answer)
    assert ask(oracle).scores()[score] == 0


def test_the_shipped_bundle_finds_its_boxes_and_masks() -> None:
    """Floors under what 60 scenes scored (0.94 and 0.82): a broken kernel or coordinate falls far below them."""
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + 60)
    scores = Scorer(evaluate(PaliGemma.load(), seeds, photographs=False)).scores()
    assert scores["detect_ap50"] > 0.85
    assert scores["segment_mean_iou"] > 0.75


def test_losses_are_of_the_same_scenes_and_have_their_interval() -> None:
    """A model that is wrong in every fourth scene, beside one that is right: a quarter, more or less."""
    right = ask(Oracle())
    assert find_losses(right, right, 5)["counting"] == {"lost": 0, "low": 0, "high": 0}
    values: list[dict[str, list[float]]] = [
        {"counting": [index % 4 > 0], "caption_exact_match": [1.0]} for index in range(40)
    ]
    perfect: list[dict[str, list[float]]] = [{"counting": [1.0], "caption_exact_match": [1.0]} for _ in range(40)]
    extra: dict[str, list[float]] = {"colour": [1.0], "segment_mean_iou": [0.5]}
    boxes = boxes_of([(index, *RIGHT[0][1:]) for index in range(40)], 40)
    worse, exact = (
        Scorer(Answers(40, boxes, boxes, [scene | extra for scene in scenes], [(wrong, 10)] * 40))
        for scenes, wrong in ((values, 2), (perfect, 1))
    )
    found = find_losses(exact, worse, 100)
    assert found["counting"]["lost"] == pytest.approx(0.25)
    assert 0.05 < found["counting"]["low"] < 0.25 < found["counting"]["high"] < 0.45
    assert found["caption_exact_match"] == {"lost": 0, "low": 0, "high": 0}
    assert found["ocr_character_error_rate"] == {"lost": 0.1, "low": 0.1, "high": 0.1}, "more errors are a loss"
    assert found["detect_ap50"]["lost"] == 0


def test_scenes_are_judged_that_neither_train_nor_choose_nor_show_anything() -> None:
    assert min(JUDGED) >= HELD_OUT_SEED > max(CHOOSING)
    assert max(JUDGED) < FIRST_SAMPLE
    assert len(JUDGED) == 1_000


def test_what_a_score_lacks_is_said() -> None:
    reached = LEAST | MOST
    assert lacking(reached) == {}
    assert lacking(reached | {"counting": 0.97, "ocr_character_error_rate": 0.05}) == {
        "counting": 0.01,
        "ocr_character_error_rate": 0.01,
    }
