"""PaliGemma as a library, on the shipped shapes bundle."""

from __future__ import annotations

import dataclasses
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from benchmarks.shapes.scenes import HELD_OUT_SEED, make_scene
from paliedge import GenerationOptions, PaliGemma
from paliedge.backends import ort
from paliedge.backends.ort import OrtCache, OrtSession
from paliedge.bundle.bundle import Bundle
from paliedge.errors import ClosedError, ImageError, UsageError
from paliedge.model import SHIPPED_BUNDLE

pytestmark = pytest.mark.bare

SCENE = make_scene(HELD_OUT_SEED + 20_000)
LABEL = SCENE.objects[0].label


@pytest.fixture(scope="module")
def model() -> PaliGemma:
    return PaliGemma.load()


def as_path(image: npt.NDArray[np.uint8], folder: Path) -> object:
    Image.fromarray(image).save(folder / "scene.png")
    return folder / "scene.png"


def as_bytes(image: npt.NDArray[np.uint8], folder: Path) -> object:
    as_path(image, folder)
    return (folder / "scene.png").read_bytes()


@pytest.mark.parametrize("convert", [as_path, as_bytes, lambda image, _: Image.fromarray(image)])
def test_every_way_to_give_an_image_gives_the_same_answer(
    model: PaliGemma, tmp_path: Path, convert: Callable[[npt.NDArray[np.uint8], Path], object]
) -> None:
    expected = model.detect(SCENE.image, [LABEL])
    found = model.detect(convert(SCENE.image, tmp_path), [LABEL])  # type: ignore[arg-type]  # the point of the test
    assert found.token_ids == expected.token_ids
    assert found.detections == expected.detections


def test_bgr_arrays_are_turned_around(model: PaliGemma) -> None:
    straight = model.encode(SCENE.image)
    assert np.array_equal(model.encode(SCENE.image[..., ::-1], bgr=True).features, straight.features)
    assert not np.array_equal(model.encode(SCENE.image[..., ::-1]).features, straight.features)


def test_an_encoded_image_is_accepted_wherever_an_image_is(model: PaliGemma) -> None:
    encoded = model.encode(SCENE.image)
    for answer in (
        lambda image: model.detect(image, [LABEL]),
        model.caption,
        model.ocr,
        lambda image: model.ask(image, "how many circles are there?"),
        lambda image: model.generate(image, "ocr"),
    ):
        fresh, reused = answer(SCENE.image), answer(encoded)
        assert reused.token_ids == fresh.token_ids
        assert reused.timings.vision_ms == 0 < fresh.timings.vision_ms


def test_an_image_that_another_model_encoded_is_refused(model: PaliGemma) -> None:
    encoded = model.encode(SCENE.image)
    for features in (encoded.features[:-1], encoded.features[:, :-1], np.repeat(encoded.features, 4, axis=0)):
        foreign = dataclasses.replace(encoded, features=features)
        with pytest.raises(UsageError, match="another model encoded"):
            model.caption(foreign)


def test_a_list_of_labels_is_the_prompt_with_separators(model: PaliGemma) -> None:
    listed = model.detect(SCENE.image, [LABEL, "blue star"])
    assert listed.token_ids == model.generate(SCENE.image, f"detect {LABEL} ; blue star").token_ids
    assert listed.token_ids == model.detect(SCENE.image, f"{LABEL} ; blue star").token_ids


def test_the_boxes_of_a_scene_are_found_where_they_are(model: PaliGemma) -> None:
    """One scene, half of its boxes: quality is measured elsewhere, this is about coordinates and order."""
    found = model.detect(SCENE.image, [LABEL]).detections
    expected = [item.box for item in SCENE.objects if item.label == LABEL]
    near = [box for box in expected if any(np.abs(np.subtract(item.box, box)).max() < 6 for item in found)]
    assert len(near) * 2 >= len(expected)


def test_boxes_refer_to_the_pixels_of_the_picture_that_was_given(model: PaliGemma) -> None:
    stretched = Image.fromarray(SCENE.image).resize((336, 112), Image.Resampling.NEAREST)
    answer = model.detect(stretched, [LABEL])
    assert answer.image_wh == (336, 112)
    assert answer.detections
    for item in answer.detections:
        scaled = np.multiply(item.box_normalized, (336, 112, 336, 112))
        assert item.box == pytest.approx(scaled.tolist())


