"""Detections as arrays, under the names that Ultralytics' results have. Knows no model and draws nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from paliedge.results.locations import Detection
from paliedge.results.masks import Polygon

Floats: TypeAlias = "npt.NDArray[np.float32]"


@dataclass(frozen=True, eq=False)
class Boxes:
    """N boxes, in the model's order. An index, a slice or an iteration gives `Boxes` again.

    Attributes:
        xyxy: [N, 4] float32; x1, y1, x2, y2 in pixels.
        conf: [N] float32, 0 to 1; see `Detection.confidence`.
        cls: [N] int64; keys of the answer's `names`.
        orig_shape: height and width of the image in pixels.
    """

    xyxy: Floats
    conf: Floats
    cls: npt.NDArray[np.int64]
    orig_shape: tuple[int, int]

    @property
    def xyxyn(self) -> Floats:
        """[N, 4] float32; `xyxy` divided by the image's width and height, 0 to 1."""
        return _normalize(self.xyxy, self.orig_shape)

    @property
    def xywh(self) -> Floats:
        """[N, 4] float32; the centre's x and y, width and height in pixels."""
        low, high = self.xyxy[:, :2], self.xyxy[:, 2:]
        return np.concatenate([(low + high) / 2, high - low], axis=1)

    @property
    def xywhn(self) -> Floats:
        """[N, 4] float32; `xywh` divided by the image's width and height, 0 to 1."""
        return _normalize(self.xywh, self.orig_shape)

    def __len__(self) -> int:
        return len(self.conf)

    def __getitem__(self, index: Any) -> Boxes:
        """The boxes at an int, a slice, indices or a [N] bool array; of an int one box, not none.

        Raises:
            IndexError: there is no such box.
        """
        rows = np.arange(len(self))[index].reshape(-1)
        return Boxes(self.xyxy[rows], self.conf[rows], self.cls[rows], self.orig_shape)

    def __iter__(self) -> Iterator[Boxes]:
        return (self[row] for row in range(len(self)))


@dataclass(frozen=True, eq=False)
class Masks:
    """The masks of those detections that have one: M of N, in their order.

    Attributes:
        detections: M detections with a mask.
        index: [M] int64; the index of each among the answer's boxes.
        orig_shape: height and width of the image in pixels.
    """

    detections: tuple[Detection, ...]
    index: npt.NDArray[np.int64]
    orig_shape: tuple[int, int]

    @cached_property
    def data(self) -> npt.NDArray[np.bool_]:
        """[M, H, W] of the image, True inside."""
        return np.stack([item.mask.to_array() for item in self.detections if item.mask])

    @cached_property
    def xy(self) -> list[Polygon]:
        """M outlines [K, 2] of x and y in pixels, the largest of each mask; [0, 2] for a mask without a pixel.

        Raises:
            MissingExtraError: contourpy is not installed.
        """
        outlines = (item.mask.to_polygons() for item in self.detections if item.mask)
        return [found[0] if found else np.empty((0, 2)) for found in outlines]

    @property
    def xyn(self) -> list[Polygon]:
        """`xy` divided by the image's width and height, 0 to 1."""
        height, width = self.orig_shape
        return [outline / (width, height) for outline in self.xy]

    def __len__(self) -> int:
        return len(self.detections)


def boxes_from_detections(detections: Sequence[Detection], cls: Sequence[int], orig_shape: tuple[int, int]) -> Boxes:
    """The boxes, with a class index for each; `orig_shape` is height and width in pixels."""
    edges = np.array([item.box for item in detections], np.float32).reshape(-1, 4)
    confidences = np.array([item.confidence for item in detections], np.float32)
    return Boxes(edges, confidences, np.array(cls, np.int64), orig_shape)


def masks_from_detections(detections: Sequence[Detection], orig_shape: tuple[int, int]) -> Masks | None:
    """The masks; None where no detection has one."""
    indices = [index for index, item in enumerate(detections) if item.mask]
    if not indices:
        return None
    return Masks(tuple(detections[index] for index in indices), np.array(indices, np.int64), orig_shape)


def outline_of(detection: Detection) -> Polygon:
    """[K, 2] x and y in pixels: the largest outline of its mask; the box's corners where it has none.

    Raises:
        MissingExtraError: it has a mask, and contourpy is not installed.
    """
    outlines = detection.mask.to_polygons() if detection.mask else []
    if outlines:
        return outlines[0]
    x1, y1, x2, y2 = detection.box
    return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])


def yolo_lines(
    detections: Sequence[Detection], cls: Sequence[int], image_wh: tuple[int, int], *, with_confidence: bool
) -> list[str]:
    """A line a detection, as YOLO's label files have them; all numbers are divided by width and height.

    Without any mask a line is `class cx cy w h`, with the confidence behind it if wanted. Else it is
    `class x1 y1 x2 y2 ...`, the largest outline of each mask, or a box's corners. A file holds one of the two
    forms: YOLO reads no mixture. An outline has no confidence behind it: it would be taken for half a point.

    Raises:
        MissingExtraError: there is a mask, and contourpy is not installed.
    """
    if any(item.mask for item in detections):
        rows = [(outline_of(item) / image_wh).ravel().tolist() for item in detections]
    else:
        rows = []
        for item in detections:
            x1, y1, x2, y2 = item.box_normalized
            score = [item.confidence] if with_confidence else []
            rows.append([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, *score])
    return [" ".join([str(kind), *(f"{value:.6g}" for value in row)]) for kind, row in zip(cls, rows, strict=True)]


def _normalize(values: Floats, orig_shape: tuple[int, int]) -> Floats:
    height, width = orig_shape
    sizes: Floats = np.array([width, height, width, height], np.float32)
    return np.divide(values, sizes, dtype=np.float32)
