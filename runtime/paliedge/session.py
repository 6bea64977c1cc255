"""What a loaded model can do, whichever engine runs it: encode an image, prefill, decode."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IdRange = tuple[int, int]
"""First and last token id that may win."""


class Step(NamedTuple):
    """The chosen token and its log-probability among all tokens."""

    token: int
    log_prob: float


CacheT = TypeVar("CacheT")


class Session(Protocol[CacheT]):
    """A vision encoder and a decoder, ready to run. Safe to share between threads; a cache is not."""

    def encode_image(self, pixel_values: FloatArray) -> FloatArray:
        """pixel_values [1, 3, S, S] -> image_features [N, H]."""
        ...

    def new_cache(self) -> CacheT:
        """A KV cache of the bundle's capacity, for one request at a time."""
        ...

    def prefill(self, cache: CacheT, inputs_embeds: FloatArray, allowed: IdRange) -> Step:
        """Start over with the prefix inputs_embeds [S, H]; returns the first token."""
        ...

    def decode(self, cache: CacheT, inputs_embeds: FloatArray, allowed: IdRange) -> Step:
        """Append one token inputs_embeds [H]; returns the next one."""
        ...