def test_streamed_pieces_are_the_answer(model: PaliGemma) -> None:
    whole = model.generate(SCENE.image, "caption en")
    pieces = list(model.stream(SCENE.image, "caption en"))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(piece.token_id for piece in pieces[:-1]) == whole.token_ids
    assert tuple(piece.log_prob for piece in pieces[:-1]) == whole.log_probs
    assert [piece.finish_reason for piece in pieces] == [None] * len(whole.token_ids) + ["stop"]
    cut = list(model.stream(SCENE.image, "caption en", options=GenerationOptions(max_new_tokens=2)))
    assert [piece.finish_reason for piece in cut] == [None, "length"]


def test_streamed_detections_are_those_of_the_answer(model: PaliGemma) -> None:
    whole = model.detect(SCENE.image, [LABEL, "blue star"])
    pieces = model.stream(SCENE.image, f"detect {LABEL} ; blue star")
    assert tuple(item for piece in pieces for item in piece.detections) == whole.detections


def test_a_stop_at_the_limit_is_told_and_complete_boxes_are_kept(model: PaliGemma) -> None:
    whole = model.detect(SCENE.image, [LABEL])
    assert whole.finish_reason == "stop"
    box_only = model.detect(SCENE.image, [LABEL], options=GenerationOptions(max_new_tokens=4))
    assert box_only.finish_reason == "length"
    assert [item.box for item in box_only.detections] == [whole.detections[0].box]
    part = model.detect(SCENE.image, [LABEL], options=GenerationOptions(max_new_tokens=3))
    assert part.detections == ()
    assert part.num_malformed == 1


def test_log_probs_are_probabilities_of_the_whole_vocabulary(model: PaliGemma) -> None:
    answer = model.detect(SCENE.image, [LABEL])
    assert len(answer.log_probs) == len(answer.token_ids)
    assert all(-20 < value <= 0 for value in answer.log_probs)


def test_times_have_an_entry_a_decode_step(model: PaliGemma) -> None:
    answer = model.generate(SCENE.image, "caption en")
    assert len(answer.timings.decode_ms) == len(answer.token_ids)  # the last step gave end-of-sequence
    assert answer.timings.total_ms > sum(answer.timings.decode_ms)
    cut = model.generate(SCENE.image, "caption en", options=GenerationOptions(max_new_tokens=3))
    assert len(cut.timings.decode_ms) == 2


@pytest.mark.parametrize(
    ("prompt", "options"),
    [("word " * 300, {}), ("ocr", {"max_new_tokens": 0}), ("ocr", {"max_new_tokens": 257}), ("\ud800", {})],
)
def test_a_request_that_does_not_fit_is_refused_before_anything_runs(
    model: PaliGemma, monkeypatch: pytest.MonkeyPatch, prompt: str, options: dict[str, int]
) -> None:
    def fail(*_: object) -> None:
        pytest.fail("a graph ran")

    monkeypatch.setattr(OrtSession, "encode_image", fail)
    monkeypatch.setattr(OrtSession, "prefill", fail)
    with pytest.raises(UsageError):
        model.generate(SCENE.image, prompt, options=GenerationOptions(max_new_tokens=options.get("max_new_tokens")))
    with pytest.raises(ImageError):
        model.generate(b"no image", "ocr")


def test_no_label_is_an_error(model: PaliGemma) -> None:
    with pytest.raises(UsageError, match="at least one label"):
        model.detect(SCENE.image, [])


