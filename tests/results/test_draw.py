"""Annotated pictures: every tag readable and inside, no tag on another, masks that let the picture through."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from paliedge.results.draw import Tag, colour_of, draw_answer, draw_detections, place_tags
from paliedge.results.locations import Detection
from paliedge.results.masks import Mask

pytestmark = pytest.mark.bare

Box = tuple[float, float, float, float]
SIZES = [(1, 1), (20, 20), (112, 112), (640, 480), (4000, 3000), (4000, 20), (20, 1500)]
LONG = "the hat of the man on the left of the tall tree behind the house with the red roof and a chimney"


def found(label: str, box: Box, size_wh: tuple[int, int], *, mask: bool = False) -> Detection:
    values = np.ones((64, 64), np.float32)
    pixels = (box[0] * size_wh[0], box[1] * size_wh[1], box[2] * size_wh[0], box[3] * size_wh[1])
    return Detection(label, pixels, box, (math.log(0.5),) * 4, (), Mask(values, pixels, size_wh) if mask else None)


def rectangles_overlap(one: Tag, other: Tag) -> bool:
    a, b = one.rectangle, other.rectangle
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def tags_of(size_wh: tuple[int, int], *items: tuple[str, Box]) -> list[Tag]:
    detections = [found(label, box, size_wh) for label, box in items]
    return place_tags(detections, [item.box for item in detections], size_wh)


@pytest.mark.parametrize("size_wh", SIZES)
def test_pictures_of_any_size_get_tags_and_small_ones_are_enlarged(size_wh: tuple[int, int]) -> None:
    image = Image.new("RGB", size_wh, "grey")
    drawn = draw_detections(image, [found(LONG, (0.2, 0.2, 0.9, 0.9), size_wh, mask=True)])
    assert max(drawn.size) >= 560
    assert drawn.width / drawn.height == pytest.approx(size_wh[0] / size_wh[1], rel=0.05)
    (tag,) = place_tags([found(LONG, (0.2, 0.2, 0.9, 0.9), drawn.size)], [(0, 0, 1, 1)], drawn.size)
    assert tag.rectangle[3] - tag.rectangle[1] >= max(14, max(drawn.size) // 80) or min(drawn.size) < 100
    assert tag.text.endswith("0.50")
    colours = {colour for _, colour in drawn.getcolors(drawn.width * drawn.height) or []}
    assert ImageColor.getrgb(colour_of(LONG)) in colours


def test_a_mask_is_drawn_where_its_uncut_box_lies() -> None:
    """Its left half, which is inside the shape, lies beside the picture."""
    left_half = np.where(np.arange(64) < 32, 1, -1)[None].repeat(64, 0).astype(np.float32)
    cut = found("cat", (0, 0, 0.5, 0.5), (800, 800))._replace(mask=Mask(left_half, (-400, 0, 400, 400), (800, 800)))
    drawn = draw_detections(Image.new("RGB", (800, 800), "grey"), [cut])
    assert drawn.getpixel((100, 250)) == drawn.getpixel((600, 600)) == ImageColor.getrgb("grey")


shares = st.tuples(st.floats(0, 0.99), st.floats(0, 0.99), st.floats(0.001, 1), st.floats(0.001, 1)).map(
    lambda b: (b[0], b[1], min(1.0, b[0] + b[2]), min(1.0, b[1] + b[3]))
)
sizes = st.tuples(st.integers(60, 4000), st.integers(20, 4000))
labels = st.sampled_from(["", "cat", "yellow star", LONG, "two\nlines"])


@given(sizes, st.lists(st.tuples(labels, shares), max_size=12))
@settings(deadline=None, max_examples=60)
def test_no_tag_is_outside_the_picture(size_wh: tuple[int, int], items: list[tuple[str, Box]]) -> None:
    for tag in tags_of(size_wh, *items):
        x1, y1, x2, y2 = tag.rectangle
        assert 0 <= x1 < x2 < size_wh[0]
        assert 0 <= y1 < y2 < size_wh[1]
        assert "\n" not in tag.text


def test_a_tag_is_above_its_box_where_there_is_room() -> None:
    (tag,) = tags_of((600, 400), ("cat", (0.5, 0.5, 0.8, 0.8)))
    assert tag.text == "cat 0.50"
    assert tag.rectangle[0] == 300
    assert tag.rectangle[3] == 199
    (inside,) = tags_of((600, 400), ("cat", (0, 0, 0.8, 0.8)))
    assert inside.rectangle[:2] == (0, 0)


@pytest.mark.parametrize("num_boxes", [2, 4, 8])
def test_tags_of_one_and_the_same_box_do_not_overlap(num_boxes: int) -> None:
    tags = tags_of((600, 400), *[("yellow star", (0.2, 0.2, 0.7, 0.8))] * num_boxes)
    assert len(tags) == num_boxes
    assert not [pair for pair in combinations(tags, 2) if rectangles_overlap(*pair)]


def test_overlap_is_seen() -> None:
    """The test above can fail."""
    assert rectangles_overlap(Tag("a", (0, 0, 9, 9), "red"), Tag("b", (9, 9, 20, 20), "red"))
    assert not rectangles_overlap(Tag("a", (0, 0, 9, 9), "red"), Tag("b", (10, 0, 20, 20), "red"))


def test_a_long_label_is_cut_and_its_confidence_stays() -> None:
    (tag,) = tags_of((300, 300), (LONG, (0.1, 0.1, 0.9, 0.9)))
    assert tag.text.startswith(LONG[:10])
    assert tag.text.endswith("... 0.50")
    (whole,) = tags_of((3000, 3000), (LONG, (0.1, 0.1, 0.9, 0.9)))
    assert whole.text == f"{LONG} 0.50"


def test_masks_are_half_transparent_in_the_colour_of_the_label() -> None:
    image = Image.new("RGB", (600, 600), (200, 100, 0))
    drawn = draw_detections(image, [found("cat", (0.1, 0.1, 0.9, 0.9), image.size, mask=True)])
    middle = drawn.getpixel((300, 300))
    halves = [(a + b) / 2 for a, b in zip((200, 100, 0), ImageColor.getrgb(colour_of("cat")), strict=True)]
    assert middle == pytest.approx(halves, abs=2)
    assert drawn.getpixel((20, 300)) == (200, 100, 0)
    assert image.getpixel((300, 300)) == (200, 100, 0)


def test_colours_are_those_of_the_label_in_every_run() -> None:
    assert [colour_of(label) for label in ("cat", "dog", "", "yellow star")] == [
        "#d55e00",
        "#f0e442",
        "#e69f00",
        "#0072b2",
    ]


EYES = {  # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
    "any": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def lab_from_colour(colour: str, eyes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """CIELAB of an sRGB colour as such eyes see it."""
    srgb = np.array(ImageColor.getrgb(colour)) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ (eyes @ linear).clip(0, 1) / to_xyz.sum(axis=1)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES.values(), ids=EYES)
def test_any_eyes_tell_the_colours_apart(eyes: npt.NDArray[np.float64]) -> None:
    """A distance of 2.3 is just noticeable; the least of these pairs is 17, orange and yellow with deuteranopia."""
    colours = sorted({colour_of(str(number)) for number in range(200)})
    assert len(colours) == 7
    seen = [lab_from_colour(colour, eyes) for colour in colours]
    assert min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) > 16


def test_boxes_at_the_far_border_are_drawn_whole() -> None:
    drawn = draw_detections(Image.new("RGB", (600, 600)), [found("cat", (0, 0, 1, 1), (600, 600))])
    colour = ImageColor.getrgb(colour_of("cat"))
    places = [(0, 300), (1, 300), (598, 300), (599, 300), (300, 598), (300, 599)]  # the line is two pixels wide
    assert [drawn.getpixel(place) for place in places] == [colour] * len(places)


@pytest.mark.parametrize("size_wh", SIZES)
def test_answers_stand_below_the_picture_and_inside_the_strip(size_wh: tuple[int, int]) -> None:
    drawn = draw_answer(Image.new("RGB", size_wh, "white"), "three cats\n\n" + "a" * 300)
    assert drawn.width >= 560
    dark = np.asarray(drawn.convert("L")) < 128
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    assert rows[0] > max(size_wh[1], drawn.height // 20)
    assert 2 < columns[0] < columns[-1] < drawn.width - 3
    assert rows[-1] < drawn.height - 3


def test_an_empty_answer_is_no_error() -> None:
    assert draw_answer(Image.new("RGB", (600, 600)), "").height > 600
