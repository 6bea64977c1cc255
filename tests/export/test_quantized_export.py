"""int8 and int4 bundles: what is stored, what the gate lets through, and what calibration is good for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from paliedge import PaliGemma
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Manifest, Precision
from paliedge.diagnostics.verify import verify_golden
from paliedge.errors import PrecisionError, UsageError
from paliedge_export.checkpoint.config import read_config
from paliedge_export.exporter import export_bundle
from paliedge_export.gate.runner import Runner
from paliedge_export.options import Quantization
from paliedge_export.weights import files
from paliedge_export.weights.activations import load_statistics
from paliedge_export.weights.linears import linears
from paliedge_export.weights.samples import builtin_samples
from tests.paths import SHAPES_CHECKPOINT
from tests.tiny import make_tiny

MILD: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "gain": 0.06}
"""A tiny model that makes no more of a rounding error than a trained one: four bits are for such."""
SAMPLES = SHAPES_CHECKPOINT / "calibration"


@pytest.fixture(scope="module", params=["paligemma", "paligemma2"])
def mild(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that brings a few samples of its own."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    make_tiny(folder, request.param, num_kv_heads=2, **MILD)
    bring_samples(folder, 3)
    return folder


def bring_samples(checkpoint: Path, num_images: int) -> None:
    folder = checkpoint / "calibration"
    folder.mkdir()
    lines = (SAMPLES / "samples.jsonl").read_text().splitlines()[: 2 * num_images]
    for name in {json.loads(line)["image"] for line in lines}:
        shutil.copy(SAMPLES / name, folder)
    (folder / "samples.jsonl").write_text("\n".join(lines))


def export(checkpoint: Path, output: Path, precision: Precision, *targets: str, **options: Any) -> Manifest:
    compare = options.pop("compare", True)
    return export_bundle(
        str(checkpoint),
        output,
        targets=targets or ("cpu",),
        precision=precision,
        quantization=Quantization(**options),
        compare=compare,
    )


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_all_targets_pass_the_gate(precision: Precision, mild: Path, tmp_path: Path) -> None:
    manifest = export(mild, tmp_path / "b", precision, "cpu", "jetpack6", "jetpack7", "rtx")
    assert set(manifest.comparisons) | set(manifest.not_compared) == {"cpu", "jetpack6", "jetpack7", "rtx"}
    for found in manifest.comparisons.values():
        assert (found.num_images, found.num_answers, found.num_not_finite) == (3, 6, 0)
        assert found.reference == "its fp32 graphs"
        assert found.image_features.min < 1
    kinds = {"int8": {"DynamicQuantizeMatMul", "MatMulNBits"}, "int4": {"MatMulNBits"}}
    assert kinds[precision] <= operators(tmp_path / "b", manifest.targets["cpu"].decoder.file)
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(tmp_path / "b", "vision_encoder.opset20.onnx")
    decoder = onnx.load(tmp_path / "b" / manifest.targets["cpu"].decoder.file, load_external_data=False)
    levels = {
        attribute.i
        for node in decoder.graph.node
        for attribute in node.attribute
        if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level"
    }
    if precision == "int8":  # gate and up read the same rounded input
        names = [
            node.op_type for node in onnx.load(tmp_path / "b" / manifest.targets["jetpack6"].decoder.file).graph.node
        ]
        assert names.count("QuantizeLinear") == 4 * manifest.model.text.num_layers
    assert levels == {4}  # products of integers: with 0, 8-bit weights are a hundred times slower


def test_without_comparison_no_answer_is_made_to_judge_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    make_tiny(folder, "paligemma", **MILD)
    bring_samples(folder, 48)
    answered: list[list[str]] = []
    for compare in (True, False):
        said: list[str] = []
        export_bundle(
            str(folder),
            tmp_path / f"{compare}",
            targets=("cpu",),
            precision="int8",
            quantization=Quantization(),
            compare=compare,
            report=said.append,
        )
        answered.append([line for line in said if line.startswith("image ")])
    assert [len(lines) for lines in answered] == [32 + 16, 32]  # by the fp32 graphs
    statistics = [(tmp_path / name / "calibration.safetensors").read_bytes() for name in ("True", "False")]
    assert statistics[0] == statistics[1]


def operators(folder: Path, file: str) -> set[str]:
    return {node.op_type for node in onnx.load(folder / file, load_external_data=False).graph.node}


def bits_of_weights(folder: Path, file: str) -> dict[str, int]:
    model = onnx.load(folder / file, load_external_data=False)
    width = {onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8, onnx.TensorProto.FLOAT16: 16}
    return {
        tensor.name: width.get(tensor.data_type, 32)
        for tensor in model.graph.initializer
        if tensor.name.endswith(".weight")
    }


def test_linear_layers_alone_are_integers(mild: Path, tmp_path: Path) -> None:
    manifest = export(mild, tmp_path / "b", "int4", "jetpack6", compare=False)
    decoder = bits_of_weights(tmp_path / "b", manifest.targets["jetpack6"].decoder.file)
    vision = bits_of_weights(tmp_path / "b", manifest.targets["jetpack6"].vision_encoder.file)
    assert {decoder[name] for name in decoder if "_proj" in name} == {4}
    assert {vision[name] for name in vision if ".layers." in name and "norm" not in name} == {8}
    assert {decoder[name] for name in decoder if "norm" in name} == {32}
    assert decoder["lm_head.weight"] == 8
    assert vision["multi_modal_projector.linear.weight"] == 16
    assert (manifest.embedding.dtype, manifest.embedding.row_scales is not None) == ("int8", True)


def plant_outliers(checkpoint: Path, output: Path) -> None:
    """The same function, but a few channels behind each norm are 200 times as large, as in a Gemma."""
    shutil.copytree(checkpoint, output)
    tensors = load_file(output / "model.safetensors")
    channels, factor = [3, 17, 40], np.float32(200)
    consumers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for name in list(tensors):
        for norm, readers in consumers.items():
            if f".{norm}.weight" in name:
                tensors[name][channels] = (1 + tensors[name][channels]) * factor - 1
                for reader in readers:
                    tensors[name.replace(norm, reader)][:, channels] /= factor
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outliers")
    make_tiny(folder / "plain", "paligemma", **MILD)
    bring_samples(folder / "plain", 3)
    plant_outliers(folder / "plain", folder / "planted")
    return folder / "planted"


def test_outlier_channels_pass_with_smoothing(outliers: Path, tmp_path: Path) -> None:
    manifest = export(outliers, tmp_path / "b", "int8", "cpu", "jetpack6")
    assert min(found.last_hidden.mean for found in manifest.comparisons.values()) > 0.99
    strengths = json.loads((tmp_path / "b" / "precision_report.json").read_text())["strengths"]
    assert strengths["language_model.layers.0.self_attn.qkv_proj"] > 0


@pytest.mark.parametrize("target", ["cpu", "jetpack6"])
def test_and_fail_without_it(target: str, outliers: Path, tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match="mean cosine of last hidden states") as caught:
        export(outliers, tmp_path / "b", "int8", target, smooth=False)
    assert "The worst layers" in caught.value.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["cpu", "jetpack6", "jetpack7"])
def test_a_residual_beyond_the_range_of_fp16_does_no_harm(target: str, tmp_path: Path) -> None:
    """Gemma 2's post norms are large: each layer adds more to the residual stream than fp16 can hold."""
    checkpoint = tmp_path / "checkpoint"
    make_tiny(checkpoint, "paligemma2", **MILD)
    tensors = load_file(checkpoint / "model.safetensors")
    for name in tensors:
        if "language_model" in name and ("post_attention_layernorm" in name or "post_feedforward_layernorm" in name):
            tensors[name] += np.float32(30_000)
        elif "language_model" in name and ("input_layernorm" in name or "pre_feedforward_layernorm" in name):
            tensors[name] += np.float32(8)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    manifest = export(checkpoint, tmp_path / "b", "fp16", target)
    if target in manifest.not_compared:
        pytest.skip("this ONNX Runtime runs no graphs of opset 24; 1.25 does")
    assert manifest.comparisons[target].num_not_finite == 0
    export_bundle(str(checkpoint), tmp_path / "fp32", compare=False)
    wanted = Runner(tmp_path / "fp32", "cpu").answer(builtin_samples(), "fp32")
    found = Runner(tmp_path / "b", target).answer(builtin_samples(), "fp16", wanted)
    largest = max(float(np.abs(layer).max()) for name, layer in wanted.layers.items() if "language_model" in name)
    assert largest > float(np.finfo(np.float16).max)
    pairs = [pair for rows in zip(wanted.answers, found.answers, strict=True) for pair in zip(*rows, strict=True)]
    tokens, scores = (
        np.array([[getattr(one, part) for one in pair] for pair in pairs]) for part in ("tokens", "log_probs")
    )
    moved = tokens[:, 0] != tokens[:, 1]
    assert moved.mean() < 0.1
    assert np.abs(scores[:, 0] - scores[:, 1])[moved].max(initial=0) < 0.02  # random weights have ties


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_without_anything_to_calibrate_with_nothing_is_exported(precision: Precision, tmp_path: Path) -> None:
    make_tiny(tmp_path / "checkpoint", "paligemma")
    with pytest.raises(UsageError, match=r"--calibrate"):
        export(tmp_path / "checkpoint", tmp_path / "b", precision)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_statistics_of_a_bundle_make_the_same_bundle_again(mild: Path, tmp_path: Path) -> None:
    """Also from the checkpoint without its samples, and from the file alone."""
    first = export(mild, tmp_path / "first", "int8", compare=False)
    bare = tmp_path / "bare"
    shutil.copytree(mild, bare, ignore=lambda folder, names: ["calibration"])
    for name, source in (("again", tmp_path / "first"), ("file", tmp_path / "first" / "calibration.safetensors")):
        export(bare, tmp_path / name, "int8", compare=False, calibrate=source)
        for file in first.files:
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "first" / file).read_bytes(), file


