"""The demo says where it is wrong, by what the scenes were drawn from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.shapes.scenes import HELD_OUT_SEED, caption, make_scene
from paliedge.cli import main
from paliedge.cli.demo import DEMO_SCENES, box_faults
from paliedge.results.locations import Detection

SCENES = json.loads((DEMO_SCENES / "scenes.json").read_text())
OBJECTS = [{"label": "red star", "box": [10, 10, 30, 30]}, {"label": "blue star", "box": [60, 60, 90, 90]}]


def found(label: str, *box: float) -> Detection:
    return Detection(label, box, box, (-1.0,) * 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("detections", "labels", "faults"),
    [
        ([found("red star", 11, 10, 30, 31), found("blue star", 60, 60, 90, 90)], ["red star", "blue star"], []),
        ([], ["red star"], ["red star at 10 10 30 30 was missed"]),
        ([found("red star", 60, 60, 90, 90)], ["blue star"], [
            "a blue star is where red star was found", "blue star at 60 60 90 90 was missed"]),
        ([found("red star", 10, 10, 30, 30)] * 2, ["red star"], ["a red star is where red star was found"]),
        ([found("red star", 31, 31, 50, 50)], [], ["nothing like it is where red star was found"]),
    ],
)  # fmt: skip
def test_boxes_are_held_against_the_truth(detections: list[Detection], labels: list[str], faults: list[str]) -> None:
    assert list(box_faults(detections, OBJECTS, labels)) == faults


def test_the_truth_is_that_of_the_pictures() -> None:
    pictures = {scene["file"]: np.asarray(Image.open(DEMO_SCENES / scene["file"])) for scene in SCENES}
    for seed in range(HELD_OUT_SEED + 30_000, HELD_OUT_SEED + 30_100):
        drawn = make_scene(seed)
        for scene in SCENES:
            if scene["file"] in pictures and np.array_equal(pictures[scene["file"]], drawn.image):
                del pictures[scene["file"]]
                assert scene["truth"]["caption"] == caption(drawn)
                assert scene["truth"]["ocr"] == (drawn.text.text if drawn.text else "")
                boxes = [(item["label"], tuple(item["box"])) for item in scene["truth"]["objects"]]
                assert boxes == [(item.label, tuple(item.box)) for item in drawn.objects]
    assert pictures == {}


def test_what_is_wrong_stands_below_its_answer_and_not_in_json(tmp_path: Path) -> None:
    lines = CliRunner().invoke(main, ["demo", "--save", str(tmp_path)]).stdout.splitlines()
    answers = {scene["file"]: scene["truth"]["ocr"] for scene in SCENES}
    for index, line in enumerate(lines):
        name, _, text = line.partition(": ocr: ")
        if text and name in answers:
            wrong = index + 1 < len(lines) and lines[index + 1].startswith("  wrong: ")
            assert wrong == (text != answers[name]), line
    rows = CliRunner().invoke(main, ["demo", "--save", str(tmp_path), "--json"]).stdout.splitlines()
    assert len([json.loads(row) for row in rows]) == 5 * len(SCENES)
