"""The TensorRT session answers as ONNX Runtime does on the same graphs, whatever is asked in whatever order.

No GPU is here: fakes of CUDA and TensorRT keep the rules of the real ones and run the graphs.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from benchmarks.shapes.scenes import HELD_OUT_SEED, make_scene
from paliedge import GenerationOptions, PaliGemma
from paliedge.backends.ort import OrtSession
from paliedge.backends.select import BackendOptions
from paliedge.backends.session import GeneratedToken, IdRange, Session
from paliedge.bench.cold_start import _start
from paliedge.bundle.bundle import Bundle
from paliedge.errors import UsageError
from paliedge.generation.embedding import EmbeddingTable
from paliedge.generation.request import EncodedImage
from paliedge.inputs.images import load_image
from paliedge.inputs.preprocess import Preprocessor
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge.results.generation import Generation
from tests.answers import answer_together
from tests.bundles import (
    MAX_NEW_TOKENS,
    MAX_PROMPT_TOKENS,
    RTX_VERSION,
    TWO_BOARDS,
    VERSIONS,
    open_reference,
)
from tests.fakes.cuda_runtime import FakeCuda
from tests.fakes.machine import Machine, fake_machine
from tests.masks import decode_masks
from tests.paths import SHAPES_CHECKPOINT

pytestmark = pytest.mark.opset24

IMAGES = [make_scene(HELD_OUT_SEED + 30_000 + index).image for index in range(3)]
Answers = list[tuple[tuple[int, ...], tuple[float, ...]]]
Reference = Callable[[str, str], PaliGemma]


def load(bundle: Path, **options: Any) -> PaliGemma:
    return PaliGemma.load(bundle, BackendOptions(backend="tensorrt", **options), report=lambda line: None)


def ask_all(model: PaliGemma, image: npt.NDArray[np.uint8] | EncodedImage) -> Answers:
    """Each of the four tasks."""
    return summarize(
        [
            model.detect(image, ["red circle", "blue square"]),
            model.caption(image),
            model.ask(image, "how many circles?"),
            model.ocr(image),
        ]
    )


def summarize(answers: list[Generation]) -> Answers:
    return [(answer.token_ids, answer.log_probs) for answer in answers]


@pytest.fixture
def model(machine: Machine, built: dict[str, Path], subject: str) -> Iterator[PaliGemma]:
    with closing(load(built[subject])) as loaded:
        yield loaded


@pytest.fixture
def wanted(reference: Reference, subject: str, target: str) -> PaliGemma:
    return reference(subject, target)


@pytest.fixture(scope="module")
def known_answers(reference: Reference) -> Callable[[str, str], list[Answers]]:
    @functools.cache
    def answer(subject: str, target: str) -> list[Answers]:
        return [ask_all(reference(subject, target), image) for image in IMAGES]

    return answer


@pytest.fixture
def expected(known_answers: Callable[[str, str], list[Answers]], subject: str, target: str) -> list[Answers]:
    """What ONNX Runtime says to the four tasks on every image."""
    return known_answers(subject, target)


def test_all_tasks_give_what_onnx_runtime_gives(model: PaliGemma, expected: list[Answers]) -> None:
    assert len({tokens for answers in expected for tokens, _ in answers}) > len(IMAGES), "the images do not matter"
    for number in (0, 1, 2, 0):
        assert ask_all(model, IMAGES[number]) == expected[number]


def test_a_batch_is_answered_one_request_after_another(model: PaliGemma, expected: list[Answers]) -> None:
    prompts = ["detect red circle ; blue square", "caption en", "answer en how many circles?", "ocr"]
    requests = [(IMAGES[number], prompt) for number in (0, 1) for prompt in prompts]
    assert summarize(answer_together(model, requests, batch_size=3)) == [*expected[0], *expected[1]]


def test_the_runtimes_own_session_on_onnx_runtime_says_the_same(
    built: dict[str, Path], expected: list[Answers], subject: str, target: str
) -> None:
    """What all others here are compared with is not of this test's making."""
    bundle = Bundle(built[subject])
    with closing(PaliGemma(bundle, OrtSession(bundle, target, 1))) as model:
        for image, answers in zip(IMAGES, expected, strict=True):
            found = ask_all(model, image)
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in answers]
            for (_, scores), (_, others) in zip(found, answers, strict=True):
                assert scores == pytest.approx(others, abs=1e-3)


@pytest.mark.parametrize("subject", ["shapes"])
def test_masks_are_what_the_layers_say(model: PaliGemma) -> None:
    codes = np.random.default_rng(2).integers(0, 128, (3, 16))
    expected = decode_masks(load_file(SHAPES_CHECKPOINT / "mask_decoder.safetensors"), codes)
    for _ in range(2):
        found = model._session.decode_masks(codes)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@TWO_BOARDS
