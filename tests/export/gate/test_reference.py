"""transformers reads the same folder by itself: whatever our own reader gets wrong, the gate refuses by its name."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Precision
from paliedge.errors import PrecisionError
from paliedge_export import exporter
from paliedge_export.checkpoint.config import read_config
from paliedge_export.checkpoint.generation import read_ends
from paliedge_export.checkpoint.safetensors_reader import Checkpoint
from paliedge_export.checkpoint.tokenizer import read_tokenizer
from paliedge_export.exporter import export_bundle
from paliedge_export.gate import reference, transformers_model
from tests.export.conftest import Tiny
from tests.tiny import make_tiny

Plant = Callable[[pytest.MonkeyPatch], None]


def plant_truncation(patch: pytest.MonkeyPatch) -> None:
    original = read_tokenizer

    def truncated(folders: Any) -> Any:
        found = original(folders)
        raw = json.loads(found.content)
        raw["normalizer"] = {"type": "Replace", "pattern": {"String": "caption"}, "content": "cap"}
        return found._replace(content=json.dumps(raw).encode())

    patch.setattr(exporter, "read_tokenizer", truncated)


def plant_stale_weights(patch: pytest.MonkeyPatch) -> None:
    original = Checkpoint.__getitem__

    def stale(self: Checkpoint, name: str) -> Any:
        found = original(self, name)
        return np.roll(found, 1, axis=0) if name == "language_model.layers.1.mlp.up_proj.weight" else found

    patch.setattr(Checkpoint, "__getitem__", stale)


def plant_processor_switch(patch: pytest.MonkeyPatch) -> None:
    original = Checkpoint.read_preprocess
    patch.setattr(
        Checkpoint,
        "read_preprocess",
        lambda self: msgspec.structs.replace(original(self), mean=(0.0,) * 3, std=(1.0,) * 3),
    )


def plant_wrong_end(patch: pytest.MonkeyPatch) -> None:
    original = read_ends

    def wrong(folders: Any, tokenizer: Any) -> Any:
        tokens, notes = original(folders, tokenizer)
        return msgspec.structs.replace(tokens, ends=(1, 44)), notes

    patch.setattr(exporter, "read_ends", wrong)


PLANTS: dict[str, tuple[Plant, str]] = {
    "tokenizer": (plant_truncation, "the prompt 'caption en' as tokens"),
    "weights": (plant_stale_weights, "error of log-probabilities"),
    "processor": (plant_processor_switch, "pixel_values as its image processor makes them"),
    "end": (plant_wrong_end, r"answers that end at \[1\]"),
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("plant", "named"), PLANTS.values(), ids=PLANTS)
def test_a_fault_of_our_own_reader_makes_the_gate_refuse(
    plant: Plant, named: str, precision: Precision, paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(PrecisionError, match=named):
        export_bundle(str(paligemma.checkpoint), tmp_path / "bundle", precision=precision)
    assert list(tmp_path.iterdir()) == []


def compare_without(paligemma: Tiny, folder: Path) -> tuple[str, list[str]]:
    """Why nothing was compared, and what was said."""
    said: list[str] = []
    export_bundle(str(paligemma.checkpoint), folder / "bundle", precision="fp16", report=said.append)
    kept = Bundle(folder / "bundle").manifest.reference
    assert kept is not None
    assert kept.name == kept.compared == ""
    assert f"not compared with transformers: {kept.not_compared}" in said
    return kept.not_compared, said


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_what_is_not_installed_is_called_that(
    name: str, paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    reason, _ = compare_without(paligemma, tmp_path)
    assert reason.startswith(f"{name} is not installed; pip install")


def test_an_older_transformers_is_not_called_a_missing_one(
    paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = ModuleType("transformers")
    old.__version__ = "4.57.3"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", old)
    assert compare_without(paligemma, tmp_path)[0].startswith("transformers 4.57.3 is too old")


def test_a_transformers_that_breaks_on_import_is_no_traceback(
    paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> Any:
        raise RuntimeError(f"{name} was built for another numpy\nsecond line")

    monkeypatch.setattr(transformers_model, "import_module", fail)
    assert "torch cannot be imported (torch was built for another numpy)" in compare_without(paligemma, tmp_path)[0]


def test_what_transformers_cannot_read_is_said_in_its_words(paligemma: Tiny, tmp_path: Path) -> None:
    """Names behind a wrapper's prefix: we take it off, transformers would go on with random weights."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "checkpoint"
    shutil.copytree(paligemma.checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    wrapped = dataclasses.replace(paligemma, checkpoint=folder)
    assert "it finds no" in compare_without(wrapped, tmp_path)[0]


def test_a_model_that_does_not_fit_into_memory_is_not_loaded(
    paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        pytest.fail("it was loaded")

    monkeypatch.setattr(transformers_model, "_HEADROOM", 1e9)
    monkeypatch.setattr(transformers_model, "load_model", refuse)
    assert "are free" in compare_without(paligemma, tmp_path)[0]


def test_where_only_bfloat16_fits_it_is_compared_in_that_and_says_so(
    paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        transformers_model, "choose_size", lambda checkpoint: ("bfloat16", checkpoint.config.text.num_layers)
    )
    for precision in ("fp32", "fp16"):
        manifest = export_bundle(str(paligemma.checkpoint), tmp_path / "bundle", precision=precision)
        assert manifest.reference is not None
        assert "in bfloat16" in manifest.reference.compared
        assert "float32 graphs" in manifest.reference.compared


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny(folder, request.param, num_layers=14, gain=0.1)
    return folder


def memory_for(checkpoint: Path, dtype: str, num_layers: int) -> int:
    """Bytes of which that much of the model takes a little less."""
    opened = Checkpoint(checkpoint, read_config(checkpoint))
    for free in range(100_000, 10_000_000, 1_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformers_model, "_free_memory", lambda free=free: free)
            try:
                if transformers_model.choose_size(opened) == (dtype, num_layers):
                    return free
            except transformers_model.NotComparedError:
                continue
    raise AssertionError


def test_the_largest_part_of_a_model_that_fits_is_chosen(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [memory_for(deep, *size) for size in (("float32", 1), ("float32", 2), ("bfloat16", 14), ("float32", 14))]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_where_less_fits_the_first_layers_are_compared(
    precision: Precision, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = memory_for(deep, "float32", 2)
    monkeypatch.setattr(transformers_model, "_free_memory", lambda: free)
    manifest = export_bundle(str(deep), tmp_path / "bundle", precision=precision)
    assert manifest.reference is not None
    assert "with the first 2 of 14 layers, since no more fit" in manifest.reference.compared
    assert "float32 graphs: cosine" in manifest.reference.compared
    plant_stale_weights(monkeypatch)  # in the second layer
    with pytest.raises(PrecisionError):
        export_bundle(str(deep), tmp_path / "stale", precision=precision)


class TorchvisionsWay:
    """Resizes as torchvision's processor does, whose wheels do not load beside a CPU build of torch."""

    def __call__(self, images: Sequence[Image.Image], return_tensors: str) -> SimpleNamespace:
        pixels = torch.from_numpy(np.array(images[0])).permute(2, 0, 1)[None]
        resized = functional.interpolate(pixels, size=(56, 56), mode="bicubic", antialias=True)
        return SimpleNamespace(pixel_values=resized.float() / 127.5 - 1)


def ask_for_torchvision(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_processor_type": "SiglipImageProcessorFast"}))
    return folder


def test_torchvisions_other_pixels_are_measured_and_said(
    paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_torchvision_processor", lambda folder: TorchvisionsWay())
    lines: list[str] = []
    manifest = export_bundle(
        str(ask_for_torchvision(paligemma.checkpoint, tmp_path / "fast")), tmp_path / "bundle", report=lines.append
    )
    assert manifest.reference is not None
    found = re.search(
        r"pixels are up to ([0-9.]+) of 255 off Pillow's, ([0-9.]+) on average", manifest.reference.compared
    )
    assert found
    assert 0.5 <= float(found[1]) < 60
    assert float(found[2]) < 2
    assert any("the bundle resizes as Pillow does" in line for line in lines)


def test_without_torchvision_it_is_said_that_nothing_was_measured(paligemma: Tiny, tmp_path: Path) -> None:
    folder = ask_for_torchvision(paligemma.checkpoint, tmp_path / "fast")
    manifest = export_bundle(str(folder), tmp_path / "bundle")
    assert manifest.reference is not None
    assert "torchvision's image processor, which cannot be compared with Pillow's here" in manifest.reference.compared
    assert manifest.preprocess == export_bundle(str(paligemma.checkpoint), tmp_path / "plain", compare=False).preprocess
