"""Masks as pixels, outlines and run lengths, judged by pycocotools and by shapes whose measures are known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from paliedge.errors import MissingExtraError
from paliedge.results.masks import Mask

pytestmark = [
    pytest.mark.bare,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools'
]
ROWS, COLUMNS = np.mgrid[0:64, 0:64] + 0.5
DISC = (32 - np.hypot(ROWS - 32, COLUMNS - 32)).astype(np.float32) / 32
LEFT_HALF = np.where(COLUMNS < 32, 1, -1).astype(np.float32)


def test_a_disc_fills_its_share_of_the_box() -> None:
    mask = Mask(DISC, (100, 50, 300, 150), (640, 480)).to_array()
    assert mask.shape == (480, 640)
    assert mask.dtype == bool
    inside = mask[50:150, 100:300]
    assert mask.sum() == inside.sum()  # nothing beyond the box
    assert inside.mean() == pytest.approx(np.pi / 4, abs=0.01)
    assert inside[50, 5]
    assert inside[50, 195]
    assert not inside[5, 5]


def test_left_is_left_and_top_is_top() -> None:
    left = Mask(LEFT_HALF, (0, 0, 10, 4), (10, 4)).to_array()
    assert left[:, :5].all()
    assert not left[:, 5:].any()
    top = Mask(LEFT_HALF.T.copy(), (0, 0, 10, 4), (10, 4)).to_array()
    assert top[:2].all()
    assert not top[2:].any()


@pytest.mark.parametrize("box", [(3.2, 2.1, 3.3, 2.2), (9.9, 3.9, 10.0, 4.0), (0.0, 0.0, 0.1, 4.0)])
def test_the_thinnest_box_has_a_pixel_inside_the_image(box: tuple[float, float, float, float]) -> None:
    mask = Mask(np.ones((64, 64), np.float32), box, (10, 4)).to_array()
    assert mask.any()
    assert mask.shape == (4, 10)


@pytest.mark.parametrize("box", [(-20, 5, 30, 45), (10, -30, 50, 20), (-5, 12, 65, 70), (-9, 0, 0.6, 40)])
def test_what_of_a_box_lies_beyond_the_image_is_cut_and_not_squeezed(box: tuple[float, float, float, float]) -> None:
    x1, y1, x2, y2 = box
    whole = Mask(DISC, (x1 + 40, y1 + 40, x2 + 40, y2 + 40), (140, 130)).to_array()
    cut = Mask(DISC, box, (60, 50))
    np.testing.assert_array_equal(cut.to_array(), whole[40:90, 40:100])
    for outline in cut.to_polygons():
        assert (outline >= 0).all()
        assert (outline <= (60, 50)).all()


def test_outlines_enclose_what_is_filled() -> None:
    mask = Mask(DISC, (100, 50, 300, 150), (640, 480))
    (outline,) = mask.to_polygons()
    x, y = outline.T
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
    assert area == pytest.approx(np.pi / 4 * 200 * 100, rel=0.01)
    assert (x.min(), x.max(), y.min(), y.max()) == pytest.approx((100, 300, 50, 150), abs=4)


def test_a_full_mask_has_the_box_as_its_outline() -> None:
    (outline,) = Mask(np.ones((64, 64), np.float32), (10, 20, 30, 60), (100, 100)).to_polygons()
    low, high = outline.min(axis=0), outline.max(axis=0)
    assert (*low, *high) == pytest.approx((10, 20, 30, 60), abs=0.5)


def test_outlines_come_the_largest_first_and_an_empty_mask_has_none() -> None:
    two = np.maximum(4 - np.hypot(ROWS - 10, COLUMNS - 10), 9 - np.hypot(ROWS - 40, COLUMNS - 40)).astype(np.float32)
    large, small = Mask(two, (0, 0, 64, 64), (64, 64)).to_polygons()
    assert large.mean(axis=0) == pytest.approx((40, 40), abs=1)
    assert small.mean(axis=0) == pytest.approx((10, 10), abs=1)
    assert Mask(-np.ones((64, 64), np.float32), (0, 0, 64, 64), (64, 64)).to_polygons() == []


def test_without_contourpy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "contourpy", None)
    with pytest.raises(MissingExtraError, match=r"paliedge\[polygons\]"):
        Mask(DISC, (0, 0, 64, 64), (64, 64)).to_polygons()


boxes = st.tuples(st.floats(0, 60), st.floats(0, 40), st.floats(0.5, 60), st.floats(0.5, 40)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(st.integers(0, 2**31), boxes, st.sampled_from([-3.0, -0.5, 0.0, 0.5, 3.0]))
@settings(deadline=None, max_examples=100)
def test_pycocotools_reads_the_run_lengths_as_the_same_pixels(
    seed: int, box: tuple[float, float, float, float], shift: float
) -> None:
    coarse = np.random.default_rng(seed).normal(shift, 1, (8, 8))
    mask = Mask(np.kron(coarse, np.ones((8, 8))).astype(np.float32), box, (130, 90))
    assert np.array_equal(coco.decode(mask.to_rle()).astype(bool), mask.to_array())


def test_run_lengths_are_those_that_pycocotools_writes() -> None:
    for mask in (Mask(DISC, (3, 5, 99, 88), (130, 90)), Mask(DISC, (0, 0, 130, 90), (130, 90))):
        expected = coco.encode(np.asfortranarray(mask.to_array().astype(np.uint8)))
        assert mask.to_rle()["counts"].encode() == expected["counts"]
        assert mask.to_rle()["size"] == expected["size"]
