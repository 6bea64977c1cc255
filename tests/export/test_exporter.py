"""An export is reproducible, checks itself, and publishes all or nothing."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from paliedge.backends import ort
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Precision
from paliedge.errors import CheckpointError, PrecisionError, UsageError
from paliedge_export import options
from paliedge_export.checkpoint import opening
from paliedge_export.checkpoint.big_vision import GEMMA2_27B_WIDTH
from paliedge_export.checkpoint.config import ModelConfig, read_config
from paliedge_export.exporter import export_bundle
from paliedge_export.gate import compare, reference, runner, witness
from paliedge_export.weights import files
from paliedge_export.weights.samples import PROMPTS, Sample
from tests.export.conftest import Tiny

Content = dict[str, bytes]


def read_folder(folder: Path) -> Content:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_config_with_a_mistake(folder: Path) -> ModelConfig:
    """Attention scores half as large again as they should be."""
    config = read_config(folder)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, query_scale=config.text.query_scale * 1.5))


def test_two_exports_are_the_same_to_the_byte(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("first", "second"):
        export_bundle(str(tiny.checkpoint), tmp_path / name)
    assert read_folder(tmp_path / "first") == read_folder(tmp_path / "second")


def test_the_largest_gemma_2_is_never_fp16(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert GEMMA2_27B_WIDTH == 4608
    monkeypatch.setattr(options, "GEMMA2_27B_WIDTH", read_config(tiny.checkpoint).text.hidden_size)
    with pytest.raises(UsageError, match="--precision fp32"):
        export_bundle(str(tiny.checkpoint), tmp_path / "bundle", precision="fp16")


def test_a_bundle_knows_the_repository_it_comes_from(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "find_checkpoint", lambda name, revision: tiny.checkpoint)
    export_bundle("google/paligemma-3b-mix-224", tmp_path / "bundle", compare=False)
    assert Bundle(tmp_path / "bundle").manifest.producer.checkpoint == "google/paligemma-3b-mix-224"


def test_fp32_is_compared_with_transformers(tiny: Tiny, tmp_path: Path) -> None:
    exported = export_bundle(str(tiny.checkpoint), tmp_path / "bundle")
    comparison = exported.comparisons["cpu"]
    assert comparison.reference.startswith("transformers ")
    assert comparison.image_features_error < 1e-4
    assert comparison.log_prob_error < 1e-4
    assert comparison.token_match == 1
    manifest = Bundle(tmp_path / "bundle").manifest
    assert manifest.comparisons == {"cpu": comparison}
    assert manifest.not_compared == {}
    assert manifest.golden is not None
    with np.load(tmp_path / "bundle" / manifest.golden) as golden:
        shape = golden["token_ids"].shape
        assert shape[:2] == (len(golden["images"]), len(PROMPTS))
        assert 1 < shape[2] <= runner.MAX_NEW_TOKENS
        assert len(np.unique(golden["token_ids"].reshape(-1, shape[2]), axis=0)) > 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_export_is_held_against_transformers(precision: Precision, tiny: Tiny, tmp_path: Path) -> None:
    manifest = export_bundle(str(tiny.checkpoint), tmp_path / "bundle", precision=precision)
    reference = Bundle(tmp_path / "bundle").manifest.reference
    assert reference is not None
    assert reference.name.startswith("transformers ")
    assert "prompts, pixels and ends" in reference.compared
    assert reference.not_compared == ""
    if precision == "fp16":
        assert "float32 graphs: cosine of features 1.00000" in reference.compared
        assert manifest.comparisons["cpu"].reference == "its fp32 graphs"
        assert 0 < manifest.comparisons["cpu"].log_prob_error < 5e-2
    assert {path.suffix for path in (tmp_path / "bundle").iterdir() if path.is_dir()} == set()


def test_without_transformers_the_graphs_own_answers_are_the_golden(
    paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    export_bundle(str(paligemma.checkpoint), tmp_path / "bundle")
    manifest = Bundle(tmp_path / "bundle").manifest
    assert manifest.golden is not None
    assert manifest.comparisons == {}
    assert "transformers is not installed" in manifest.not_compared["cpu"]


@pytest.mark.parametrize("old", [False, True], ids=["new-folder", "over-a-bundle"])
def test_graphs_that_differ_from_the_reference_are_not_published(
    old: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    if old:
        export_bundle(str(tiny.checkpoint), output, compare=False)
    before = read_folder(output) if old else {}
    monkeypatch.setattr(opening, "read_config", read_config_with_a_mistake)
    with pytest.raises(PrecisionError, match="Nothing was published"):
        export_bundle(str(tiny.checkpoint), output)
    assert (read_folder(output) if old else {}) == before
    assert list(tmp_path.iterdir()) == ([output] if old else [])


def test_a_bundle_over_its_limit_is_not_published(
    paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compare.GATES, "fp16", msgspec.structs.replace(compare.GATES["fp16"], error=1e-9))
    with pytest.raises(PrecisionError, match=r"error of image features .*, over 1e-09; error of log-probabilities"):
        export_bundle(str(paligemma.checkpoint), tmp_path / "bundle", precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_answers_that_are_no_numbers_are_not_published(
    paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReferenceOfNan(reference.TransformersReference):
        def answer(self, samples: Sequence[Sample], kept_tokens: Sequence[int]) -> runner.ReferenceRun:
            found = super().answer(samples, kept_tokens)
            for row in found.answers:
                row[:] = [dataclasses.replace(one, log_probs=[math.nan] * len(one.tokens)) for one in row]
            return found

    monkeypatch.setattr(witness, "TransformersReference", ReferenceOfNan)
    with pytest.raises(PrecisionError, match="error of log-probabilities nan"):
        export_bundle(str(paligemma.checkpoint), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_read_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(CheckpointError):
        export_bundle(str(tmp_path / "checkpoint"), tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_export_needs_neither_torch_nor_transformers(precision: str, paligemma: Tiny, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
import paliedge_export.exporter as exporter
exporter.export_bundle({str(paligemma.checkpoint)!r}, Path("bundle"), precision={precision!r}, compare=False)
print(sorted({{"torch", "transformers", "peft"}} & set(sys.modules)))
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"
    assert Bundle(tmp_path / "bundle").manifest.targets["cpu"].precision == precision


@pytest.mark.parametrize(
    ("targets", "precision", "words"),
    [
        (["cpu"], "bf16", "fp32 or fp16 or int8 or int4 for the target 'cpu'"),
        (["jetpack6"], "fp32", "fp16 or bf16 or int8 or int4 for the target 'jetpack6'"),
        (["cpu", "rtx"], "bf16", "for the target 'cpu'"),
        (["cpu", "rtx"], "fp32", "for the target 'rtx'"),
    ],
)
def test_a_precision_without_kernels_is_refused(
    targets: list[str], precision: str, words: str, paligemma: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        export_bundle(str(paligemma.checkpoint), tmp_path / "b", targets=targets, precision=precision)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_targets_share_one_precision_and_one_set_of_weights(paligemma: Tiny, tmp_path: Path) -> None:
    manifest = export_bundle(
        str(paligemma.checkpoint), tmp_path / "b", targets=["jetpack7", "cpu", "jetpack6", "jetpack7"], compare=False
    )
    assert list(manifest.targets) == ["jetpack7", "cpu", "jetpack6"]
    assert {target.precision for target in manifest.targets.values()} == {"fp16"}
    assert sorted(path.name for path in (tmp_path / "b").glob("*.weights")) == [
        "decoder.fp16.weights",
        "embed_tokens.fp16.weights",
        "vision_encoder.fp16.weights",
    ]
    assert set(manifest.not_compared.values()) == {"left out by --no-compare"}


def test_graphs_that_this_onnx_runtime_is_too_old_for_are_listed_with_the_reason(
    paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "VERSION", "1.23.2")  # the last one for Python 3.10
    manifest = export_bundle(str(paligemma.checkpoint), tmp_path / "b", targets=["jetpack6", "jetpack7"])
    assert list(manifest.comparisons) == ["jetpack6"]
    said = manifest.not_compared["jetpack7"]
    assert said.startswith("onnxruntime 1.23.2 has no kernel for its TensorScatter, as 1.25 has, for Python 3.11")
    assert "jetpack6's on the same weights were compared instead: cosine of features 1.0" in said


def test_a_stand_in_leaves_nothing_behind_and_gives_golden_answers(
    paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle holds what it would hold where jetpack7's own graphs can be run."""
    export_bundle(str(paligemma.checkpoint), tmp_path / "run", targets=["jetpack7", "rtx"])
    monkeypatch.setattr(ort, "VERSION", "1.23.2")
    manifest = export_bundle(str(paligemma.checkpoint), tmp_path / "b", targets=["jetpack7", "rtx"])
    assert set(manifest.not_compared) == {"jetpack7", "rtx"}
    assert manifest.golden
    assert {path.name for path in (tmp_path / "b").iterdir()} == {path.name for path in (tmp_path / "run").iterdir()}
    Bundle(tmp_path / "b").verify_hashes()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_a_wrong_weight_is_found_by_the_stand_in(
    precision: Precision, paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = files.WeightFile.add

    def spoil(self: files.WeightFile, name: str, array: Any, dtype: Any = np.float32) -> None:
        wrong = name == "language_model.layers.1.mlp.down_proj.weight" and np.dtype(dtype) != np.float32
        honest(self, name, -array if wrong else array, dtype)

    monkeypatch.setattr(files.WeightFile, "add", spoil)
    monkeypatch.setattr(ort, "VERSION", "1.23.2")
    with pytest.raises(PrecisionError, match="graphs for jetpack6"):
        export_bundle(
            str(paligemma.checkpoint),
            tmp_path / "b",
            targets=["jetpack7"],
            precision=precision,
            quantization=paligemma.calibrated(precision),
        )
