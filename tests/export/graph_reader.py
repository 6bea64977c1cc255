"""A bundle's graphs run as they lie on the disk, batches and caches being whatever a test makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from paliedge.bundle.bundle import Bundle
from paliedge.generation.embedding import EmbeddingTable

Array = npt.NDArray[Any]


class Graphs:
    """Vision encoder and decoder of the target `cpu`."""

    def __init__(self, folder: Path) -> None:
        bundle = Bundle(folder)
        self.manifest = bundle.manifest
        target = bundle.target("cpu")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        paths = [bundle.path(graph.file) for graph in (target.vision_encoder, target.decoder)]
        self.vision_model, self.decoder_model = (onnx.load(path, load_external_data=False) for path in paths)
        self._vision, self._decoder = (
            ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in paths
        )
        self._table = EmbeddingTable(bundle)

    def encode(self, pixels: Array) -> Array:
        """[B, 3, S, S] -> [B, N, H]."""
        return np.asarray(self._vision.run(None, {"pixel_values": pixels})[0])

    def embed(self, ids: Sequence[Sequence[int]]) -> Array:
        """[B, S] -> [B, S, H]."""
        return np.stack([self._table(row) for row in ids])

    def empty_cache(self, batch: int, capacity: int) -> dict[str, Array]:
        text = self.manifest.model.text
        shape = (batch, text.num_kv_heads, capacity, text.head_dim)
        return {
            f"past_key_values.{index}.{part}": np.zeros(shape, np.float32)
            for index in range(text.num_layers)
            for part in ("key", "value")
        }

    def run(
        self,
        embeds: Array,
        prefix_length: Sequence[int],
        *,
        start: Sequence[int] | None = None,
        past: Mapping[str, Array] | None = None,
        allowed: tuple[int, int] | None = None,
    ) -> dict[str, Array]:
        """All outputs by name; `start` counts the tokens in each row's cache."""
        batch, length = embeds.shape[:2]
        first = np.array(start or [0] * batch)[:, None]
        inputs = {
            "inputs_embeds": embeds.astype(np.float32),
            "position_ids": first + np.arange(1, length + 1),
            "prefix_length": np.array(prefix_length),
            "allowed_ids": np.array([allowed or (0, self.manifest.tokens.vocab_size - 1)] * batch),
            **(past or self.empty_cache(batch, 0)),
        }
        names = [output.name for output in self._decoder.get_outputs()]
        return dict(zip(names, map(np.asarray, self._decoder.run(names, inputs)), strict=True))
