"""Boxes from location tokens, read from token ids and never from text.

A box is four location tokens, y1 x1 y2 x2, each round(edge / size * 1023) of the squared image; its
label is the text behind it, up to ` ; ` or the next box. The inverse divides by 1023 too, as
big_vision's evaluation does, so that the last bin reaches the border.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from paliedge.manifest import Tokens

_SEPARATOR = re.compile(r"\s;(?:\s|$)")


class Detection(NamedTuple):
    """One labelled box.

    Attributes:
        label: the text behind the box; empty if there is none.
        box: x1, y1, x2, y2 in pixels of the image as it was given (after its EXIF rotation).
        box_normalized: the same, divided by width and height: 0 to 1.
    """

    label: str
    box: tuple[float, float, float, float]
    box_normalized: tuple[float, float, float, float]


class ParsedLocations(NamedTuple):
    """The boxes of an answer and the number of location groups that are no box."""

    detections: tuple[Detection, ...]
    num_malformed: int


def parse_locations(
    token_ids: Sequence[int], tokens: Tokens, decode: Callable[[Sequence[int]], str], image_wh: tuple[int, int]
) -> ParsedLocations:
    """Read the boxes of an answer.

    | location tokens in a row | meaning |
    |---|---|
    | 4 | a box |
    | 8, 12, ... | boxes of which only the last has a label |
    | any other number | malformed: no box |

    A box with y1 >= y2 or x1 >= x2 is malformed too (big_vision counts it as no box). Segmentation
    tokens between a box and its label are passed over. Text before the first box is no label.

    Args:
        token_ids: the generated ids.
        tokens: the bundle's token ids.
        decode: text of some ids.
        image_wh: width and height in pixels that the boxes refer to.
    """
    detections: list[Detection] = []
    num_malformed = 0
    edges: list[int] = []
    for kind, group in groupby(token_ids, lambda token: _kind(token, tokens)):
        ids = list(group)
        if kind == "location":
            edges = [token - tokens.first_location for token in ids]
            boxes, num_bad = _boxes_from_bins(edges, tokens.num_locations, image_wh)
            num_malformed += num_bad
            detections += boxes
            labelled = bool(boxes) and _is_box(edges[-4:])
        elif kind == "text" and edges:
            if labelled:
                detections[-1] = detections[-1]._replace(label=_label_from_text(decode(ids)))
            edges, labelled = [], False
    return ParsedLocations(tuple(detections), num_malformed)


def location_tokens_from_box(
    box: tuple[float, float, float, float], image_wh: tuple[int, int], num_locations: int = 1024
) -> str:
    """The four tokens of a box x1, y1, x2, y2 in pixels, for prompts that point at a region."""
    x1, y1, x2, y2 = box
    width, height = image_wh
    shares = (y1 / height, x1 / width, y2 / height, x2 / width)
    top = num_locations - 1
    return "".join(f"<loc{min(max(round(share * top), 0), top):04d}>" for share in shares)


def _kind(token: int, tokens: Tokens) -> str:
    if 0 <= token - tokens.first_location < tokens.num_locations:
        return "location"
    if 0 <= token - tokens.first_segmentation < tokens.num_segmentations:
        return "segmentation"
    return "text"


def _boxes_from_bins(bins: list[int], num_locations: int, image_wh: tuple[int, int]) -> tuple[list[Detection], int]:
    if len(bins) % 4:
        return [], 1
    groups = [bins[start : start + 4] for start in range(0, len(bins), 4)]
    boxes = [_detection_from_bins(group, num_locations, image_wh) for group in groups if _is_box(group)]
    return boxes, len(groups) - len(boxes)


def _is_box(bins: list[int]) -> bool:
    y1, x1, y2, x2 = bins
    return y1 < y2 and x1 < x2


def _detection_from_bins(bins: list[int], num_locations: int, image_wh: tuple[int, int]) -> Detection:
    y1, x1, y2, x2 = (place / (num_locations - 1) for place in bins)
    width, height = image_wh
    return Detection("", (x1 * width, y1 * height, x2 * width, y2 * height), (x1, y1, x2, y2))


def _label_from_text(text: str) -> str:
    return _SEPARATOR.split(text, maxsplit=1)[0].strip()
