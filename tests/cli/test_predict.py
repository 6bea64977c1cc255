"""The verbs that look at pictures, run as a user runs them, on the shipped shapes bundle."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from paliedge.cli import main
from paliedge.cli.demo import DEMO_SCENES
from paliedge.errors import DeviceError
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge.model import PaliGemma

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools'
SCENES = json.loads((DEMO_SCENES / "scenes.json").read_text())
SCENE = DEMO_SCENES / SCENES[0]["file"]
LABELS = " ; ".join(SCENES[0]["detect"])


def run(*arguments: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(item) for item in arguments], env=env)


def test_detect_prints_a_line_a_box_and_says_which_model_it_uses() -> None:
    result = run("detect", SCENE, LABELS)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines
    for line in lines:
        source, rest = line.split(": ")
        *label, x1, y1, x2, y2, confidence = rest.split()
        assert source == str(SCENE)
        assert " ".join(label) in SCENES[0]["detect"]
        assert 0 <= float(x1) < float(x2) <= 112
        assert 0 <= float(y1) < float(y2) <= 112
        assert 0 < float(confidence) <= 1
    assert "shapes model that ships" in result.stderr


def test_json_is_one_object_a_picture_with_boxes_tokens_and_times() -> None:
    result = run("detect", SCENE, LABELS, "--json")
    answer = json.loads(result.stdout)
    assert answer["source"] == str(SCENE)
    assert answer["finish_reason"] == "stop"
    assert answer["image_wh"] == [112, 112]
    assert len(answer["token_ids"]) == len(answer["log_probs"])
    assert answer["timings"]["prefill_ms"] > 0
    assert answer["detections"]
    for found in answer["detections"]:
        normalized = [round(edge / 112, 2) for edge in found["box"]]
        assert normalized == pytest.approx(found["box_normalized"], abs=0.01)


def test_conf_leaves_out_what_is_less_likely() -> None:
    everything = json.loads(run("detect", SCENE, LABELS, "--json").stdout)["detections"]
    scores = sorted(item["confidence"] for item in everything)
    assert len(scores) > 1
    some = json.loads(run("detect", SCENE, LABELS, "--json", "--conf", scores[-1] - 1e-4).stdout)["detections"]
    assert some == [item for item in everything if item["confidence"] >= scores[-1] - 1e-4]
    assert run("detect", SCENE, LABELS, "--conf", 1.5).exit_code == 2


def test_free_and_only_asked_reach_the_model() -> None:
    both = run("detect", SCENE, LABELS, "--free", "--only-asked")
    assert both.exit_code == 2
    assert "not free" in both.stderr
    for option in ("--free", "--only-asked"):
        assert run("detect", SCENE, LABELS, option).exit_code == 0


def test_segment_gives_boxes_with_masks_and_draws_them(tmp_path: Path) -> None:
    label = SCENES[0]["detect"][0]
    result = run("segment", SCENE, label, "--json", "--save", tmp_path)
    found = json.loads(result.stdout)["detections"]
    assert [item["label"] for item in found] == [label] * len(found) != []
    for item in found:
        x1, y1, x2, y2 = item["box"]
        pixels = coco.decode(item["mask"])
        assert pixels.shape == (112, 112)
        assert 0.3 * (x2 - x1) * (y2 - y1) < pixels.sum() <= 1.2 * (x2 - x1) * (y2 - y1)
    assert (tmp_path / SCENE.with_suffix(".png").name).is_file()


@pytest.mark.parametrize(
    "verb",
    [
        ["caption"],
        ["caption", "--style", "describe"],
        ["question", "two"],
        ["ask", "how many circles are there?"],
        ["ocr"],
        ["predict", "ocr"],
    ],
)
def test_the_other_verbs_answer_with_text(verb: list[str]) -> None:
    result = run(verb[0], SCENE, *verb[1:])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{SCENE}: ")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets every prompt that the model is asked."""
    prompts: list[str] = []
    encode = PromptTokenizer.encode_prefix

    def note(tokenizer: PromptTokenizer, text: str, **options: Any) -> list[int]:
        prompts.append(text)
        return encode(tokenizer, text, **options)

    monkeypatch.setattr(PromptTokenizer, "encode_prefix", note)
    return prompts


