"""Boxes out of token ids: a table of answers, the way back, and any ids at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paliedge.bundle.manifest import Tokens
from paliedge.results.locations import (
    Detection,
    LocationParser,
    ParsedLocations,
    location_tokens_from_box,
    parse_locations,
)

pytestmark = pytest.mark.bare

FIRST_LOCATION = 100
FIRST_SEGMENTATION = 2000
TOKENS = Tokens(
    bos=2,
    eos=1,
    pad=0,
    image=9000,
    newline=3,
    first_location=FIRST_LOCATION,
    num_locations=1024,
    first_segmentation=FIRST_SEGMENTATION,
    num_segmentations=128,
    vocab_size=9000,
)
WORDS = [
    " cat",
    " dog",
    " ;",
    " man's hat",
    " t.v.",
    " crème brûlée 猫",
    " a",
    "/b (c),",
    " d",
    " x-ray",
    "-tube",
    ";",
    " ; ",
]
TEXT = {10 + index: word for index, word in enumerate(WORDS)}
IDS = {word: token for token, word in TEXT.items()}

WIDTH, HEIGHT = 2046, 1023
"""So that a bin is two pixels wide and one high."""


def decode(ids: Sequence[int]) -> str:
    return "".join(TEXT[token] for token in ids)


def ids_from(*parts: str | int) -> list[int]:
    """Words as they are, numbers as location tokens."""
    return [IDS[part] if isinstance(part, str) else FIRST_LOCATION + part for part in parts]


def segmentation(count: int) -> list[int]:
    return [FIRST_SEGMENTATION + index * 8 for index in range(count)]


def parse_with(
    token_ids: Sequence[int], tokens: Tokens, decode: Callable[[Sequence[int]], str], image_wh: tuple[int, int]
) -> ParsedLocations:
    return parse_locations(token_ids, [-0.5] * len(token_ids), tokens, decode, image_wh)


def parse(token_ids: Sequence[int]) -> ParsedLocations:
    return parse_with(token_ids, TOKENS, decode, (WIDTH, HEIGHT))


A = (10, 20, 30, 40)
B = (0, 0, 1023, 1023)
BOX_A = (40.0, 10.0, 80.0, 30.0)
BOX_B = (0.0, 0.0, 2046.0, 1023.0)

CASES: dict[str, tuple[list[int], list[tuple[str, tuple[float, ...]]], int]] = {
    "one-box": (ids_from(*A, " cat"), [("cat", BOX_A)], 0),
    "several": (ids_from(*A, " cat", " ;", *B, " dog"), [("cat", BOX_A), ("dog", BOX_B)], 0),
    "several-of-one-label": (ids_from(*A, " cat", " ;", *B, " cat"), [("cat", BOX_A), ("cat", BOX_B)], 0),
    "separator-in-one-token": (ids_from(*A, " cat", " ; ", *B, " dog"), [("cat", BOX_A), ("dog", BOX_B)], 0),
    "no-separator": (ids_from(*A, " cat", *B, " dog"), [("cat", BOX_A), ("dog", BOX_B)], 0),
    "no-label": (ids_from(*A), [("", BOX_A)], 0),
    "no-label-before-another-box": (ids_from(*A, " ;", *B, " dog"), [("", BOX_A), ("dog", BOX_B)], 0),
    "1-location": (ids_from(10, " cat"), [], 1),
    "3-locations": (ids_from(10, 20, 30, " cat"), [], 1),
    "5-locations": (ids_from(*A, 50, " cat"), [], 1),
    "8-locations": (ids_from(*A, *B, " cat"), [("", BOX_A), ("cat", BOX_B)], 0),
    "8-locations-the-last-4-no-box": (ids_from(*A, 9, 9, 9, 9, " cat"), [("", BOX_A)], 1),
    "8-locations-the-first-4-no-box": (ids_from(9, 9, 9, 9, *A, " cat"), [("cat", BOX_A)], 1),
    "3-locations-between-boxes": (
        ids_from(*A, " cat", " ;", 1, 2, 3, " d", " ;", *B, " dog"),
        [("cat", BOX_A), ("dog", BOX_B)],
        1,
    ),
    "swapped-y": (ids_from(30, 20, 10, 40, " cat"), [], 1),
    "swapped-x": (ids_from(10, 40, 30, 20, " cat"), [], 1),
    "no-height": (ids_from(10, 20, 10, 40, " cat"), [], 1),
    "no-width": (ids_from(10, 20, 30, 20, " cat"), [], 1),
    "a-label-does-not-move-to-the-box-before-a-malformed-one": (
        ids_from(*A, " ;", 30, 20, 10, 40, " cat"),
        [("", BOX_A)],
        1,
    ),
    "text-first": (ids_from(" dog", *A, " cat"), [("cat", BOX_A)], 0),
    "text-only": (ids_from(" cat", " ;", " dog"), [], 0),
    "empty": ([], [], 0),
    "trailing-separator": (ids_from(*A, " cat", " ;"), [("cat", BOX_A)], 0),
    "text-behind-the-separator": (ids_from(*A, " cat", " ;", " dog"), [("cat", BOX_A)], 0),
    "truncated-second-box": (ids_from(*A, " cat", " ;", 0, 0, 1023), [("cat", BOX_A)], 1),
    "truncated-second-label": (ids_from(*A, " cat", " ;", *B), [("cat", BOX_A), ("", BOX_B)], 0),
    "apostrophe": (ids_from(*A, " man's hat", " ;", *B, " dog"), [("man's hat", BOX_A), ("dog", BOX_B)], 0),
    "dots": (ids_from(*A, " t.v."), [("t.v.", BOX_A)], 0),
    "unicode": (ids_from(*A, " crème brûlée 猫"), [("crème brûlée 猫", BOX_A)], 0),
    "punctuation": (ids_from(*A, " a", "/b (c),", " d"), [("a/b (c), d", BOX_A)], 0),
    "hyphens": (ids_from(*A, " x-ray", "-tube"), [("x-ray-tube", BOX_A)], 0),
    "semicolon-inside-a-word": (ids_from(*A, " a", ";", " d"), [("a; d", BOX_A)], 0),
    "segmentation-before-the-label": (ids_from(*A) + segmentation(16) + ids_from(" cat"), [("cat", BOX_A)], 0),
    "segmentation-and-no-label": (ids_from(*A) + segmentation(16), [("", BOX_A)], 0),
    "segmentation-of-several": (
        ids_from(*A) + segmentation(16) + ids_from(" cat", " ;", *B) + segmentation(16) + ids_from(" dog"),
        [("cat", BOX_A), ("dog", BOX_B)],
        0,
    ),
    "segmentation-behind-the-label": (ids_from(*A, " cat") + segmentation(16), [("cat", BOX_A)], 0),
    "segmentation-between-two-boxes": (
        ids_from(*A) + segmentation(16) + ids_from(*B, " dog"),
        [("", BOX_A), ("dog", BOX_B)],
        0,
    ),
}


@pytest.mark.parametrize(("token_ids", "expected", "num_malformed"), CASES.values(), ids=CASES)
def test_an_answer_is_read_as_its_boxes(
    token_ids: list[int], expected: list[tuple[str, tuple[float, ...]]], num_malformed: int
) -> None:
    detections, malformed = parse(token_ids)
    assert [item.label for item in detections] == [label for label, _ in expected]
    for item, (_, box) in zip(detections, expected, strict=True):
        assert item.box == pytest.approx(box)
    assert malformed == num_malformed


CODES = tuple(range(0, 128, 8))
MASKS: dict[str, tuple[list[int], list[tuple[int, ...]], int]] = {
    "mask-and-label": (ids_from(*A) + segmentation(16) + ids_from(" cat"), [CODES], 0),
    "mask-and-no-label": (ids_from(*A) + segmentation(16), [CODES], 0),
    "no-mask": (ids_from(*A, " cat"), [()], 0),
    "15-codes": (ids_from(*A) + segmentation(15) + ids_from(" cat"), [()], 1),
    "17-codes": (ids_from(*A) + segmentation(16) + [FIRST_SEGMENTATION] + ids_from(" cat"), [()], 1),
    "codes-behind-the-label": (ids_from(*A, " cat") + segmentation(16), [()], 0),
    "codes-without-a-box": (segmentation(16) + ids_from(" cat"), [], 0),
    "codes-of-the-last-of-two-boxes": (ids_from(*A, *B) + segmentation(16), [(), CODES], 0),
    "codes-of-no-box": (ids_from(9, 9, 9, 9) + segmentation(16) + ids_from(" cat"), [], 1),
    "two-masks": (
        ids_from(*A) + segmentation(16) + ids_from(" ;", *B) + segmentation(16) + ids_from(" dog"),
        [CODES, CODES],
        0,
    ),
}


@pytest.mark.parametrize(("token_ids", "expected", "num_malformed"), MASKS.values(), ids=MASKS)
def test_sixteen_segmentation_tokens_behind_a_box_are_its_mask(
    token_ids: list[int], expected: list[tuple[int, ...]], num_malformed: int
) -> None:
    detections, malformed = parse(token_ids)
    assert [item.mask_codes for item in detections] == expected
    assert malformed == num_malformed


def test_a_detection_has_the_log_probabilities_of_its_own_tokens() -> None:
    token_ids = ids_from(" dog", *A) + segmentation(16) + ids_from(" cat", " ;", *B, *A, " x-ray", "-tube")
    log_probs = [-float(place) for place in range(len(token_ids))]
    first, second, third = parse_locations(token_ids, log_probs, TOKENS, decode, (WIDTH, HEIGHT)).detections
    assert [-value for value in first.log_probs] == list(range(1, 23))  # with the separator that ends it
    assert [-value for value in second.log_probs] == [23, 24, 25, 26]
    assert [-value for value in third.log_probs] == [27, 28, 29, 30, 31, 32]
    assert first.confidence == pytest.approx((math.e**-1 * math.e**-2 * math.e**-3 * math.e**-4) ** 0.25)
    assert 0 < second.confidence < first.confidence < 1


def test_a_detection_is_known_as_soon_as_its_last_token_is() -> None:
    parser = LocationParser(TOKENS, decode, (WIDTH, HEIGHT))
    token_ids = ids_from(*A, " cat", " ;", *B, " dog", *A)
    found = [[item.label for item in parser.push(token, 0.0)] for token in token_ids]
    assert found == [[], [], [], [], [], ["cat"], [], [], [], [], [], ["dog"], [], [], []]
    assert [item.box for item in parser.finish()] == [BOX_A]
    assert parser.finish() == []


def test_a_box_is_y1_x1_y2_x2_in_1023rds_of_height_and_width() -> None:
    (item,), _ = parse_with(ids_from(0, 341, 682, 1023), TOKENS, decode, (300, 90))
    assert item.box_normalized == pytest.approx((1 / 3, 0, 1, 2 / 3))
    assert item.box == pytest.approx((100, 0, 300, 60))


def test_boxes_in_a_letterbox_are_mapped_back_and_cut_to_the_image() -> None:
    """An image of 200 x 100 pixels in the middle half of the square's height."""
    token_ids = ids_from(256, 0, 767, 1023, " cat", " ;", 0, 512, 511, 1023, " dog", " ;", 0, 0, 100, 1023, " a")
    found, malformed = parse_locations(
        token_ids, [0.0] * len(token_ids), TOKENS, decode, (200, 100), (0, 0.25, 1, 0.75)
    )
    assert [item.label for item in found] == ["cat", "dog"]
    assert malformed == 1  # all of it lies in the padding
    assert found[0].box == pytest.approx((0, 0, 200, 100), abs=0.3)
    assert found[1].box == pytest.approx((100, 0, 200, 50), abs=0.3)
    assert found[0].uncut_box is None or found[0].uncut_box == pytest.approx(found[0].box, abs=0.3)
    assert found[1].uncut_box == pytest.approx((100, -50, 200, 50), abs=0.3)


