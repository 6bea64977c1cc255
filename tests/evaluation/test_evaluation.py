"""Metrics against examples worked by hand, readers against bad input, masks by a model that knows its answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from paliedge import Detection, EncodedImage, Generation, Mask, Timings
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Engine, Manifest, Plan, Prompts
from paliedge.errors import ImageError, MissingExtraError, PaliEdgeError, UsageError
from paliedge.evaluation import metrics
from paliedge.evaluation.cases import Case, Outcome, Shape
from paliedge.evaluation.datasets import CocoDataset, open_coco, open_texts
from paliedge.evaluation.detection import Question, check_masks, evaluate_detection
from paliedge.evaluation.pictures import draw_worst
from paliedge.evaluation.report import Report, save_report
from paliedge.evaluation.tasks import require_packages
from paliedge.evaluation.texts import evaluate_texts, score_texts
from paliedge.inputs.prompt import BoxTask, Prompt
from paliedge.model import SHIPPED_BUNDLE

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools'
SIZE_WH = (40, 20)


# Metrics


@pytest.mark.parametrize(
    ("num_agreeing", "accuracy"),
    [(0, 0.0), (1, 9 / 10 / 3), (2, (2 * 1 / 3 + 8 * 2 / 3) / 10), (3, (3 * 2 / 3 + 7) / 10), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_of_ten_answers_leaves_one_out_at_a_time(num_agreeing: int, accuracy: float) -> None:
    answers = ["red"] * num_agreeing + [f"other {index}" for index in range(10 - num_agreeing)]
    assert metrics.vqa_accuracy(answers, "Red.") == pytest.approx(accuracy)


def test_vqa_accuracy_of_few_answers_is_agreement_with_one() -> None:
    assert metrics.vqa_accuracy(["the dog", "cat"], "Dog!") == 1
    assert metrics.vqa_accuracy(["the dog", "cat"], "bird") == 0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A Dog, the cat.", "dog cat"),
        ("two", "2"),
        ("None", "0"),
        ("1,000 men", "1000 men"),
        ("3.5 m.", "3.5 m"),
        ("black-and-white", "black and white"),
        ("yes!\n", "yes"),
        ("it's", "it's"),
    ],
)
def test_case_punctuation_and_articles_do_not_count(text: str, normal: str) -> None:
    assert metrics.normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("answers", "found", "score"),
    [
        (["STOP"], "stop ", 1.0),
        (["street"], "streat", 5 / 6),
        (["abcd"], "abxy", 0.0),  # half must change: no longer below the threshold
        (["abcde"], "abcxy", 0.6),
        (["wrong altogether", "street"], "streat", 5 / 6),
        (["", "x"], "", 1.0),
        (["word"], "", 0.0),
    ],
)
def test_anls_takes_the_best_answer_and_cuts_at_one_half(answers: list[str], found: str, score: float) -> None:
    assert metrics.anls(answers, found) == pytest.approx(score)


def test_error_rates_are_over_all_texts_together() -> None:
    characters, words = metrics.error_rates(["abcd", "one two three"], ["abxd", "one two"])
    assert characters == pytest.approx((1 + 6) / (4 + 13))
    assert words == pytest.approx((1 + 1) / (1 + 3))
    assert metrics.error_rates(["same"], ["same"]) == (0, 0)


def test_the_efficiencies_are_accuracy_by_seconds_and_by_price() -> None:
    assert metrics.ocr_accuracy(0.2) == pytest.approx(0.8)
    assert metrics.ocr_accuracy(1.7) == 0
    assert metrics.speed_efficiency(0.8, 0.5) == pytest.approx(1.6)
    price = metrics.price_per_image(0.5, 7.2)
    assert price == pytest.approx(0.001)
    assert metrics.cost_efficiency(0.8, price) == pytest.approx(800)
    assert metrics.speed_efficiency(0.8, 0) is metrics.cost_efficiency(0.8, 0) is None


def text_case(found: str, *answers: str, seconds: float = 0.5) -> Case:
    return Case(Path("a.png"), "ocr", found, 0.0, seconds, is_cut_off=False, answers=answers)


def test_error_rates_use_the_answer_that_is_nearest() -> None:
    scores = score_texts([text_case("EXIT", "ENTRANCE", "EXIT"), text_case("ABCX", "ABCD")], "ocr")
    assert scores == pytest.approx({"exact_match": 0.5, "cer": 1 / 8, "wer": 0.5, "anls": 0.875, "accuracy": 0.875})
    assert "vqa_accuracy" in score_texts([text_case("EXIT", "EXIT")], "vqa")


def make_report(*cases: Case, price: float | None = None) -> Report:
    outcome = Outcome(score_texts(cases, "ocr"), cases)
    return Report("ocr", Path("data"), Path("bundle"), "name", "0" * 64, {}, outcome, price_per_hour=price)


def test_a_report_without_a_price_says_so_and_invents_none() -> None:
    report = make_report(text_case("ABCX", "ABCD", seconds=0.25), text_case("ABCD", "ABCD", seconds=0.75))
    content = report.to_dict()
    assert content["seconds_per_image"] == {"median": 0.5, "mean": 0.5}
    assert content["speed_efficiency"] == pytest.approx(0.875 / 0.5)
    assert content["cost_efficiency"] is content["price_per_image"] is None
    assert "--price-per-hour" in content["cost_efficiency_note"]
    assert "cost efficiency    none: no price given; set --price-per-hour" in report.to_table()


def test_a_report_with_a_price_has_the_cost_efficiency() -> None:
    content = make_report(text_case("ABCX", "ABCX", seconds=0.5), price=7.2).to_dict()
    assert content["cost_efficiency"] == pytest.approx(1 / 0.001)
    assert content["price_per_image"] == pytest.approx(0.001)
    assert content["cost_efficiency_note"] is None


@pytest.mark.parametrize(("task", "package"), [("detect", "pycocotools"), ("ocr", "jiwer"), ("vqa", "rapidfuzz")])
def test_a_missing_package_names_the_extra(task: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages(task)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"no package {package}.*paliedge\[eval\]"):
        require_packages(task)


# Datasets


def coco_content(**changes: Any) -> dict[str, Any]:
    """Two pictures: a cat at 10, 2 to 30, 12 in the first, a crowd of dogs in the second; nothing is a bird."""
    outline = [10, 2, 30, 2, 30, 12, 10, 12]
    dogs = {"size": [20, 40], "counts": [0, 400, 400]}
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 20},
            {"id": "8", "file_name": "b.png"},
        ],
        "categories": [{"id": 0, "name": "bird"}, {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": 0, "image_id": 7, "category_id": 1, "bbox": [10, 2, 20, 10], "segmentation": [outline]},
            {"image_id": "8", "category_id": 2, "bbox": [0, 0, 20, 20], "iscrowd": 1, "segmentation": dogs},
        ],
    } | changes


def write_coco(folder: Path, name: str = "annotations.json", pictures: str = ".", **changes: Any) -> Path:
    """The folder, with the content above in the file `name` and two grey pictures in the folder `pictures`."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(coco_content(**changes)))
    (folder / pictures).mkdir(parents=True, exist_ok=True)
    for file in ("a.png", "b.png"):
        Image.new("RGB", SIZE_WH, "grey").save(folder / pictures / file)
    return folder


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("annotations.json", "."),
        ("annotations.json", "images"),
        ("_annotations.coco.json", "."),
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_default.json", "images"),
        ("annotations/instances_val.json", "images/val"),
    ],
)
def test_coco_folders_are_found_however_they_are_laid_out(name: str, pictures: str, tmp_path: Path) -> None:
    write_coco(tmp_path, name, pictures)
    for dataset in (open_coco(tmp_path, masks=True), open_coco(tmp_path / name, masks=True)):
        assert [image.path.resolve() for image in dataset.images] == [
            (tmp_path / pictures / file).resolve() for file in ("a.png", "b.png")
        ]
        assert dataset.labels == ("cat", "dog")  # nothing is a bird
        (cat,), (dog,) = (image.annotations for image in dataset.images)
        assert (cat.label, cat.box, cat.area, cat.is_crowd) == ("cat", (10, 2, 30, 12), 200, False)
        assert dog.is_crowd
        assert [image.size_wh for image in dataset.images] == [(40, 20), None]


