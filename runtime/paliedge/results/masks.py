"""A mask as the mask decoder gives it, and the forms in which users want it. Knows no tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from paliedge.errors import MissingExtraError

Polygon = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Mask:
    """The shape inside a box.

    Attributes:
        values: [64, 64] float32, positive inside the shape; the map is stretched over the box.
        box: x1, y1, x2, y2 in pixels of the image; it may reach beyond it, and what lies there is cut away.
        image_wh: width and height of the image in pixels.
    """

    values: npt.NDArray[np.float32]
    box: tuple[float, float, float, float]
    image_wh: tuple[int, int]

    def to_array(self) -> npt.NDArray[np.bool_]:
        """[H, W] of the image, True inside.

        The map is stretched over the box's pixels, bilinear, and then cut at 0, as big_vision does.
        """
        width, height = self.image_wh
        left, top, right, bottom = self._pixels()
        whole = np.zeros((height, width), np.bool_)
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        rows, columns = self.values.shape
        across, down = columns / (right - left), rows / (bottom - top)
        visible = ((x1 - left) * across, (y1 - top) * down, (x2 - left) * across, (y2 - top) * down)
        picture = Image.fromarray(self.values)
        whole[y1:y2, x1:x2] = np.asarray(picture.resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR, visible)) > 0
        return whole

    def to_polygons(self) -> list[Polygon]:
        """Outlines [N, 2] of x and y in pixels, the largest first; the holes of a shape are outlines too.

        Raises:
            MissingExtraError: contourpy is not installed.
        """
        try:
            from contourpy import contour_generator
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                expected="contourpy, for polygons",
                found="no such package",
                action='Run `pip install "paliedge[polygons]"`.',
            ) from error
        rows, columns = self.values.shape
        framed = np.pad(self.values, 1, constant_values=min(-1.0, float(self.values.min())))
        x1, y1, x2, y2 = self.box
        scale, corner = np.array([(x2 - x1) / columns, (y2 - y1) / rows]), np.array([x1, y1])
        outlines = [
            ((np.asarray(line) - 0.5).clip(0, (columns, rows)) * scale + corner).clip(0, self.image_wh)
            for line in contour_generator(z=framed).lines(0.0)
        ]
        return sorted((line for line in outlines if _area(line) > 0), key=_area, reverse=True)

    def to_rle(self) -> dict[str, Any]:
        """COCO's compressed run lengths: `size` [height, width] and `counts`, which pycocotools reads."""
        pixels = self.to_array().ravel(order="F")
        edges = np.flatnonzero(np.diff(pixels, prepend=False, append=False)) if pixels.size else np.empty(0, int)
        runs = np.diff(edges, prepend=0).tolist()
        if not edges.size or edges[-1] != pixels.size:
            runs.append(pixels.size - (int(edges[-1]) if edges.size else 0))
        return {"size": [self.image_wh[1], self.image_wh[0]], "counts": _compress(runs)}

    def _pixels(self) -> tuple[int, int, int, int]:
        """The box in whole pixels, at least one of the image each way."""
        edges = []
        for low, high, size in zip(self.box[:2], self.box[2:], self.image_wh, strict=True):
            first = min(round(low), size - 1)
            edges.append((first, max(round(high), first + 1, 1)))
        (left, right), (top, bottom) = edges
        return left, top, right, bottom


def _area(outline: Polygon) -> float:
    x, y = outline.T
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def _compress(runs: list[int]) -> str:
    """COCO's text form: each run as its difference to the run two before, five bits a character, lowest first."""
    text = []
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr((bits | 32 if more else bits) + 48))
    return "".join(text)