def test_boxes_without_a_label_have_the_only_one_that_was_asked_for() -> None:
    token_ids = ids_from(*A, " ;", *A, *B, " dog")
    found, _ = parse_locations(
        token_ids, [0.0] * len(token_ids), TOKENS, decode, (WIDTH, HEIGHT), requested_label="left cat"
    )
    assert [item.label for item in found] == ["left cat", "left cat", "dog"]


def test_the_number_of_bins_comes_from_the_tokens() -> None:
    (item,), _ = parse_with([5, 5, 9, 9], TOKENS_OF_FIVE_BINS, decode, (8, 8))
    assert item.box == (0, 0, 8, 8)


TOKENS_OF_FIVE_BINS = Tokens(
    bos=2,
    eos=1,
    pad=0,
    image=200,
    newline=3,
    first_location=5,
    num_locations=5,
    first_segmentation=120,
    num_segmentations=8,
    vocab_size=200,
)


def test_tokens_behind_the_last_location_and_segmentation_token_are_text() -> None:
    asked: list[list[int]] = []

    def spy(ids: Sequence[int]) -> str:
        asked.append(list(ids))
        return " x"

    behind = [FIRST_LOCATION - 1, FIRST_LOCATION + 1024, FIRST_SEGMENTATION - 1, FIRST_SEGMENTATION + 128]
    (item,), malformed = parse_with([*ids_from(*A), *behind], TOKENS, spy, (WIDTH, HEIGHT))
    assert (item.label, malformed, asked[-1]) == ("x", 0, behind)


