"""Boxes from location tokens and masks' codes from segmentation tokens, read from ids and never from text.

A box is four location tokens, y1 x1 y2 x2, each round(edge / size * 1023) of the squared image. The 16
segmentation tokens behind it, if any, are its mask. Its label is the text behind those, up to ` ;` or the
next box. The inverse divides by 1023 too, as big_vision's evaluation does: so the last bin reaches the
border.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from paliedge.bundle.manifest import CODES_PER_MASK, Tokens
from paliedge.inputs.preprocess import WHOLE, ContentBox
from paliedge.results.masks import Mask

_SEPARATOR = re.compile(r"\s;")
_Box = tuple[float, float, float, float]


class Detection(NamedTuple):
    """One labelled box.

    Attributes:
        label: the text behind the box; without one, the label that was asked for if it was the only one, else empty.
        box: x1, y1, x2, y2 in pixels of the image as it was given (after its EXIF rotation).
        box_normalized: the same, divided by width and height: 0 to 1.
        log_probs: natural logarithms of its tokens' probabilities among all tokens: four of the box, 16 of
            the mask if it has one, then the label's.
        mask_codes: the mask's 16 codes; empty without a mask.
        mask: what they show; None without a mask, or in a bundle without a mask decoder.
        uncut_box: the box as it was said, where it reaches beyond the image (into a letterbox's padding); else None.
    """

    label: str
    box: _Box
    box_normalized: _Box
    log_probs: tuple[float, ...]
    mask_codes: tuple[int, ...] = ()
    mask: Mask | None = None
    uncut_box: _Box | None = None

    @property
    def confidence(self) -> float:
        """Geometric mean of the four location tokens' probabilities, 0 to 1.

        It ranks boxes, better than chance and than their order; it is no probability that a box is right.
        """
        return math.exp(fmean(self.log_probs[:4]))


def box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes, x1 y1 x2 y2 or y1 x1 y2 x2 both; 0 for one without an area."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(0, right - left) * max(0, bottom - top)

    low, high = map(max, one[:2], other[:2]), map(min, one[2:], other[2:])
    common = area(*low, *high)
    return common / (area(*one) + area(*other) - common) if common else 0.0


class ParsedLocations(NamedTuple):
    """The boxes of an answer and the number of location or segmentation groups that are no box or mask."""

    detections: tuple[Detection, ...]
    num_malformed: int


def parse_locations(
    token_ids: Sequence[int],
    log_probs: Sequence[float],
    tokens: Tokens,
    decode: Callable[[Sequence[int]], str],
    image_wh: tuple[int, int],
    content_box: ContentBox = WHOLE,
    requested_label: str = "",
) -> ParsedLocations:
    """Read the boxes of an answer, see `LocationParser`; `log_probs` has one entry a token."""
    parser = LocationParser(tokens, decode, image_wh, content_box, requested_label)
    detections: list[Detection] = []
    for token, log_prob in zip(token_ids, log_probs, strict=True):
        detections += parser.push(token, log_prob)
    return ParsedLocations((*detections, *parser.finish()), parser.num_malformed)


class LocationParser:
    """Reads the boxes of an answer, a token at a time.

    | location tokens in a row | meaning |
    |---|---|
    | 4 | a box |
    | 8, 12, ... | boxes of which only the last has a mask and a label |
    | any other number | malformed: no box |

    A box with y1 >= y2 or x1 >= x2 is malformed too (big_vision counts it as no box). Segmentation tokens
    between a box and its label are its mask; another number of them than 16 is malformed: the box stays,
    without a mask. Text before the first box is no label.

    Args:
        tokens: the bundle's token ids.
        decode: text of some ids.
        image_wh: width and height in pixels that the boxes refer to.
        content_box: where the image lies in the square; boxes are cut to it, and one all beside it is malformed.
        requested_label: the label of boxes without one, as models answer that were trained on referring expressions.

    Attributes:
        num_malformed: location and segmentation groups so far that are no box or no mask.
    """

    def __init__(
        self,
        tokens: Tokens,
        decode: Callable[[Sequence[int]], str],
        image_wh: tuple[int, int],
        content_box: ContentBox = WHOLE,
        requested_label: str = "",
    ) -> None:
        self.num_malformed = 0
        self._tokens = tokens
        self._decode = decode
        self._image_wh = image_wh
        self._content_box = content_box
        self._requested_label = requested_label
        self._bins: list[int] = []
        self._codes: list[int] = []
        self._text: list[int] = []
        self._log_probs: list[float] = []

    def push(self, token: int, log_prob: float) -> list[Detection]:
        """Take the next token; returns the detections that it completes."""
        tokens = self._tokens
        if 0 <= (location := token - tokens.first_location) < tokens.num_locations:
            done = self.finish() if self._codes or self._text else []
            self._bins.append(location)
            self._log_probs.append(log_prob)
            return done
        if not self._bins:
            return []
        if 0 <= (code := token - tokens.first_segmentation) < tokens.num_segmentations:
            if not self._text:
                self._codes.append(code)
                self._log_probs.append(log_prob)
            return []
        self._text.append(token)
        self._log_probs.append(log_prob)
        return self.finish() if _SEPARATOR.search(self._decode(self._text)) else []

    def finish(self) -> list[Detection]:
        """The detections that are pending; the next token begins anew."""
        bins, codes, label = self._bins, self._codes, _SEPARATOR.split(self._decode(self._text), maxsplit=1)[0].strip()
        log_probs = tuple(self._log_probs)
        self._bins, self._codes, self._text, self._log_probs = [], [], [], []
        if len(bins) % 4:
            self.num_malformed += 1
            return []
        if codes and len(codes) != CODES_PER_MASK:
            self.num_malformed += 1
            codes = []
        detections = []
        for start in range(0, len(bins), 4):
            said = self._edges(bins[start : start + 4])
            box = _cut(said)
            if box is None:
                self.num_malformed += 1
                continue
            is_last = start + 4 == len(bins)
            detections.append(
                Detection(
                    (label if is_last else "") or self._requested_label,
                    self._in_pixels(box),
                    box,
                    log_probs[start:] if is_last else log_probs[start : start + 4],
                    tuple(codes) if is_last else (),
                    uncut_box=None if said == box else self._in_pixels(said),
                )
            )
        return detections

    def _edges(self, bins: Sequence[int]) -> _Box:
        """Four bins as edges x1, y1, x2, y2, of which 0 to 1 lies in the image."""
        y1, x1, y2, x2 = (location / (self._tokens.num_locations - 1) for location in bins)
        left, top, right, bottom = self._content_box
        (x1, x2), (y1, y2) = (
            ((first - low) / (high - low), (last - low) / (high - low))
            for first, last, low, high in ((x1, x2, left, right), (y1, y2, top, bottom))
        )
        return x1, y1, x2, y2

    def _in_pixels(self, box: _Box) -> _Box:
        (x1, y1, x2, y2), (width, height) = box, self._image_wh
        return x1 * width, y1 * height, x2 * width, y2 * height


def _cut(box: _Box) -> _Box | None:
    """What of a box lies between 0 and 1; None where that is nothing, or no box."""
    x1, y1, x2, y2 = (min(max(edge, 0.0), 1.0) for edge in box)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def location_tokens_from_box(box: _Box, image_wh: tuple[int, int], num_locations: int = 1024) -> str:
    """The four tokens of a box x1, y1, x2, y2 in pixels, for prompts that point at a region."""
    x1, y1, x2, y2 = box
    width, height = image_wh
    shares = (y1 / height, x1 / width, y2 / height, x2 / width)
    top = num_locations - 1
    return "".join(f"<loc{min(max(round(share * top), 0), top):04d}>" for share in shares)
