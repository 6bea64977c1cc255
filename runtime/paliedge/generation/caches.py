"""KV caches that wait for the next answer: they are large, and making one takes as long as a few tokens."""

# Tests: tests/generation/test_batches.py and tests/backends/test_life_cycle.py.
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from paliedge.backends.session import Session


class CachePool:
    """The caches of one session; may be shared between threads.

    Those of one row are all kept, of larger ones the last that came back.
    """

    def __init__(self, session: Session[Any, Any]) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._single = [session.new_cache()]
        self._batch: tuple[int, Any] | None = None
        self._closed = False

    @contextmanager
    def lend(self, num_rows: int) -> Iterator[Any]:
        """A cache of at least `num_rows` rows that is nobody else's meanwhile."""
        with self._lock:
            rows, cache = num_rows, None
            if num_rows == 1:
                cache = self._single.pop() if self._single else None
            elif self._batch and self._batch[0] >= num_rows:
                (rows, cache), self._batch = self._batch, None
        if cache is None:
            cache = self._session.new_cache(num_rows)
        try:
            yield cache
        finally:
            with self._lock:
                if self._closed:
                    pass  # its session is gone, and so is what it was for
                elif rows == 1:
                    self._single.append(cache)
                else:
                    self._batch = (rows, cache)

    def close(self) -> None:
        """Let go of the caches that wait; those that are lent end with their answers."""
        with self._lock:
            self._closed = True
            self._single.clear()
            self._batch = None
