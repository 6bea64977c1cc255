"""A graph of its own for prefill: the same rows and answers as the decoder's, in other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from paliedge import GenerationOptions, PaliGemma
from paliedge.backends.ort import OrtSession
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Precision
from paliedge.bundle.precision_report import PRECISION_REPORT, PrecisionReport
from paliedge.cli import main
from paliedge.diagnostics.verify import verify_golden
from paliedge.errors import UsageError
from paliedge_export.exporter import export_bundle
from paliedge_export.options import Quantization
from paliedge_export.writer import write_all_weights
from tests.answers import answer_together
from tests.tiny import make_tiny

IMAGES = [np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8) for seed in range(3)]
PROMPTS = ["caption en", "detect red circle ; blue star", "ocr"]


@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
def test_with_the_same_weights_it_changes_nothing(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(tmp_path / "checkpoint", family, seed=2)
    export_bundle(
        str(tmp_path / "checkpoint"), tmp_path / "one", max_prompt_tokens=40, max_new_tokens=12, compare=False
    )
    write = write_all_weights

    def with_prefill(*arguments: Any) -> Any:
        return {layout: stored._replace(prefill=stored.decoder) for layout, stored in write(*arguments).items()}

    monkeypatch.setattr("paliedge_export.exporter.write_all_weights", with_prefill)
    manifest = export_bundle(str(tmp_path / "checkpoint"), tmp_path / "two", max_prompt_tokens=40, max_new_tokens=12)
    assert manifest.comparisons["cpu"].token_match == 1.0
    one, two = (OrtSession(Bundle(tmp_path / name), num_threads=1) for name in ("one", "two"))
    rng = np.random.default_rng(0)
    hidden = manifest.model.text.hidden_size
    size = manifest.model.vision.image_size
    pixels = rng.normal(size=(1, 3, size, size)).astype(np.float32)
    prompt, following = (rng.normal(size=(length, hidden)).astype(np.float32) for length in (5, 3))
    found = []
    for session in (one, two):
        cache = session.new_cache(2)
        features = session.encode_image(pixels)
        steps = [session.prefill(cache, [features], prompt, (0, 300), row=1)]
        session.move_row(cache, 1, 0)
        steps += [session.decode(cache, embeds[None], [(0, 300)])[0] for embeds in following]
        found.append((steps, cache))
    (steps, cache), (others, other) = found
    assert [step.token_id for step in steps] == [step.token_id for step in others]
    assert [step.log_prob for step in others] == pytest.approx([step.log_prob for step in steps], abs=1e-4)
    assert other.lengths.tolist() == cache.lengths.tolist()
    for name, buffer in cache.buffers.items():
        np.testing.assert_allclose(other.buffers[name], buffer, atol=1e-4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int4 for `cpu` and a TensorRT, with 8 bits for the prefill of the first."""
    folder = tmp_path_factory.mktemp("fast")
    make_tiny(folder / "checkpoint", "paligemma", num_kv_heads=2, hidden_size=128, intermediate_size=256, gain=0.06)
    (folder / "checkpoint" / "calibration").mkdir()
    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / "checkpoint" / "calibration" / f"{number}.png")
    command = ["export", str(folder / "checkpoint"), "-o", str(folder / "bundle"), "--max-new-tokens", "12"]
    command += ["--max-prompt-tokens", "24", "--target", "cpu", "--target", "jetpack6"]
    command += ["--precision", "int4", "--fast-prefill", "--sensitivity", "20"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return folder / "bundle"


def test_it_has_8_bits_beside_the_4_of_the_decoder(bundle: Path) -> None:
    manifest = Bundle(bundle).manifest
    target = manifest.targets["cpu"]
    assert manifest.targets["jetpack6"].prefill is None
    assert target.prefill is not None
    assert target.independent_rows
    assert set(target.prefill.weights) <= target.weights
    graph = onnx.load(bundle / target.prefill.file, load_external_data=False).graph
    kinds = {node.op_type for node in graph.node}
    assert "DynamicQuantizeMatMul" in kinds
    assert not {"MatMulNBits", "Gemm", "ArgMax"} & kinds
    num_layers = manifest.model.text.num_layers
    assert "the decoder's twice for a fast prefill" in CliRunner().invoke(main, ["info", str(bundle)]).output
    report = msgspec.json.decode((bundle / PRECISION_REPORT).read_bytes(), type=PrecisionReport)
    assert any(one.kept for one in report.sensitivity)
    layers = report.targets["cpu"].layers
    assert len(layers) == manifest.model.vision.num_layers + manifest.model.text.num_layers
    assert min(layers.values()) > 0.9
    used = {name for node in graph.node for name in node.input if name.endswith("_proj.weight")}
    assert len(used) == 5 * (num_layers - 1) + 1
    (weights,) = target.prefill.weights
    outside = [{one.key: one.value for one in tensor.external_data} for tensor in graph.initializer]
    lengths = [int(place["length"]) for place in outside if place]
    assert 0 <= manifest.files[weights].size - sum(lengths) < 4096 * len(lengths), "nothing but gaps between pages"


def test_its_answers_are_the_same_alone_and_together(bundle: Path) -> None:
    requests = [(image, prompt) for image in IMAGES for prompt in PROMPTS]
    with PaliGemma.load(bundle) as model:
        assert verify_golden(Bundle(bundle), model) is not None
        alone = [model.generate(*one, options=GenerationOptions(max_new_tokens=8)) for one in requests]
        together = answer_together(model, requests, GenerationOptions(max_new_tokens=8))
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert len({tuple(one.token_ids) for one in alone}) > 1


@pytest.mark.parametrize(("precision", "target"), [("int8", "cpu"), ("fp32", "cpu"), ("int4", "jetpack6")])
def test_it_is_for_int4_on_a_processor(precision: Precision, target: str, tmp_path: Path) -> None:
    make_tiny(tmp_path / "checkpoint", "paligemma")
    with pytest.raises(UsageError, match="leave out --fast-prefill"):
        export_bundle(
            str(tmp_path / "checkpoint"),
            tmp_path / "bundle",
            targets=[target],
            precision=precision,
            quantization=Quantization(fast_prefill=True),
        )