ONE = coco_content()["annotations"][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": [{"id": 7}]}, "missing required field `file_name`"),
        ({"annotations": [ONE | {"image_id": 99}]}, r"annotations\[0\] of image 99"),
        ({"annotations": [ONE | {"category_id": 99}]}, "category 99"),
        ({"annotations": [ONE | {"bbox": [1, 2, 3]}]}, "bbox"),
        ({"annotations": []}, "no annotation"),
        ({"annotations": [ONE | {"segmentation": []}]}, "--task detect"),
        ({"annotations": [ONE | {"segmentation": [[1, 2, 3, 4]]}]}, "--task detect"),
        ({"annotations": [ONE | {"segmentation": {"size": [20, 40], "counts": [1, 2]}}]}, "--task detect"),
        ({"images": [{"id": 7, "file_name": "gone.png"}, {"id": "8", "file_name": "x\0"}]}, "such as gone.png"),
    ],
)
def test_a_bad_coco_file_says_what_is_wrong(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_coco(tmp_path, **changes)
    with pytest.raises(UsageError, match=words):
        open_coco(tmp_path, masks=True)


def test_boxes_are_read_whatever_the_masks_are_like(tmp_path: Path) -> None:
    write_coco(tmp_path, annotations=[ONE | {"segmentation": {}}])
    assert open_coco(tmp_path, masks=False).images[0].annotations[0].segmentation is None


def test_without_coco_annotations_it_says_where_they_could_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        open_coco(tmp_path / "absent", masks=False)
    with pytest.raises(UsageError, match=r"found none.*_annotations\.coco\.json"):
        open_coco(tmp_path, masks=False)
    write_coco(tmp_path, "test/_annotations.coco.json")
    with pytest.raises(UsageError, match=r"below: test/_annotations\.coco\.json.*Name one"):
        open_coco(tmp_path, masks=False)
    for split in ("train", "val"):
        write_coco(tmp_path, f"annotations/instances_{split}.json")
    with pytest.raises(UsageError, match=r"several files: .*instances_train\.json, .*instances_val\.json.*Name one"):
        open_coco(tmp_path, masks=False)


def write_lines(folder: Path, *lines: str) -> Path:
    Image.new("RGB", SIZE_WH).save(folder / "a.png")
    (folder / "texts.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    return folder


def test_lines_are_read_with_and_without_prompts(tmp_path: Path) -> None:
    first = json.dumps({"image": "a.png", "prefix": "answer en how many?", "suffix": "two", "more": 1})
    second = json.dumps({"image": "gone.png", "answers": ["x", "y"], "suffix": "unused"})
    write_lines(tmp_path, first, "", second, json.dumps({"image": "a.png", "suffix": ""}))
    for dataset in (tmp_path, tmp_path / "texts.jsonl"):
        examples = open_texts(dataset, needs_prompt=False)
        assert [example.prompt for example in examples] == ["answer en how many?", None, None]
        assert [example.answers for example in examples] == [("two",), ("x", "y"), ("",)]
        assert [example.path for example in examples] == [tmp_path / name for name in ("a.png", "gone.png", "a.png")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: "),
        ('{"prefix": "ocr", "suffix": "x"}', "line 2: .*`image`"),
        ('{"image": "a.png"}', "line 2 without `suffix` or `answers`"),
        ('{"image": "a.png", "answers": []}', "line 2 without `suffix` or `answers`"),
        ('{"image": "a.png", "suffix": 3}', "line 2: Expected `str"),
        ('{"image": "a.png", "suffix": "x"}', "line 2 without the question in `prefix`"),
        ('{"image": "\\ud800"}', "line 2: "),
    ],
)
def test_a_bad_line_is_told_by_its_number(line: str, words: str, tmp_path: Path) -> None:
    good = json.dumps({"image": "a.png", "prefix": "answer en why?", "suffix": "so"})
    with pytest.raises(UsageError, match=words):
        open_texts(write_lines(tmp_path, good, line), needs_prompt=True)


def test_a_folder_without_lines_or_pictures_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"found none.*Give a \.jsonl file"):
        open_texts(tmp_path, needs_prompt=False)
    write_lines(tmp_path, "", " ")
    with pytest.raises(UsageError, match="no line"):
        open_texts(tmp_path, needs_prompt=False)
    write_lines(tmp_path, '{"image": "gone.png", "suffix": "x"}')
    with pytest.raises(UsageError, match=r"no image such as gone\.png; looked in"):
        open_texts(tmp_path, needs_prompt=False)


