"""The worst cases of an evaluation on one sheet: what was expected and what was found."""

# Tests: tests/evaluation/test_evaluation.py.
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from paliedge.evaluation.cases import Case, Shape
from paliedge.inputs.images import load_image
from paliedge.results.draw import draw_answer

EXPECTED_COLOUR, FOUND_COLOUR = "#009e73", "#d55e00"
MAX_TILES = 12
_NUM_COLUMNS = 4
_TILE = 560
_LINE_WIDTH = 4
_FONT_SIZE = 18
_MASK_OPACITY = 0.4
_MAX_CHARACTERS = 240


def draw_worst(cases: Sequence[Case]) -> Image.Image:
    """A sheet of the cases with the lowest scores, at most 12, the worst first.

    Raises:
        ImageError: a picture has gone since it was answered.
    """
    worst = sorted(cases, key=lambda case: case.score)[:MAX_TILES]
    tiles = [_draw_tile(case) for case in worst]
    rows = [tiles[start : start + _NUM_COLUMNS] for start in range(0, len(tiles), _NUM_COLUMNS)]
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new("RGB", (_TILE * len(rows[0]), sum(heights)), "white")
    for index, row in enumerate(rows):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * _TILE, sum(heights[:index])))
    return sheet


def _draw_tile(case: Case) -> Image.Image:
    """The picture in a square, with the shapes of both kinds, and what was expected and found below."""
    picture = load_image(case.source)
    scale = _TILE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    tile = Image.new("RGB", (_TILE, _TILE), "white")
    tile.paste(picture.resize((width, height), Image.Resampling.LANCZOS))
    for shapes, colour in ((case.truth, EXPECTED_COLOUR), (case.found, FOUND_COLOUR)):
        for shape in shapes:
            _draw_shape(tile, shape, colour, scale, (width, height))
    if case.answers:
        expected, found = _shortened(" | ".join(case.answers)), _shortened(case.answer)
    else:
        expected, found = f"{len(case.truth)} in green", f"{len(case.found)} in orange"
    captioned = draw_answer(tile, f"score {case.score:.2f}, expected: {expected}")
    return draw_answer(captioned, f"found: {found}")


def _draw_shape(tile: Image.Image, shape: Shape, colour: str, scale: float, size_wh: tuple[int, int]) -> None:
    if shape.mask:
        from pycocotools import mask

        stencil = Image.fromarray(mask.decode(shape.mask) * np.uint8(round(255 * _MASK_OPACITY)))
        tile.paste(colour, (0, 0), stencil.resize(size_wh, Image.Resampling.NEAREST))
    draw = ImageDraw.Draw(tile)
    x1, y1, x2, y2 = (edge * scale for edge in shape.box)
    x1, x2 = sorted((x1, x2))  # an annotation may have a negative size, which Pillow refuses
    y1, y2 = sorted((y1, y2))
    draw.rectangle((x1, y1, x2, y2), outline=colour, width=_LINE_WIDTH)
    label = shape.label if shape.confidence is None else f"{shape.label} {shape.confidence:.2f}"
    place, anchor = ((x1 + 6, y1 + 6), "la") if shape.confidence is None else ((x1 + 6, y2 - 6), "ld")
    font = ImageFont.load_default(_FONT_SIZE)
    draw.text(place, label, fill=colour, font=font, anchor=anchor, stroke_width=2, stroke_fill="white")


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 3] + "..."
