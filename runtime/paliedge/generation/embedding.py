"""The embedding table, mapped from its file: only the rows of the tokens at hand are read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paliedge.backends.session import FloatArray
from paliedge.bundle.bundle import Bundle


class EmbeddingTable:
    """Token ids to input embeddings, sqrt(hidden) times their row, as Gemma scales them."""

    def __init__(self, bundle: Bundle) -> None:
        embedding = bundle.manifest.embedding
        shape = (embedding.rows, bundle.manifest.model.text.hidden_size)
        self._table = np.memmap(bundle.path(embedding.file), embedding.dtype, "r", shape=shape)
        self._scale = np.float32(embedding.scale)
        self._zero = np.float32(128 if embedding.dtype == "uint8" else 0)
        self._row_scales: FloatArray | None = None
        if embedding.row_scales:
            self._row_scales = np.memmap(bundle.path(embedding.row_scales), np.float32, "r", shape=shape[:1])

    def __call__(self, token_ids: Sequence[int]) -> FloatArray:
        """[S] ids -> [S, H] float32."""
        ids = list(token_ids)
        rows: FloatArray = self._table[ids].astype(np.float32)
        if self._row_scales is not None:
            rows -= self._zero
            rows *= self._row_scales[ids, None]
        rows *= self._scale
        return rows