# Detection


def without_mask_decoder(manifest: Manifest) -> Manifest:
    targets = {name: replace(target, mask_decoder=None) for name, target in manifest.targets.items()}
    return replace(manifest, targets=targets)


def test_masks_are_asked_of_a_bundle_that_can_decode_them_alone() -> None:
    """By a graph, or by an engine that was built from one."""
    whole = Bundle(SHIPPED_BUNDLE, check_hashes=False).manifest
    check_masks(whole)
    bare = without_mask_decoder(whole)
    plan = Plan("x.plan", ())
    engine = Engine("rtx", "rtx", "1.7", "any", "", "fp16", plan, plan, None, None)
    for manifest in (bare, replace(bare, engines=(engine,))):
        with pytest.raises(UsageError, match=r"one without.*--mask-decoder.*--task detect"):
            check_masks(manifest)
    check_masks(replace(bare, engines=(engine, replace(engine, mask_decoder=plan))))


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.failures: list[tuple[str, PaliEdgeError]] = []

    def started(self, number: int, total: int, source: Path) -> None:
        self.names.append(f"{number}/{total} {source.name}")

    def failed(self, source: Path, error: PaliEdgeError) -> None:
        self.failures.append((source.name, error))


def found(label: str, box: tuple[float, float, float, float], confidence: float = 0.9, mask: bool = True) -> Detection:
    """A detection whose mask fills its box."""
    log_probs = (math.log(confidence),) * 4
    filled = Mask(np.ones((64, 64), np.float32), box, SIZE_WH) if mask else None
    return Detection(label, box, (0, 0, 1, 1), log_probs, mask=filled)


