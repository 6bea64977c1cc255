"""The weight files: what the graphs of every lowering read.

Weights are fused where graphs want it (query, key and value in one matrix) and transposed to [in, out].
Matrices are in the compute type or in integers, norms and biases in float32. One tensor at a time is in
memory. Floats are written once for all targets. ONNX Runtime's kernels and TensorRT's want integers in
different orders: a quantised bundle for both has both.

| tensor | "qdq", ONNX's own operators | "contrib", com.microsoft's |
|---|---|---|
| 8-bit weight | int8 [K, N], weight_scale float32 [N] | uint8 [K, N], its zero at 128; the same scale |
| its input, static | input_scale float32 [] | measured at run time |
| 4-bit weight | int4 [K, N], weight_scale float16 [K/G, N] | uint8 [N, K/G, G/2], float32 [N, K/G] |
| head | int8 [V, H], weight_scale float16 [V] | uint8 [V, H/G, G], float32 [V, H/G] |
"""

# Tests: tests/export/test_quantized_export.py and tests/export/weights/test_integers.py.
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from paliedge.bundle.manifest import Precision
from paliedge_export.checkpoint.config import ModelConfig
from paliedge_export.checkpoint.safetensors_reader import EMBED_TOKENS, LM_HEAD, Array, Checkpoint
from paliedge_export.targets import Layout
from paliedge_export.weights.activations import InputStatistics
from paliedge_export.weights.integers import (
    INT8_MAX,
    Floats,
    find_group,
    pack_blocks,
    pack_int4,
    quantize_int4,
    quantize_int8,
    without_sign,
)
from paliedge_export.weights.linears import Linear, text_linears, vision_linears
from paliedge_export.weights.smoothing import Smoothed

DTYPES: dict[Precision, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.float16),
    "int4": np.dtype(np.float16),
}
"""Of matrices that are not quantised."""
QUANTIZED = ("int8", "int4")
INT4 = np.dtype(ml_dtypes.int4)
HEAD_SCALES = "lm_head.weight_scale"
ROW_SCALES = "embed_tokens.row_scales"
_ALIGNMENT = 4096
_SMALLEST_INPUT_SCALE = 1e-6
_ROWS_AT_A_TIME = 8192
Tensors = Checkpoint | Smoothed


@dataclass(frozen=True)
class Encoding:
    """How the matrices of a bundle are stored.

    Attributes:
        precision: of the bundle.
        layout: who reads it; floats are the same for both.
        inputs: statistics of the linear layers' inputs, for a quantised bundle.
        kept: linear layers that stay in 16 bits.
        kept_tokens: ids whose rows the head keeps, ascending; None for all.
        with_table: write the host's embedding table too, also where it is not the head; a bundle needs one.
        fast_prefill: write the decoder's layers in 8 bits, too, where the layout multiplies them faster.
    """

    precision: Precision
    layout: Layout = "qdq"
    inputs: Mapping[str, InputStatistics] | None = None
    kept: frozenset[str] = frozenset()
    kept_tokens: Sequence[int] | None = None
    with_table: bool = True
    fast_prefill: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES[self.precision]

    @property
    def suffix(self) -> str:
        """What the weight files of this encoding are called after."""
        return f"{self.precision}.{self.layout}" if self.precision in QUANTIZED else self.precision

    def bits(self, name: str) -> int:
        """4, 8 or 0 for a float: how the weight of a linear layer is stored."""
        if self.inputs is None or name not in self.inputs or name in self.kept:
            return 0
        return quantized_bits(self.precision, name, len(self.inputs[name].absmax))


