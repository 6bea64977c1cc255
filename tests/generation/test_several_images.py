"""Several images in one prompt are one block that everything in the prefix sees, as in transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from benchmarks.shapes.scenes import HELD_OUT_SEED, make_scene
from paliedge import GenerationOptions, ImageSet, PaliGemma
from paliedge.errors import UsageError
from paliedge.inputs.video import read_video
from paliedge_export.exporter import export_bundle
from tests.inputs.test_video import written
from tests.tiny import make_tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
NUM_TOKENS = 12
IMAGES = [np.random.default_rng(seed).integers(0, 256, (30 + seed, 40, 3), np.uint8) for seed in range(4)]


class Both(NamedTuple):
    ours: PaliGemma
    theirs: PaliGemmaForConditionalGeneration
    processor: PaliGemmaProcessor


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    model = make_tiny(folder / "checkpoint", request.param)
    export_bundle(
        str(folder / "checkpoint"),
        folder / "bundle",
        max_prompt_tokens=24,
        max_new_tokens=NUM_TOKENS,
        max_images=3,
        compare=False,
    )
    processor = PaliGemmaProcessor.from_pretrained(folder / "checkpoint", backend="pil")
    processor.image_seq_length = 16
    with closing(PaliGemma.load(folder / "bundle")) as ours:
        yield Both(ours, model.eval(), processor)


def reference(both: Both, images: list[np.ndarray], prompt: str) -> list[int]:
    pictures = [Image.fromarray(image) for image in images]
    inputs = both.processor(images=[pictures], text="<image>" * len(images) + prompt, return_tensors="pt")
    with torch.no_grad():
        generated = both.theirs.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    answer: list[int] = generated[0, inputs["input_ids"].shape[1] :].tolist()
    eos = both.ours.manifest.tokens.eos
    return answer[: answer.index(eos)] if eos in answer else answer


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_answer_is_transformers_own(both: Both, count: int) -> None:
    for prompt in ("caption en", "answer en how many stars are there?"):
        images = IMAGES[:count]
        found = both.ours.generate(
            ImageSet(*images), prompt, options=GenerationOptions(max_new_tokens=NUM_TOKENS, free=True)
        )
        assert list(found.token_ids) == reference(both, images, prompt)
        assert found.image_wh == (40, 30)


def test_every_image_and_their_order_matter(both: Both) -> None:
    def ask(*places: int) -> tuple[float, ...]:
        return both.ours.ocr(
            ImageSet(*(IMAGES[place] for place in places)), options=GenerationOptions(max_new_tokens=3)
        ).log_probs

    answers = {ask(0, 1), ask(1, 0), ask(0, 2), ask(0), ask(1)}
    assert len(answers) == 5


def test_encoded_images_are_taken_and_only_new_ones_are_timed(both: Both) -> None:
    encoded = both.ours.encode(IMAGES[0])
    mixed = both.ours.caption(ImageSet(encoded, IMAGES[1]))
    assert mixed.token_ids == both.ours.caption(ImageSet(*IMAGES[:2])).token_ids
    assert mixed.timings.vision_ms > 0
    assert both.ours.caption(ImageSet(encoded, encoded)).timings.vision_ms == 0


def test_frames_of_a_video_are_the_images_of_one_prompt(tmp_path: Path) -> None:
    """The shapes model was trained on one image and has room for two."""
    path = tmp_path / "scenes.mp4"
    scenes = [Image.fromarray(make_scene(HELD_OUT_SEED + seed).image) for seed in range(3)]
    written(path, scenes, [0, 0.5, 1])
    with closing(PaliGemma.load()) as model:
        frames = [frame.image for frame in read_video(path, every=2)]
        arrays = [np.asarray(frame) for frame in frames]
        assert len(frames) == 2

        def ask(images: Sequence[Image.Image | np.ndarray]) -> tuple[tuple[int, ...], tuple[float, ...]]:
            answer = model.ask(ImageSet(*images), "how many circles are there?")
            return answer.token_ids, answer.log_probs

        assert ask(frames) == ask(arrays)
        assert len({ask(images) for images in (frames, frames[::-1], frames[:1], frames[1:])}) == 4
        with pytest.raises(UsageError, match="--max-images"):
            ask([*frames, frames[0]])


@pytest.mark.parametrize("count", [0, 5])
def test_more_images_than_fit_or_none_are_refused(both: Both, count: int) -> None:
    with pytest.raises(UsageError, match="--max-images"):
        both.ours.caption(ImageSet(*(IMAGES * 2)[:count]))


def test_cache_rows_of_an_image_depend_on_the_prompt(both: Both) -> None:
    """Image tokens see the prompt: their keys and values must be computed anew, only their features are kept."""
    session, embed = both.ours._session, both.ours._answerer._embed
    encoded = both.ours.encode(IMAGES[0])
    num_image_tokens = len(encoded.features)
    kept = []
    for prompt in ("caption en", "ocr"):
        cache = session.new_cache()
        prefix = both.ours._make_request._tokenizer.encode_prefix(prompt)
        session.prefill(cache, [encoded.features], embed(prefix), (0, 9))
        kept.append({name: rows[:, :, :num_image_tokens].copy() for name, rows in cache.buffers.items()})
    for name, rows in kept[0].items():
        assert np.allclose(rows, kept[1][name], atol=1e-5) == (".0." in name), name


@pytest.mark.parametrize("make", [list, tuple])
def test_a_list_of_pictures_is_refused_with_both_meanings(
    both: Both, make: type[list[Any]] | type[tuple[Any, ...]]
) -> None:
    with pytest.raises(UsageError, match=r"ImageSet.*generate_batch"):
        both.ours.detect(make(IMAGES[:2]), "red circle")  # type: ignore[arg-type]  # the point of the test
