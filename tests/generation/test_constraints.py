"""A model that says anything at random is held to whole boxes; nothing that is well formed is forbidden."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paliedge.bundle.manifest import Tokens
from paliedge.generation.constraints import AllowedTokens, BoxConstraint, allow_all
from paliedge.results.locations import parse_locations

pytestmark = pytest.mark.bare

TOKENS = Tokens(
    bos=2,
    eos=1,
    pad=0,
    image=1300,
    newline=3,
    first_location=100,
    num_locations=1024,
    first_segmentation=1124,
    num_segmentations=128,
    vocab_size=1252,
)
SEPARATOR = 10
LABELS = ([20, 21], [20, 22, 23], [30])


def decode(ids: object) -> str:
    assert isinstance(ids, list)
    return "".join(" ;" if token == SEPARATOR else f" w{token}" for token in ids)


def may_come(choice: AllowedTokens, token: int) -> bool:
    return token in choice if isinstance(choice, frozenset) else choice[0] <= token <= choice[1]


def say_at_random(rule: BoxConstraint, seed: int, length: int) -> list[int]:
    """What a model says whose every token is drawn at random, locations more often than there are of them."""
    rng = random.Random(seed)
    said: list[int] = []
    token: int | None = None
    for _ in range(length):
        choice = rule(token)
        wanted = [rng.randrange(TOKENS.vocab_size), rng.randrange(100, 1124), rng.randrange(4, 60), 1]
        fitting = [one for one in wanted if may_come(choice, one)]
        if not fitting:
            fitting = sorted(choice) if isinstance(choice, frozenset) else list(choice)
        token = rng.choice(fitting)
        if token == TOKENS.eos:
            break
        said.append(token)
    return said


@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([None, LABELS]))
@settings(deadline=None, max_examples=300)
def test_whatever_is_said_holds_no_malformed_box(seed: int, masks: bool, labels: tuple[list[int], ...] | None) -> None:
    rule = BoxConstraint(TOKENS, masks=masks, labels=labels, separator=[SEPARATOR])
    said = say_at_random(rule, seed, 120)
    if len(said) == 120:  # cut off: what is begun is not whole
        while said and not (said[-1] >= 100 and rule_restarts(said)):
            said.pop()
        said = said[:-1]
    parsed = parse_locations(said, [0.0] * len(said), TOKENS, decode, (1000, 1000))
    assert parsed.num_malformed == 0
    assert all(len(item.mask_codes) == (16 if masks else 0) for item in parsed.detections)
    if labels is not None:
        spelled = {"".join(f" w{token}" for token in label).strip() for label in labels}
        assert {item.label for item in parsed.detections} <= spelled


def rule_restarts(said: list[int]) -> bool:
    """Whether the last token is the first of a box."""
    before = said[-2] if len(said) > 1 else 0
    return 100 <= said[-1] < 1124 and not 100 <= before < 1124


@pytest.mark.parametrize("masks", [False, True])
def test_an_answer_that_is_well_formed_may_be_given(masks: bool) -> None:
    mask = list(range(1124, 1140)) if masks else []
    answers = [
        [],
        [50, 51],
        [100, 100, 1123, 1123, *mask, 20, 21],
        [150, 160, 151, 161, *mask, 20, SEPARATOR, 100, 100, 101, 101, *mask, 30, SEPARATOR],
        [50, 150, 160, 151, 161, *mask, 20, 150, 160, 151, 161, *mask, 30],
    ]
    for answer in answers:
        rule = BoxConstraint(TOKENS, masks=masks)
        before: int | None = None
        for token in [*answer, TOKENS.eos]:
            assert may_come(rule(before), token), (answer, token)
            before = token


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ([], 1123),  # nothing fits below the last bin
        ([], 1124),
        ([200], 50),
        ([200], 1),
        ([200], 1123),
        ([200, 300], 200),
        ([200, 300], 199),
        ([200, 300, 201], 300),
        ([200, 300, 201], 1124),
        ([200, 300, 201, 301], 400),
        ([200, 300, 201, 301], 1124),
        ([200, 300, 201, 301, 20], 1124),
    ],
)
def test_a_token_that_would_break_a_box_may_not_come(said: list[int], refused: int) -> None:
    rule = BoxConstraint(TOKENS, masks=False)
    choice = rule(None)
    for token in said:
        assert may_come(choice, token)
        choice = rule(token)
    assert not may_come(choice, refused)


def test_masks_are_asked_for_in_full() -> None:
    rule = BoxConstraint(TOKENS, masks=True)
    for token in (None, 200, 300, 400):
        rule(token)
    choices = [rule(500), *(rule(1200) for _ in range(16))]
    assert choices[:16] == [(1124, 1251)] * 16
    assert may_come(choices[16], 20)


def test_labels_are_those_that_were_asked_for() -> None:
    rule = BoxConstraint(TOKENS, masks=False, labels=LABELS, separator=[SEPARATOR, 11])
    for token in (None, 200, 300, 400):
        rule(token)
    assert [rule(token) for token in (500, 20, 22, 23, SEPARATOR, 11)] == [
        frozenset({20, 30}),
        frozenset({21, 22}),
        frozenset({23}),
        frozenset({TOKENS.eos, SEPARATOR}),
        frozenset({11}),
        (100, 1122),
    ]


def test_without_a_rule_every_token_may_come() -> None:
    rule = allow_all(TOKENS)
    assert rule(None) == rule(1124) == (0, 1251)