@pytest.mark.parametrize(
    ("box", "image_wh", "text"),
    [
        ((0, 0, 640, 480), (640, 480), "<loc0000><loc0000><loc1023><loc1023>"),
        ((160, 120, 320, 480), (640, 480), "<loc0256><loc0256><loc1023><loc0512>"),
        ((-5, -5, 700, 500), (640, 480), "<loc0000><loc0000><loc1023><loc1023>"),
    ],
)
def test_a_box_is_spelled_in_four_tokens(
    box: tuple[float, float, float, float], image_wh: tuple[int, int], text: str
) -> None:
    assert location_tokens_from_box(box, image_wh) == text


def ids_from_tokens(text: str) -> list[int]:
    return [FIRST_LOCATION + int(name.removeprefix("<loc")) for name in text.split(">") if name]


bins = st.tuples(*[st.integers(0, 1023)] * 4).filter(lambda place: place[0] < place[2] and place[1] < place[3])
sizes = st.tuples(st.integers(1, 8000), st.integers(1, 8000))


@given(bins, sizes)
@settings(deadline=None, max_examples=200)
def test_a_box_that_was_read_is_spelled_with_the_same_tokens(place: tuple[int, ...], image_wh: tuple[int, int]) -> None:
    token_ids = [FIRST_LOCATION + edge for edge in place]
    (item,), _ = parse_with(token_ids, TOKENS, decode, image_wh)
    assert ids_from_tokens(location_tokens_from_box(item.box, image_wh)) == token_ids


