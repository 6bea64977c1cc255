"""Greedy decoding: prefill, then one decode step a token. Knows tokens, not text or images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from paliedge.session import CacheT, FloatArray, IdRange, Session


class GeneratedToken(NamedTuple):
    """One token, its log-probability and the milliseconds that its step took."""

    token: int
    log_prob: float
    ms: float


def decode_greedily(
    session: Session[CacheT],
    cache: CacheT,
    prefix_embeds: FloatArray,
    embed: Callable[[int], FloatArray],
    *,
    eos: int,
    allowed: IdRange,
    max_new_tokens: int,
) -> Iterator[GeneratedToken]:
    """Yield tokens up to and including `eos`, at most `max_new_tokens`; the first one is prefill's.

    Args:
        prefix_embeds: image features and prompt embeddings [S, H].
        embed: the embedding [H] of a token id.
    """
    started = time.perf_counter()
    step = session.prefill(cache, prefix_embeds, allowed)
    for count in range(1, max_new_tokens + 1):
        yield GeneratedToken(*step, (time.perf_counter() - started) * 1000)
        if step.token == eos or count == max_new_tokens:
            return
        started = time.perf_counter()
        step = session.decode(cache, embed(step.token), allowed)
