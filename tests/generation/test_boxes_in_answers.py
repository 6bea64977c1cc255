"""Boxes and masks as an answer brings them: held to their form, scored, streamed, with masks decoded.

The models are random, which is as misbehaved as a model can be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from paliedge import Generation, GenerationOptions, PaliGemma
from paliedge.backends.session import GeneratedToken, IdRange
from paliedge.errors import UsageError
from paliedge_export.exporter import export_bundle
from tests.masks import decode_masks, random_mask_decoder
from tests.tiny import make_tiny

MASK_DECODER = random_mask_decoder(4)
IMAGES = [np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8) for seed in range(6)]
LABELS = ["red circle", "blue star", "red star"]
NUM_TOKENS = 60


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PaliGemma]:
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny(folder / "checkpoint", request.param, seed=3)
    save_file(MASK_DECODER, folder / "checkpoint" / "mask_decoder.safetensors")
    export_bundle(
        str(folder / "checkpoint"), folder / "bundle", max_prompt_tokens=40, max_new_tokens=NUM_TOKENS, compare=False
    )
    with closing(PaliGemma.load(folder / "bundle")) as loaded:
        yield push_locations(loaded)


def push_locations(model: PaliGemma) -> PaliGemma:
    """Make the random model begin boxes: every third step it says what the rule allows last."""
    session = model._session
    decode, count = session.decode, [0]

    def loud(cache: object, embeds: npt.NDArray[np.float32], allowed: Sequence[IdRange]) -> list[GeneratedToken]:
        count[0] += 1
        tokens = model.manifest.tokens
        first, last = tokens.first_location, tokens.first_location + tokens.num_locations - 1
        wanted = (max(allowed[0][0], first), min(allowed[0][1], last))
        return decode(cache, embeds, [wanted] if count[0] % 3 and wanted[0] <= wanted[1] else allowed)

    session.decode = loud  # type: ignore[method-assign, assignment]
    return model


def whole(answer: Generation) -> Generation:
    """The answer without a box that the token limit cut."""
    cut = answer.finish_reason == "length" and answer.num_malformed > 0
    return dataclasses.replace(answer, num_malformed=answer.num_malformed - 1) if cut else answer


def test_malformed_boxes_are_said_only_when_free(model: PaliGemma) -> None:
    free = [model.detect(image, LABELS, options=GenerationOptions(free=True)) for image in IMAGES]
    held = [whole(model.detect(image, LABELS)) for image in IMAGES]
    assert sum(answer.num_malformed for answer in free) > 3
    assert sum(len(answer.detections) for answer in held) > 3
    assert [answer.num_malformed for answer in held] == [0] * len(IMAGES)


def test_every_segment_has_a_mask_of_its_own_codes(model: PaliGemma) -> None:
    answers = [model.segment(image, LABELS) for image in IMAGES]
    complete = [item for answer in answers for item in answer.detections if item.mask]
    assert len(complete) > 3
    for item in complete:
        assert len(item.mask_codes) == 16
        assert item.mask is not None
        (expected,) = decode_masks(MASK_DECODER, np.array([item.mask_codes]))
        np.testing.assert_allclose(item.mask.values, expected, atol=1e-4 * np.abs(expected).max())
        assert item.mask.to_array().shape == (40, 60)
    assert [whole(answer).num_malformed for answer in answers] == [0] * len(IMAGES)


def test_labels_are_held_to_those_that_are_asked_for(model: PaliGemma) -> None:
    free = {item.label for image in IMAGES for item in model.detect(image, LABELS).detections}
    held = [model.detect(image, LABELS, options=GenerationOptions(only_requested=True)) for image in IMAGES]
    found = {item.label for answer in held for item in answer.detections[:-1]}  # the last may be cut
    assert free - set(LABELS), "the model says other labels when it may"
    assert found
    assert found <= set(LABELS)
    with pytest.raises(UsageError, match="not free"):
        model.detect(IMAGES[0], LABELS, options=GenerationOptions(free=True, only_requested=True))
    with pytest.raises(UsageError, match="another prompt"):
        model.generate(IMAGES[0], "caption en", options=GenerationOptions(only_requested=True))


def test_a_prompt_of_ones_own_is_held_like_the_method(model: PaliGemma) -> None:
    for prompt in (f"segment {LABELS[0]}", f" segment {LABELS[0]} ; {LABELS[1]}\n"):
        found = model.generate(IMAGES[0], prompt)
        assert whole(found).num_malformed == 0
        assert any(item.mask for item in found.detections)
    several = [model.generate(image, f"segment {LABELS[0]}\ncaption en") for image in IMAGES]
    assert sum(answer.num_malformed for answer in several) > 3  # two commands: nothing is held


def test_streamed_detections_are_the_answers(model: PaliGemma) -> None:
    for image in IMAGES[:3]:
        pieces = list(model.stream(image, f"segment {LABELS[0]}"))
        found = [item for piece in pieces for item in piece.detections]
        assert pieces[-1].finish_reason in ("stop", "length")
        assert all(piece.finish_reason is None for piece in pieces[:-1])
        early = [place for place, piece in enumerate(pieces[:-1]) if piece.detections]
        assert early, "a detection came before the end"
        assert len(found) > 1
        for item in found:
            assert (item.mask is not None) == bool(item.mask_codes)


def test_confidence_filters_and_nothing_else(model: PaliGemma) -> None:
    answer = model.detect(IMAGES[0], LABELS)
    scores = sorted(item.confidence for item in answer.detections)
    assert all(0 < score < 1 for score in scores)
    middle = scores[len(scores) // 2]
    kept = answer.above(middle)
    assert [item for item in answer.detections if item.confidence >= middle] == list(kept.detections)
    assert len(kept.detections) < len(answer.detections)
    assert kept.text == answer.text
    row = answer.to_dict()["detections"][0]
    assert row["confidence"] == pytest.approx(answer.detections[0].confidence, abs=1e-5)


def test_a_bundle_without_a_mask_decoder_still_has_the_codes(tmp_path: Path) -> None:
    make_tiny(tmp_path / "checkpoint", "paligemma", seed=3)
    export_bundle(
        str(tmp_path / "checkpoint"),
        tmp_path / "bundle",
        max_prompt_tokens=40,
        max_new_tokens=NUM_TOKENS,
        compare=False,
    )
    with closing(PaliGemma.load(tmp_path / "bundle")) as plain:
        found = push_locations(plain).segment(IMAGES[0], LABELS).detections
    assert any(len(item.mask_codes) == 16 for item in found)
    assert all(item.mask is None for item in found)
