"""Greedy decoding: prefill, then one decode step a token. Knows tokens, not text or images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from paliedge.backends.session import CacheT, FloatArray, IdRange, Session, Step
from paliedge.generation.constraints import Choice, Rule


class GeneratedToken(NamedTuple):
    """One token, its log-probability, and the milliseconds that its step took: on the GPU, on the wall.

    The requests of a batch share a step; each has its whole time.
    """

    token: int
    log_prob: float
    device_ms: float | None
    ms: float


@dataclass(frozen=True, eq=False)
class Prefix:
    """What an answer is decoded from.

    Attributes:
        image_features: what the session's vision encoder gave for each image.
        prompt_embeds: [S, H].
        rule: what may be chosen, from token to token.
        max_new_tokens: where to stop at the latest.
    """

    image_features: Sequence[Any]
    prompt_embeds: FloatArray
    rule: Rule
    max_new_tokens: int


PrefixT = TypeVar("PrefixT", bound=Prefix)


@dataclass
class _Row(Generic[PrefixT]):
    """An answer in the making: its last token, and how many more may come."""

    prefix: PrefixT
    token: int
    remaining: int

    def take(self, step: Step, eos: int) -> bool:
        """Whether another token is to come."""
        self.token = step.token
        self.remaining -= 1
        return self.token != eos and self.remaining > 0


def decode_greedily(
    session: Session[CacheT, Any],
    cache: CacheT,
    prefixes: Iterable[PrefixT],
    embed: Callable[[Sequence[int]], FloatArray],
    *,
    eos: int,
    batch: int = 1,
) -> Iterator[tuple[PrefixT, GeneratedToken]]:
    """Yield tokens up to and including `eos`, each with the prefix that it continues; the first one is prefill's.

    A prefix is taken when a row of the cache is free for it. It is prefilled alone, which keeps
    a processor busy anyway; decode steps, which wait for weights, are shared by all that are there.

    Args:
        cache: with `batch` rows.
        embed: the embeddings [B, H] of B token ids.
    """
    waiting = iter(prefixes)
    rows: list[_Row[PrefixT]] = []
    while True:
        while len(rows) < batch and (prefix := next(waiting, None)):
            started = time.perf_counter()
            allowed = _range(prefix.rule(None))
            step = session.prefill(cache, prefix.image_features, prefix.prompt_embeds, allowed, len(rows))
            row = _Row(prefix, step.token, prefix.max_new_tokens)
            if row.take(step, eos):
                rows.append(row)
            yield prefix, GeneratedToken(*step, _milliseconds(started))
        if not rows:
            return
        started = time.perf_counter()
        choices = [row.prefix.rule(row.token) for row in rows]
        steps = session.decode(cache, embed([row.token for row in rows]), [_range(choice) for choice in choices])
        steps = _settle(session, cache, choices, steps)
        ms = _milliseconds(started)
        stepped = [row.prefix for row in rows]
        for place in reversed(range(len(rows))):
            if not rows[place].take(steps[place], eos):
                _vacate(session, cache, rows, place)
        for prefix, step in zip(stepped, steps, strict=True):
            yield prefix, GeneratedToken(*step, ms)


def _vacate(session: Session[CacheT, Any], cache: CacheT, rows: list[_Row[PrefixT]], place: int) -> None:
    """End the answer at `place`; the last row takes its place."""
    last = rows.pop()
    if place < len(rows):
        session.move_row(cache, len(rows), place)
        rows[place] = last


def _settle(session: Session[CacheT, Any], cache: CacheT, choices: Sequence[Choice], steps: list[Step]) -> list[Step]:
    """Where only a few ids may win and another did, the likeliest of them: each is tried in a repeated step."""
    candidates = [
        sorted(choice) if isinstance(choice, frozenset) and step.token not in choice else []
        for choice, step in zip(choices, steps, strict=True)
    ]
    tried: list[list[Step]] = [[] for _ in steps]
    for index in range(max(map(len, candidates))):
        tokens = [few[index] if index < len(few) else steps[row].token for row, few in enumerate(candidates)]
        for row, step in enumerate(session.repeat_decode(cache, [(token, token) for token in tokens])):
            if index < len(candidates[row]):
                tried[row].append(step)
    return [
        max(found, key=lambda one: one.log_prob) if found else step for found, step in zip(tried, steps, strict=True)
    ]


def _milliseconds(started: float) -> float:
    return (time.perf_counter() - started) * 1000


def _range(choice: Choice) -> IdRange:
    return (min(choice), max(choice)) if isinstance(choice, frozenset) else choice
