"""Greedy decoding: prefill, then one decode step a token. Knows tokens, not text or images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from paliedge.constraints import Choice, Rule
from paliedge.session import CacheT, FeaturesT, FloatArray, IdRange, Session


class GeneratedToken(NamedTuple):
    """One token, its log-probability, and the milliseconds that its step took: on the wall, on the GPU."""

    token: int
    log_prob: float
    device_ms: float | None
    ms: float


def decode_greedily(
    session: Session[CacheT, FeaturesT],
    cache: CacheT,
    image_features: Sequence[FeaturesT],
    prompt_embeds: FloatArray,
    embed: Callable[[int], FloatArray],
    *,
    eos: int,
    rule: Rule,
    max_new_tokens: int,
) -> Iterator[GeneratedToken]:
    """Yield tokens up to and including `eos`, at most `max_new_tokens`; the first one is prefill's.

    Args:
        image_features: what the session's vision encoder gave for each image.
        prompt_embeds: [S, H].
        embed: the embedding [H] of a token id.
        rule: what may be chosen, from token to token.
    """
    started = time.perf_counter()
    choice = rule(None)
    step = session.prefill(cache, image_features, prompt_embeds, _range(choice))
    for count in range(1, max_new_tokens + 1):
        yield GeneratedToken(*step, (time.perf_counter() - started) * 1000)
        if step.token == eos or count == max_new_tokens:
            return
        started = time.perf_counter()
        choice = rule(step.token)
        step = session.decode(cache, embed(step.token), _range(choice))
        if isinstance(choice, frozenset) and step.token not in choice:
            tried = [session.repeat_decode(cache, (token, token)) for token in sorted(choice)]
            step = max(tried, key=lambda one: one.log_prob)


def _range(choice: Choice) -> IdRange:
    return (min(choice), max(choice)) if isinstance(choice, frozenset) else choice