class Knowing:
    """A model that gives the detections of a picture by its name; each answer takes 10 + 20 + 30 + 40 ms."""

    def __init__(self, answers: dict[str, list[Detection]]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, list[str]]] = []

    def encode(self, image: Path) -> EncodedImage:
        if image.name not in self.answers:
            raise ImageError(expected="an image", found="none", action="Look.")
        return EncodedImage(image.name, SIZE_WH, 10.0, 20.0)

    def generate(self, image: EncodedImage, prompt: Prompt) -> Generation:
        assert prompt.boxes
        task, labels = prompt.boxes
        self.asked.append((f"{task} {image.features}", list(labels)))
        if len(labels) > 2:
            raise UsageError(expected="2 labels", found="3", action="Ask for less.")
        detections = tuple(item for item in self.answers[image.features] if len(labels) > 1 or item.label in labels)
        return Generation("text", (1,), (0.0,), detections, 0, SIZE_WH, "stop", Timings(0.0, 0.0, 30.0, (40.0,)))


CAT, DOGS = (10.0, 2.0, 30.0, 12.0), (0.0, 0.0, 20.0, 20.0)
RIGHT = {"a.png": [found("cat", CAT)], "b.png": []}


def evaluate(
    answers: dict[str, list[Detection]], dataset: CocoDataset, task: BoxTask = "segment", **question: Any
) -> tuple[Outcome, Listener]:
    listener = Listener()
    return evaluate_detection(Knowing(answers), dataset, Question(task, **question), listener), listener


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    return open_coco(write_coco(tmp_path), masks=True)


def test_exact_masks_score_one(dataset: CocoDataset) -> None:
    outcome, listener = evaluate(RIGHT, dataset)
    names = ("ap", "ap50", "ap75", "mask_ap", "mask_ap50", "mask_ap75")
    assert outcome.scores == pytest.approx(dict.fromkeys(names, 1.0))
    assert [case.score for case in outcome.cases] == [1.0, 1.0]  # a crowd is not missed
    assert listener.names == ["1/2 a.png", "2/2 b.png"]
    assert outcome.cases[0].seconds == pytest.approx(0.1)


