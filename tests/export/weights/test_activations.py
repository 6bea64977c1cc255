"""What calibration remembers of a linear layer's input is what transformers feeds that layer.

On this side the fp32 graphs of a bundle with outputs added; on the other forward hooks, on the same
pixels and ids. And what was remembered survives its file, which is trusted in nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from paliedge.bundle.bundle import Bundle
from paliedge.errors import UsageError
from paliedge.inputs.preprocess import Preprocessor
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge_export.checkpoint.config import read_config
from paliedge_export.gate import runner
from paliedge_export.gate.runner import Runner, collect_statistics
from paliedge_export.gate.transformers_model import reference_steps
from paliedge_export.weights.activations import Statistics, load_statistics
from paliedge_export.weights.linears import linears
from paliedge_export.weights.samples import Sample
from tests.export.conftest import Tiny

Array = npt.NDArray[Any]
NUM_TOKENS = 3
WIDTHS = {"a": 4, "b": 3}


def make_samples() -> list[Sample]:
    """One more prompt than images, of different lengths."""
    rng = np.random.default_rng(1)
    first, second = (Image.fromarray(rng.integers(0, 255, (70, 90, 3), np.uint8)) for _ in range(2))
    return [Sample("a", first, ("caption en",)), Sample("b", second, ("detect red circle ; blue square", "ocr"))]


@contextmanager
def hooked(tiny: Tiny, part: str, seen: dict[str, list[Array]]) -> Iterator[None]:
    """While it lasts, inputs [rows, K] of the linear layers whose names begin with `part` are added to `seen`.

    Behind the last attention, graphs go on with the last token alone.
    """
    last = f"language_model.layers.{tiny.model.config.text_config.num_hidden_layers - 1}."
    modules = {name.removeprefix("model."): module for name, module in tiny.model.named_modules()}
    handles = []
    for linear in linears(read_config(tiny.checkpoint)):
        if not linear.name.startswith(part):
            continue
        rows = seen.setdefault(linear.name, [])
        first = -1 if linear.name.startswith(last) and not linear.name.endswith("qkv_proj") else 0

        def take(module: object, inputs: tuple[torch.Tensor], rows: list[Array] = rows, first: int = first) -> None:
            rows.append(inputs[0].reshape(-1, inputs[0].shape[-1])[first:].double().numpy())

        handles.append(modules[linear.weights[0].removesuffix(".weight")].register_forward_pre_hook(take))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ask_transformers(tiny: Tiny, samples: list[Sample]) -> dict[str, Array]:
    """What enters each linear layer [rows, K] while all prompts are answered, by its name."""
    bundle = Bundle(tiny.bundle)
    tokens = bundle.manifest.tokens
    preprocess = Preprocessor(bundle.manifest.preprocess, bundle.manifest.model.vision.image_size)
    tokenizer = PromptTokenizer(bundle.path(bundle.manifest.tokenizer), tokens)
    seen: dict[str, list[Array]] = {}
    for sample in samples:
        pixels = torch.from_numpy(preprocess(sample.image))
        with torch.no_grad(), hooked(tiny, "vision_tower", seen):
            tiny.model.get_image_features(pixels)
        for prompt in sample.prompts:
            prefix, kept = tokenizer.encode_prefix(prompt), np.arange(tokens.vocab_size)
            with hooked(tiny, "language_model", seen):
                steps = reference_steps(tiny.model, pixels, prefix, tokens.image, NUM_TOKENS, kept)
                assert tokens.eos not in [token for token, _, _ in steps]
    return {name: np.concatenate(rows) for name, rows in seen.items()}


def test_statistics_are_those_of_what_transformers_feeds_each_layer(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MAX_NEW_TOKENS", NUM_TOKENS)
    samples = make_samples()
    found = Statistics("here")
    graphs = Runner(tiny.bundle, "cpu", statistics=True)
    names = {linear.name for linear in linears(read_config(tiny.checkpoint))}
    answers = graphs.answer(samples, "itself", watch=collect_statistics(found, names))
    tokens = {(name.split(".")[0], len(layer)) for name, layer in answers.layers.items()}
    assert tokens == {("vision_tower", len(answers.features[0])), ("language_model", 1)}
    wanted = ask_transformers(tiny, samples)
    kinds = {name.split(".")[-1] for name in wanted}
    assert kinds == {"qkv_proj", "out_proj", "fc1", "fc2", "o_proj", "gate_proj", "down_proj"}
    assert found.inputs.keys() == wanted.keys()
    for name, rows in wanted.items():
        assert found.inputs[name].rows == len(rows), name
        np.testing.assert_allclose(found.inputs[name].absmax, np.abs(rows).max(0), rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(found.inputs[name].mean_square, (rows**2).mean(0), rtol=1e-3, err_msg=name)


def test_pieces_add_up_to_the_statistics_of_all_rows() -> None:
    rows = (np.random.default_rng(0).normal(0, 3, (100, 4)) * [1, 10, 0, 0.1]).astype(np.float32)
    statistics = Statistics("here")
    for piece in np.split(rows, [1, 8, 60]):
        statistics.add("a", np.abs(piece).max(0), np.square(piece).mean(0), len(piece))
    statistics.add("b", np.ones(3, np.float32), np.ones(3, np.float32), 7)
    assert statistics.inputs["a"].rows == 100
    np.testing.assert_allclose(statistics.inputs["a"].absmax, np.abs(rows).max(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.inputs["a"].mean_square, (rows**2).mean(0), rtol=1e-5)
    assert statistics.inputs["b"].rows == 7
    np.testing.assert_array_equal(statistics.inputs["b"].mean_square, 1)


def make_statistics() -> Statistics:
    rng = np.random.default_rng(4)
    statistics = Statistics("3 images of photos, très bien")
    for rows, (name, width) in enumerate(WIDTHS.items(), 5):
        absmax = rng.uniform(0, 9, width).astype(np.float32)
        statistics.add(name, absmax, np.square(absmax), rows)
    return statistics


def test_statistics_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    wanted = make_statistics()
    wanted.save(path)
    found = load_statistics(path, WIDTHS)
    assert found.source == wanted.source
    assert found.inputs.keys() == wanted.inputs.keys()
    for name, entry in wanted.inputs.items():
        assert found.inputs[name].rows == entry.rows
        for part in ("absmax", "mean_square"):
            array = getattr(found.inputs[name], part)
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, getattr(entry, part))


def rewritten(**changes: Array | None) -> Callable[[Path], object]:
    """A file in which arrays are replaced, or left out where they are None; `__` stands for the slash."""

    def write(path: Path) -> None:
        make_statistics().save(path)
        arrays = load_file(path) | {name.replace("__", "/"): array for name, array in changes.items()}
        save_file({name: array for name, array in arrays.items() if array is not None}, path, metadata={"source": "x"})

    return write


def cut(path: Path) -> None:
    make_statistics().save(path)
    path.write_bytes(path.read_bytes()[:-7])


def write_without_source(path: Path) -> None:
    make_statistics().save(path)
    save_file(load_file(path), path)


def floats(*values: float) -> Array:
    return np.array(values, np.float32)


BROKEN: dict[str, Callable[[Path], object]] = {
    "no file": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("absmax 1 2 3"),
    "cut off": cut,
    "one layer's arrays missing": rewritten(b__absmax=None, b__mean_square=None, b__rows=None),
    "no source": write_without_source,
    "another model's widths": rewritten(a__absmax=floats(*[1] * 5), a__mean_square=floats(*[1] * 5)),
    "one array of another width": rewritten(a__mean_square=floats(*[1] * 5)),
    "a column": rewritten(b__absmax=np.ones((3, 1), np.float32)),
    "a number": rewritten(b__absmax=np.ones((), np.float32)),
    "NaN": rewritten(a__absmax=floats(1, np.nan, 1, 1)),
    "infinity": rewritten(b__mean_square=floats(1, 1, np.inf)),
    "negative": rewritten(b__mean_square=floats(1, -1e-3, 1)),
    "another type": rewritten(a__absmax=np.ones(4)),
    "several counts": rewritten(a__rows=np.array([1, 2])),
    "endless rows": rewritten(a__rows=floats(np.inf)),
    "no rows": rewritten(a__rows=np.array([0])),
}


@pytest.mark.parametrize("write", BROKEN.values(), ids=BROKEN)
def test_a_file_that_holds_other_things_is_refused(write: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    write(path)
    with pytest.raises(UsageError) as caught:
        load_statistics(path, WIDTHS)
    assert str(path) in caught.value.expected
    assert "--calibrate" in caught.value.action
