"""The decode loop on a scripted session: no weights, no TensorRT."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paliedge.backends.session import FloatArray, GeneratedToken, IdRange, IntArray, Session
from paliedge.generation.constraints import AllowedTokens, TokenConstraint
from paliedge.generation.engine import GenerationEngine, NewTokens
from paliedge.generation.request import DEFAULT_OPTIONS, EncodedImage, Request

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
    ) -> GeneratedToken:
        assert prompt_embeds.shape == (len(prompt_embeds), HIDDEN)
        cache.rows[row] = [*prompt_embeds[:, 0].tolist(), *np.concatenate(image_features)[:, 0].tolist()]
        return self._answer("prefill", cache, row, allowed)

    def decode(
        self, cache: ScriptedCache, inputs_embeds: FloatArray, allowed: Sequence[IdRange]
    ) -> list[GeneratedToken]:
        assert inputs_embeds.shape == (len(allowed), HIDDEN)
        self.widths.append(len(allowed))
        for row, value in enumerate(inputs_embeds[:, 0].tolist()):
            cache.rows[row].append(value)
        return [self._answer("decode", cache, row, one) for row, one in enumerate(allowed)]

    def repeat_decode(self, cache: ScriptedCache, allowed: Sequence[IdRange]) -> list[GeneratedToken]:
        self.calls += [("repeat", one) for one in allowed]
        assert all(first == last for first, last in allowed)
        return [GeneratedToken(token, self.scores.get(token, -9.0)) for token, _ in allowed]

    def move_row(self, cache: ScriptedCache, source: int, target: int) -> None:
        assert source > target
        cache.rows[target] = cache.rows.pop(source)

    def decode_masks(self, codes: IntArray) -> FloatArray:
        raise AssertionError("the decode loop knows no masks")

    def close(self) -> None:
        raise AssertionError("the decode loop does not own the session")

    def _answer(self, call: str, cache: ScriptedCache, row: int, allowed: IdRange) -> GeneratedToken:
        self.calls.append((call, allowed))
        self.caches.append(cache)
        seen = cache.rows[row]
        said = len(seen) - seen.index(IMAGE) - 1
        token = self.answers[int(seen[0])][said]
        return GeneratedToken(token, -token / 10)


def embed(tokens: Sequence[int]) -> FloatArray:
    return np.repeat(np.array(tokens, np.float32)[:, None], HIDDEN, 1)


def request(limit: int, constraint: TokenConstraint = lambda token: (0, 99), prompt: int = PROMPT) -> Request:
    features = embed([IMAGE])
    images = tuple(EncodedImage(one, (1, 1), 0.0, 0.0) for one in (features[:0], features))
    return Request(images, (), [prompt], constraint, "", DEFAULT_OPTIONS, limit, 0.0)


def scripted(tokens: list[int], **rest: Any) -> ScriptedSession:
    return ScriptedSession({PROMPT: tokens}, **rest)


def engine_on(
    session: ScriptedSession, cache: ScriptedCache | None = None, num_rows: int = 1
) -> GenerationEngine[ScriptedCache]:
    checked: Session[ScriptedCache, FloatArray] = session
    return GenerationEngine(checked, cache or ScriptedCache(), embed, end_ids={EOS}, num_rows=num_rows)


def run(engine: GenerationEngine[ScriptedCache]) -> Iterator[NewTokens]:
    """All steps until no request is left."""
    while new := engine.step():
        yield from new
    assert engine.num_requests == 0


def decode(
    session: ScriptedSession,
    cache: ScriptedCache,
    limit: int,
    constraint: TokenConstraint = lambda token: (0, 99),
) -> list[GeneratedToken]:
    engine = engine_on(session, cache)
    engine.add(request(limit, constraint))
    return [token for new in run(engine) for token in new.tokens]


def test_decoding_ends_with_end_of_sequence() -> None:
    session = scripted([7, 8, EOS, 9])
    tokens = decode(session, ScriptedCache(), limit=10)
    assert [(token.token_id, token.log_prob) for token in tokens] == [(7, -0.7), (8, -0.8), (EOS, -0.1)]
    assert [call for call, _ in session.calls] == ["prefill", "decode", "decode"]


def test_end_of_sequence_out_of_prefill_needs_no_decode_step() -> None:
    session = scripted([EOS, 9])
    assert [token.token_id for token in decode(session, ScriptedCache(), limit=10)] == [EOS]
    assert len(session.calls) == 1


def test_decoding_ends_at_the_limit_without_a_step_to_spare() -> None:
    for limit in (1, 2, 3):
        session = scripted([7, 8, 9, 10])
        assert [token.token_id for token in decode(session, ScriptedCache(), limit)] == [7, 8, 9][:limit]
        assert len(session.calls) == limit


@pytest.mark.parametrize(("tokens", "limit", "reasons"), [([7, EOS], 9, [None, "stop"]), ([7, 8], 2, [None, "length"])])
def test_the_last_tokens_say_why_they_are_the_last(tokens: list[int], limit: int, reasons: list[str | None]) -> None:
    engine = engine_on(scripted(tokens))
    engine.add(request(limit))
    assert [new.finish_reason for new in run(engine)] == reasons


def test_end_of_sequence_at_the_limit_is_an_end_and_no_cut() -> None:
    engine = engine_on(scripted([7, EOS]))
    engine.add(request(2))
    assert [new.finish_reason for new in run(engine)] == [None, "stop"]


def test_the_cache_sees_the_prefix_and_then_every_token_but_the_last() -> None:
    session = scripted([7, 8, 9, EOS])
    cache = ScriptedCache({0: [55.0]})  # from an earlier request
    decode(session, cache, limit=10)
    assert cache.rows == {0: [PROMPT, IMAGE, 7, 8, 9]}
    assert all(used is cache for used in session.caches)


def test_the_constraint_is_asked_before_every_step_with_the_token_before_it() -> None:
    session = scripted([7, 8, EOS])
    ranges: dict[int | None, IdRange] = {None: (5, 42), 7: (6, 43), 8: (0, 44)}
    decode(session, ScriptedCache(), limit=10, constraint=ranges.__getitem__)
    assert [allowed for _, allowed in session.calls] == list(ranges.values())


def test_of_a_few_ids_the_likeliest_is_taken() -> None:
    session = scripted([7, 8, 20, EOS], scores={10: -3.0, 30: -1.0, 60: -2.0})
    choices: dict[int | None, AllowedTokens] = {7: frozenset({8, 9}), 8: frozenset({10, 30, 60})}
    tokens = decode(session, ScriptedCache(), limit=10, constraint=lambda token: choices.get(token, (0, 99)))
    assert [(one.token_id, one.log_prob) for one in tokens] == [(7, -0.7), (8, -0.8), (30, -1.0), (EOS, -0.1)]
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
    engine = engine_on(session)
    engine.add(request(10))
    assert session.calls == []
    for index, wanted in enumerate((7, 8), 1):
        assert [new.tokens[0].token_id for new in engine.step()] == [wanted]
        assert len(session.calls) == index


def test_a_step_is_timed_without_the_time_its_reader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0.0, 0.5)
    monkeypatch.setattr("paliedge.generation.engine.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    engine = engine_on(scripted([7, 8, EOS]))
    engine.add(request(10))
    times = []
    for new in run(engine):
        times.append(new.tokens[0].ms)
        next(ticks)  # a slow reader
    assert times == [500, 500, 500]


ANSWERS = {40: [7, 8, 9, 10, EOS], 41: [EOS], 42: [11, EOS], 43: [12, 13, 14, 15, 16, 17], 44: [18, EOS], 45: [19, 20]}
LIMITS = {43: 6, 45: 2}


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8])
def test_requests_of_a_batch_get_their_own_tokens_whoever_ends_first(num_rows: int) -> None:
    session = ScriptedSession(ANSWERS)
    engine = engine_on(session, num_rows=num_rows)
    ids = {engine.add(request(LIMITS.get(prompt, 10), prompt=prompt)): prompt for prompt in ANSWERS}
    found: dict[int, list[int]] = {prompt: [] for prompt in ANSWERS}
    for new in run(engine):
        found[ids[new.request_id]] += [token.token_id for token in new.tokens]
    assert found == ANSWERS
    assert max(session.widths) == min(num_rows, 5)  # one of the six ends in prefill
    num_steps = sum(len(tokens) - 1 for tokens in ANSWERS.values())
    assert sum(session.widths) == num_steps
    assert len(session.widths) == (num_steps if num_rows == 1 else {2: 6, 3: 5, 8: 5}[num_rows])


def test_each_row_of_a_batch_has_its_own_constraint() -> None:
    session = ScriptedSession({40: [7, 20, EOS], 41: [8, 21, EOS]}, scores={10: -3.0, 30: -1.0})
    engine = engine_on(session, num_rows=2)
    engine.add(request(10, lambda token: frozenset({10, 30}) if token == 7 else (0, 50), prompt=40))
    engine.add(request(10, lambda token: (0, 60), prompt=41))
    assert [new.tokens[0].token_id for new in run(engine)] == [7, 8, 30, 21, EOS, EOS]
    assert session.calls[2:4] == [("decode", (10, 30)), ("decode", (0, 60))]
    assert session.calls[4:8] == [("repeat", one) for one in ((10, 10), (21, 21), (30, 30), (21, 21))]


def test_a_request_that_comes_later_costs_the_running_ones_its_prefill_and_no_more() -> None:
    session = ScriptedSession({40: [7, 8, 9, EOS], 41: [17, 18, EOS]})
    engine = engine_on(session, num_rows=2)
    first = engine.add(request(10, prompt=40))
    assert [new.request_id for _ in range(2) for new in engine.step()] == [first, first]
    second = engine.add(request(10, prompt=41))
    assert [[new.request_id for new in engine.step()] for _ in range(2)] == [[second], [first, second]]
    assert [call for call, _ in session.calls] == ["prefill", "decode", "prefill", "decode", "decode"]


def test_there_is_room_until_every_row_is_spoken_for() -> None:
    engine = engine_on(ScriptedSession(ANSWERS), num_rows=2)
    room = []
    for prompt in ANSWERS:
        room.append(engine.has_room)
        engine.add(request(10, prompt=prompt))
    assert room == [True, True, False, False, False, False]
    assert engine.num_requests == len(ANSWERS)


def test_a_cancelled_request_says_no_more_and_leaves_its_row_to_the_next() -> None:
    session = ScriptedSession(ANSWERS)
    engine = engine_on(session, num_rows=2)
    long, other, waiting = (engine.add(request(LIMITS.get(prompt, 10), prompt=prompt)) for prompt in (40, 43, 44))
    for _ in range(3):
        engine.step()
    engine.cancel(long)
    engine.cancel(long)  # twice is no error
    (new,) = engine.step()
    assert (new.request_id, new.tokens[0].token_id) == (waiting, 18)
    said = [(new.request_id, new.tokens[0].token_id) for new in run(engine)]
    assert [token for who, token in said if who == other] == ANSWERS[43][2:]
    assert {who for who, _ in said} == {other, waiting}


def test_a_request_that_waits_is_cancelled_before_anything_runs_for_it() -> None:
    session = ScriptedSession(ANSWERS)
    engine = engine_on(session)
    first, second = (engine.add(request(10, prompt=prompt)) for prompt in (42, 40))
    engine.cancel(second)
    assert {new.request_id for new in run(engine)} == {first}
    assert len(session.calls) == 2


def test_a_prefill_that_fails_ends_its_own_request_alone() -> None:
    session = ScriptedSession(ANSWERS)
    engine = engine_on(session, num_rows=2)
    good = engine.add(request(10, prompt=40))
    engine.step()
    engine.add(request(10, prompt=99))  # unknown to the script
    with pytest.raises(KeyError):
        engine.step()
    assert [new.tokens[0].token_id for new in run(engine)] == ANSWERS[40][1:]
    assert good == 0