def quantized_bits(precision: Precision, name: str, width: int) -> int:
    """Bits of a linear layer's weight: 4 in an int4 bundle's decoder where `width` has groups, else 8."""
    in_decoder = name.startswith("language_model")
    return 4 if precision == "int4" and in_decoder and find_group(width) else 8


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

    def add_packed(self, name: str, content: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Write one tensor of `shape` whose elements, narrower than a byte, are packed in `content`."""
        self.add(name, content, np.uint8)
        self.tensors[name] = self.tensors[name]._replace(dtype=dtype, shape=shape)


Stored = dict[str, StoredTensor]


class StoredGraphs(NamedTuple):
    """Tensors of each graph; the decoder's `lm_head.weight` may be the table itself."""

    vision_encoder: Stored
    decoder: Stored
    prefill: Stored | None = None


def write_weights(
    folder: Path, checkpoint: Tensors, config: ModelConfig, rows: int, encoding: Encoding
) -> StoredGraphs:
    """Write embedding table, head, vision encoder and decoder to files in `folder`; returns what lies where.

    `rows` of the table are tokens; those behind them are noise. With bf16, table and head are fp16:
    logits in bfloat16 are an eighth apart where they matter, and neighbouring location tokens would tie.
    """
    suffix, every = encoding.suffix, range(rows)
    quantized = encoding.precision in QUANTIZED
    tied = _head_is_table(checkpoint, rows)
    head_is_table = tied and encoding.kept_tokens is None
    tensors: Stored = {}
    if encoding.with_table or head_is_table:
        with WeightFile(folder / f"embed_tokens.{suffix}.weights") as table:
            _add_table(table, checkpoint, EMBED_TOKENS, every, encoding)
        tensors |= table.tensors
    if encoding.with_table and quantized:
        with WeightFile(folder / f"embed_tokens.{suffix}.scales") as scales:
            scales.add(ROW_SCALES, _row_scales(checkpoint, EMBED_TOKENS, every))
        tensors |= scales.tensors
    source = EMBED_TOKENS if tied else LM_HEAD
    kept = encoding.kept_tokens or every
    if not head_is_table:
        with WeightFile(folder / f"lm_head.{suffix}.weights") as head:
            _add_table(head, checkpoint, source, kept, encoding)
        tensors[LM_HEAD] = head.tensors[source]
    else:
        tensors[LM_HEAD] = tensors[EMBED_TOKENS]
    with WeightFile(folder / f"vision_encoder.{suffix}.weights") as vision:
        _add_vision_encoder(vision, checkpoint, config, encoding)
    with WeightFile(folder / f"decoder.{suffix}.weights") as decoder:
        _add_decoder(decoder, checkpoint, config, encoding)
        if quantized:
            _add_head_scales(decoder, _row_scales(checkpoint, source, kept), config, encoding.layout)
    graphs = StoredGraphs(vision.tensors, decoder.tensors | tensors)
    if not encoding.fast_prefill or encoding.layout != "contrib":
        return graphs
    with WeightFile(folder / f"prefill.{suffix}.weights") as prefill:
        _add_decoder(prefill, checkpoint, config, replace(encoding, precision="int8"), only_rows=True)
    return graphs._replace(prefill=prefill.tensors)


def write_linear(folder: Path, name: str, tensors: Tensors, linear: Linear, encoding: Encoding) -> Stored:
    """Write one linear layer's weight to a file called `name` in `folder`."""
    with WeightFile(folder / name) as file:
        _add_linear(file, tensors, linear, encoding)
    return file.tensors


def _add_vision_encoder(file: WeightFile, checkpoint: Tensors, config: ModelConfig, encoding: Encoding) -> None:
    root = "vision_tower"
    patch = f"{root}.embeddings.patch_embedding"
    kernel = checkpoint[f"{patch}.weight"].reshape(config.vision.hidden_size, -1)
    file.add(f"{patch}.weight", kernel.T, encoding.dtype)
    file.add(f"{patch}.bias", checkpoint[f"{patch}.bias"])
    positions = f"{root}.embeddings.position_embedding.weight"
    file.add(positions, checkpoint[positions])
    for index in range(config.vision.num_layers):
        layer = f"{root}.encoder.layers.{index}"
        for name in ("layer_norm1", "layer_norm2"):
            _add_layer_norm(file, checkpoint, f"{layer}.{name}")
    for linear in vision_linears(config):
        _add_linear(file, checkpoint, linear, encoding)
        biases = [checkpoint[weight.removesuffix("weight") + "bias"] for weight in linear.weights]
        file.add(f"{linear.name}.bias", np.concatenate(biases))
    _add_layer_norm(file, checkpoint, f"{root}.post_layernorm")
    projector = "multi_modal_projector.linear"
    file.add(f"{projector}.weight", checkpoint[f"{projector}.weight"].T, encoding.dtype)
    file.add(f"{projector}.bias", checkpoint[f"{projector}.bias"])


def _add_decoder(
    file: WeightFile, checkpoint: Tensors, config: ModelConfig, encoding: Encoding, *, only_rows: bool = False
) -> None:
    """The decoder's layers and last norm; with `only_rows` no more than the cache's rows are made from."""
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.text.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    layers = [f"language_model.layers.{index}" for index in range(config.text.num_layers)]
    names = [f"{layer}.{norm}" for layer in layers for norm in norms] + ["language_model.norm"]
    last, makes_rows = f"{layers[-1]}.", (f"{layers[-1]}.self_attn.qkv_proj", f"{layers[-1]}.input_layernorm")

    def wanted(name: str) -> bool:
        return not only_rows or name in makes_rows or not name.startswith((last, "language_model.norm"))

    for linear in text_linears(config):
        if wanted(linear.name):
            _add_linear(file, checkpoint, linear, encoding)
    for name in filter(wanted, names):
        _add_rms_norm(file, checkpoint, f"{name}.weight")


def _add_linear(file: WeightFile, checkpoint: Tensors, linear: Linear, encoding: Encoding) -> None:
    """The matrices of a linear layer as [in, out] or in integers."""
    bits = encoding.bits(linear.name)
    found = encoding.inputs[linear.name] if bits and encoding.inputs else None
    for name, sources in linear.matrices.items():
        weight = np.concatenate([checkpoint[source] for source in sources]).T
        if found:
            _add_quantized(file, name, weight.astype(np.float32), bits, found.mean_square, encoding.layout)
        else:
            file.add(f"{name}.weight", weight, encoding.dtype)
    if found and bits == 8 and encoding.layout == "qdq":
        scale = np.maximum(found.absmax.max() / INT8_MAX, _SMALLEST_INPUT_SCALE)
        file.add(f"{linear.name}.input_scale", scale)


def _add_quantized(file: WeightFile, name: str, weight: Floats, bits: int, importance: Floats, layout: Layout) -> None:
    """One matrix [in, out] in integers; `importance` [in] see `quantize_int4`."""
    if bits == 8:
        codes, scales = quantize_int8(weight, axis=1)
        if layout == "qdq":
            file.add(f"{name}.weight", codes, np.int8)
        else:
            file.add(f"{name}.weight", without_sign(codes), np.uint8)
        file.add(f"{name}.weight_scale", scales)
        return
    codes, scales = quantize_int4(weight, importance)
    if layout == "qdq":
        file.add_packed(f"{name}.weight", pack_int4(codes), codes.shape, INT4)
        file.add(f"{name}.weight_scale", scales, np.float16)
    else:
        file.add(f"{name}.weight", pack_blocks(np.ascontiguousarray(codes.T), find_group(len(codes)), 4), np.uint8)
        file.add(f"{name}.weight_scale", scales.T)


def _add_layer_norm(file: WeightFile, checkpoint: Tensors, name: str) -> None:
    for kind in ("weight", "bias"):
        file.add(f"{name}.{kind}", checkpoint[f"{name}.{kind}"])


def _add_rms_norm(file: WeightFile, checkpoint: Tensors, name: str) -> None:
    """1 + weight, which is exact to fold: the reference takes the sum in float32 too."""
    file.add(name, np.float32(1) + checkpoint[name].astype(np.float32))


def _add_table(file: WeightFile, checkpoint: Tensors, name: str, ids: Sequence[int], encoding: Encoding) -> None:
    """The rows `ids` of a table, a row a token."""
    width = checkpoint.shape(name)[1]
    pieces = _pieces(checkpoint, name, ids)
    if encoding.precision not in QUANTIZED:
        dtype = np.dtype(np.float16) if encoding.precision == "bf16" else encoding.dtype
        file.add_pieces(name, pieces, (len(ids), width), dtype)
        return
    codes = (quantize_int8(piece.astype(np.float32), 0, np.float16).codes for piece in pieces)
    if encoding.layout == "qdq":
        file.add_pieces(name, codes, (len(ids), width), np.int8)
        return
    group = find_group(width)
    blocks = (pack_blocks(piece, group, 8) for piece in codes)
    file.add_pieces(name, blocks, (len(ids), width // group, group), np.uint8)


def _row_scales(checkpoint: Tensors, name: str, ids: Sequence[int]) -> Array:
    """What the codes of each row are multiples of: [rows], in float16."""
    pieces = _pieces(checkpoint, name, ids)
    return np.concatenate([quantize_int8(piece.astype(np.float32), 0, np.float16).scales for piece in pieces])


def _add_head_scales(file: WeightFile, scales: Array, config: ModelConfig, layout: Layout) -> None:
    if layout == "qdq":
        file.add(HEAD_SCALES, scales, np.float16)
    else:
        width = config.text.hidden_size
        file.add(HEAD_SCALES, np.repeat(scales[:, None], width // find_group(width), axis=1))


def _head_is_table(checkpoint: Tensors, rows: int) -> bool:
    """Whether the rows of real tokens are the same: like transformers, a head that differs is no tied one.

    That holds whatever config.json says: old checkpoints store a copy of the table, some fine-tunes
    a head of their own without saying so.
    """
    every = range(rows)
    pairs = zip(_pieces(checkpoint, LM_HEAD, every), _pieces(checkpoint, EMBED_TOKENS, every), strict=True)
    return LM_HEAD not in checkpoint or all(np.array_equal(head, table) for head, table in pairs)


def _pieces(checkpoint: Tensors, name: str, ids: Sequence[int]) -> Iterator[Array]:
    """The rows `ids` of a matrix, ascending, some at a time."""
    indices = np.asarray(ids)
    for start in range(0, int(indices[-1]) + 1, _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, int(indices[-1]) + 1)
        chosen = indices[(indices >= start) & (indices < stop)] - start
        if len(chosen):
            yield checkpoint.rows(name, start, stop)[chosen]