def test_a_step_can_be_repeated_with_other_tokens_allowed(
    model: PaliGemma, wanted: PaliGemma, built: dict[str, Path], subject: str
) -> None:
    """Where a few labels are to choose from the loop does so; the cache must not know of it."""
    last = model.manifest.tokens.vocab_size - 1
    embed = EmbeddingTable(Bundle(built[subject]))
    features = wanted.encode(IMAGES[0]).features

    def run(session: Session[Any, Any], repeats: int) -> list[GeneratedToken]:
        cache = session.new_cache()
        found = [session.prefill(cache, [features], embed([2, 3]), (0, last))]
        for token in (9, 10, 11, 12):
            found += session.decode(cache, embed([token]), [(0, last)])
            for other in range(repeats):
                assert [step.token_id for step in session.repeat_decode(cache, [(other, other)])] == [other]
        return [step._replace(device_ms=None) for step in found]

    plain = run(wanted._session, 0)
    assert run(model._session, 0) == run(model._session, 3) == run(wanted._session, 3) == plain


@TWO_BOARDS
def test_an_encoded_image_serves_many_prompts_while_others_come_and_go(
    model: PaliGemma, expected: list[Answers]
) -> None:
    kept = [model.encode(image) for image in IMAGES]
    assert [ask_all(model, encoded) for encoded in kept] == expected
    kept[1] = model.encode(IMAGES[0])
    assert [ask_all(model, encoded) for encoded in kept] == [expected[0], expected[0], expected[2]]


@TWO_BOARDS
def test_two_answers_can_be_under_way_at_once(model: PaliGemma, wanted: PaliGemma, expected: list[Answers]) -> None:
    """Each has a cache of its own."""
    prompts = ("caption en", "detect red circle ; blue square")
    alone = summarize([wanted.generate(IMAGES[0], prompt) for prompt in prompts])
    streams = [model.stream(IMAGES[0], prompt) for prompt in prompts]
    pieces = [[next(stream)] for stream in streams]
    assert ask_all(model, IMAGES[1]) == expected[1]
    for stream, received in zip(streams, pieces, strict=True):
        received += stream
    said = [[piece for piece in received if piece.finish_reason != "stop"] for received in pieces]
    assert [
        (tuple(piece.token_id for piece in received), tuple(piece.log_prob for piece in received)) for received in said
    ] == alone


def test_prompts_of_every_length(model: PaliGemma, wanted: PaliGemma) -> None:
    """Up and down, so that what a longer prefill left could show in a shorter one."""
    encoded = model.encode(IMAGES[0])
    other = wanted.encode(IMAGES[0])
    longest = "ocr " + " ".join("a" * (MAX_PROMPT_TOKENS - 4))
    with pytest.raises(UsageError, match=f"at most {MAX_PROMPT_TOKENS} tokens"):
        model.generate(encoded, longest + " a a a a a")
    for length in (*range(0, len(longest), 5), *range(len(longest), 0, -7)):
        prompt = longest[:length]
        expected = wanted.generate(other, prompt, options=GenerationOptions(max_new_tokens=3))
        assert summarize([model.generate(encoded, prompt, options=GenerationOptions(max_new_tokens=3))]) == summarize(
            [expected]
        ), prompt


def steps_to_capacity(session: Session[Any, Any], bundle: Bundle, choices: Sequence[IdRange]) -> list[GeneratedToken]:
    """The longest prefix and as many tokens as fit, twice in one cache; which tokens may win goes in turns."""
    manifest = bundle.manifest
    pixels = Preprocessor(manifest.preprocess, manifest.model.vision.image_size)(load_image(IMAGES[0]))
    embed = EmbeddingTable(bundle)
    text = PromptTokenizer(bundle.path(manifest.tokenizer), manifest.tokens).encode_prefix("ocr")
    prompt = embed((text * MAX_PROMPT_TOKENS)[:MAX_PROMPT_TOKENS])
    features, cache = session.encode_image(pixels), session.new_cache()
    turns = itertools.cycle(choices)
    steps = []
    for _ in range(2):
        steps.append(session.prefill(cache, [features], prompt, next(turns)))
        for _ in range(manifest.limits.new_tokens):
            steps += session.decode(cache, embed([steps[-1].token_id]), [next(turns)])
    return [step._replace(device_ms=None) for step in steps]


def test_decoding_to_the_last_place_of_the_cache_and_the_choice_of_tokens(
    machine: Machine, built: dict[str, Path], subject: str, target: str
) -> None:
    from paliedge.backends.trt.flavours import load_flavour
    from paliedge.backends.trt.session import TrtSession

    bundle = Bundle(built[subject])
    tokens = bundle.manifest.tokens
    choices = ((0, tokens.vocab_size - 1), (tokens.first_location, tokens.first_location + 1023), (7, 7))
    engine = next(engine for engine in bundle.manifest.engines if engine.target == target)
    with closing(TrtSession(bundle, engine, load_flavour("tensorrt"))) as session:
        found = steps_to_capacity(session, bundle, choices)
    assert found == steps_to_capacity(open_reference(bundle, target), bundle, choices)
    assert len(found) == 2 * (1 + MAX_NEW_TOKENS)
    assert all(first <= step.token_id <= last for step, (first, last) in zip(found, choices * 6, strict=True))