def test_masks_are_scored_as_masks_and_boxes_as_boxes(tmp_path: Path) -> None:
    left_half = ONE | {"segmentation": [[10, 2, 20, 2, 20, 12, 10, 12]]}
    dataset = open_coco(write_coco(tmp_path, annotations=[left_half]), masks=True)
    scores = evaluate(RIGHT, dataset)[0].scores  # a mask as large as the box: IoU 1/2 with its left half
    assert scores["ap"] == pytest.approx(1)
    assert scores["mask_ap50"] == pytest.approx(1)
    assert scores["mask_ap75"] == 0.0
    assert scores["mask_ap"] == pytest.approx(0.1)  # one of ten thresholds


def test_boxes_without_masks_score_nothing_as_masks(dataset: CocoDataset) -> None:
    outcome, _ = evaluate({"a.png": [found("cat", CAT, mask=False)], "b.png": []}, dataset)
    assert (outcome.scores["ap"], outcome.scores["mask_ap"]) == pytest.approx((1, 0))


def test_shifted_boxes_score_zero_and_a_sure_wrong_one_costs(dataset: CocoDataset) -> None:
    away = (0.0, 10.0, 8.0, 20.0)
    assert evaluate({"a.png": [found("cat", away)], "b.png": []}, dataset, "detect")[0].scores["ap50"] == 0
    both = [found("cat", away, 0.95), found("cat", CAT, 0.9)]
    outcome, _ = evaluate({"a.png": both, "b.png": []}, dataset, "detect")
    assert outcome.scores["ap50"] == pytest.approx(0.5)
    assert outcome.cases[0].score == pytest.approx(2 * 1 / (2 + 1))
    last = [found("cat", away, 0.8), found("cat", CAT, 0.9)]
    assert evaluate({"a.png": last, "b.png": []}, dataset, "detect")[0].scores["ap50"] == pytest.approx(1)


def test_case_of_labels_is_ignored_others_count_against_picture(dataset: CocoDataset) -> None:
    outcome, _ = evaluate({"a.png": [found("Cat", CAT), found("cow", CAT)], "b.png": []}, dataset, "detect")
    assert outcome.scores["ap"] == pytest.approx(1)
    assert outcome.cases[0].score == pytest.approx(2 / 3)
    assert [shape.label for shape in outcome.cases[0].found] == ["cat", "cow"]


def test_what_is_asked_depends_on_the_question(dataset: CocoDataset) -> None:
    def asked(**question: Any) -> list[tuple[str, list[str]]]:
        model = Knowing(RIGHT)
        evaluate_detection(model, dataset, Question(**question), Listener())
        return model.asked

    assert asked() == [("detect a.png", ["cat", "dog"]), ("detect b.png", ["cat", "dog"])]
    assert asked(one_by_one=True)[:2] == [("detect a.png", ["cat"]), ("detect a.png", ["dog"])]
    assert asked(only_present=True, task="segment") == [("segment a.png", ["cat"]), ("segment b.png", ["dog"])]


def test_one_by_one_counts_the_image_once_and_every_prompt(dataset: CocoDataset) -> None:
    outcome, _ = evaluate(RIGHT, dataset, "detect", one_by_one=True)
    assert outcome.cases[0].seconds == pytest.approx(0.03 + 2 * 0.07)
    assert outcome.cases[0].prompt == "detect cat\ndetect dog"
    assert outcome.scores["ap"] == pytest.approx(1)


def test_unreadable_pictures_and_other_sizes_are_left_out(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "a.png", "width": 41, "height": 20}, {"id": "8", "file_name": "b.png"}]
    dataset = open_coco(write_coco(tmp_path, images=images), masks=True)
    outcome, listener = evaluate({"a.png": [], "b.png": []}, dataset)
    assert [case.source.name for case in outcome.cases] == ["b.png"]
    assert [(name, error.expected) for name, error in listener.failures] == [("a.png", "41 x 20 pixels, as annotated")]
    assert outcome.scores["ap"] is None  # a crowd alone is nothing to find
    outcome, listener = evaluate({}, dataset)
    assert (outcome.cases, len(listener.failures)) == ((), 2)


def test_a_case_tells_the_prompt_in_the_models_own_words(dataset: CocoDataset) -> None:
    outcome, _ = evaluate(RIGHT, dataset, one_by_one=True, prompts=Prompts(segment="{labels}"))
    assert outcome.cases[0].prompt == "cat\ndog"


