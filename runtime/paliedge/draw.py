"""Annotated pictures: masks, boxes with their labels, and an answer below, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from paliedge.locations import Detection
from paliedge.masks import Mask

_PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
"""Okabe and Ito's, which colour-blind eyes tell apart."""
_MASK_OPACITY = 0.5
_MIN_SIDE = 560
"""Smaller pictures are enlarged to this, so that labels can be read."""


def draw_detections(image: Image.Image, detections: Sequence[Detection]) -> Image.Image:
    """A copy of `image` with a coloured box a detection, its mask half transparent; a label has its own colour."""
    scale = max(1.0, _MIN_SIDE / max(image.size))
    canvas = _enlarge(image, scale)
    for item in detections:
        if item.mask:
            enlarged = Mask(item.mask.values, _scaled(item.box, scale), canvas.size)
            stencil = Image.fromarray(enlarged.to_array().astype(np.uint8) * round(255 * _MASK_OPACITY))
            canvas.paste(colour_of(item.label), mask=stencil)
    draw = ImageDraw.Draw(canvas)
    unit = max(canvas.size) / 280
    for item in detections:
        colour, box = colour_of(item.label), _scaled(item.box, scale)
        draw.rectangle(box, outline=colour, width=max(2, round(unit * 1.5)))
        tag = f"{item.label} {item.confidence:.2f}".strip()
        _draw_tag(draw, tag, box[:2], colour, canvas.size, round(unit * 8))
    return canvas


def colour_of(label: str) -> str:
    """The colour of a label, always the same."""
    return _PALETTE[crc32(label.encode()) % len(_PALETTE)]


def _scaled(box: tuple[float, float, float, float], scale: float) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box
    return x1 * scale, y1 * scale, x2 * scale, y2 * scale


def draw_answer(image: Image.Image, answer: str) -> Image.Image:
    """A copy of `image` with `answer` on a strip below it."""
    canvas = _enlarge(image, max(1.0, _MIN_SIDE / max(image.size)))
    font = _font(max(12, max(canvas.size) // 28))
    margin = int(font.size) // 2
    lines = _wrap(answer, font, canvas.width - 2 * margin)
    strip = Image.new("RGB", (canvas.width, canvas.height + len(lines) * round(font.size * 1.3) + 2 * margin), "white")
    strip.paste(canvas, (0, 0))
    ImageDraw.Draw(strip).multiline_text(
        (margin, canvas.height + margin), "\n".join(lines), fill="black", font=font, spacing=round(font.size * 0.3)
    )
    return strip


def _enlarge(image: Image.Image, scale: float) -> Image.Image:
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _draw_tag(
    draw: ImageDraw.ImageDraw,
    text: str,
    corner: tuple[float, float],
    colour: str,
    size_wh: tuple[int, int],
    height: int,
) -> None:
    """The label on its colour, above the box, or inside it where there is no room above."""
    font = _font(max(10, height))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, depth = right - left + 6, bottom - top + 6
    x = max(0.0, min(corner[0], size_wh[0] - width))
    y = corner[1] - depth if corner[1] >= depth else corner[1]
    draw.rectangle((x, y, x + width, y + depth), fill=colour)
    draw.text((x + 3 - left, y + 3 - top), text, fill="black", font=font)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's own, part of every wheel
    return font
