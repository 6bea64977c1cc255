"""What each format's writer writes, read by pycocotools, by csv and json, and by LabelMe's rules."""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from paliedge.cli.options import FORMATS
from paliedge.errors import ImageError, MissingExtraError, OutputError, UsageError
from paliedge.inputs.prompt import BoxRequest
from paliedge.results.formats import FOLDER_FORMATS, TEXT_FORMATS, Format, Writer, open_writer
from tests.results.test_arrays import CAT, DOG, OTHER_CAT, answer, detection, masked

pytestmark = [
    pytest.mark.bare,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools'
]
ASKED = BoxRequest("detect", ["dog", "cat", "bird"])
ONE, TWO = Path("pictures/one.jpg"), Path("pictures/two, three.png")
BAD = ImageError(expected="a picture", found="none", action="Look.")


def written(form: Format, *answers: Any, asked: BoxRequest | None = ASKED, folder: Path | None = None) -> str:
    """What a writer makes of answers to pictures one, two; an error for an answer is a picture that failed."""
    output = io.StringIO()
    writer = open_writer(form, output.write, folder, asked)
    for source, each in zip((ONE, TWO), answers, strict=False):
        if isinstance(each, ImageError):
            writer.fail(source, each)
        else:
            writer.add(source, each)
    writer.finish()
    return output.getvalue()


def test_the_command_line_offers_every_format() -> None:
    assert set(FORMATS) == {"text", *get_args(Format)}
    assert set(TEXT_FORMATS) | set(FOLDER_FORMATS) | {"coco"} == set(get_args(Format))


def test_json_lines_and_the_array_have_the_same_objects() -> None:
    answers = (answer(CAT, masked("dog", (0, 0, 9, 9))), BAD)
    lines = written("jsonl", *answers).splitlines()
    rows = [json.loads(line) for line in lines]
    assert json.loads(written("json", *answers)) == rows
    assert rows[0] == {"source": str(ONE), **answers[0].to_dict()}
    assert rows[1] == {"source": str(TWO), "error": {"expected": "a picture", "found": "none", "action": "Look."}}
    assert json.loads(written("json", answers[0])) == rows[:1]


def test_csv_has_a_row_a_box_and_one_for_a_text() -> None:
    rows = list(csv.DictReader(io.StringIO(written("csv", answer(CAT, DOG), answer(text='a "cat",\na dog')))))
    assert [row["file"] for row in rows] == [str(ONE), str(ONE), str(TWO)]
    assert list(rows[0].values())[1:] == ["", "cat", "20", "10", "60", "30", "0.9", ""]
    assert list(rows[2].values())[1:] == [""] * 7 + ['a "cat",\na dog']
    assert "\r" not in written("csv", answer(CAT))


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_forms_for_text_say_when_a_frame_was_shown(form: Format) -> None:
    output = io.StringIO()
    writer = open_writer(form, output.write)
    writer.add(Path("video.mp4#3"), answer(CAT), 1 / 3)
    writer.finish()
    text = output.getvalue()
    rows = list(csv.DictReader(io.StringIO(text))) if form == "csv" else [json.loads(text.strip("[]\n"))]
    assert [float(row["time_s"]) for row in rows] == [0.333]


@pytest.fixture
def coco(tmp_path: Path) -> COCO:
    path = tmp_path / "coco.json"
    path.write_text(written("coco", answer(CAT, detection("hat", (0, 0, 9, 9))), answer(masked("cat", (0, 0, 20, 10)))))
    return COCO(path)


