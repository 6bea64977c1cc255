"""The gate's figures, on answers that are made up."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Tokens
from paliedge.bundle.precision_report import TargetReport
from paliedge.errors import PrecisionError
from paliedge.model import SHIPPED_BUNDLE
from paliedge_export.gate.compare import GATES, check, compare
from paliedge_export.gate.runner import ReferenceRun, TeacherForcedAnswer
from paliedge_export.weights.samples import builtin_samples

SAMPLES = builtin_samples()[:1]
TOKENS: Tokens = Bundle(SHIPPED_BUNDLE, check_hashes=False).manifest.tokens


class FakeRunner:
    """Gives answers that are told to it."""

    def __init__(self, answers: ReferenceRun) -> None:
        self._answers = answers

    def answer(self, *arguments: object) -> ReferenceRun:
        return self._answers

    def text(self, tokens: object) -> str:
        return f"{tokens}"


def turned(cosine: float) -> npt.NDArray[np.float32]:
    """A vector with this cosine to that of 1.0."""
    return np.array([cosine, math.sqrt(1 - cosine**2)], np.float32)


def answers(
    tokens: list[int],
    *,
    log_prob: float = -0.1,
    hidden: float = 1.0,
    last_hidden: float | None = None,
    features: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
    num_not_finite: int = 0,
) -> ReferenceRun:
    """The same answer to each prompt; figures are cosines with those of 1.0, `last_hidden` that of the last token."""
    state = turned(hidden)
    states = np.tile(state, (len(tokens), 1))
    states[-1] = state if last_hidden is None else turned(last_hidden)
    answer = TeacherForcedAnswer(tokens, [log_prob] * len(tokens), states)
    layers = {f"language_model.layers.{index}": np.tile(state if index else 1.0, (3, 2))[:, :2] for index in range(3)}
    image_features = np.stack([turned(cosine) for cosine in features])
    return ReferenceRun("the reference", [image_features], [[answer] * 3], layers, num_not_finite)


def run(expected: ReferenceRun, found: ReferenceRun, precision: Any = "int8") -> TargetReport:
    return compare(FakeRunner(found), SAMPLES, expected, TOKENS, precision)  # type: ignore[arg-type]


def box(*bins: int) -> list[int]:
    return [TOKENS.first_location + edge for edge in bins]


def test_equal_answers_are_perfect() -> None:
    tokens = [*box(100, 100, 300, 300), 60, TOKENS.eos]
    found = run(answers(tokens), answers(tokens)).comparison
    assert (found.token_match, found.sure_token_match, found.box_iou, found.first_difference) == (1, 1, 1, None)
    assert found.last_hidden.min == pytest.approx(1)
    assert (found.num_images, found.num_answers) == (1, 3)


def test_a_box_that_moved_counts_by_its_overlap() -> None:
    """200 x 200 bins, moved by 100 along x: a third of the union."""
    expected, found = [*box(100, 100, 300, 300), 60], [*box(100, 200, 300, 400), 60]
    report = run(answers(expected), answers(found)).comparison
    assert report.box_iou == pytest.approx(1 / 3)
    assert report.token_match == pytest.approx(3 / 5)
    assert report.first_difference == 1


@pytest.mark.parametrize("found", [[60, 100, 300, 300], [300, 100, 100, 300]], ids=["a word", "swapped"])
def test_what_is_no_box_overlaps_nothing(found: list[int]) -> None:
    tokens = [60, *box(*found[1:])] if found[0] == 60 else box(*found)
    assert run(answers(box(100, 100, 300, 300)), answers(tokens)).comparison.box_iou == 0


@pytest.mark.parametrize(
    ("expected", "log_prob"), [(box(300, 100, 100, 300), -0.1), (box(1, 1, 9, 9), -6.9), ([60, 61, 62], -0.1)]
)
def test_only_boxes_that_the_reference_means_count(expected: list[int], log_prob: float) -> None:
    assert run(answers(expected, log_prob=log_prob), answers(expected)).comparison.box_iou is None


def test_tokens_that_the_reference_guessed_are_counted_apart() -> None:
    report = run(answers([60, 61], log_prob=-3.0), answers([60, 62])).comparison
    assert (report.token_match, report.sure_token_match) == (0.5, None)
    assert run(answers([60, 61]), answers([60, 62])).comparison.sure_token_match == 0.5


EXPECTED = {40: [60, 61] * 20, 4: box(100, 100, 300, 300)}
"""The reference's tokens, by how many there are."""


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"hidden": 0.9}, "mean cosine of last hidden states 0.9, not 0.98"),
        ({"num_not_finite": 3}, "activations that are no finite number 3, over 0"),
        ({"tokens": [60, 62]}, "share of sure tokens that are equal 0.5, not 0.95"),
        ({"log_prob": math.nan}, "error of log-probabilities nan"),
        ({"hidden": math.nan}, "mean cosine of last hidden states 0, not"),
        ({"tokens": [60, 61] * 20, "last_hidden": 0.8}, "smallest cosine of last hidden states 0.8, not 0.9"),
        ({"features": (0.98,) * 4}, "mean cosine of image features 0.98, not 0.99"),
        ({"features": (1.0,) * 30 + (0.85,)}, "smallest cosine of image features 0.85, not 0.9"),
        ({"tokens": box(100, 150, 300, 350)}, "mean IoU of boxes 0.6, not 0.9"),
    ],
)
def test_each_figure_can_fail(found: dict[str, Any], words: str) -> None:
    given = answers(**({"tokens": [60, 61]} | found))
    expected = answers(
        EXPECTED.get(len(given.answers[0][0].tokens), [60, 61]), features=(1.0,) * len(given.features[0])
    )
    with pytest.raises(PrecisionError, match="Nothing was published") as caught:
        check(run(expected, given), "cpu")
    assert words in caught.value.found


def test_the_worst_layer_is_the_one_behind_which_the_state_turns() -> None:
    report = run(answers([60]), answers([60], hidden=0.95))
    assert list(report.layers) == [f"language_model.layers.{index}" for index in range(3)]
    report = msgspec.structs.replace(report, layers={"a.0": 0.99, "a.1": 0.9, "a.2": 0.89, "b.0": 0.95, "b.1": 0.94})
    assert report.worst_layers() == ["a.1", "b.0", "a.0"]


def test_gates_get_looser_with_the_precision() -> None:
    order = [GATES[name] for name in ("fp32", "fp16", "bf16", "int8", "int4")]
    for tighter, looser in itertools.pairwise(order):
        assert looser.error is None or (tighter.error is not None and tighter.error <= looser.error)
        for name in ("features_mean", "features_min", "hidden_mean", "hidden_min", "sure_tokens", "box_iou"):
            assert getattr(tighter, name) >= getattr(looser, name), name
