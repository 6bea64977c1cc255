"""What a loaded model can do, whichever engine runs it: encode an image, prefill, decode."""

# Tests: tests/backends/test_life_cycle.py.
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
IdRange = tuple[int, int]
"""First and last token id that may win."""


class GeneratedToken(NamedTuple):
    """One token of an answer.

    Attributes:
        token_id: the chosen id.
        log_prob: natural logarithm of its probability among all tokens.
        device_ms: milliseconds that the GPU worked on its step; None without a GPU's clock.
        ms: milliseconds that its step took on the wall; the requests of a batch share a step, and each has its whole
            time.
    """

    token_id: int
    log_prob: float
    device_ms: float | None = None
    ms: float = 0.0


CacheT = TypeVar("CacheT")
FeaturesT = TypeVar("FeaturesT")


class Session(Protocol[CacheT, FeaturesT]):
    """A vision encoder and a decoder, ready to run. Safe to share between threads; a cache is not.

    After `close` every method but `close` raises ClosedError.

    Attributes:
        has_device_clock: steps carry `device_ms`.
        graph_capture_s: seconds that the last capture of a decode step took; None where there was none.
        has_mask_decoder: `decode_masks` works.
        max_batch: requests that one cache may hold without changing each other's answers.
        arithmetic: what this processor makes of the products of these graphs, a line a kind; empty on a GPU.
    """

    has_device_clock: bool
    graph_capture_s: float | None
    has_mask_decoder: bool
    max_batch: int
    arithmetic: tuple[str, ...]

    def encode_image(self, pixel_values: FloatArray) -> FeaturesT:
        """pixel_values [1, 3, S, S] -> image_features, which stay where the decoder wants them.

        They have a `shape` [N, H], and become an array by `np.asarray`.
        """
        ...

    def new_cache(self, batch: int = 1) -> CacheT:
        """A KV cache of the bundle's capacity, with a row for each of `batch` requests at a time."""
        ...

    def close(self) -> None:
        """Give back what the session holds. May be called twice."""
        ...

    def prefill(
        self,
        cache: CacheT,
        image_features: Sequence[FeaturesT],
        prompt_embeds: FloatArray,
        allowed: IdRange,
        row: int = 0,
    ) -> GeneratedToken:
        """Start `row` over with each image's features [N, H] and then prompt_embeds [S, H]; returns the first token."""
        ...

    def decode(self, cache: CacheT, inputs_embeds: FloatArray, allowed: Sequence[IdRange]) -> list[GeneratedToken]:
        """Append one token to each of the first rows, inputs_embeds [B, H]; returns their next ones."""
        ...

    def repeat_decode(self, cache: CacheT, allowed: Sequence[IdRange]) -> list[GeneratedToken]:
        """The last decode step once more, with other ranges: the cache stays as it is."""
        ...

    def move_row(self, cache: CacheT, source: int, target: int) -> None:
        """Put the request of row `source` in the place of row `target`'s."""
        ...

    def decode_masks(self, codes: IntArray) -> FloatArray:
        """codes [N, 16] -> masks [N, 64, 64], positive inside."""
        ...


def present_name(past: str) -> str:
    """The cache output that belongs to the cache input `past_key_values.N.key` or `.value`."""
    return past.replace("past_key_values.", "present.")
