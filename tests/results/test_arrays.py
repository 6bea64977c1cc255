"""Answers under Ultralytics' names: arrays, label files, pictures, and supervision's Detections."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import paliedge
from paliedge import GenerationOptions
from paliedge.errors import ImageError, MissingExtraError, OutputError, UsageError
from paliedge.model import SHIPPED_BUNDLE, PaliGemma
from paliedge.results.generation import Generation, Timings
from paliedge.results.locations import Detection
from paliedge.results.masks import Mask

pytestmark = pytest.mark.bare

WH = (200, 100)
LEFT_HALF = np.where(np.arange(64) < 32, 1, -1)[None].repeat(64, 0).astype(np.float32)
NOTHING = -np.ones((64, 64), np.float32)


def detection(label: str, box: tuple[float, float, float, float], confidence: float = 0.5) -> Detection:
    x1, y1, x2, y2 = box
    shares = (x1 / WH[0], y1 / WH[1], x2 / WH[0], y2 / WH[1])
    return Detection(label, box, shares, (math.log(confidence),) * 5)


def masked(label: str, box: tuple[float, float, float, float], values: Any = LEFT_HALF) -> Detection:
    return detection(label, box)._replace(mask=Mask(values, box, WH))


def answer(*detections: Detection, image: Image.Image | None = None, text: str = "") -> Generation:
    times = Timings(1.0, 2.0, 3.0, (4.0, 5.0))
    return Generation(text, (), (), detections, 0, WH, "stop", times, image)


CAT, DOG, OTHER_CAT = (
    detection("cat", (20, 10, 60, 30), 0.9),
    detection("dog", (0, 0, 200, 100), 0.25),
    detection("cat", (100, 50, 110, 90)),
)


def test_boxes_are_arrays_in_four_forms() -> None:
    boxes = answer(CAT, DOG, OTHER_CAT).boxes
    assert boxes.xyxy.tolist() == [[20, 10, 60, 30], [0, 0, 200, 100], [100, 50, 110, 90]]
    assert boxes.xywh.tolist() == [[40, 20, 40, 20], [100, 50, 200, 100], [105, 70, 10, 40]]
    assert boxes.xyxyn[0] == pytest.approx([0.1, 0.1, 0.3, 0.3])
    assert boxes.xywhn[0] == pytest.approx([0.2, 0.2, 0.2, 0.2])
    assert boxes.xywhn[1] == pytest.approx([0.5, 0.5, 1, 1])
    assert {form.dtype for form in (boxes.xyxy, boxes.xyxyn, boxes.xywh, boxes.xywhn, boxes.conf)} == {
        np.dtype("float32")
    }
    assert boxes.conf == pytest.approx([0.9, 0.25, 0.5])


def test_classes_are_indices_into_the_names_in_their_order() -> None:
    found = answer(DOG, CAT, OTHER_CAT)
    assert found.names == {0: "dog", 1: "cat"}
    assert found.boxes.cls.tolist() == [0, 1, 1]
    assert np.issubdtype(found.boxes.cls.dtype, np.integer)
    assert found.above(0.4).names == {0: "cat"}


def test_boxes_are_indexed_sliced_and_iterated_as_boxes() -> None:
    boxes = answer(CAT, DOG, OTHER_CAT).boxes
    assert [box.xyxy.shape for box in boxes] == [(1, 4)] * 3
    assert boxes[-1].xyxy.tolist() == [[100, 50, 110, 90]]
    assert boxes[1:].cls.tolist() == [1, 0]
    assert boxes[boxes.conf > 0.4].xywhn.shape == (2, 4)
    with pytest.raises(IndexError):
        boxes[3]


def test_an_answer_without_boxes_has_empty_arrays_and_no_masks() -> None:
    found = answer(text="a cat")
    assert len(found.boxes) == 0
    for array in (found.boxes.xyxy, found.boxes.xyxyn, found.boxes.xywh, found.boxes.xywhn):
        assert array.shape == (0, 4)
    assert found.boxes.conf.shape == found.boxes.cls.shape == (0,)
    assert found.masks is None
    assert found.names == {}
    assert answer(CAT).masks is None


def test_masks_are_those_that_there_are_with_pixels_and_outlines() -> None:
    masks = answer(CAT, masked("dog", (100, 20, 180, 60)), masked("cat", (0, 0, 20, 10), NOTHING)).masks
    assert masks is not None
    assert len(masks) == 2
    assert masks.index.tolist() == [1, 2]
    assert masks.data.shape == (2, 100, 200)
    assert masks.data.dtype == bool
    assert masks.data[0, 20:60, 100:140].all()
    assert masks.data.sum() == 40 * 40
    outline, empty = masks.xy
    assert (outline.min(axis=0), outline.max(axis=0)) == (
        pytest.approx((100, 20), abs=1),
        pytest.approx((140, 60), abs=1),
    )
    assert empty.shape == (0, 2)
    assert masks.xyn[0].max(axis=0) == pytest.approx((0.7, 0.6), abs=0.01)


def test_speed_and_shape_have_ultralytics_names() -> None:
    found = answer()
    assert found.orig_shape == (100, 200)
    assert found.speed == {
        "preprocess": 1.0,
        "inference": 14.0,
        "postprocess": 0.0,
        "vision": 2.0,
        "prefill": 3.0,
        "decode": 9.0,
    }


def test_to_json_is_what_json_prints() -> None:
    found = answer(masked("Käse", (0, 0, 20, 10)))
    assert "Käse" in found.to_json()
    assert json.loads(found.to_json()) == found.to_dict()


def test_label_files_of_boxes(tmp_path: Path) -> None:
    path = answer(CAT, DOG).save_txt(tmp_path / "new" / "a.txt")
    assert path.read_text() == "0 0.2 0.2 0.2 0.2\n1 0.5 0.5 1 1\n"
    answer(CAT, DOG).save_txt(path, save_conf=True)
    assert path.read_text() == "0 0.2 0.2 0.2 0.2 0.9\n1 0.5 0.5 1 1 0.25\n"
    answer().save_txt(path)
    assert path.read_text() == ""


def test_label_files_with_masks_have_outlines_in_every_line(tmp_path: Path) -> None:
    two = np.full((64, 64), -1, np.float32)
    two[4:8, 4:8], two[20:60, 20:60] = 1, 1
    found = answer(masked("dog", (0, 0, 64, 64), two), CAT, masked("cat", (0, 0, 20, 10), NOTHING))
    path = found.save_txt(tmp_path / "a.txt", save_conf=True)
    dog, cat, nothing = ([float(part) for part in line.split()] for line in path.read_text().splitlines())
    assert (dog[0], cat[0], nothing[0]) == (0, 1, 1)
    outline = np.reshape(dog[1:], (-1, 2)) * WH
    assert (*outline.min(axis=0), *outline.max(axis=0)) == pytest.approx((20, 20, 60, 60), abs=0.6)
    assert cat[1:] == pytest.approx([0.1, 0.1, 0.3, 0.1, 0.3, 0.3, 0.1, 0.3])
    assert nothing[1:] == pytest.approx([0, 0, 0.1, 0, 0.1, 0.1, 0, 0.1])


def test_plots_show_boxes_or_else_the_text() -> None:
    image = Image.new("RGB", (700, 350), "white")
    assert answer(CAT, image=image).plot().size == image.size
    assert answer(CAT, image=image).plot().tobytes() != image.tobytes()
    assert answer(text="a cat", image=image).plot().height > 350
    assert image.getcolors() == [(700 * 350, (255, 255, 255))]  # the answer's picture is left as it was


def test_a_plot_without_a_picture_says_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"answer.plot\(picture\)"):
        answer(CAT).plot()
    assert answer(CAT)._repr_png_() is None


def test_saving_makes_folders_and_knows_what_cannot_be(tmp_path: Path) -> None:
    found = answer(CAT, image=Image.new("RGB", WH))
    path = found.save(tmp_path / "new" / "a.jpg")
    with Image.open(path) as saved:
        assert saved.format == "JPEG"
    with pytest.raises(UsageError, match=r"\.png"):
        found.save(tmp_path / "a.txt")
    with pytest.raises(OutputError, match="Name another folder"):
        found.save(path / "deeper.png")
    with pytest.raises(OutputError, match="Name another folder"):
        found.save_txt(path / "deeper.txt")


def test_the_picture_is_no_part_of_equality() -> None:
    assert answer(CAT, image=Image.new("RGB", WH)) == answer(CAT)


def test_a_repr_is_one_line_a_person_reads() -> None:
    assert repr(answer(CAT, DOG)).startswith("<Generation: cat 0.90, dog 0.25; ")
    assert "and 2 more" in repr(answer(*[CAT] * 6))
    assert repr(answer(text="a cat\non a mat")).startswith("<Generation: 'a cat\\non a mat'; ")
    assert len(repr(answer(text="word " * 100))) < 150
    cut = replace(answer(text="a"), finish_reason="length")
    assert "cut off at the token limit" in repr(cut)


def test_an_answer_holds_its_picture_only_if_that_was_asked() -> None:
    picture = Image.new("RGB", (40, 30), "red")
    options = GenerationOptions(max_new_tokens=1)
    with PaliGemma.load(SHIPPED_BUNDLE) as model:
        plain = model.ocr(picture, options)
        kept = [
            model.ocr(picture, replace(options, keep_image=True)),
            model.ocr(model.encode(picture, keep_image=True), options),
        ]
    assert (plain.image, plain.path) == (None, None)
    assert plain.plot(picture).width == 560
    for each in kept:
        assert each.image is not None
        assert each.image.tobytes() == picture.tobytes()
        assert each.plot().width == 560
        assert (each._repr_png_() or b"").startswith(b"\x89PNG")


def test_the_picture_of_a_file_is_read_again_and_another_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30), "red").save(path)
    with PaliGemma.load(SHIPPED_BUNDLE) as model:
        found = model.ocr(str(path), GenerationOptions(max_new_tokens=1))
    assert found.path == path
    assert found.plot().tobytes() == found.plot(Image.new("RGB", (40, 30), "red")).tobytes()
    with pytest.raises(UsageError, match="40 x 30"):
        found.plot(Image.new("RGB", (30, 40)))
    path.unlink()
    with pytest.raises(ImageError):
        found.plot()


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore:OpenCV")  # supervision does without, and says so
def test_supervision_gets_everything() -> None:
    found = answer(CAT, masked("dog", (100, 20, 180, 60))).to_supervision()
    assert found.xyxy.tolist() == [[20, 10, 60, 30], [100, 20, 180, 60]]
    assert found.data["class_name"].tolist() == ["cat", "dog"]
    assert found.class_id.tolist() == [0, 1]
    assert found.confidence == pytest.approx([0.9, 0.5])
    assert found.mask.shape == (2, 100, 200)
    assert [int(mask.sum()) for mask in found.mask] == [0, 1600]
    assert answer(CAT).to_supervision().mask is None
    assert len(found.with_nms(0.5)) == 2
    assert answer().to_supervision().is_empty()


def test_without_supervision_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingExtraError, match="pip install supervision"):
        answer(CAT).to_supervision()


def test_the_views_are_public() -> None:
    assert isinstance(answer(CAT).boxes, paliedge.Boxes)
    assert isinstance(answer(masked("cat", (0, 0, 9, 9))).masks, paliedge.Masks)