def test_pycocotools_loads_the_dataset(coco: COCO) -> None:
    images = coco.loadImgs(coco.getImgIds())
    assert [(item["file_name"], item["width"], item["height"]) for item in images] == [
        (str(ONE), 200, 100),
        (str(TWO), 200, 100),
    ]
    assert [item["name"] for item in coco.loadCats(sorted(coco.getCatIds()))] == ["dog", "cat", "bird", "hat"]
    (cat, hat), (other,) = (coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]])) for image in images)
    assert cat["bbox"] == [20, 10, 40, 20]
    assert (cat["area"], cat["score"], cat["iscrowd"]) == (800, 0.9, 0)
    assert [coco.loadCats(item["category_id"])[0]["name"] for item in (cat, hat, other)] == ["cat", "hat", "cat"]
    assert [item["id"] for item in (cat, hat, other)] == [1, 2, 3]  # 0 is no id for COCO's evaluation


def test_masks_round_trip_through_coco(coco: COCO) -> None:
    (found,) = [item for item in coco.dataset["annotations"] if "segmentation" in item]
    expected = answer(masked("cat", (0, 0, 20, 10))).masks
    assert expected is not None
    assert np.array_equal(coco.annToMask(found).astype(bool), expected.data[0])
    assert found["area"] == expected.data.sum() == 100


def test_the_annotations_are_coco_results(coco: COCO) -> None:
    results = coco.loadRes(json.loads(json.dumps(coco.dataset["annotations"])))
    boxes = [item["bbox"] for item in results.loadAnns(results.getAnnIds())]
    assert boxes == [[20, 10, 40, 20], [0, 0, 9, 9], [0, 0, 20, 10]]
    assert all("score" in item for item in results.dataset["annotations"])


def test_yolo_writes_a_file_a_picture_and_the_classes(tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    assert written("yolo", answer(CAT, DOG, detection("hat", (0, 0, 20, 10))), answer(), folder=folder) == ""
    assert sorted(path.name for path in folder.iterdir()) == ["classes.txt", "one.txt", "two, three.txt"]
    assert (folder / "classes.txt").read_text() == "dog\ncat\nbird\nhat\n"
    assert (folder / "one.txt").read_text().splitlines() == [
        "1 0.2 0.2 0.2 0.2 0.9",
        "0 0.5 0.5 1 1 0.25",
        "3 0.05 0.05 0.1 0.1 0.5",
    ]
    assert (folder / "two, three.txt").read_text() == ""


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore:OpenCV")  # supervision does without, and says so
def test_another_reader_finds_the_masks_in_yolo_files(tmp_path: Path) -> None:
    from supervision import DetectionDataset

    (tmp_path / "images").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "images" / "one.png")
    found = answer(masked("cat", (20, 10, 60, 30)), masked("dog", (100, 20, 180, 60)))
    written("yolo", found, folder=tmp_path / "labels")
    names = (tmp_path / "labels" / "classes.txt").read_text().split()
    (tmp_path / "data.yaml").write_text(f"names: {names}")
    images, labels, classes = (str(tmp_path / name) for name in ("images", "labels", "data.yaml"))
    dataset = DetectionDataset.from_yolo(images, labels, classes, force_masks=True)
    read: Any = next(iter(dataset))[2]
    assert [dataset.classes[kind] for kind in read.class_id] == ["cat", "dog"]
    assert found.masks is not None
    for mask, expected in zip(read.mask, found.masks.data, strict=True):
        assert (mask & expected).sum() > 0.9 * (mask | expected).sum()


def test_yolo_segments_are_the_class_and_the_outline(tmp_path: Path) -> None:
    written("yolo", answer(masked("cat", (0, 0, 200, 100))), folder=tmp_path)
    kind, *numbers = (tmp_path / "one.txt").read_text().split()
    outline = np.array(numbers, float).reshape(-1, 2)
    assert kind == "1"
    assert (*outline.min(axis=0), *outline.max(axis=0)) == pytest.approx((0, 0, 0.5, 1), abs=0.01)


def test_files_of_pictures_with_one_name_do_not_meet(tmp_path: Path) -> None:
    writer = open_writer("yolo", print, tmp_path, ASKED)
    for source in ("a/x.png", "b/x.png", "b/classes.png"):
        writer.add(Path(source), answer(CAT))
    writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes-2.txt", "classes.txt", "x-2.txt", "x.txt"]
    assert (tmp_path / "classes.txt").read_text().startswith("dog")