def test_too_many_labels_for_one_prompt_say_what_helps(tmp_path: Path) -> None:
    three = [ONE | {"category_id": index} for index in range(3)]
    dataset = open_coco(write_coco(tmp_path, annotations=three), masks=False)
    with pytest.raises(UsageError, match=r"Ask for less\. With --one-by-one or --labels present"):
        evaluate(RIGHT, dataset, "detect")
    assert evaluate(RIGHT, dataset, "detect", one_by_one=True)[0].scores["ap"] == pytest.approx(1 / 3)


def test_a_mask_of_another_size_is_an_error_of_its_picture(tmp_path: Path) -> None:
    small = ONE | {"segmentation": {"size": [2, 2], "counts": [2, 2]}}
    dataset = open_coco(write_coco(tmp_path, annotations=[small]), masks=True)
    _, listener = evaluate(RIGHT, dataset)
    assert [(name, error.found) for name, error in listener.failures] == [("a.png", "a mask of 2 x 2")]


# Texts


class Writing:
    """Answers every prompt with itself in upper case."""

    def generate(self, image: Path, prompt: str) -> Generation:
        if len(prompt) > 20:
            raise UsageError(expected="a short prompt", found="a long one", action="Shorten it.")
        return Generation(prompt.upper(), (), (), (), 0, SIZE_WH, "length", Timings(1.0, 2.0, 3.0, (4.0,)))


def test_a_prompt_that_is_too_long_is_left_out_others_are_not(tmp_path: Path) -> None:
    rows = [("ocr", "OCR"), ("x" * 21, "X"), (None, "READ")]
    lines = [json.dumps({"image": "a.png", "prefix": prefix, "suffix": suffix}) for prefix, suffix in rows]
    examples, listener = open_texts(write_lines(tmp_path, *lines), needs_prompt=False), Listener()
    outcome = evaluate_texts(Writing(), examples, "ocr", "read", listener)
    assert [case.answer for case in outcome.cases] == ["OCR", "READ"]
    assert outcome.scores["exact_match"] == 1.0
    assert [error.found for _, error in listener.failures] == ["a long one"]
    assert all(case.is_cut_off for case in outcome.cases)
    assert outcome.cases[0].seconds == pytest.approx(0.01)


# Pictures


def test_the_sheet_shows_the_worst_first_and_both_kinds_of_boxes(tmp_path: Path) -> None:
    Image.new("RGB", SIZE_WH, "black").save(tmp_path / "a.png")
    right = Case(tmp_path / "a.png", "detect cat", "", 1.0, 0.1, False)
    full = found("cat", CAT).mask
    assert full
    wrong = Case(
        tmp_path / "a.png", "detect cat", "", 0.0, 0.1, False, truth=(Shape("cat", CAT),),
        found=(Shape("dog", DOGS, 0.5, full.to_rle()),),
    )  # fmt: skip
    sheet = draw_worst([right] * 20 + [wrong])
    assert sheet.width == 4 * 560
    colours = {colour for _, colour in sheet.crop((0, 0, 560, 560)).getcolors(1 << 20) or ()}
    assert {(0, 158, 115), (213, 94, 0)} <= colours
    assert sheet.crop((560, 0, 1120, 280)).getcolors() == [(560 * 280, (0, 0, 0))]  # nothing drawn in a right one
    assert sheet.getpixel((400, 150)) == (85, 38, 0)  # the mask, two fifths of its colour


def test_a_saved_report_has_a_line_a_case(tmp_path: Path) -> None:
    Image.new("RGB", SIZE_WH).save(tmp_path / "a.png")
    report = make_report(Case(tmp_path / "a.png", "ocr", "x" * 500, 0.0, 0.1, False, answers=("a", "b")))
    paths = save_report(report, tmp_path)
    assert [path.name for path in paths] == ["report.json", "predictions.jsonl", "worst.png"]
    assert json.loads(paths[0].read_text()) == report.to_dict()
    (row,) = map(json.loads, paths[1].read_text().splitlines())
    assert (row["expected"], row["answer"], row["score"]) == (["a", "b"], "x" * 500, 0.0)
