"""The decode loop on a scripted session: no weights, no engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from paliedge.constraints import Choice, Rule
from paliedge.decoding import GeneratedToken, decode_greedily
from paliedge.session import FloatArray, IdRange, IntArray, Session, Step

EOS = 1
HIDDEN = 3


@dataclass
class ScriptedCache:
    """What a real cache would hold: the embeddings so far."""

    embeds: list[float] = field(default_factory=list)


@dataclass
class ScriptedSession:
    """Answers with `tokens` one after another, and writes down what it was asked."""

    tokens: list[int]
    calls: list[tuple[str, IdRange]] = field(default_factory=list)
    caches: list[ScriptedCache] = field(default_factory=list)
    has_device_clock: bool = False
    has_mask_decoder: bool = False
    scores: dict[int, float] = field(default_factory=dict)

    def encode_image(self, pixel_values: FloatArray) -> FloatArray:
        raise AssertionError("the decode loop knows no images")

    def new_cache(self) -> ScriptedCache:
        return ScriptedCache()

    def prefill(
        self, cache: ScriptedCache, image_features: Sequence[FloatArray], prompt_embeds: FloatArray, allowed: IdRange
    ) -> Step:
        assert prompt_embeds.shape == (len(prompt_embeds), HIDDEN)
        cache.embeds = [*np.concatenate(image_features)[:, 0].tolist(), *prompt_embeds[:, 0].tolist()]
        return self._answer("prefill", cache, allowed)

    def decode(self, cache: ScriptedCache, inputs_embeds: FloatArray, allowed: IdRange) -> Step:
        assert inputs_embeds.shape == (HIDDEN,)
        cache.embeds.append(float(inputs_embeds[0]))
        return self._answer("decode", cache, allowed)

    def repeat_decode(self, cache: ScriptedCache, allowed: IdRange) -> Step:
        self.calls.append(("repeat", allowed))
        assert allowed[0] == allowed[1]
        return Step(allowed[0], self.scores[allowed[0]])

    def decode_masks(self, codes: IntArray) -> FloatArray:
        raise AssertionError("the decode loop knows no masks")

    def close(self) -> None:
        raise AssertionError("the decode loop does not own the session")

    def _answer(self, call: str, cache: ScriptedCache, allowed: IdRange) -> Step:
        self.calls.append((call, allowed))
        self.caches.append(cache)
        token = self.tokens[len(self.caches) - 1]
        return Step(token, -token / 10)


def embed(token: int) -> FloatArray:
    return np.full(HIDDEN, token, np.float32)


def decode(
    session: ScriptedSession, cache: ScriptedCache, limit: int, rule: Rule = lambda token: (0, 99)
) -> list[GeneratedToken]:
    checked: Session[ScriptedCache, FloatArray] = session
    image, prompt = embed(100)[None], embed(101)[None]
    return list(
        decode_greedily(checked, cache, [image, image[:0]], prompt, embed, eos=EOS, rule=rule, max_new_tokens=limit)
    )


def test_decoding_ends_with_end_of_sequence() -> None:
    session = ScriptedSession([7, 8, EOS, 9])
    steps = decode(session, ScriptedCache(), limit=10)
    assert [(step.token, step.log_prob) for step in steps] == [(7, -0.7), (8, -0.8), (EOS, -0.1)]
    assert [call for call, _ in session.calls] == ["prefill", "decode", "decode"]


def test_end_of_sequence_out_of_prefill_needs_no_decode_step() -> None:
    session = ScriptedSession([EOS, 9])
    assert [step.token for step in decode(session, ScriptedCache(), limit=10)] == [EOS]
    assert len(session.calls) == 1


def test_decoding_ends_at_the_limit_without_a_step_to_spare() -> None:
    for limit in (1, 2, 3):
        session = ScriptedSession([7, 8, 9, 10])
        assert [step.token for step in decode(session, ScriptedCache(), limit)] == [7, 8, 9][:limit]
        assert len(session.calls) == limit


def test_the_cache_sees_the_prefix_and_then_every_token_but_the_last() -> None:
    session = ScriptedSession([7, 8, 9, EOS])
    cache = ScriptedCache(embeds=[55.0])  # from an earlier request
    decode(session, cache, limit=10)
    assert cache.embeds == [100, 101, 7, 8, 9]
    assert all(used is cache for used in session.caches)


def test_the_rule_is_asked_before_every_step_with_the_token_before_it() -> None:
    session = ScriptedSession([7, 8, EOS])
    ranges: dict[int | None, IdRange] = {None: (5, 42), 7: (6, 43), 8: (0, 44)}
    decode(session, ScriptedCache(), limit=10, rule=ranges.__getitem__)
    assert [allowed for _, allowed in session.calls] == list(ranges.values())


def test_of_a_few_ids_the_likeliest_is_taken() -> None:
    session = ScriptedSession([7, 8, 20, EOS], scores={10: -3.0, 30: -1.0, 60: -2.0})
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
    assert session.caches[0].embeds[2:] == [7, 8, 30]


def test_a_token_is_handed_out_before_the_next_one_is_computed() -> None:
    session = ScriptedSession([7, 8, EOS])
    prefix = embed(100)[None]
    steps = decode_greedily(
        session, ScriptedCache(), [prefix], prefix, embed, eos=EOS, rule=lambda token: (0, 99), max_new_tokens=10
    )
    assert session.calls == []
    assert next(steps).token == 7
    assert len(session.calls) == 1
    assert next(steps).token == 8
    assert len(session.calls) == 2


def test_a_step_is_timed_without_the_time_its_reader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0.0, 0.5)
    monkeypatch.setattr("paliedge.decoding.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    session = ScriptedSession([7, 8, EOS])
    prefix = embed(100)[None]
    times = []
    for step in decode_greedily(
        session, ScriptedCache(), [prefix], prefix, embed, eos=EOS, rule=lambda token: (0, 99), max_new_tokens=10
    ):
        times.append(step.ms)
        next(ticks)  # a slow reader
    assert times == [500, 500, 500]
