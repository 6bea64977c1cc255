"""Quantised bundles keep their boxes, and the scripts that say so can say otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.harness import summarise
from benchmarks.peers.whole_model import describe_bundle
from benchmarks.shapes.evaluate import evaluate
from benchmarks.shapes.precisions import BehindVision, find_faults, measure
from benchmarks.shapes.scenes import HELD_OUT_SEED, make_scene
from benchmarks.shapes.scores import Scorer
from paliedge import PaliGemma
from paliedge.model import SHIPPED_BUNDLE

SEEDS = range(HELD_OUT_SEED, HELD_OUT_SEED + 40)


@pytest.fixture(scope="module")
def exact() -> dict[str, Any]:
    with PaliGemma.load(SHIPPED_BUNDLE) as model:
        return Scorer(evaluate(model, SEEDS)).scores()


@pytest.mark.parametrize(("target", "precision"), [("cpu", "int8"), ("cpu", "int4"), ("jetpack6", "int8")])
def test_boxes_and_captions_are_kept(target: str, precision: str, exact: dict[str, Any], tmp_path: Path) -> None:
    """40 scenes say less than the stored results."""
    found = Scorer(measure(target, precision, 0.0, precision, SEEDS, tmp_path)[1]).scores()
    assert found["detect_ap50"] > exact["detect_ap50"] - 0.05
    assert found["caption_exact_match"] > exact["caption_exact_match"] - 0.1


def test_a_decoder_is_measured_behind_another_vision_encoder(tmp_path: Path) -> None:
    found, own = (measure("cpu", "int8", 0.0, vision, SEEDS[:3], tmp_path)[0] for vision in ("fp32", "int8"))
    assert found["bundle_bytes"] > own["bundle_bytes"]
    with PaliGemma.load(tmp_path / "cpu-int8") as model, PaliGemma.load(tmp_path / "cpu-fp32") as encoder:
        image = make_scene(0).image
        features = BehindVision(model, encoder).encode(image).features
        assert (features == encoder.encode(image).features).all()
        assert (features != model.encode(image).features).any()


def one(target: str, precision: str, ap50: float, caption: float, sensitivity: float = 0.0) -> dict[str, Any]:
    lost = {"detect_ap50": ap50, "caption_exact_match": caption}
    return {
        "target": target,
        "precision": precision,
        "sensitivity": sensitivity,
        "losses": {name: {"lost": value} for name, value in lost.items()},
    }


def test_faults_are_found() -> None:
    exports = [
        one("cpu", "fp32", 0.0, 0.0),
        one("cpu", "int8", 0.004, 0.005),
        one("cpu", "int4", 0.016, 0.02),
        one("cpu", "int4", 0.0, 0.016, 0.5),
        one("jetpack6", "int8", -0.2, 0.006),
    ]
    assert [fault.split(" lost")[0] for fault in find_faults(exports)] == [
        "cpu int4 0.0: detect_ap50",
        "cpu int4 0.0: caption_exact_match",
        "cpu int4 0.5: caption_exact_match",
        "jetpack6 int8 0.0: caption_exact_match",
    ]


def test_medians_are_over_all_rounds() -> None:
    rounds = [
        {
            "load": 1.0,
            "peak_rss": size,
            "anonymous": size,
            "answers": [
                {"vision": x, "prefill": 2 * x, "tokens": [x, 3 * x], "answer": 7 * x, "chosen": [5]}
                for x in (1.0, 2.0)
            ],
        }
        for size in (10, 30)
    ]
    found = summarise(rounds)
    assert (found["vision"], found["prefill"], found["token"], found["answer"]) == (1.5, 3.0, 2.5, 10.5)
    assert (found["answer_range"], found["peak_rss"], found["num_answers"]) == ([7.0, 14.0], 30, 4)


def test_a_bundle_is_described_by_its_files() -> None:
    found = describe_bundle(SHIPPED_BUNDLE)
    assert found["bundle_bytes"] > found["decoder_bytes"] + found["vision_bytes"]
    assert found["plan_over_files"] == pytest.approx(1, abs=0.05)
