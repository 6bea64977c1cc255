"""Requests that are decoded together get the answers that each would get alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.shapes.scenes import HELD_OUT_SEED, make_scene
from paliedge import Generation, GenerationOptions, PaliGemma
from paliedge.backends.ort import OrtCache, OrtSession
from paliedge.backends.session import FloatArray, GeneratedToken, IdRange
from paliedge.errors import ImageError, UsageError
from paliedge_export.exporter import export_bundle
from tests.answers import answer_together
from tests.tiny import make_tiny

IMAGES = [np.random.default_rng(seed).integers(0, 256, (30 + seed, 40, 3), np.uint8) for seed in range(3)]
PROMPTS = ["caption en", "detect red circle ; blue star", "answer en how many stars are there?", "ocr"]
REQUESTS = [(IMAGES[(place + turn) % 3], prompt) for turn in range(3) for place, prompt in enumerate(PROMPTS)]
LAYOUTS = [("paligemma", "cpu", "fp32"), ("paligemma2", "cpu", "fp32"), ("paligemma", "cpu", "int4")]
LAYOUTS += [("paligemma", "cpu", "fp16")]
LAYOUTS += [("paligemma", "jetpack6", "fp16"), ("paligemma2", "jetpack7", "fp16"), ("paligemma", "jetpack7", "int8")]


@pytest.fixture(scope="module")
def shapes() -> Iterator[PaliGemma]:
    with closing(PaliGemma.load()) as model:
        yield model


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each decode step was for."""
    found: list[int] = []
    decode = OrtSession.decode

    def count(session: OrtSession, cache: OrtCache, embeds: FloatArray, allowed: list[IdRange]) -> list[GeneratedToken]:
        found.append(len(allowed))
        return decode(session, cache, embeds, allowed)

    monkeypatch.setattr(OrtSession, "decode", count)
    return found


def load_tiny(folder: Path, family: str, target: str, precision: Any) -> PaliGemma:
    make_tiny(folder / "checkpoint", family, seed=2)
    (folder / "checkpoint" / "calibration").mkdir()
    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / "checkpoint" / "calibration" / f"{number}.png")
    export_bundle(
        str(folder / "checkpoint"),
        folder / "bundle",
        targets=[target],
        precision=precision,
        max_prompt_tokens=40,
        max_new_tokens=12,
        compare=False,
    )
    return PaliGemma.load(folder / "bundle")


def assert_same(found: Generation, alone: Generation, atol: float = 2e-3) -> None:
    assert found.token_ids == alone.token_ids
    np.testing.assert_allclose(found.log_probs, alone.log_probs, atol=atol)
    assert found.finish_reason == alone.finish_reason
    assert [one.label for one in found.detections] == [one.label for one in alone.detections]


@pytest.mark.opset24
@pytest.mark.parametrize(("family", "target", "precision"), LAYOUTS)
def test_a_batch_gives_what_each_request_gives_alone(
    tmp_path: Path, widths: list[int], family: str, target: str, precision: str
) -> None:
    with closing(load_tiny(tmp_path, family, target, precision)) as model:
        alone = [model.generate(image, prompt) for image, prompt in REQUESTS]
        for size in (2, 5, 64):
            widths.clear()
            found = answer_together(model, REQUESTS, batch_size=size)
            for one, other in zip(found, alone, strict=True):
                assert_same(one, other, 2e-2 if precision == "int4" else 2e-3)  # 8-bit activations may round apart
            assert max(widths) > 1
            assert max(widths) <= size


def test_int8_on_the_cpu_answers_one_after_another(tmp_path: Path, widths: list[int]) -> None:
    """Its activations share a scale that is measured over all tokens: together, answers would change."""
    with closing(load_tiny(tmp_path, "paligemma", "cpu", "int8")) as model:
        assert not model.manifest.targets["cpu"].independent_rows
        alone = [model.generate(image, prompt) for image, prompt in REQUESTS]
        for one, other in zip(answer_together(model, REQUESTS, batch_size=4), alone, strict=True):
            assert one.token_ids == other.token_ids
            assert one.log_probs == other.log_probs
        assert set(widths) == {1}


