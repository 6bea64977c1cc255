"""The score is 1 where everything is right and falls with each kind of mistake."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.shapes.evaluate import Tally, ap50


def tally_of(detections: list[tuple[int, int, list[float], float]]) -> Tally:
    tally = Tally()
    for index in range(4):
        truth: dict[str, Any] = {"id": index + 1, "image_id": index, "category_id": 1, "iscrowd": 0}
        tally.ground_truth.append(truth | {"bbox": [10, 10, 20, 20], "area": 400})
    for image, category, box, score in detections:
        tally.detections.append({"image_id": image, "category_id": category, "bbox": box, "score": score})
    return tally


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
    assert low - 1e-9 <= ap50(tally_of(detections), scored=True, num_scenes=4) <= high + 1e-9


def test_without_scores_unsure_ghosts_cost_as_much_as_sure_ones() -> None:
    ghosts = [(index, 1, [50.0, 50.0, 9.0, 9.0], 0.1) for index in range(4)]
    assert ap50(tally_of([*ghosts, *RIGHT]), scored=False, num_scenes=4) < 0.8
