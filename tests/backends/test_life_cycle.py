"""A model's life on every backend: closed once or twice, left in the middle, shared between threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shapes.scenes import HELD_OUT_SEED, make_scene
from paliedge import ClosedError, GenerationOptions, PaliEdgeError, PaliGemma
from paliedge.backends.trt.build import build_engine
from tests.bundles import RTX_VERSION, VERSIONS, copy_bundle
from tests.fakes.cuda_runtime import FakeCuda
from tests.fakes.machine import fake_machine

IMAGES = [make_scene(HELD_OUT_SEED + 40_000 + index).image for index in range(2)]
SHORT = GenerationOptions(max_new_tokens=6)


@pytest.fixture(scope="module")
def rtx_bundle(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_bundle(bundles["shapes"], tmp_path_factory.mktemp("rtx"))
    with fake_machine(tmp_path_factory.mktemp("machine"), tensorrt=None, rtx=RTX_VERSION, cuda=FakeCuda()):
        build_engine(folder)
    return folder


@pytest.fixture(params=["onnxruntime", "tensorrt", pytest.param("rtx", marks=pytest.mark.opset24)])
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def model(backend: Any, built: dict[str, Path], rtx_bundle: Path, tmp_path: Path) -> Iterator[PaliGemma]:
    if backend == "onnxruntime":
        with closing(PaliGemma.load(backend=backend)) as loaded:
            yield loaded
        return
    versions: dict[str, Any] = {"tensorrt": None, "rtx": None}
    versions[backend] = RTX_VERSION if backend == "rtx" else VERSIONS["jetpack6"]
    bundle = rtx_bundle if backend == "rtx" else built["shapes"]
    with (
        fake_machine(tmp_path / "machine", cuda=FakeCuda(), **versions),
        closing(PaliGemma.load(bundle, backend=backend, report=lambda line: None)) as loaded,
    ):
        yield loaded


QUESTIONS: dict[str, Callable[[PaliGemma, Any], object]] = {
    "encode": lambda model, _: model.encode(IMAGES[0]),
    "encode something else": lambda model, _: model.encode(b"no picture"),
    "generate": lambda model, _: model.generate(IMAGES[0], "ocr"),
    "generate, encoded": lambda model, image: model.generate(image, "ocr"),
    "stream": lambda model, image: list(model.stream(image, "ocr")),
    "batch": lambda model, image: list(model.generate_batch([(1, image, "ocr")])),
    "detect": lambda model, _: model.detect(IMAGES[0], "red star"),
    "segment": lambda model, _: model.segment(IMAGES[0], "red star"),
    "caption": lambda model, _: model.caption(IMAGES[0]),
    "ask": lambda model, _: model.ask(IMAGES[0], "how many?"),
    "question": lambda model, _: model.question(IMAGES[0], "two"),
    "ocr": lambda model, _: model.ocr(IMAGES[0]),
}


def test_after_the_end_every_question_gets_the_same_error(model: PaliGemma) -> None:
    image = model.encode(IMAGES[0])
    begun = model.stream(image, "caption en")
    next(begun)
    batch = model.generate_batch([(1, image, "ocr"), (2, IMAGES[1], "caption en")], batch_size=1)
    next(batch)
    model.close()
    model.close()
    for ask in QUESTIONS.values():
        with pytest.raises(ClosedError, match="Load the bundle again"):
            ask(model, image)
    for open_still in (begun, batch):
        with pytest.raises(ClosedError):
            next(open_still)
    model.close()


def test_a_with_block_closes_and_may_be_closed_inside(model: PaliGemma) -> None:
    with model:
        model.ocr(IMAGES[0], SHORT)
        model.close()
    with pytest.raises(ClosedError):
        model.ocr(IMAGES[0])


@pytest.mark.parametrize("method", ["prefill", "decode"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError], ids=lambda kind: kind.__name__)
def test_after_an_exception_in_the_middle_the_next_answer_is_right(
    model: PaliGemma, method: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [model.caption(image, options=SHORT).token_ids for image in IMAGES]
    original, calls = getattr(model._session, method), [0]

    def fail_once(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        calls[0] += 1
        if calls[0] == (1 if method == "prefill" else 3):
            raise error
        return found

    monkeypatch.setattr(model._session, method, fail_once)
    with pytest.raises(error):
        model.caption(IMAGES[0], options=SHORT)
    assert [model.caption(image, options=SHORT).token_ids for image in IMAGES] == expected
    calls[0] = 0
    with pytest.raises(error):
        list(model.generate_batch([(index, image, "caption en") for index, image in enumerate(IMAGES)], SHORT))
    answers = model.generate_batch([(index, image, "caption en") for index, image in enumerate(IMAGES)], SHORT)
    assert [answer.token_ids for _, answer in answers if not isinstance(answer, PaliEdgeError)] == expected


def test_threads_that_close_and_ask_at_once_get_answers_or_the_error(model: PaliGemma) -> None:
    expected = model.ocr(IMAGES[0], SHORT).token_ids
    found: list[object] = []

    def ask() -> None:
        try:
            while True:
                found.append(model.ocr(IMAGES[0], SHORT).token_ids == expected)
        except ClosedError:
            found.append("closed")
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while found.count(True) < 5 and any(thread.is_alive() for thread in threads):
        pass
    model.close()
    for thread in threads:
        thread.join()
    assert found.count("closed") == 3
    assert set(found) == {True, "closed"}