@TWO_BOARDS
def test_a_graph_changes_nothing_but_the_calls(
    machine: Machine, built: dict[str, Path], subject: str, expected: list[Answers]
) -> None:
    with closing(load(built[subject], use_cuda_graph=False)) as model:
        assert [ask_all(model, image) for image in IMAGES] == expected
    assert not machine.gpu.calls["cudaGraphLaunch"]
    with closing(load(built[subject])) as model:
        assert [ask_all(model, image) for image in IMAGES] == expected
    assert machine.gpu.calls["cudaStreamBeginCapture"] == 1, "one cache, one graph"
    num_decodes = sum(len(tokens) for answers in expected for tokens, _ in answers)
    assert machine.gpu.calls["cudaGraphLaunch"] > num_decodes / 2


@TWO_BOARDS
def test_a_cold_start_tells_what_the_capture_took(
    machine: Machine, built: dict[str, Path], subject: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "image.npy", IMAGES[0])
    order = {"bundle": str(built[subject]), "image": str(tmp_path / "image.npy"), "prompt": "caption en"}

    def start(**options: Any) -> dict[str, float | None]:
        return _start(order | {"options": asdict(BackendOptions(backend="tensorrt", **options))})

    for captured in (start(), start(sequential=True)):
        assert captured["graph_capture"] is not None
        assert captured["first_answer"] is not None
        assert 0 < captured["graph_capture"] < captured["first_answer"]
    assert start(use_cuda_graph=False)["graph_capture"] is None


@pytest.mark.parametrize("integrated", [False, True])
def test_a_gpu_that_is_done_at_once_gives_the_same(
    built: dict[str, Path], subject: str, expected: list[Answers], target: str, tmp_path: Path, integrated: bool
) -> None:
    """Elsewhere the fake GPU works as late as it may."""
    gpu = FakeCuda(integrated=integrated, eager=True)
    machine = fake_machine(tmp_path / "machine", tensorrt=VERSIONS[target], cuda=gpu)
    with machine, closing(load(built[subject])) as model:
        assert [ask_all(model, image) for image in IMAGES[:2]] == expected[:2]


@TWO_BOARDS
def test_features_are_an_array_and_go_from_session_to_session(
    model: PaliGemma, wanted: PaliGemma, built: dict[str, Path], subject: str, expected: list[Answers]
) -> None:
    ours, theirs = model.encode(IMAGES[0]), wanted.encode(IMAGES[0])
    assert np.array_equal(np.asarray(ours.features), theirs.features)
    assert np.asarray(ours.features, np.float64).dtype == np.float64
    assert ask_all(wanted, ours) == expected[0]
    assert ask_all(model, theirs) == expected[0]
    with closing(load(built[subject])) as other:
        assert ask_all(other, ours) == expected[0]
        assert ask_all(model, other.encode(IMAGES[0])) == expected[0]


@TWO_BOARDS
def test_features_of_another_model_are_refused(machine: Machine, built: dict[str, Path]) -> None:
    with closing(load(built["paligemma"])) as model, closing(load(built["shapes"])) as other:
        encoded = other.encode(IMAGES[0])
        with pytest.raises(UsageError, match="another model"):
            model.caption(encoded)


@TWO_BOARDS
def test_threads_share_a_model(model: PaliGemma, expected: list[Answers]) -> None:
    kept = [model.encode(image) for image in IMAGES]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: ask_all(model, (IMAGES, kept)[index % 2][index % 3]), range(6)))
    assert found == expected * 2


@TWO_BOARDS
def test_the_gpus_own_times_are_told(model: PaliGemma) -> None:
    encoded = model.encode(IMAGES[0])
    fresh, reused = model.caption(IMAGES[0]), model.caption(encoded)
    for answer in (fresh, reused):
        assert answer.timings.device is not None
        assert answer.timings.device.prefill_ms > 0
        assert len(answer.timings.device.decode_ms) == len(answer.timings.decode_ms) > 0
        assert min(answer.timings.device.decode_ms) > 0
        assert answer.timings.device.prefill_ms <= answer.timings.prefill_ms
    assert fresh.timings.device is not None
    assert reused.timings.device is not None
    assert fresh.timings.device.vision_ms > 0 == reused.timings.device.vision_ms


@pytest.mark.opset24(always=True)
@pytest.mark.parametrize("integrated", [False, True])
def test_tensorrt_for_rtx_runs_the_same_graphs(
    bundles: dict[str, Path], reference: Reference, tmp_path: Path, integrated: bool
) -> None:
    from paliedge.backends.trt.build import build_engine

    folder = Path(shutil.copytree(bundles["paligemma"], tmp_path / "bundle"))
    with fake_machine(tmp_path / "m", tensorrt=None, rtx=RTX_VERSION, cuda=FakeCuda(integrated=integrated)) as machine:
        engine = build_engine(folder)
        assert (engine.flavour, engine.target, engine.compute_capability) == ("rtx", "jetpack7", "any")
        with closing(PaliGemma.load(folder, BackendOptions(backend="rtx"))) as model:
            assert ask_all(model, IMAGES[0]) == ask_all(reference("paligemma", "jetpack7"), IMAGES[0])
        assert machine.gpu.calls["cudaGraphLaunch"]