@pytest.mark.parametrize(
    "ask",
    [
        lambda: PaliGemma.load(backend="gpu"),  # type: ignore[arg-type]
        lambda: PaliGemma.load(threads=-1),
        lambda: GenerationOptions(min_confidence=5),
        lambda: GenerationOptions(min_confidence=-0.1),
        lambda: GenerationOptions(max_new_tokens="many"),  # type: ignore[arg-type]
        lambda: PaliGemma.load().ocr(SCENE.image, {"free": True}),  # type: ignore[arg-type]
    ],
)
def test_options_that_there_are_not_are_refused(ask: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        ask()


def test_a_model_says_what_it_is_and_a_closed_one_is_not_entered() -> None:
    model = PaliGemma.load()
    assert repr(model) == "PaliGemma: 112 x 112 pixels, 5 layers of width 128"
    model.close()
    assert repr(model).endswith(", closed")
    with pytest.raises(ClosedError), model:
        pytest.fail("entered")


def test_threads_share_a_model_and_get_their_own_answers(model: PaliGemma) -> None:
    images = [make_scene(HELD_OUT_SEED + 20_001 + index).image for index in range(4)]
    expected = [model.generate(image, "caption en").token_ids for image in images]
    assert len(set(expected)) == len(images)
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(5):
            if model.generate(images[index], "caption en").token_ids != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_abandoned_stream_gives_its_cache_back(model: PaliGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[OrtCache] = []
    new_cache = OrtSession.new_cache

    def count(session: OrtSession, batch: int = 1) -> OrtCache:
        made.append(new_cache(session, batch))
        return made[-1]

    monkeypatch.setattr(OrtSession, "new_cache", count)
    expected = model.generate(SCENE.image, "caption en").token_ids
    for _ in range(3):
        stream = model.stream(SCENE.image, "caption en")
        next(stream)
        assert model.generate(SCENE.image, "caption en").token_ids == expected
        stream.close()  # type: ignore[attr-defined]  # it is a generator
    assert len(made) <= 1  # for the answer beside the first open stream


def test_the_cache_stays_where_it_is_and_decoding_allocates_nothing_that_grows() -> None:
    bundle = Bundle(SHIPPED_BUNDLE)
    session = OrtSession(bundle)
    cache = session.new_cache()
    limits = bundle.manifest.limits
    width = bundle.manifest.model.text.hidden_size
    image = np.ones((bundle.manifest.model.vision.num_image_tokens, width), np.float32)
    addresses = {name: buffer.ctypes.data for name, buffer in cache.buffers.items()}
    sizes = np.zeros((2, limits.new_tokens), np.int64)
    tracemalloc.start()
    for answer in sizes:  # the first one fills Python's own pools
        session.prefill(cache, [image], np.ones((limits.prefix - len(image), width), np.float32), (0, 10))
        for index in range(limits.new_tokens):
            session.decode(cache, np.ones((1, width), np.float32), [(0, 10)])
            answer[index] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert {name: buffer.ctypes.data for name, buffer in cache.buffers.items()} == addresses
    assert cache.lengths.tolist() == [limits.prefix + limits.new_tokens]
    assert sizes[1, -1] - sizes[1, 20] < 500


def test_a_small_model_runs_on_one_thread_and_a_large_one_on_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only the small one is given its memory in one piece."""
    seen: list[tuple[int, bool]] = []
    load = ort.load_graph

    def count(path: Path, num_threads: int, *rest: Any, plan_memory: bool) -> Any:
        seen.append((num_threads, plan_memory))
        return load(path, num_threads, *rest, plan_memory=plan_memory)

    monkeypatch.setattr(ort, "load_graph", count)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2})
    for small, given, expected in ((10**9, 0, 1), (1, 0, 3), (1, 2, 2)):
        monkeypatch.setattr(ort, "_SMALL_BYTES", small)
        OrtSession(Bundle(SHIPPED_BUNDLE), num_threads=given).close()
        assert set(seen) == {(expected, small > 1)}
        seen.clear()


def test_options_as_keywords_work_for_one_version_more_and_say_the_new_way(model: PaliGemma) -> None:
    asked: Any = model
    wanted = model.detect(SCENE.image, [LABEL], GenerationOptions(max_new_tokens=4, only_requested=True))
    with pytest.warns(DeprecationWarning, match=r"options=GenerationOptions\(max_new_tokens=4, only_requested=True\)"):
        found = asked.detect(SCENE.image, [LABEL], max_new_tokens=4, only_asked=True)
    assert found.token_ids == wanted.token_ids
    with pytest.warns(DeprecationWarning, match="bgr=True"):
        assert asked.ocr(SCENE.image[..., ::-1], bgr=True).token_ids == model.ocr(SCENE.image).token_ids
