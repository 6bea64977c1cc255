"""Scores of answers about scenes, and how far two models' answers about the same scenes lie apart.

AP50 is pycocotools', once with each box ranked by its confidence, once with all boxes equal. Intervals are those of
scenes drawn again and again out of the same ones (the bootstrap), both models' with the same draws.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.shapes.goals import LEAST, MOST
from benchmarks.shapes.scenes import CLASSES, IMAGE_SIZE, SceneObject
from paliedge import Generation


@dataclass
class Boxes:
    """COCO annotations and results."""

    ground_truth: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)

    def add_truth(self, image: int, objects: Iterable[SceneObject]) -> None:
        for item in objects:
            width, height = item.box.x2 - item.box.x1, item.box.y2 - item.box.y1
            self.ground_truth.append(
                {
                    "id": len(self.ground_truth) + 1,
                    "image_id": image,
                    "category_id": _category(item.label),
                    "bbox": [item.box.x1, item.box.y1, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )

    def add_answer(self, image: int, answer: Generation) -> None:
        for item in answer.detections:
            x1, y1, x2, y2 = item.box
            box = [x1, y1, x2 - x1, y2 - y1]
            row = {"image_id": image, "category_id": _category(item.label), "bbox": box, "score": item.confidence}
            self.detections.append(row)


@dataclass
class Answers:
    """What is known of the answers to some scenes, scene by scene.

    Attributes:
        alone: boxes where each class was asked for alone.
        together: boxes where up to three were asked for in one prompt.
        values: by score, a scene's values, which are averaged over all scenes together.
        errors: wrong characters of each scene's text, and how many it has.
        timings: in ms, by stage.
    """

    num_scenes: int = 0
    alone: Boxes = field(default_factory=Boxes)
    together: Boxes = field(default_factory=Boxes)
    values: list[dict[str, list[float]]] = field(default_factory=list)
    errors: list[tuple[int, int]] = field(default_factory=list)
    timings: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, *values: float) -> None:
        """Values of the scene at hand."""
        self.values[-1].setdefault(name, []).extend(values)

    def time(self, answer: Generation) -> Generation:
        self.timings["prefill_ms"].append(answer.timings.prefill_ms)
        self.timings["decode_step_ms"] += answer.timings.decode_ms
        return answer


def _category(label: str) -> int:
    return CLASSES.index(label) + 1 if label in CLASSES else len(CLASSES) + 1


class _Ranking:
    """AP at IoU 0.5, all sizes, at most 100 boxes a scene, as COCO defines it, of any choice of scenes."""

    def __init__(self, boxes: Boxes, num_scenes: int, *, scored: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            truth = COCO()
            truth.dataset = {
                "info": {},
                "images": [{"id": index, "width": IMAGE_SIZE, "height": IMAGE_SIZE} for index in range(num_scenes)],
                "annotations": boxes.ground_truth,
                "categories": [{"id": index + 1, "name": name} for index, name in enumerate((*CLASSES, "other"))],
            }
            truth.createIndex()
            found = truth.loadRes([item if scored else item | {"score": 1.0} for item in boxes.detections])
            self._evaluation = COCOeval(truth, found, "bbox")
            self._evaluation.params.iouThrs = np.array([0.5])
            self._evaluation.params.areaRng, self._evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
            self._evaluation.evaluate()
        self._by_class = np.array(self._evaluation.evalImgs, object).reshape(len(CLASSES) + 1, num_scenes)

    def of(self, scenes: npt.NDArray[np.int64]) -> float:
        """Of as many scenes as there are; one may be there several times."""
        self._evaluation.evalImgs = self._by_class[:, scenes].ravel().tolist()
        with contextlib.redirect_stdout(io.StringIO()):
            self._evaluation.accumulate()
        precision = self._evaluation.eval["precision"][0, :, :, 0, 2]
        return float(np.mean(precision[precision > -1]))


class Scorer:
    """The scores of some answers."""

    def __init__(self, answers: Answers) -> None:
        self.num_scenes = answers.num_scenes
        self._rankings = {
            "detect_ap50": _Ranking(answers.alone, answers.num_scenes, scored=True),
            "detect_ap50_unscored": _Ranking(answers.alone, answers.num_scenes, scored=False),
            "detect_ap50_several_labels": _Ranking(answers.together, answers.num_scenes, scored=True),
        }
        names = sorted({name for scene in answers.values for name in scene})
        self._shares = {
            name: np.array([(sum(found), len(found)) for scene in answers.values for found in [scene.get(name, [])]])
            for name in names
        }
        self._shares["counting_and_colour"] = self._shares["counting"] + self._shares["colour"]
        self._shares["ocr_character_error_rate"] = np.array(answers.errors)

    def scores(self) -> dict[str, float]:
        """All of them, of all scenes."""
        everything = np.arange(self.num_scenes)
        rounded = {name: round(self.score(name, everything), 4) for name in (*self._rankings, *self._shares)}
        return {"num_scenes": self.num_scenes, **rounded}

    def score(self, name: str, scenes: npt.NDArray[np.int64]) -> float:
        """One of them, of as many scenes as there are; one may be there several times."""
        if name in self._rankings:
            return self._rankings[name].of(scenes)
        total, count = self._shares[name][scenes].sum(axis=0)
        return float(total / count)


def find_losses(exact: Scorer, other: Scorer, num_draws: int = 400) -> dict[str, dict[str, float]]:
    """How much worse `other`'s scores are that have a goal, and between what 95 % of the draws lie."""
    rng = np.random.default_rng(0)
    scenes = np.arange(exact.num_scenes)
    draws = [scenes, *(rng.choice(scenes, len(scenes)) for _ in range(num_draws))]
    found = {}
    for name in (*LEAST, *MOST):
        lost = np.array([exact.score(name, picks) - other.score(name, picks) for picks in draws])
        lost = -lost if name in MOST else lost
        low, high = np.percentile(lost[1:], (2.5, 97.5))
        found[name] = {key: round(float(value), 4) for key, value in (("lost", lost[0]), ("low", low), ("high", high))}
    return found