def test_real_answers_of_different_length_boxes_and_masks(shapes: PaliGemma, widths: list[int]) -> None:
    scenes = [make_scene(HELD_OUT_SEED + seed) for seed in range(6)]
    requests = []
    for scene in scenes:
        encoded, label = shapes.encode(scene.image), scene.objects[0].label
        requests += [(encoded, f"detect {label} ; red star"), (encoded, f"segment {label}")]
    for only_requested in (False, True):
        options = GenerationOptions(only_requested=only_requested)
        alone = [shapes.generate(*request, options) for request in requests]
        found = answer_together(shapes, requests, options, batch_size=4)
        for one, other in zip(found, alone, strict=True):
            assert_same(one, other)
            assert [bool(item.mask) for item in one.detections] == [bool(item.mask) for item in other.detections]
    assert max(widths) == 4
    assert any(item.mask for one in found for item in one.detections)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_bad_picture_is_told_in_turn_others_are_answered(shapes: PaliGemma, size: int, overlap: bool) -> None:
    scenes = [make_scene(HELD_OUT_SEED + seed).image for seed in range(4)]
    pictures: list[Any] = [*scenes[:2], b"no picture", *scenes[2:], b""]
    keyed = [(f"picture {index}", picture, "ocr") for index, picture in enumerate(pictures)]
    expected = [shapes.ocr(image).text for image in scenes]
    found = list(shapes.generate_batch(keyed, batch_size=size, overlap=overlap))
    assert [key for key, _ in found] == [key for key, _, _ in keyed]
    assert [answer.text for _, answer in found if isinstance(answer, Generation)] == expected
    assert [index for index, (_, answer) in enumerate(found) if isinstance(answer, ImageError)] == [2, 5]


def test_an_error_in_place_of_a_picture_comes_out_in_its_turn(shapes: PaliGemma) -> None:
    scene, error = make_scene(HELD_OUT_SEED).image, ImageError(expected="a frame", found="none", action="Wait.")
    keyed: list[tuple[int, Any, str]] = [(0, error, "ocr"), (1, scene, "ocr"), (2, error, "ocr"), (3, error, "ocr")]
    found = dict(shapes.generate_batch(keyed, batch_size=2))
    assert list(found) == [0, 1, 2, 3]
    assert isinstance(found.pop(1), Generation)
    assert set(map(id, found.values())) == {id(error)}


def test_an_error_that_is_first_is_told_before_the_next_picture(shapes: PaliGemma) -> None:
    """A camera that is lost may be silent for long."""
    error = ImageError(expected="a frame", found="none", action="Wait.")

    def pictures() -> Iterator[tuple[int, Any, str]]:
        yield 0, error, "ocr"
        pytest.fail("the next one was asked for")

    assert next(shapes.generate_batch(pictures())) == (0, error)


def test_a_batch_that_is_left_gives_its_cache_to_the_next(shapes: PaliGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    new_cache = OrtSession.new_cache

    def count(session: OrtSession, batch: int = 1) -> OrtCache:
        made.append(batch)
        return new_cache(session, batch)

    monkeypatch.setattr(OrtSession, "new_cache", count)
    scene = make_scene(HELD_OUT_SEED).image
    expected = shapes.ocr(scene).text
    with PaliGemma.load() as fresh:
        for size in (6, 6, 4):
            answers = fresh.generate_batch(((key, scene, "ocr") for key in range(9)), batch_size=size)
            assert isinstance(first := next(answers)[1], Generation)
            assert first.text == expected
            answers.close()  # type: ignore[attr-defined]  # it is a generator
    assert made == [1, 6]


def test_a_batch_of_nothing_is_refused(shapes: PaliGemma) -> None:
    with pytest.raises(UsageError):
        shapes.generate_batch([], batch_size=0)
    assert list(shapes.generate_batch([])) == []


def test_overlap_encodes_the_next_image_while_this_is_decoded(
    shapes: PaliGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, decode = OrtSession.encode_image, OrtSession.decode
    threads: set[int] = set()
    second_began, decoding = threading.Event(), threading.Event()

    def spy_encode(session: OrtSession, pixels: FloatArray) -> FloatArray:
        threads.add(threading.get_ident())
        if decoding.is_set():
            second_began.set()
        return encode(session, pixels)

    def spy_decode(session: OrtSession, *rest: Any) -> list[GeneratedToken]:
        decoding.set()
        assert second_began.wait(20)  # without overlap this would never come
        return decode(session, *rest)

    monkeypatch.setattr(OrtSession, "encode_image", spy_encode)
    monkeypatch.setattr(OrtSession, "decode", spy_decode)
    pictures = (make_scene(HELD_OUT_SEED + seed).image for seed in range(5))

    def slowly() -> Iterator[tuple[Any, str]]:
        for place, picture in enumerate(pictures):
            if place:
                assert decoding.wait(20)
            yield picture, "caption en"

    assert len(answer_together(shapes, slowly(), batch_size=1, overlap=True)) == 5
    assert threading.get_ident() not in threads
