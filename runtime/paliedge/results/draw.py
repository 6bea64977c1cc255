"""Annotated pictures: masks, boxes with their labels, and an answer below, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple
from zlib import crc32

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from paliedge.results.locations import Detection
from paliedge.results.masks import Mask

_PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
"""Okabe and Ito's, which colour-blind eyes tell apart."""
_MASK_OPACITY = 0.5
_MIN_SIDE = 560
"""Smaller pictures are enlarged to this, so that labels can be read."""
_MIN_SHORT_SIDE, _MAX_STRETCHED = 96, 6000
"""Narrow ones further, up to this short side, while the long side stays below the other."""
_MIN_FONT = 14
_ELLIPSIS = "..."


class Tag(NamedTuple):
    """A label on its colour; `rectangle` is x1, y1, x2, y2 in pixels, the last pixels included."""

    text: str
    rectangle: tuple[int, int, int, int]
    colour: str


def draw_detections(image: Image.Image, detections: Sequence[Detection]) -> Image.Image:
    """A copy of `image` with a coloured box a detection, its mask half transparent; a label has its own colour."""
    scale = _scale(image.size)
    canvas = _enlarge(image, scale)
    boxes = [_scaled(item.box, scale) for item in detections]
    for item in detections:
        if item.mask:
            enlarged = Mask(item.mask.values, _scaled(item.mask.box, scale), canvas.size)
            stencil = Image.fromarray(enlarged.to_array().astype(np.uint8) * round(255 * _MASK_OPACITY))
            canvas.paste(colour_of(item.label), mask=stencil)
    draw = ImageDraw.Draw(canvas)
    thickness = _thickness(canvas.size)
    for item, (x1, y1, x2, y2) in zip(detections, boxes, strict=True):
        edges = (x1, y1, min(x2, canvas.width - 1), min(y2, canvas.height - 1))  # the far border is no pixel
        draw.rectangle(edges, outline=colour_of(item.label), width=thickness)
    font = _font(_font_size(canvas.size))
    for tag in place_tags(detections, boxes, canvas.size):
        draw.rectangle(tag.rectangle, fill=tag.colour)
        x1, y1, _, y2 = tag.rectangle
        middle = (y1 + y2 + 1) / 2
        draw.text((x1 + _padding(font), middle), tag.text, fill=_ink_on(tag.colour), font=font, anchor="lm")
    return canvas


def draw_answer(image: Image.Image, answer: str) -> Image.Image:
    """A copy of `image` with `answer` on a strip below it."""
    canvas = _enlarge(image, _scale(image.size))
    width = max(canvas.width, _MIN_SIDE)
    font = _font(max(16, width // 32))
    margin, spacing = int(font.size) // 2, round(font.size * 0.3)
    text = "\n".join(_wrap(answer, font, width - 2 * margin))
    _, _, _, depth = ImageDraw.Draw(canvas).multiline_textbbox((0, 0), text, font=font, spacing=spacing)
    strip = Image.new("RGB", (width, canvas.height + round(depth) + 2 * margin), "white")
    strip.paste(canvas, (0, 0))
    ImageDraw.Draw(strip).multiline_text((margin, canvas.height + margin), text, "black", font, spacing=spacing)
    return strip


def colour_of(label: str) -> str:
    """The colour of a label, always the same."""
    return _PALETTE[crc32(label.encode()) % len(_PALETTE)]


def place_tags(
    detections: Sequence[Detection], boxes: Sequence[tuple[float, float, float, float]], size_wh: tuple[int, int]
) -> list[Tag]:
    """Label and confidence of each box, wholly inside a picture of `size_wh` pixels.

    A tag is above its box where there is room that no other tag has, else at another edge of it. Where
    every place is taken, it gets the one that hides the least of other tags.

    Args:
        detections: what to name.
        boxes: their x1, y1, x2, y2 in pixels of that picture.
        size_wh: width and height in pixels.
    """
    font = _font(_font_size(size_wh))
    depth = min(sum(font.getmetrics()) + 2 * (_padding(font) // 2), size_wh[1])
    tags: list[Tag] = []
    for item, box in zip(detections, boxes, strict=True):
        text = _shorten(item.label, f"{item.confidence:.2f}", font, size_wh[0] - 2 * _padding(font))
        width = min(round(font.getlength(text)) + 2 * _padding(font), size_wh[0])
        corners = list(_corners(box, (width, depth), size_wh))
        hidden = [sum(_overlap((x, y, x + width, y + depth), tag.rectangle) for tag in tags) for x, y in corners]
        x, y = corners[hidden.index(min(hidden))]
        tags.append(Tag(text, (x, y, x + width - 1, y + depth - 1), colour_of(item.label)))
    return tags


def _corners(
    box: tuple[float, float, float, float], tag_wh: tuple[int, int], size_wh: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """Left upper corners for a tag, the best first: above the box, inside its top, below, inside its bottom, between.

    Each is at the box's left edge first, then at its right; the last ones are beside the box. All are moved into
    the picture.
    """
    x1, y1, x2, y2 = map(round, box)
    width, depth = tag_wh
    between = range(y1 + depth, max(y1 + depth, y2 - depth), depth)
    rows = [*([y1 - depth] if y1 >= depth else []), y1, y2, y2 - depth, *between]
    places = [(x, y) for y in rows for x in (x1, x2 - width)]
    beside = [(x, y) for y in (y1, y2 - depth) for x in (x2, x1 - width)]
    for x, y in (*places, *beside):
        yield min(max(x, 0), size_wh[0] - width), min(max(y, 0), size_wh[1] - depth)


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> int:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def _shorten(label: str, score: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Label and score on one line of at most `width` pixels: the label is cut first."""
    label = " ".join(label.split())
    text = f"{label} {score}".strip()
    while label and font.getlength(text) > width:
        label = label[:-1].rstrip()
        text = f"{label}{_ELLIPSIS} {score}" if label else score
    return text


def _scale(size_wh: tuple[int, int]) -> float:
    narrow = min(_MIN_SHORT_SIDE / min(size_wh), _MAX_STRETCHED / max(size_wh))
    return max(1.0, _MIN_SIDE / max(size_wh), narrow)


def _scaled(box: tuple[float, float, float, float], scale: float) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box
    return x1 * scale, y1 * scale, x2 * scale, y2 * scale


def _enlarge(image: Image.Image, scale: float) -> Image.Image:
    if scale == 1:
        return image.convert("RGB")
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _thickness(size_wh: tuple[int, int]) -> int:
    return max(2, min(max(size_wh) // 250, min(size_wh) // 32))


def _font_size(size_wh: tuple[int, int]) -> int:
    """A 56th of the long side, but no more than a 6th of the short one."""
    return max(_MIN_FONT, min(max(size_wh) // 56, min(size_wh) // 6))


def _padding(font: ImageFont.FreeTypeFont) -> int:
    return max(2, round(font.size / 4))


def _ink_on(colour: str) -> str:
    """Black or white, whichever stands out more."""
    red, green, blue = ImageColor.getrgb(colour)[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "white"


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; line breaks stay, a longer word is broken."""
    lines = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            while font.getlength(longer) > width and len(longer) > 1:
                cut = _fitting(longer, font, width)
                lines.append(longer[:cut])
                longer = longer[cut:]
            line = longer
        lines.append(line)
    return lines


def _fitting(word: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """How many of its first characters fit into `width` pixels, at least one."""
    return next((end for end in range(len(word) - 1, 1, -1) if font.getlength(word[:end]) <= width), 1)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's own, part of every wheel
    return font
