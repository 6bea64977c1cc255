"""A letterboxed bundle answers in the pixels of the picture, wherever that lies in the model's square."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice
from statistics import fmean
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.shapes.scenes import HELD_OUT_SEED, IMAGE_SIZE, make_scene
from paliedge import PaliGemma
from paliedge_export.exporter import export_bundle
from tests.paths import SHAPES_CHECKPOINT

SHORT = 72
"""The shorter side of the pictures; the longer one is a scene's own."""
MARGIN = (IMAGE_SIZE - SHORT) // 2
NUM_CUTS = 8

Edges = tuple[float, float, float, float]


class Cut(NamedTuple):
    """A scene of one object without its upper and lower margins, or without those at its sides."""

    image: npt.NDArray[np.uint8]
    label: str
    box: Edges
    mask: npt.NDArray[np.bool_]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PaliGemma]:
    """The shapes model with padding in a grey that scenes may have: it was trained on squares."""
    bundle = tmp_path_factory.mktemp("letterbox") / "bundle"
    export_bundle(str(SHAPES_CHECKPOINT), bundle, letterbox=(110, 110, 110), compare=False)
    with closing(PaliGemma.load(bundle)) as loaded:
        yield loaded


def find_cuts(*, tall: bool) -> Iterator[Cut]:
    """Of scenes whose object is whole in what is kept."""
    inner, whole = slice(MARGIN, MARGIN + SHORT), slice(None)
    part = (whole, inner) if tall else (inner, whole)
    left, top = (MARGIN, 0) if tall else (0, MARGIN)
    for seed in count(HELD_OUT_SEED + 30_000):
        scene = make_scene(seed)
        item = scene.objects[0]
        if len(scene.objects) == 1 and item.mask[part].sum() == item.mask.sum():
            x1, y1, x2, y2 = item.box
            box = (x1 - left, y1 - top, x2 - left, y2 - top)
            yield Cut(scene.image[part], item.label, box, item.mask[part])


@pytest.fixture(scope="module", params=[False, True], ids=["wide", "tall"])
def cuts(request: pytest.FixtureRequest) -> list[Cut]:
    return list(islice(find_cuts(tall=request.param), NUM_CUTS))


def overlap(one: Edges, other: Edges) -> float:
    """IoU of two boxes."""
    sides = [min(one[2 + axis], other[2 + axis]) - max(one[axis], other[axis]) for axis in (0, 1)]
    shared = max(sides[0], 0) * max(sides[1], 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared)


def test_boxes_are_where_the_objects_are_in_the_picture(model: PaliGemma, cuts: list[Cut]) -> None:
    overlaps = []
    for cut in cuts:
        answer = model.detect(cut.image, [cut.label])
        height, width, _ = cut.image.shape
        assert answer.image_wh == (width, height)
        overlaps.append(max((overlap(item.box, cut.box) for item in answer.detections), default=0))
        for item in answer.detections:
            assert np.multiply(item.box_normalized, (width, height) * 2) == pytest.approx(np.array(item.box))
    assert fmean(overlaps) > 0.8


def test_streamed_boxes_are_those_of_the_answer(model: PaliGemma, cuts: list[Cut]) -> None:
    for cut in cuts:
        pieces = model.stream(cut.image, f"detect {cut.label}")
        streamed = tuple(item for piece in pieces for item in piece.detections)
        assert streamed == model.detect(cut.image, [cut.label]).detections


def test_masks_are_what_can_be_seen_of_the_objects(model: PaliGemma, cuts: list[Cut]) -> None:
    overlaps = []
    for cut in cuts:
        found = model.segment(cut.image, [cut.label]).detections
        masks = [item.mask.to_array() for item in found if item.mask]
        assert {mask.shape for mask in masks} <= {cut.image.shape[:2]}
        overlaps.append(max(((mask & cut.mask).sum() / (mask | cut.mask).sum() for mask in masks), default=0))
    assert fmean(overlaps) > 0.75