@given(st.data(), sizes)
@settings(deadline=None, max_examples=200)
def test_a_box_that_was_spelled_is_read_within_half_a_bin(data: st.DataObject, image_wh: tuple[int, int]) -> None:
    width, height = image_wh
    x1, y1 = data.draw(st.floats(0, 0.9)) * width, data.draw(st.floats(0, 0.9)) * height
    box = (x1, y1, x1 + 0.05 * width, y1 + 0.05 * height)
    (item,), _ = parse_with(ids_from_tokens(location_tokens_from_box(box, image_wh)), TOKENS, decode, image_wh)
    for read, edge, size in zip(item.box, box, (width, height, width, height), strict=True):
        assert abs(read - edge) <= 0.5001 * size / 1023


any_id = st.one_of(
    st.integers(-5, 10_000),
    st.integers(FIRST_LOCATION, FIRST_LOCATION + 1023),
    st.integers(FIRST_SEGMENTATION, FIRST_SEGMENTATION + 127),
    st.sampled_from(sorted(TEXT)),
)


@given(st.lists(st.one_of(any_id.map(lambda token: [token]), bins.map(lambda place: ids_from(*place)))), sizes)
@settings(deadline=None, max_examples=500)
def test_any_ids_give_boxes_inside_the_image_and_never_an_error(
    groups: list[list[int]], image_wh: tuple[int, int]
) -> None:
    token_ids = [token for group in groups for token in group]
    detections, malformed = parse_with(token_ids, TOKENS, lambda ids: "".join(TEXT.get(i, "?") for i in ids), image_wh)
    for item in detections:
        assert_inside(item, image_wh)
    num_locations = sum(FIRST_LOCATION <= token < FIRST_LOCATION + 1024 for token in token_ids)
    num_codes = sum(FIRST_SEGMENTATION <= token < FIRST_SEGMENTATION + 128 for token in token_ids)
    assert len(detections) * 4 + malformed <= num_locations + num_codes
    assert bool(detections or malformed) == bool(num_locations)


def assert_inside(item: Detection, image_wh: tuple[int, int]) -> None:
    for (x1, y1, x2, y2), (width, height) in ((item.box, image_wh), (item.box_normalized, (1, 1))):
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
    assert item.label == item.label.strip()
    assert " ; " not in item.label