@pytest.mark.parametrize(
    ("verb", "prompt"),
    [
        (["caption"], "caption en"),
        (["caption", "--lang", "de"], "caption de"),
        (["caption", "--style", "cap"], "cap en"),
        (["caption", "--style", "describe"], "describe en"),
        (["caption", "--style", "describe", "--lang", "fr"], "describe fr"),
        (["ask", "why?"], "answer en why?"),
        (["ask", "why?", "--lang", "de"], "answer de why?"),
        (["question", "two"], "question en two"),
        (["question", "two", "--lang", "es"], "question es two"),
        (["ocr"], "ocr"),
        (["detect", "cat ; dog"], "detect cat ; dog"),
        (["segment", "the left cat"], "segment the left cat"),
    ],
)
def test_a_verb_asks_in_the_words_of_its_options(verb: list[str], prompt: str, asked: list[str]) -> None:
    assert run(verb[0], SCENE, *verb[1:], "--max-new-tokens", 1).exit_code == 0
    assert asked == [prompt]


def test_predict_shows_boxes_where_the_answer_has_some() -> None:
    for options in ([], ["--conf", "0.03"], ["--free"]):
        found = run("predict", SCENE, f"detect {LABELS}", *options).stdout
        assert found == run("detect", SCENE, LABELS, *options).stdout


def test_an_environment_variable_stands_for_an_option() -> None:
    result = run("detect", SCENE, LABELS, env={"PALIEDGE_JSON": "1", "PALIEDGE_MAX_NEW_TOKENS": "2"})
    answer = json.loads(result.stdout)
    assert len(answer["token_ids"]) == 2
    assert answer["finish_reason"] == "length"


def test_a_cut_answer_is_told_on_stderr() -> None:
    for how in ([], ["--format", "csv"]):
        result = run("detect", SCENE, LABELS, "--max-new-tokens", 3, *how)
        assert "cut off at the token limit" in result.stderr
        assert result.exit_code == 0


def test_save_draws_the_boxes_into_a_larger_picture(tmp_path: Path) -> None:
    result = run("detect", SCENE, LABELS, "--save", tmp_path / "out")
    assert result.exit_code == 0
    with Image.open(tmp_path / "out" / f"{SCENE.stem}.png") as saved, Image.open(SCENE) as source:
        enlarged = source.convert("RGB").resize(saved.size, Image.Resampling.LANCZOS)
        assert saved.width == 560
        assert saved.convert("RGB").tobytes() != enlarged.tobytes()


