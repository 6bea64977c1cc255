"""The weight files: what the graphs of every lowering read, written once.

Fused where graphs want it (query, key and value in one matrix; gate and up in one), transposed to
[in, out], matrices in the compute type, norms and biases in float32. One tensor at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from paliedge.manifest import Precision
from paliedge_export.checkpoint import EMBED_TOKENS, LM_HEAD, Array, Checkpoint
from paliedge_export.config import ModelConfig

DTYPES: dict[Precision, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
_ALIGNMENT = 4096
_ROWS_AT_A_TIME = 8192


class StoredTensor(NamedTuple):
    """Where a tensor lies: `offset` and `length` in bytes."""

    file: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    length: int


class WeightFile:
    """A file of raw little-endian tensors, each at a page boundary so that readers can map it."""

    def __init__(self, path: Path) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self._name = path.name
        self._stream = path.open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(self, name: str, array: Array, dtype: npt.DTypeLike = np.float32) -> None:
        """Write one tensor as `dtype`."""
        self.add_pieces(name, [array], array.shape, dtype)

    def add_pieces(self, name: str, pieces: Iterable[Array], shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        """Write one tensor of `shape` that comes in pieces along its first axis."""
        offset = -(-self._stream.tell() // _ALIGNMENT) * _ALIGNMENT
        self._stream.seek(offset)
        dtype = np.dtype(dtype)
        for piece in pieces:
            self._stream.write(np.ascontiguousarray(piece.astype(dtype)).view(np.uint8).data)
        self.tensors[name] = StoredTensor(self._name, dtype, shape, offset, self._stream.tell() - offset)


Stored = dict[str, StoredTensor]


def write_weights(
    folder: Path, checkpoint: Checkpoint, config: ModelConfig, rows: int, precision: Precision
) -> tuple[Stored, Stored]:
    """Write embedding table, head, vision encoder and decoder to files in `folder`; returns what lies where.

    `rows` of the table are tokens; those behind them are noise. With bf16, table and head are fp16:
    logits in bfloat16 are an eighth apart where they matter, and neighbouring location tokens would tie.
    The first result is the vision encoder's tensors, the second the decoder's, in which `lm_head.weight`
    may be the table itself.
    """
    dtype = DTYPES[precision]
    head_dtype = np.dtype(np.float16) if precision == "bf16" else dtype
    with WeightFile(folder / f"embed_tokens.{precision}.weights") as table:
        _add_rows(table, checkpoint, EMBED_TOKENS, rows, head_dtype)
    head = table
    if not _head_is_table(checkpoint, rows):
        with WeightFile(folder / f"lm_head.{precision}.weights") as head:
            _add_rows(head, checkpoint, LM_HEAD, rows, head_dtype)
    with WeightFile(folder / f"vision_encoder.{precision}.weights") as vision:
        _add_vision_encoder(vision, checkpoint, config, dtype)
    with WeightFile(folder / f"decoder.{precision}.weights") as decoder:
        _add_decoder(decoder, checkpoint, config, dtype)
    (stored_head,) = head.tensors.values()
    return vision.tensors, decoder.tensors | table.tensors | {LM_HEAD: stored_head}


def _add_vision_encoder(file: WeightFile, checkpoint: Checkpoint, config: ModelConfig, dtype: npt.DTypeLike) -> None:
    root = "vision_tower"
    patch = f"{root}.embeddings.patch_embedding"
    kernel = checkpoint[f"{patch}.weight"].reshape(config.vision.hidden_size, -1)
    file.add(f"{patch}.weight", kernel.T, dtype)
    file.add(f"{patch}.bias", checkpoint[f"{patch}.bias"])
    places = f"{root}.embeddings.position_embedding.weight"
    file.add(places, checkpoint[places])
    for index in range(config.vision.num_layers):
        layer = f"{root}.encoder.layers.{index}"
        parts = [f"{layer}.self_attn.{part}_proj" for part in "qkv"]
        weight, bias = (np.concatenate([checkpoint[f"{part}.{kind}"] for part in parts]) for kind in ("weight", "bias"))
        file.add(f"{layer}.self_attn.qkv_proj.weight", weight.T, dtype)
        file.add(f"{layer}.self_attn.qkv_proj.bias", bias)
        for name in ("self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
            _add_linear(file, checkpoint, f"{layer}.{name}", dtype)
        for name in ("layer_norm1", "layer_norm2"):
            _add_layer_norm(file, checkpoint, f"{layer}.{name}")
    _add_layer_norm(file, checkpoint, f"{root}.post_layernorm")
    _add_linear(file, checkpoint, "multi_modal_projector.linear", dtype)


def _add_decoder(file: WeightFile, checkpoint: Checkpoint, config: ModelConfig, dtype: npt.DTypeLike) -> None:
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.text.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for index in range(config.text.num_layers):
        layer = f"language_model.layers.{index}"
        for fused, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            module = fused.split(".")[0]
            weight = np.concatenate([checkpoint[f"{layer}.{module}.{part}_proj.weight"] for part in parts])
            file.add(f"{layer}.{fused}.weight", weight.T, dtype)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            file.add(f"{layer}.{name}.weight", checkpoint[f"{layer}.{name}.weight"].T, dtype)
        for name in norms:
            _add_rms_norm(file, checkpoint, f"{layer}.{name}.weight")
    _add_rms_norm(file, checkpoint, "language_model.norm.weight")


def _add_linear(file: WeightFile, checkpoint: Checkpoint, name: str, dtype: npt.DTypeLike) -> None:
    file.add(f"{name}.weight", checkpoint[f"{name}.weight"].T, dtype)
    file.add(f"{name}.bias", checkpoint[f"{name}.bias"])


def _add_layer_norm(file: WeightFile, checkpoint: Checkpoint, name: str) -> None:
    for kind in ("weight", "bias"):
        file.add(f"{name}.{kind}", checkpoint[f"{name}.{kind}"])


def _add_rms_norm(file: WeightFile, checkpoint: Checkpoint, name: str) -> None:
    """1 + weight, which is exact to fold: the reference takes the sum in float32 too."""
    file.add(name, np.float32(1) + checkpoint[name].astype(np.float32))


def _add_rows(file: WeightFile, checkpoint: Checkpoint, name: str, rows: int, dtype: npt.DTypeLike) -> None:
    width = checkpoint.shape(name)[1]
    file.add_pieces(name, _pieces(checkpoint, name, rows), (rows, width), dtype)


def _head_is_table(checkpoint: Checkpoint, rows: int) -> bool:
    """Whether the rows of real tokens are the same: like transformers, a head that differs is no tied one.

    That holds whatever config.json says: old checkpoints store a copy of the table, some fine-tunes
    a head of their own without saying so.
    """
    return LM_HEAD not in checkpoint or all(
        np.array_equal(head, table)
        for head, table in zip(_pieces(checkpoint, LM_HEAD, rows), _pieces(checkpoint, EMBED_TOKENS, rows), strict=True)
    )


def _pieces(checkpoint: Checkpoint, name: str, rows: int) -> Iterator[Array]:
    """The first `rows` rows of a matrix, some at a time."""
    for start in range(0, rows, _ROWS_AT_A_TIME):
        yield checkpoint.rows(name, start, min(start + _ROWS_AT_A_TIME, rows))