def test_another_models_statistics_are_refused(mild: Path, tmp_path: Path) -> None:
    export(mild, tmp_path / "first", "int8", compare=False)
    make_tiny(tmp_path / "other", "paligemma", hidden_size=64)
    with pytest.raises(UsageError, match="another model's"):
        export(tmp_path / "other", tmp_path / "b", "int8", calibrate=tmp_path / "first")


def test_more_images_change_the_statistics(mild: Path, tmp_path: Path) -> None:
    """So that the test of reuse above is no accident."""
    first, second = (
        export(mild, tmp_path / name, "int8", "jetpack6", compare=False, calibrate=folder)
        for name, folder in (("few", None), ("many", SAMPLES))
    )
    assert first.files["decoder.int8.qdq.weights"] != second.files["decoder.int8.qdq.weights"]


@pytest.mark.parametrize(("target", "budget"), [("cpu", 0.2), ("jetpack6", 0.2), ("cpu", 1.0)])
def test_the_layer_that_suffers_is_found_and_kept(target: str, budget: float, tmp_path: Path) -> None:
    """One output channel of one layer is made huge, so that one scale for its input's rows is hopeless."""
    checkpoint = tmp_path / "checkpoint"
    make_tiny(checkpoint, "paligemma", **MILD)
    bring_samples(checkpoint, 2)
    tensors = load_file(checkpoint / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    down = name.replace("up_proj", "down_proj")
    tensors[name][5] *= 5000  # one channel of down_proj's input, which its weight hardly reads ...
    tensors[down][:, 5] /= 5000
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    # ... and which smoothing would mend, so it is off
    manifest = export(checkpoint, tmp_path / "b", "int8", target, sensitivity=budget, smooth=False)
    ranking = json.loads((tmp_path / "b" / "precision_report.json").read_text())["sensitivity"]
    assert ranking[0]["name"] == "language_model.layers.1.mlp.down_proj"
    assert ranking[0]["error"] > 10 * ranking[1]["error"]
    assert [one["error"] for one in ranking] == sorted((one["error"] for one in ranking), reverse=True)
    bits = bits_of_weights(tmp_path / "b", manifest.targets[target].decoder.file)
    assert bits["language_model.layers.1.mlp.down_proj.weight"] == 16
    kept = [one for one in ranking if one["kept"]]
    total = sum(one["num_weights"] * one["bits"] for one in ranking)
    assert 0 < sum(one["num_weights"] * (16 - one["bits"]) for one in kept) <= budget * total
    matrices = {linear.name: linear.matrices for linear in linears(read_config(checkpoint))}
    assert {name for name, width in bits.items() if width == 16} == {
        f"{matrix}.weight" for one in kept if one["name"].startswith("language") for matrix in matrices[one["name"]]
    }


def test_a_broken_layer_is_named(mild: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its weights upside down, in the files of the int8 bundle alone."""
    honest = files.WeightFile.add

    def spoil(self: files.WeightFile, name: str, array: Any, dtype: Any = np.float32) -> None:
        wrong = name.startswith("language_model.layers.1.") and np.dtype(dtype) == np.uint8
        honest(self, name, -array if wrong else array, dtype)

    monkeypatch.setattr(files.WeightFile, "add", spoil)
    with pytest.raises(PrecisionError) as caught:
        export(mild, tmp_path / "b", "int8")
    assert "behind them: language_model.layers.1 (" in caught.value.found
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_number_is_seen(mild: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One scale of the int8 bundle is infinite."""
    honest = files.WeightFile.add

    def spoil(self: files.WeightFile, name: str, array: Any, dtype: Any = np.float32) -> None:
        wrong = name == "language_model.layers.1.mlp.down_proj.weight_scale"
        honest(self, name, array * np.inf if wrong else array, dtype)

    monkeypatch.setattr(files.WeightFile, "add", spoil)
    with pytest.raises(PrecisionError, match=r"activations that are no finite number [1-9]\S*, over 0"):
        export(mild, tmp_path / "b", "int8")


def test_the_report_stays_in_the_bundle(mild: Path, tmp_path: Path) -> None:
    manifest = export(mild, tmp_path / "b", "int8")
    assert manifest.precision_report in Bundle(tmp_path / "b").manifest.files
    report = json.loads((tmp_path / "b" / str(manifest.precision_report)).read_text())
    target = report["targets"]["cpu"]
    assert list(target["layers"]) == [
        *(f"vision_tower.encoder.layers.{index}" for index in range(2)),
        *(f"language_model.layers.{index}" for index in range(3)),
    ]
    assert [row["prompt"] for row in target["answers"]][1] == "caption en"
    assert report["calibrated_with"] == "3 images of calibration"


def test_sixteen_bits_are_judged_on_the_samples_too(mild: Path, tmp_path: Path) -> None:
    manifest = export(mild, tmp_path / "b", "fp16")
    assert manifest.comparisons["cpu"].num_images == 3
    assert manifest.calibration is None


def test_what_is_judged_has_no_part_in_what_it_is_judged_by(tmp_path: Path) -> None:
    """48 samples: the first 32 calibrate and say which layers suffer, the last 16 judge."""
    checkpoint = tmp_path / "checkpoint"
    make_tiny(checkpoint, "paligemma", **MILD)
    changed = Path(shutil.copytree(SAMPLES, tmp_path / "changed"))
    for index in range(32, 48):
        Image.new("RGB", (112, 112), "white").save(changed / f"{index}.png")
    names = {linear.name: linear.width for linear in linears(read_config(checkpoint))}
    found, rankings = [], []
    for folder in (SAMPLES, changed):
        bundle = tmp_path / f"{folder.name}-bundle"
        manifest = export(checkpoint, bundle, "int8", compare=False, calibrate=folder, sensitivity=0.2)
        found.append(load_statistics(bundle / "calibration.safetensors", names))
        rankings.append(json.loads((bundle / str(manifest.precision_report)).read_text())["sensitivity"])
    assert [one.source for one in found] == ["32 images of calibration", "32 images of changed"]
    for name, one in found[0].inputs.items():
        np.testing.assert_array_equal(one.absmax, found[1].inputs[name].absmax)
    assert rankings[0] == rankings[1]


def test_where_there_are_few_every_image_calibrates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """20 images: a loud first one is seen, although the last 16 judge."""
    checkpoint = tmp_path / "checkpoint"
    make_tiny(checkpoint, "paligemma", **MILD)
    widths = {linear.name: linear.width for linear in linears(read_config(checkpoint))}
    caplog.set_level("INFO")
    loudest = []
    for name, first in (("grey", 128), ("loud", 0)):
        folder = tmp_path / name
        folder.mkdir()
        for index in range(20):
            Image.new("RGB", (56, 56), (128 if index else first,) * 3).save(folder / f"{index:02}.png")
        export(checkpoint, tmp_path / f"{name}-bundle", "int8", compare=False, calibrate=folder)
        found = load_statistics(tmp_path / f"{name}-bundle" / "calibration.safetensors", widths)
        assert found.source == f"20 images of {name}"
        loudest.append(found.inputs["vision_tower.encoder.layers.0.mlp.fc2"].absmax)
    assert caplog.text.count("neither calibrated nor judged") == 2, "pictures without prompts: a warning"
    grey, loud = loudest
    assert not np.array_equal(grey, loud)


@pytest.mark.parametrize("target", ["cpu", "jetpack7"])
def test_sample_prompts_over_the_limit_are_refused(target: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    make_tiny(checkpoint, "paligemma")
    bring_samples(checkpoint, 1)
    line = {"image": "00.png", "prefix": "detect " + "star " * 300, "suffix": ""}
    (checkpoint / "calibration" / "long.jsonl").write_text(json.dumps(line))
    with pytest.raises(UsageError, match="--max-prompt-tokens"):
        export(checkpoint, tmp_path / "b", "fp16", target)


@pytest.mark.opset24
@pytest.mark.parametrize("target", ["cpu", "jetpack7"])
def test_comparison_and_golden_answers_keep_small_limits(target: str, tmp_path: Path) -> None:
    make_tiny(tmp_path / "checkpoint", "paligemma")
    export_bundle(
        str(tmp_path / "checkpoint"),
        tmp_path / "b",
        targets=[target],
        precision="fp16",
        max_prompt_tokens=8,
        max_new_tokens=3,
    )
    bundle = Bundle(tmp_path / "b")
    with PaliGemma.load(tmp_path / "b") as model:
        checked = verify_golden(bundle, model)
    assert checked is not None
    assert checked.num_answers > 0


def test_a_head_of_its_own_and_two_layouts_write_nothing_twice(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    make_tiny(checkpoint, "paligemma", tied=False, **MILD)
    bring_samples(checkpoint, 2)
    manifest = export(checkpoint, tmp_path / "b", "int8", "jetpack6", "cpu")
    assert set(manifest.comparisons) == {"jetpack6", "cpu"}
    assert sorted(name for name in manifest.files if name.startswith(("embed", "lm_head"))) == [
        "embed_tokens.int8.qdq.scales",
        "embed_tokens.int8.qdq.weights",
        "lm_head.int8.contrib.weights",
        "lm_head.int8.qdq.weights",
    ]
    used = {manifest.embedding.file, manifest.embedding.row_scales}
    for target in manifest.targets.values():
        used |= {*target.decoder.weights, *target.vision_encoder.weights}
    assert {name for name in manifest.files if name.endswith((".weights", ".scales"))} == used


def test_statistics_are_refused_where_nothing_is_quantised(mild: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs no statistics"):
        export(mild, tmp_path / "b", "fp16", calibrate=tmp_path / "x.safetensors")


def test_a_ranking_is_refused_where_nothing_is_quantised(mild: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave out --sensitivity"):
        export(mild, tmp_path / "b", "fp16", sensitivity=0.1)
