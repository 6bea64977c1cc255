"""The decode loop: add a request, then step. Knows tokens, not text or pictures.

A step is one prefill or one decode step over all rows. A prefill keeps a processor busy by itself, so each
request has its own; decode steps wait for weights and are shared by all rows. A request that is added while
others are decoded holds them up by its own prefill and no more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, NamedTuple

from paliedge.backends.session import CacheT, FloatArray, GeneratedToken, IdRange, Session
from paliedge.generation.constraints import AllowedTokens
from paliedge.generation.request import Request
from paliedge.results.generation import FinishReason


class NewTokens(NamedTuple):
    """What a step gave one request.

    Attributes:
        request_id: whose.
        tokens: in order; at least one.
        finish_reason: set where the last of them ends the answer.
    """

    request_id: int
    tokens: tuple[GeneratedToken, ...]
    finish_reason: FinishReason | None


@dataclass
class _Row:
    """An answer in the making: its last token, and how many more may come."""

    request_id: int
    request: Request
    token_id: int
    num_left: int


class GenerationEngine(Generic[CacheT]):
    """Decodes requests greedily, each in a row of one cache. For one thread at a time.

    Args:
        session: what runs the graphs.
        cache: with `num_rows` rows.
        embed: token ids -> their embeddings [S, H].
        end_ids: the tokens that end an answer.
        num_rows: requests that are decoded together.
    """

    def __init__(
        self,
        session: Session[CacheT, Any],
        cache: CacheT,
        embed: Callable[[Sequence[int]], FloatArray],
        *,
        end_ids: Container[int],
        num_rows: int = 1,
    ) -> None:
        self._session = session
        self._cache = cache
        self._embed = embed
        self._end_ids = end_ids
        self._num_rows = num_rows
        self._ids = count()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: list[_Row] = []

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + len(self._rows)

    @property
    def has_room(self) -> bool:
        """Whether the next request would be prefilled in the next step."""
        return self.num_requests < self._num_rows

    def add(self, request: Request) -> int:
        """Take a request; returns its id. It waits until a row is free for it."""
        request_id = next(self._ids)
        self._waiting.append((request_id, request))
        return request_id

    def cancel(self, request_id: int) -> None:
        """Forget a request, whose row is free at once; one that has ended is no error."""
        self._waiting = deque(one for one in self._waiting if one[0] != request_id)
        for index, row in enumerate(self._rows):
            if row.request_id == request_id:
                self._free_row(index)
                return

    def step(self) -> list[NewTokens]:
        """Prefill the next request where a row is free, else decode a token for every row; nothing without requests."""
        if self._waiting and len(self._rows) < self._num_rows:
            return [self._prefill(*self._waiting.popleft())]
        return self._decode() if self._rows else []

    def _prefill(self, request_id: int, request: Request) -> NewTokens:
        started = time.perf_counter()
        features = [image.features for image in request.images]
        allowed = _range_of(request.constraint(None))
        token = self._session.prefill(self._cache, features, self._embed(request.prompt_ids), allowed, len(self._rows))
        row = _Row(request_id, request, token.token_id, request.max_new_tokens)
        new = self._take(row, token._replace(ms=_milliseconds(started)))
        if new.finish_reason is None:
            self._rows.append(row)
        return new

    def _decode(self) -> list[NewTokens]:
        started = time.perf_counter()
        choices = [row.request.constraint(row.token_id) for row in self._rows]
        embeds = self._embed([row.token_id for row in self._rows])
        tokens = self._session.decode(self._cache, embeds, [_range_of(choice) for choice in choices])
        tokens = self._choose_allowed_tokens(choices, tokens)
        ms = _milliseconds(started)
        found = [self._take(row, token._replace(ms=ms)) for row, token in zip(self._rows, tokens, strict=True)]
        for index in reversed(range(len(found))):
            if found[index].finish_reason:
                self._free_row(index)
        return found

    def _take(self, row: _Row, token: GeneratedToken) -> NewTokens:
        """The one place where an answer's end is decided."""
        row.token_id = token.token_id
        row.num_left -= 1
        reason: FinishReason | None = None
        if token.token_id in self._end_ids:
            reason = "stop"
        elif row.num_left == 0:
            reason = "length"
        return NewTokens(row.request_id, (token,), reason)

    def _free_row(self, index: int) -> None:
        """End the answer of row `index`; the last row takes its place."""
        last = self._rows.pop()
        if index < len(self._rows):
            self._session.move_row(self._cache, len(self._rows), index)
            self._rows[index] = last

    def _choose_allowed_tokens(
        self, choices: Sequence[AllowedTokens], tokens: list[GeneratedToken]
    ) -> list[GeneratedToken]:
        """Where only a few ids may win and another did, the likeliest of them: each is tried in a repeated step."""
        candidates = [
            sorted(choice) if isinstance(choice, frozenset) and token.token_id not in choice else []
            for choice, token in zip(choices, tokens, strict=True)
        ]
        tried: list[list[GeneratedToken]] = [[] for _ in tokens]
        for index in range(max(map(len, candidates))):
            ids = [few[index] if index < len(few) else tokens[row].token_id for row, few in enumerate(candidates)]
            for row, token in enumerate(self._session.repeat_decode(self._cache, [(one, one) for one in ids])):
                if index < len(candidates[row]):
                    tried[row].append(token)
        return [
            max(row_tried, key=lambda one: one.log_prob) if row_tried else token
            for row_tried, token in zip(tried, tokens, strict=True)
        ]


def _milliseconds(started: float) -> float:
    return (time.perf_counter() - started) * 1000


def _range_of(choice: AllowedTokens) -> IdRange:
    return (min(choice), max(choice)) if isinstance(choice, frozenset) else choice
