"""Greedy decoding: prefill, then one decode step a token. Knows tokens, not text or images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

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
    image_features: FeaturesT,
    prompt_embeds: FloatArray,
    embed: Callable[[int], FloatArray],
    *,
    eos: int,
    allowed: IdRange,
    max_new_tokens: int,
) -> Iterator[GeneratedToken]:
    """Yield tokens up to and including `eos`, at most `max_new_tokens`; the first one is prefill's.

    Args:
        image_features: what the session's vision encoder gave.
        prompt_embeds: [S, H].
        embed: the embedding [H] of a token id.
    """
    started = time.perf_counter()
    step = session.prefill(cache, image_features, prompt_embeds, allowed)
    for count in range(1, max_new_tokens + 1):
        yield GeneratedToken(*step, (time.perf_counter() - started) * 1000)
        if step.token == eos or count == max_new_tokens:
            return
        started = time.perf_counter()
        step = session.decode(cache, embed(step.token), allowed)
