"""The decode loop on a scripted session: no weights, no engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paliedge.backends.session import FloatArray, IdRange, IntArray, Session, Step
from paliedge.generation.constraints import Choice, Rule
from paliedge.generation.decoding import GeneratedToken, Prefix, decode_greedily

pytestmark = pytest.mark.bare

EOS = 1
HIDDEN = 3
IMAGE = 100
PROMPT = 101


@dataclass
class ScriptedCache:
    """What a real cache would hold: the embeddings so far, of each row."""

    rows: dict[int, list[float]] = field(default_factory=dict)


@dataclass
class ScriptedSession:
    """Answers each request with its `answers`, one after another, and writes down what it was asked.

    A request is known by its prompt's embedding.
    """

    answers: dict[int, list[int]]
    calls: list[tuple[str, IdRange]] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    caches: list[ScriptedCache] = field(default_factory=list)
    has_device_clock: bool = False
    graph_capture_s: float | None = None
    has_mask_decoder: bool = False
    max_batch: int = 8
    arithmetic: tuple[str, ...] = ()
    scores: dict[int, float] = field(default_factory=dict)

    def encode_image(self, pixel_values: FloatArray) -> FloatArray:
        raise AssertionError("the decode loop knows no images")

    def new_cache(self, batch: int = 1) -> ScriptedCache:
        raise AssertionError("the decode loop is given a cache")

    def prefill(
        self,
        cache: ScriptedCache,
        image_features: Sequence[FloatArray],
        prompt_embeds: FloatArray,
        allowed: IdRange,
        row: int = 0,
    ) -> Step:
        assert prompt_embeds.shape == (len(prompt_embeds), HIDDEN)
        cache.rows[row] = [*prompt_embeds[:, 0].tolist(), *np.concatenate(image_features)[:, 0].tolist()]
        return self._answer("prefill", cache, row, allowed)

    def decode(self, cache: ScriptedCache, inputs_embeds: FloatArray, allowed: Sequence[IdRange]) -> list[Step]:
        assert inputs_embeds.shape == (len(allowed), HIDDEN)
        self.widths.append(len(allowed))
        for row, value in enumerate(inputs_embeds[:, 0].tolist()):
            cache.rows[row].append(value)
        return [self._answer("decode", cache, row, one) for row, one in enumerate(allowed)]

    def repeat_decode(self, cache: ScriptedCache, allowed: Sequence[IdRange]) -> list[Step]:
        self.calls += [("repeat", one) for one in allowed]
        assert all(first == last for first, last in allowed)
        return [Step(token, self.scores.get(token, -9.0)) for token, _ in allowed]

    def move_row(self, cache: ScriptedCache, source: int, target: int) -> None:
        assert source > target
        cache.rows[target] = cache.rows.pop(source)

    def decode_masks(self, codes: IntArray) -> FloatArray:
        raise AssertionError("the decode loop knows no masks")

    def close(self) -> None:
        raise AssertionError("the decode loop does not own the session")

    def _answer(self, call: str, cache: ScriptedCache, row: int, allowed: IdRange) -> Step:
        self.calls.append((call, allowed))
        self.caches.append(cache)
        seen = cache.rows[row]
        said = len(seen) - seen.index(IMAGE) - 1
        token = self.answers[int(seen[0])][said]
        return Step(token, -token / 10)


def embed(tokens: Sequence[int]) -> FloatArray:
    return np.repeat(np.array(tokens, np.float32)[:, None], HIDDEN, 1)


def prefix(limit: int, rule: Rule = lambda token: (0, 99), prompt: int = PROMPT) -> Prefix:
    image = embed([IMAGE])
    return Prefix([image[:0], image], embed([prompt]), rule, limit)


def scripted(tokens: list[int], **rest: Any) -> ScriptedSession:
    return ScriptedSession({PROMPT: tokens}, **rest)


def decode(
    session: ScriptedSession, cache: ScriptedCache, limit: int, rule: Rule = lambda token: (0, 99)
) -> list[GeneratedToken]:
    checked: Session[ScriptedCache, FloatArray] = session
    return [step for _, step in decode_greedily(checked, cache, [prefix(limit, rule)], embed, eos=EOS)]


def test_decoding_ends_with_end_of_sequence() -> None:
    session = scripted([7, 8, EOS, 9])
    steps = decode(session, ScriptedCache(), limit=10)
    assert [(step.token, step.log_prob) for step in steps] == [(7, -0.7), (8, -0.8), (EOS, -0.1)]
    assert [call for call, _ in session.calls] == ["prefill", "decode", "decode"]


def test_end_of_sequence_out_of_prefill_needs_no_decode_step() -> None:
    session = scripted([EOS, 9])
    assert [step.token for step in decode(session, ScriptedCache(), limit=10)] == [EOS]
    assert len(session.calls) == 1


def test_decoding_ends_at_the_limit_without_a_step_to_spare() -> None:
    for limit in (1, 2, 3):
        session = scripted([7, 8, 9, 10])
        assert [step.token for step in decode(session, ScriptedCache(), limit)] == [7, 8, 9][:limit]
        assert len(session.calls) == limit


def test_the_cache_sees_the_prefix_and_then_every_token_but_the_last() -> None:
    session = scripted([7, 8, 9, EOS])
    cache = ScriptedCache({0: [55.0]})  # from an earlier request
    decode(session, cache, limit=10)
    assert cache.rows == {0: [PROMPT, IMAGE, 7, 8, 9]}
    assert all(used is cache for used in session.caches)


def test_the_rule_is_asked_before_every_step_with_the_token_before_it() -> None:
    session = scripted([7, 8, EOS])
    ranges: dict[int | None, IdRange] = {None: (5, 42), 7: (6, 43), 8: (0, 44)}
    decode(session, ScriptedCache(), limit=10, rule=ranges.__getitem__)
    assert [allowed for _, allowed in session.calls] == list(ranges.values())


def test_of_a_few_ids_the_likeliest_is_taken() -> None:
    session = scripted([7, 8, 20, EOS], scores={10: -3.0, 30: -1.0, 60: -2.0})
    choices: dict[int | None, Choice] = {7: frozenset({8, 9}), 8: frozenset({10, 30, 60})}
    steps = decode(session, ScriptedCache(), limit=10, rule=lambda token: choices.get(token, (0, 99)))
    assert [(step.token, step.log_prob) for step in steps] == [(7, -0.7), (8, -0.8), (30, -1.0), (EOS, -0.1)]
    assert session.calls[1:] == [
        ("decode", (8, 9)),
        ("decode", (10, 60)),
        ("repeat", (10, 10)),
        ("repeat", (30, 30)),
        ("repeat", (60, 60)),
        ("decode", (0, 99)),
    ]
    assert session.caches[0].rows[0][2:] == [7, 8, 30]


def test_a_token_is_handed_out_before_the_next_one_is_computed() -> None:
    session = scripted([7, 8, EOS])
    steps = decode_greedily(session, ScriptedCache(), [prefix(10)], embed, eos=EOS)
    assert session.calls == []
    assert next(steps)[1].token == 7
    assert len(session.calls) == 1
    assert next(steps)[1].token == 8
    assert len(session.calls) == 2


def test_a_step_is_timed_without_the_time_its_reader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0.0, 0.5)
    monkeypatch.setattr("paliedge.generation.decoding.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    times = []
    for _, step in decode_greedily(scripted([7, 8, EOS]), ScriptedCache(), [prefix(10)], embed, eos=EOS):
        times.append(step.ms)
        next(ticks)  # a slow reader
    assert times == [500, 500, 500]


ANSWERS = {40: [7, 8, 9, 10, EOS], 41: [EOS], 42: [11, EOS], 43: [12, 13, 14, 15, 16, 17], 44: [18, EOS], 45: [19, 20]}
LIMITS = {43: 6, 45: 2}


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_requests_of_a_batch_get_their_own_tokens_whoever_ends_first(batch: int) -> None:
    session, cache = ScriptedSession(ANSWERS), ScriptedCache()
    prefixes = {prompt: prefix(LIMITS.get(prompt, 10), prompt=prompt) for prompt in ANSWERS}
    found: dict[int, list[int]] = {prompt: [] for prompt in ANSWERS}
    for one, step in decode_greedily(session, cache, prefixes.values(), embed, eos=EOS, batch=batch):
        prompt = next(prompt for prompt, prefix in prefixes.items() if prefix is one)
        found[prompt].append(step.token)
    assert found == ANSWERS
    assert max(session.widths) == min(batch, 5)  # one of the six ends in prefill
    num_steps = sum(len(tokens) - 1 for tokens in ANSWERS.values())
    assert sum(session.widths) == num_steps
    assert len(session.widths) == (num_steps if batch == 1 else {2: 6, 3: 5, 8: 5}[batch])


def test_each_row_of_a_batch_has_its_own_rule() -> None:
    session = ScriptedSession({40: [7, 20, EOS], 41: [8, 21, EOS]}, scores={10: -3.0, 30: -1.0})
    few = prefix(10, lambda token: frozenset({10, 30}) if token == 7 else (0, 50), prompt=40)
    any_token = prefix(10, lambda token: (0, 60), prompt=41)
    found = [
        step.token for _, step in decode_greedily(session, ScriptedCache(), [few, any_token], embed, eos=EOS, batch=2)
    ]
    assert found == [7, 8, 30, 21, EOS, EOS]
    assert session.calls[2:4] == [("decode", (10, 30)), ("decode", (0, 60))]
    assert session.calls[4:8] == [("repeat", one) for one in ((10, 10), (21, 21), (30, 30), (21, 21))]


def test_a_request_is_not_taken_before_a_row_is_free_for_it() -> None:
    taken: list[int] = []

    def prefixes() -> Iterator[Prefix]:
        for prompt in ANSWERS:
            taken.append(prompt)
            yield prefix(LIMITS.get(prompt, 10), prompt=prompt)

    steps = decode_greedily(ScriptedSession(ANSWERS), ScriptedCache(), prefixes(), embed, eos=EOS, batch=2)
    said = [next(steps)[1].token for _ in range(3)]
    assert (said, taken) == ([7, EOS, 11], [40, 41, 42])  # the second one ended at once and left its row
    assert [next(steps)[1].token for _ in range(3)] == [8, EOS, 12]
    assert taken == [40, 41, 42, 43]