def test_saving_never_overwrites_a_source_or_another_result(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.png").write_bytes(SCENE.read_bytes())
    result = run("caption", tmp_path / "*" / "same.png", "--save", tmp_path / "a")
    assert result.exit_code == 0
    assert (tmp_path / "a" / "same.png").read_bytes() == SCENE.read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["same-2.png", "same-3.png", "same.png"]


def test_one_bad_file_among_many_gives_6_and_the_others_are_done(tmp_path: Path) -> None:
    for name in ("one.png", "three.png"):
        (tmp_path / name).write_bytes(SCENE.read_bytes())
    (tmp_path / "two.png").write_bytes(b"no picture")
    result = run("caption", tmp_path, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 6
    assert [Path(row["source"]).name for row in rows] == ["one.png", "three.png", "two.png"]
    assert "error" in rows[2]
    assert rows[0]["text"] == rows[1]["text"] != ""


def test_a_picture_that_cannot_be_written_is_an_error_and_the_answers_are_all_there(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where a folder is wanted")
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(SCENE.read_bytes())
    result = run("caption", tmp_path / "*.png", "--save", tmp_path / "out" / "deeper")
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 2
    assert "Name another folder (--save)" in result.stderr


def test_several_pictures_show_progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(SCENE.read_bytes())
    assert "[2/2]" not in run("ocr", tmp_path).stderr
    monkeypatch.setattr("paliedge.cli.run.is_terminal", lambda: True)
    result = run("ocr", tmp_path)
    assert f"[2/2] {tmp_path / 'two.png'}" in result.stderr
    assert "[2/2]" not in result.stdout


def test_only_bad_files_give_5(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(SCENE.read_bytes()[:200])
    result = run("caption", tmp_path / "bad.jpg")
    assert result.exit_code == 5
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two pictures and, between them, a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("one.png", "two.png"):
        (folder / name).write_bytes(SCENE.read_bytes())
    (folder / "other.png").write_bytes(b"no picture")
    return folder


def test_json_is_short_for_format_jsonl() -> None:
    rows = [json.loads(run("detect", SCENE, LABELS, *how).stdout) for how in (["--json"], ["--format", "jsonl"])]
    for row in rows:
        del row["timings"]
    assert rows[0] == rows[1]
    both = run("detect", SCENE, LABELS, "--json", "--format", "csv")
    assert both.exit_code == 2
    assert "one format" in both.stderr
    assert run("detect", SCENE, LABELS, "--json", "--format", "jsonl").exit_code == 0
    assert run("detect", SCENE, LABELS, env={"PALIEDGE_FORMAT": "csv"}).stdout.startswith("file,time_s,label,")


def test_one_json_array_holds_all_pictures_and_errors(pictures: Path) -> None:
    result = run("caption", pictures, "--format", "json")
    rows = json.loads(result.stdout)
    assert result.exit_code == 6
    assert [Path(row["source"]).name for row in rows] == ["one.png", "other.png", "two.png"]
    assert "error" in rows[1]
    assert rows[0]["text"] == rows[2]["text"] != ""


def test_a_bad_picture_is_told_on_stderr_where_the_format_has_no_place_for_it(pictures: Path) -> None:
    result = run("caption", pictures, "--format", "csv")
    rows = list(csv.DictReader(result.stdout.splitlines()))
    assert result.exit_code == 6
    assert [Path(row["file"]).name for row in rows] == ["one.png", "two.png"]
    assert rows[0]["text"] != ""
    assert f"error: {pictures / 'other.png'}" in result.stderr


def test_coco_is_one_dataset_of_the_good_pictures(pictures: Path, tmp_path: Path) -> None:
    result = run("detect", pictures, LABELS, "--format", "coco")
    (tmp_path / "coco.json").write_text(result.stdout)
    dataset = COCO(tmp_path / "coco.json")
    assert result.exit_code == 6
    assert [Path(image["file_name"]).name for image in dataset.dataset["images"]] == ["one.png", "two.png"]
    assert [item["name"] for item in dataset.dataset["categories"]] == SCENES[0]["detect"]
    found = json.loads(run("detect", SCENE, LABELS, "--json").stdout)["detections"]
    corners = [item["box"][:2] for item in found]
    assert [item["bbox"][:2] for item in dataset.dataset["annotations"]] == corners * 2 != []
    assert [item["image_id"] for item in dataset.dataset["annotations"]] == [1] * len(found) + [2] * len(found)


@pytest.mark.parametrize(("form", "suffix"), [("yolo", ".txt"), ("labelme", ".json")])
def test_formats_of_files_fill_the_folder_with_nothing_else(
    form: str, suffix: str, pictures: Path, tmp_path: Path
) -> None:
    result = run("detect", pictures, LABELS, "--format", form, "--save", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert result.exit_code == 6
    assert result.stdout == ""
    assert names - {"classes.txt"} == {f"one{suffix}", f"two{suffix}"}
    assert (tmp_path / "out" / f"one{suffix}").stat().st_size > 0
    if form == "yolo":
        assert (tmp_path / "out" / "classes.txt").read_text().splitlines() == SCENES[0]["detect"]


def test_other_formats_leave_annotated_pictures_in_the_folder(tmp_path: Path) -> None:
    assert run("predict", SCENE, f"detect {LABELS}", "--format", "coco", "--save", tmp_path).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{SCENE.stem}.png"]


def test_a_file_that_cannot_be_written_is_the_error_of_its_picture(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "one.txt").mkdir(parents=True)
    result = run("detect", pictures / "*o*.png", LABELS, "--format", "yolo", "--save", tmp_path / "out")
    assert result.exit_code == 6
    assert f"error: {pictures / 'one.png'}" in result.stderr
    assert (tmp_path / "out" / "two.txt").is_file()


@pytest.mark.parametrize(
    "verb",
    [
        ["caption"],
        ["caption", "--style", "describe"],
        ["question", "two"],
        ["ask", "how many?"],
        ["ocr"],
        ["predict", "caption en"],
    ],
)
def test_verbs_without_boxes_refuse_formats_of_boxes_at_once(verb: list[str], tmp_path: Path) -> None:
    for form in ("coco", "yolo", "labelme"):
        result = run(verb[0], "absent.png", *verb[1:], "--format", form, "--save", tmp_path / "out")
        assert result.exit_code == 2
        assert "json, jsonl or csv" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["yolo", "labelme"])
def test_polygons_are_missed_before_any_picture_is_answered(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "contourpy", None)
    for verb in (["segment"], ["detect", "--free"]):
        result = run(*verb, SCENE, LABELS, "--format", form, "--save", tmp_path / "out")
        assert result.exit_code == 1
        assert "paliedge[polygons]" in result.stderr
    assert not (tmp_path / "out").exists()
    assert run("detect", SCENE, LABELS, "--format", form, "--save", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("options", [["--batch", "2"], ["--batch", "9", "--overlap"], ["--overlap"]])
def test_batch_and_overlap_change_neither_answers_nor_their_order(tmp_path: Path, options: list[str]) -> None:
    names = [DEMO_SCENES / scene["file"] for scene in SCENES]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "list.txt").write_text("\n".join(map(str, [names[0], tmp_path / "bad.png", "absent.png", *names[1:]])))
    answers = []
    for given in ([], options):
        result = run("detect", tmp_path / "list.txt", LABELS, "--json", *given)
        assert result.exit_code == 6
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert [Path(row["source"]).name for row in rows][:3] == [names[0].name, "bad.png", "absent.png"]
        assert ["error" in row for row in rows] == [False, True, True, *[False] * (len(names) - 1)]
        answers.append(
            [
                {
                    **row,
                    "timings": None,
                    "speed": None,
                    "log_probs": None,
                    "detections": [(found["label"], found["box"]) for found in row.get("detections", [])],
                }
                for row in rows
            ]
        )
    assert answers[0] == answers[1]


def test_an_error_in_the_middle_keeps_the_answers_so_far(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = PaliGemma._encode, []

    def fail_at_the_second(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise DeviceError(expected="a GPU", found="none", action="Buy one.")
        return encode(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(PaliGemma, "_encode", fail_at_the_second)
    result = run("caption", pictures, "--format", "json")
    assert result.exit_code == 1
    assert [Path(row["source"]).name for row in json.loads(result.stdout)] == ["one.png"]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["detect", "absent.png", "cat"], 5, "absent.png"),
        (["detect", SCENE, " "], 2, "at least one label"),
        (["detect", SCENE, " ", "--format", "coco"], 2, "at least one label"),
        (["detect", SCENE, "cat", "-m", "absent"], 3, "no bundle.json"),
        (["detect", "x" * 300, "cat"], 5, "name too long"),
        (["detect", "x\0y", "cat"], 5, "expected"),
        (["detect", SCENE, "cat", "-m", "x" * 300], 3, "no bundle.json"),
        (["predict", SCENE, "word " * 500], 2, "a prompt of at most"),
        (["predict", SCENE, "ocr", "--max-new-tokens", "100000"], 2, "max_new_tokens"),
        (["detect", SCENE, "cat", "--format", "yolo"], 2, "--save FOLDER"),
        (["detect", SCENE, "cat", "--format", "xml"], 2, "labelme"),
        (["detect", SCENE], 2, "Missing argument"),
        (["fly"], 2, "No such command"),
    ],
)
def test_errors_say_what_is_wrong_and_have_their_exit_code(arguments: list[object], exit_code: int, words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == exit_code
    assert words in result.stderr
    assert result.stdout == ""
