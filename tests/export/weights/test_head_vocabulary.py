"""A reduced output head says boxes of its labels as the whole head does, and nothing else is asked of it."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from benchmarks.shapes.calibration import FOLDER
from benchmarks.shapes.scenes import CLASSES, HELD_OUT_SEED, make_scene
from paliedge import GenerationOptions, PaliGemma
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Precision
from paliedge.cli import main
from paliedge.diagnostics.verify import verify_golden
from paliedge.errors import UsageError
from paliedge_export.checkpoint.tokenizer import read_tokenizer
from paliedge_export.exporter import export_bundle
from paliedge_export.options import Quantization
from tests.paths import SHAPES_CHECKPOINT


def export(output: Path, vocabulary: str | None, precision: Precision = "fp32", target: str = "cpu") -> PaliGemma:
    quantization = Quantization(head_vocabulary=vocabulary)
    export_bundle(
        str(SHAPES_CHECKPOINT),
        output,
        targets=[target],
        precision=precision,
        quantization=quantization,
        compare=precision != "fp32",
    )
    return PaliGemma.load(output)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PaliGemma:
    return export(tmp_path_factory.mktemp("whole") / "b", None)


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> PaliGemma:
    return export(tmp_path_factory.mktemp("reduced") / "b", "detect")


def test_it_finds_what_the_whole_head_finds(whole: PaliGemma, reduced: PaliGemma) -> None:
    """Ids are those of the whole vocabulary, however few rows the head has."""
    num_boxes = 0
    for seed in range(HELD_OUT_SEED + 40_000, HELD_OUT_SEED + 40_012):
        scene = make_scene(seed)
        labels = sorted({item.label for item in scene.objects})
        for asked in ([labels[0]], labels[:3]):
            first, second = (model.detect(scene.image, asked) for model in (whole, reduced))
            assert second.token_ids == first.token_ids
            assert [item.box for item in second.detections] == [item.box for item in first.detections]
            assert all(b >= a - 1e-4 for a, b in zip(first.log_probs, second.log_probs, strict=True))  # fewer rivals
            num_boxes += len(second.detections)
    assert num_boxes > 20


def test_the_head_has_only_the_rows_that_such_answers_need(reduced: PaliGemma) -> None:
    manifest = reduced.manifest
    assert manifest.vocabulary is not None
    assert set(manifest.vocabulary.labels) == set(CLASSES)  # what the calibration prompts ask for
    tokens = read_tokenizer([SHAPES_CHECKPOINT]).tokens
    fewest = tokens.num_locations + tokens.num_segmentations
    assert fewest < manifest.vocabulary.num_tokens < tokens.vocab_size - 200
    head = next(name for name in manifest.targets["cpu"].decoder.weights if name.startswith("lm_head"))
    assert manifest.files[head].size == manifest.vocabulary.num_tokens * manifest.model.text.hidden_size * 4


@pytest.mark.parametrize("prompt", ["detect red star", " detect red star ; ", "segment red star\n"])
def test_its_own_tasks_are_not(prompt: str, reduced: PaliGemma) -> None:
    assert reduced.generate(make_scene(1).image, prompt, options=GenerationOptions(max_new_tokens=1)).finish_reason


@pytest.mark.parametrize(
    "prompt", ["detect ;", "caption en", "ocr", "answer en how many stars are there?", "detecting", ""]
)
def test_other_tasks_are_refused(prompt: str, reduced: PaliGemma) -> None:
    with pytest.raises(UsageError, match="without --head-vocab"):
        reduced.generate(make_scene(1).image, prompt)


def test_other_labels_are_refused(reduced: PaliGemma) -> None:
    with pytest.raises(UsageError, match="found 'dog'"):
        reduced.detect(make_scene(1).image, ["red star", "dog"])
    with pytest.raises(UsageError, match="found 'dog'"):
        reduced.generate(make_scene(1).image, "segment dog")
    assert (
        reduced.generate(make_scene(1).image, "segment red star", options=GenerationOptions(max_new_tokens=2)).token_ids
        is not None
    )


def test_labels_come_from_a_file(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_bytes(b"\xef\xbb\xbfred star\n\n  blue circle ; red star\r\nred star\n")  # as Notepad saves
    model = export(tmp_path / "b", str(labels))
    assert model.manifest.vocabulary is not None
    assert model.manifest.vocabulary.labels == ("red star", "blue circle")
    ids = kept_ids(tmp_path / "b")
    tokenizer = Tokenizer.from_file(str(SHAPES_CHECKPOINT / "tokenizer.json"))
    pieces = set(tokenizer.encode("detect red star ; blue circle", add_special_tokens=False).ids)
    detect = set(tokenizer.encode("detect", add_special_tokens=False).ids)
    assert pieces - detect <= ids
    assert not set(tokenizer.encode("purple", add_special_tokens=False).ids) <= ids


def kept_ids(bundle: Path) -> set[int]:
    model = onnx.load(bundle / "decoder.cpu.onnx", load_external_data=False)
    gather = next(node for node in model.graph.node if node.op_type == "Gather")
    (constant,) = [tensor for tensor in model.graph.initializer if tensor.name == gather.input[0]]
    return set(onnx.numpy_helper.to_array(constant).tolist())


@pytest.mark.parametrize(("precision", "target"), [("int8", "cpu"), ("int4", "jetpack6")])
def test_it_goes_with_integers(precision: Precision, target: str, tmp_path: Path) -> None:
    """The gate compares it with a reduced float32 head."""
    model = export(tmp_path / "b", "detect", precision, target)
    comparison = model.manifest.comparisons[target]
    assert comparison.box_iou is not None
    assert comparison.box_iou > 0.85
    report = json.loads((tmp_path / "b" / "precision_report.json").read_text())
    prompts = {row["prompt"].split()[0] for row in report["targets"][target]["answers"]}
    assert prompts == {"detect"}
    checked = verify_golden(Bundle(tmp_path / "b"), model)
    assert checked is not None
    assert checked.num_answers == 6


@pytest.mark.parametrize(
    ("content", "words"), [(None, "No such file"), ("\n \n", "one label a line"), (b"\xff\xfe\x00", "readable text")]
)
def test_a_file_without_labels_is_refused(content: str | bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=words):
        export(tmp_path / "b", str(path))
    assert not (tmp_path / "b").exists()


def test_detect_needs_prompts_that_name_labels(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in SHAPES_CHECKPOINT.iterdir():
        if path.is_file():
            (checkpoint / path.name).symlink_to(path.resolve())
    with pytest.raises(UsageError, match="--head-vocab a text file"):
        export_bundle(str(checkpoint), tmp_path / "b", quantization=Quantization(head_vocabulary="detect"))


def test_the_command_line_exports_one_and_info_shows_it(tmp_path: Path) -> None:
    command = ["export", str(SHAPES_CHECKPOINT), "-o", str(tmp_path / "b"), "--head-vocab", "detect", "--no-compare"]
    answer = CliRunner().invoke(main, command)
    assert answer.exit_code == 0, answer.output
    shown = CliRunner().invoke(main, ["info", str(tmp_path / "b")])
    assert "reduced head" in shown.output
    assert "red star" in shown.output
    refused = CliRunner().invoke(main, ["caption", str(FOLDER / "00.png"), "-m", str(tmp_path / "b")])
    assert refused.exit_code == 2
    assert "reduced output head" in refused.output