def test_labelme_files_say_all_that_labelme_reads(tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "one.png"
    picture.parent.mkdir()
    Image.new("RGB", (200, 100)).save(picture)
    writer = open_writer("labelme", print, tmp_path / "out" / "deep", ASKED)
    writer.add(picture, answer(OTHER_CAT, masked("dog", (0, 0, 200, 100))))
    writer.finish()
    (path,) = (tmp_path / "out" / "deep").iterdir()
    content = json.loads(path.read_text())
    assert path.name == "one.json"
    with Image.open(path.parent / content["imagePath"]) as opened:  # as LabelMe finds it
        assert (opened.height, opened.width) == (content["imageHeight"], content["imageWidth"]) == (100, 200)
    assert content["imagePath"] == "../../pictures/one.png"
    assert content["imageData"] is None
    assert content["flags"] == {}
    assert content["version"].split(".")[0] == "5"
    box, shape = content["shapes"]
    assert (box["label"], box["shape_type"], box["points"]) == ("cat", "rectangle", [[100, 50], [110, 90]])
    assert (shape["label"], shape["shape_type"]) == ("dog", "polygon")
    points = np.array(shape["points"])
    assert (*points.min(axis=0), *points.max(axis=0)) == pytest.approx((0, 0, 100, 100), abs=1)


def test_a_labelme_file_of_a_frame_holds_the_picture_which_is_no_file(tmp_path: Path) -> None:
    frame = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8))
    writer = open_writer("labelme", print, tmp_path, ASKED)
    writer.add(Path("video-3.png"), answer(CAT, image=frame), 0.5)
    content = json.loads((tmp_path / "video-3.json").read_text())
    with Image.open(io.BytesIO(base64.b64decode(content["imageData"]))) as held:
        assert np.array_equal(np.asarray(held), np.asarray(frame))


@pytest.mark.parametrize("form", get_args(Format))
def test_a_run_without_any_picture_writes_nothing(form: Format, tmp_path: Path) -> None:
    assert written(form, folder=tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["coco", "yolo", "labelme"])
def test_formats_of_boxes_take_no_text_and_say_which_do(form: Format, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="json, jsonl or csv"):
        open_writer(form, print, tmp_path, None)


@pytest.mark.parametrize("form", FOLDER_FORMATS)
def test_formats_of_files_want_a_folder(form: Format) -> None:
    with pytest.raises(UsageError, match="--save FOLDER"):
        open_writer(form, print, None, ASKED)


@pytest.mark.parametrize("form", FOLDER_FORMATS)
def test_polygons_are_asked_for_before_any_picture(
    form: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "contourpy", None)
    for asked, free in ((BoxRequest("segment", ["cat"]), False), (ASKED, True)):
        with pytest.raises(MissingExtraError, match=r"paliedge\[polygons\]"):
            open_writer(form, print, tmp_path, asked, free=free)
    assert isinstance(open_writer(form, print, tmp_path, ASKED), Writer)
    assert isinstance(open_writer("coco", print, None, BoxRequest("segment", ["cat"])), Writer)


@pytest.mark.parametrize("form", FOLDER_FORMATS)
def test_a_folder_that_cannot_be_is_an_output_error(form: Format, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Name another folder"):
        open_writer(form, print, tmp_path / "file", ASKED).add(ONE, answer(CAT))


def test_only_those_that_tell_errors_have_a_place_for_them() -> None:
    output: list[str] = []
    for form in ("csv", "coco"):
        writer = open_writer(form, output.append, None, ASKED)
        assert not writer.reports_errors
        writer.fail(ONE, BAD)
        writer.finish()
    assert output == []
    assert open_writer("json", print).reports_errors
