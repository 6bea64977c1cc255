"""Work on the next item while the last one is being used."""

# Tests: tests/generation/test_batches.py.
from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterable[T]) -> Iterator[T]:
    """`items`, each computed in a thread of its own while the reader works on the one before it.

    An error comes in its place; an iterator that is closed early waits for the item in the works.
    """
    source = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        coming = thread.submit(_next, source)
        while found := coming.result():
            coming = thread.submit(_next, source)
            yield found[0]


def _next(source: Iterator[T]) -> tuple[T] | None:
    for item in source:
        return (item,)
    return None
