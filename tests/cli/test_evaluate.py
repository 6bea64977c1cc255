"""The verb `eval`, run as a user runs it: the shipped shapes bundle on a few scenes it has never seen."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from pycocotools import mask as coco

from benchmarks.shapes.scenes import CLASSES, HELD_OUT_SEED, Scene, caption, make_scene
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import write_manifest
from paliedge.cli import main
from paliedge.model import SHIPPED_BUNDLE
from tests.evaluation.test_evaluation import without_mask_decoder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools'
SCENES = [make_scene(HELD_OUT_SEED + index) for index in range(12)]
NUM_COCO = 5


def run(*arguments: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)], env=env)


def report_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def save_picture(scene: Scene, path: Path) -> str:
    Image.fromarray(scene.image).save(path)
    return path.name


def write_coco(folder: Path, shift: int = 0, *, masks: bool = False) -> Path:
    """A COCO folder of the first scenes whose boxes and masks are moved by `shift` pixels to the left and up."""
    annotations, images = [], []
    for index, scene in enumerate(SCENES[:NUM_COCO]):
        images.append({"id": index, "file_name": save_picture(scene, folder / f"{index}.png")})
        images[-1] |= {"width": 112, "height": 112}
        for item in scene.objects:
            x1, y1, x2, y2 = item.box
            box = [x1 - shift, y1 - shift, x2 - x1, y2 - y1]
            row = {"image_id": index, "category_id": CLASSES.index(item.label), "bbox": box}
            moved = np.roll(item.mask, (-shift, -shift), axis=(0, 1))
            annotations.append(row | {"segmentation": run_lengths(moved) if masks else []})
    categories = [{"id": index, "name": name} for index, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def run_lengths(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    runs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": runs["size"], "counts": runs["counts"].decode()}


def write_lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def text_rows(folder: Path) -> list[dict[str, Any]]:
    """A line a scene with text: what it reads."""
    scenes = [scene for scene in SCENES if scene.text]
    names = [save_picture(scene, folder / f"text{index}.png") for index, scene in enumerate(scenes)]
    return [{"image": name, "suffix": scene.text.text} for name, scene in zip(names, scenes, strict=True) if scene.text]


def caption_rows(folder: Path) -> list[dict[str, Any]]:
    return [
        {"image": save_picture(scene, folder / f"{index}.png"), "prefix": "caption en", "suffix": caption(scene)}
        for index, scene in enumerate(SCENES[:6])
    ]


def test_detect_scores_well_on_a_coco_folder_and_badly_where_the_boxes_are_moved(tmp_path: Path) -> None:
    report = report_of(run(write_coco(tmp_path), "--task", "detect", "--one-by-one", "--labels", "present", "--json"))
    assert report["num_images"] == NUM_COCO
    assert report["scores"]["ap50"] > 0.5
    assert report["scores"]["ap50"] >= report["scores"]["ap75"]
    assert 0 < report["seconds_per_image"]["median"] < 60
    assert report["settings"] == {"limit": None, "labels": "present", "one_by_one": True}
    moved = report_of(
        run(write_coco(tmp_path, 40), "--task", "detect", "--one-by-one", "--labels", "present", "--json")
    )
    assert moved["scores"]["ap50"] < 0.1


def test_the_table_has_what_the_json_has_and_the_folder_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    result = run(write_coco(tmp_path), "--task", "detect", "--labels", "present", "--limit", 3, "--save", folder)
    assert result.exit_code == 0, result.stderr
    rows = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    report = json.loads((folder / "report.json").read_text())
    assert rows["images"].strip() == "3"
    assert float(rows["AP50"]) == pytest.approx(report["scores"]["ap50"], abs=1e-4)
    assert rows["seconds per image"].strip().startswith(f"{report['seconds_per_image']['median']:.4f} median")
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [Path(row["source"]).name for row in predictions] == ["0.png", "1.png", "2.png"]
    assert all({shape["label"] for shape in row["expected"]} <= set(CLASSES) for row in predictions)
    assert any(row["found"] for row in predictions)
    with Image.open(folder / "worst.png") as sheet:
        assert sheet.width == 3 * 560
    assert f"saved {folder / 'worst.png'}" in result.stderr


def test_too_many_categories_for_a_prompt_end_the_run_with_advice(tmp_path: Path) -> None:
    content = json.loads((write_coco(tmp_path) / "_annotations.coco.json").read_text())
    content["categories"] = [{"id": index, "name": "word " * 40 + name} for index, name in enumerate(CLASSES)]
    (tmp_path / "_annotations.coco.json").write_text(json.dumps(content))
    result = run(tmp_path, "--task", "detect")
    assert result.exit_code == 2
    assert "--one-by-one or --labels present" in result.stderr


def test_segment_scores_masks_and_scores_moved_ones_badly(tmp_path: Path) -> None:
    options = ("--task", "segment", "--one-by-one", "--labels", "present", "--limit", 3, "--json")
    report = report_of(run(write_coco(tmp_path, masks=True), *options))
    assert report["num_images"] == 3
    assert report["scores"]["mask_ap"] > 0.5
    assert report["scores"]["mask_ap50"] > 0.8
    moved = report_of(run(write_coco(tmp_path, 40, masks=True), *options))
    assert moved["scores"]["mask_ap50"] < 0.1


def test_masks_are_not_scored_with_a_bundle_that_has_none(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(SHIPPED_BUNDLE, tmp_path / "bundle"))
    write_manifest(bundle, without_mask_decoder(Bundle(bundle).manifest))
    result = run(write_coco(tmp_path, masks=True), "--task", "segment", "-m", bundle)
    assert result.exit_code == 2
    assert "--mask-decoder" in result.stderr
    assert run(tmp_path, "--task", "detect", "--limit", 1, "-m", bundle).exit_code == 0


def test_segment_needs_masks_in_the_data(tmp_path: Path) -> None:
    result = run(write_coco(tmp_path), "--task", "segment")
    assert result.exit_code == 2
    assert "--task detect" in result.stderr


def test_captions_are_compared_word_for_word(tmp_path: Path) -> None:
    scores = report_of(run(write_lines(tmp_path, caption_rows(tmp_path)), "--task", "caption", "--json"))["scores"]
    assert set(scores) == {"exact_match", "cer", "wer", "anls"}
    assert scores["exact_match"] >= 0.5
    assert scores["cer"] <= scores["wer"] < 0.3
    other = [row | {"suffix": "something else altogether"} for row in caption_rows(tmp_path)]
    scores = report_of(run(write_lines(tmp_path, other), "--task", "caption", "--json"))["scores"]
    assert scores["exact_match"] == scores["anls"] == 0
    assert scores["cer"] > 0.5


def test_ocr_takes_the_bundles_prompt_and_reports_both_efficiencies(tmp_path: Path) -> None:
    rows = text_rows(tmp_path)
    assert len(rows) >= 3
    result = run(write_lines(tmp_path, rows), "--task", "ocr", "--json", "--price-per-hour", 0.9, "--save", tmp_path)
    report = report_of(result)
    seconds, accuracy = report["seconds_per_image"]["mean"], report["scores"]["accuracy"]
    assert accuracy == pytest.approx(1 - report["scores"]["cer"], abs=1e-4)
    assert accuracy > 0.5
    assert report["speed_efficiency"] == pytest.approx(accuracy / seconds, rel=1e-3)
    assert report["price_per_image"] == pytest.approx(seconds / 3600 * 0.9, rel=1e-3)
    assert report["cost_efficiency"] == pytest.approx(accuracy / report["price_per_image"], rel=1e-3)
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in predictions} == {"ocr"}
    assert [row["expected"] for row in predictions] == [[row["suffix"]] for row in rows]


def test_without_a_price_there_is_no_cost_efficiency(tmp_path: Path) -> None:
    result = run(write_lines(tmp_path, text_rows(tmp_path)), "--task", "ocr", "--limit", 1)
    assert result.exit_code == 0
    assert "none: no price given" in result.stdout
    assert "price per image" not in result.stdout


def test_questions_are_scored_with_all_their_answers(tmp_path: Path) -> None:
    count = sum(item.shape == "circle" for item in SCENES[0].objects)
    row = {"image": save_picture(SCENES[0], tmp_path / "a.png"), "prefix": "answer en how many circles are there?"}
    lines = write_lines(tmp_path, [row | {"answers": [str(count)] * 8 + ["7", "9"]}, row | {"answers": ["7", "9"]}])
    scores = report_of(run(lines, "--task", "vqa", "--json"))["scores"]
    assert scores["vqa_accuracy"] == scores["exact_match"] == 0.5
    no_question = run(write_lines(tmp_path, [{"image": "a.png", "suffix": "3"}]), "--task", "vqa")
    assert no_question.exit_code == 2
    assert "the question in `prefix`" in no_question.stderr


def test_one_unreadable_image_gives_6_and_the_others_are_scored(tmp_path: Path) -> None:
    rows = caption_rows(tmp_path)[:3]
    (tmp_path / "1.png").write_bytes(b"no picture")
    result = run(write_lines(tmp_path, rows), "--task", "caption", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 6
    assert (report["num_images"], report["num_failed"]) == (2, 1)
    assert Path(report["errors"][0]["source"]).name == "1.png"
    assert "1.png: expected a JPEG" in result.stderr
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "2.png").write_bytes(b"")
    nothing = run(tmp_path, "--task", "caption", "--json", "--save", tmp_path / "out")
    assert (nothing.exit_code, nothing.stdout) == (5, "")
    assert not list((tmp_path / "out").iterdir())


def test_progress_is_shown_on_a_terminal_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path, caption_rows(tmp_path)[:2])
    assert "[2/2]" not in run(tmp_path, "--task", "caption").stderr
    monkeypatch.setattr("paliedge.cli.evaluate._is_terminal", lambda: True)
    result = run(tmp_path, "--task", "caption")
    assert f"[2/2] {tmp_path / '1.png'}" in result.stderr
    assert "[2/2]" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        ([], 2, "Missing option '--task'"),
        (["--task", "fly"], 2, "'fly' is not one of"),
        (["--task", "ocr", "--price-per-hour", 0], 2, "price-per-hour"),
        (["--task", "ocr", "--limit", 0], 2, "limit"),
        (["--task", "ocr", "--labels", "present"], 2, "--labels with --task detect or segment"),
        (["--task", "ocr", "--one-by-one"], 2, "--one-by-one with --task detect or segment"),
        (["--task", "vqa", "--lang", "de"], 2, "--lang with --task caption"),
        (["--task", "detect"], 2, "_annotations.coco.json"),
        (["--task", "ocr", "-m", "absent"], 3, "no bundle.json"),
    ],
)
def test_errors_say_what_is_wrong(arguments: list[object], exit_code: int, words: str, tmp_path: Path) -> None:
    save_picture(SCENES[0], tmp_path / "a.png")
    result = run(write_lines(tmp_path, [{"image": "a.png", "suffix": "x"}]), *arguments)
    assert result.exit_code == exit_code
    assert words in result.stderr
    assert result.stdout == ""


def test_an_environment_variable_that_is_for_another_task_is_no_error(tmp_path: Path) -> None:
    result = run(
        write_lines(tmp_path, text_rows(tmp_path)), "--json", env={"PALIEDGE_TASK": "ocr", "PALIEDGE_LANG": "de"}
    )
    assert report_of(result)["settings"] == {"limit": None}


def test_a_folder_that_cannot_be_made_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where a folder is wanted")
    result = run(write_lines(tmp_path, text_rows(tmp_path)), "--task", "ocr", "--save", tmp_path / "out" / "deeper")
    assert result.exit_code == 1
    assert "Name another folder with --save" in result.stderr
    assert "shapes model" not in result.stderr  # not even loaded


def test_without_the_extra_the_verb_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    result = run(write_lines(tmp_path, text_rows(tmp_path)), "--task", "ocr")
    assert result.exit_code == 1
    assert 'pip install "paliedge[eval]"' in result.stderr


def test_help_loads_nothing_of_the_evaluation() -> None:
    code = "import sys; import paliedge.cli; print(*sorted(name for name in sys.modules if 'eval' in name))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "paliedge.cli.evaluate" in loaded
    assert not [name for name in loaded if name.startswith(("paliedge.evaluation", "pycocotools"))]
