"""A checkpoint as big_vision saves it, one .npz, under the names of the newest transformers.

Every layer's tensors are stacked along the first axis, heads and their size are axes of their own, kernels are
[in, out]. There is no config: the dimensions are those of the arrays. A member that is stored as it is
gets mapped, so that one layer's piece is read at a time. A compressed one is unpacked for each piece.

| array (behind `params/`, if there is that) | shape |
|---|---|
| img/embedding/kernel, img/pos_embedding | [P, P, 3, W], [1, N, W] |
| img/Transformer/encoderblock/MultiHeadDotProductAttention_0/{query,key,value}/kernel | [L, W, h, d] |
| .../MultiHeadDotProductAttention_0/out/kernel | [L, h, d, W] |
| .../MlpBlock_0/Dense_{0,1}/kernel, .../LayerNorm_{0,1}/{scale,bias} | [L, W, I], [L, I, W], [L, W] |
| img/Transformer/encoder_norm/{scale,bias}, img/head/kernel | [W], [W, H] |
| llm/embedder/input_embedding, llm/final_norm/scale | [V, H], [H] |
| llm/layers/attn/q_einsum/w, kv_einsum/w, attn_vec_einsum/w | [L, n, H, d], [L, 2, k, H, d], [L, n, d, H] |
| llm/layers/mlp/gating_einsum, linear | [L, 2, H, F], [L, F, H] |
| llm/layers/{pre_attention,post_attention,pre_ffw,post_ffw}_norm/scale | [L, H]; the post norms in Gemma 2 only |
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from paliedge.bundle.manifest import Preprocess
from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.config import ModelConfig, TextConfig, VisionConfig
from paliedge_export.checkpoint.safetensors_reader import EMBED_TOKENS, Array, Checkpoint, Shape, expected_shapes

_BLOCK = "img/Transformer/encoderblock"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
GEMMA2_27B_WIDTH = 4608
_Read = Callable[[Array], Array]


class BigVisionCheckpoint(Checkpoint):
    """Tensors by canonical name, each made from its array when asked for.

    Attributes:
        config: the model's dimensions.

    Raises:
        CheckpointError: no archive, an array that is missing or of a shape that fits no PaliGemma.
    """

    why_no_reference = "transformers reads no .npz"

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self._archive = _Archive(path)
        self.config = _read_dimensions(self._archive)
        self._makers = dict(_vision(self.config)) | dict(_text(self.config))
        for name, shape in (expected_shapes(self.config) | {EMBED_TOKENS: self.shape(EMBED_TOKENS)}).items():
            array, layer, make = self._makers[name]
            stored = self._archive.shape(array)
            if layer is not None and (not stored or layer >= stored[0]):
                raise self._archive.broken(f"'{array}' of shape {list(stored)}, without a layer {layer}")
            try:
                found = make(np.broadcast_to(np.float32(0), stored[0 if layer is None else 1 :])).shape
            except (ValueError, IndexError):
                found = ()
            if found != shape:
                raise self._archive.broken(f"'{array}' of shape {list(stored)}")

    def read_preprocess(self) -> Preprocess:
        """big_vision's own, which resizes bilinearly; it has no file that says so."""
        return Preprocess(resample="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __getitem__(self, name: str) -> Array:
        array, layer, make = self._makers[name]
        stored = self._archive.read(array)
        return np.ascontiguousarray(make(stored if layer is None else stored[layer]))

    def rows(self, name: str, start: int, stop: int) -> Array:
        return np.asarray(self._archive.read(self._makers[name][0])[start:stop])

    def shape(self, name: str) -> Shape:
        if name == EMBED_TOKENS:
            return self._archive.shape("llm/embedder/input_embedding")
        return expected_shapes(self.config)[name]


_Maker = tuple[str, int | None, _Read]
"""The array, the layer's place in it, and how its piece becomes the tensor."""


def _vision(config: ModelConfig) -> Iterator[tuple[str, _Maker]]:
    root = "vision_tower"
    width = config.vision.hidden_size
    yield f"{root}.embeddings.patch_embedding.weight", ("img/embedding/kernel", None, lambda a: a.transpose(3, 2, 0, 1))
    yield f"{root}.embeddings.patch_embedding.bias", ("img/embedding/bias", None, _same)
    yield f"{root}.embeddings.position_embedding.weight", ("img/pos_embedding", None, lambda a: a[0])
    for index in range(config.vision.num_layers):
        layer = f"{root}.encoder.layers.{index}"
        for ours, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            kernel = f"{_ATTENTION}/{theirs}"
            yield f"{layer}.self_attn.{ours}.weight", (f"{kernel}/kernel", index, lambda a: a.reshape(width, -1).T)
            yield f"{layer}.self_attn.{ours}.bias", (f"{kernel}/bias", index, lambda a: a.reshape(-1))
        yield (
            f"{layer}.self_attn.out_proj.weight",
            (f"{_ATTENTION}/out/kernel", index, lambda a: a.reshape(-1, width).T),
        )
        yield f"{layer}.self_attn.out_proj.bias", (f"{_ATTENTION}/out/bias", index, _same)
        for number, dense in enumerate(("fc1", "fc2")):
            kernel = f"{_BLOCK}/MlpBlock_0/Dense_{number}"
            yield f"{layer}.mlp.{dense}.weight", (f"{kernel}/kernel", index, _transposed)
            yield f"{layer}.mlp.{dense}.bias", (f"{kernel}/bias", index, _same)
            norm = f"{_BLOCK}/LayerNorm_{number}"
            yield f"{layer}.layer_norm{number + 1}.weight", (f"{norm}/scale", index, _same)
            yield f"{layer}.layer_norm{number + 1}.bias", (f"{norm}/bias", index, _same)
    yield f"{root}.post_layernorm.weight", ("img/Transformer/encoder_norm/scale", None, _same)
    yield f"{root}.post_layernorm.bias", ("img/Transformer/encoder_norm/bias", None, _same)
    yield "multi_modal_projector.linear.weight", ("img/head/kernel", None, _transposed)
    yield "multi_modal_projector.linear.bias", ("img/head/bias", None, _same)


def _text(config: ModelConfig) -> Iterator[tuple[str, _Maker]]:
    width = config.text.hidden_size
    norms = {"input_layernorm": "pre_attention_norm", "post_attention_layernorm": "pre_ffw_norm"}
    if config.text.post_norms:
        norms = {
            "input_layernorm": "pre_attention_norm",
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "pre_ffw_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
    yield EMBED_TOKENS, ("llm/embedder/input_embedding", None, _same)
    yield "language_model.norm.weight", ("llm/final_norm/scale", None, _same)
    for index in range(config.text.num_layers):
        layer = f"language_model.layers.{index}"
        attention, mlp = "llm/layers/attn", "llm/layers/mlp"
        yield f"{layer}.self_attn.q_proj.weight", (f"{attention}/q_einsum/w", index, _heads)
        yield f"{layer}.self_attn.k_proj.weight", (f"{attention}/kv_einsum/w", index, lambda a: _heads(a[0]))
        yield f"{layer}.self_attn.v_proj.weight", (f"{attention}/kv_einsum/w", index, lambda a: _heads(a[1]))
        yield (
            f"{layer}.self_attn.o_proj.weight",
            (f"{attention}/attn_vec_einsum/w", index, lambda a: a.reshape(-1, width).T),
        )
        yield f"{layer}.mlp.gate_proj.weight", (f"{mlp}/gating_einsum", index, lambda a: a[0].T)
        yield f"{layer}.mlp.up_proj.weight", (f"{mlp}/gating_einsum", index, lambda a: a[1].T)
        yield f"{layer}.mlp.down_proj.weight", (f"{mlp}/linear", index, _transposed)
        for ours, theirs in norms.items():
            yield f"{layer}.{ours}.weight", (f"llm/layers/{theirs}/scale", index, _same)


def _same(array: Array) -> Array:
    return array


def _transposed(array: Array) -> Array:
    return np.asarray(array.T)


def _heads(array: Array) -> Array:
    """[n, H, d] -> [n d, H]."""
    return np.asarray(array.transpose(0, 2, 1).reshape(-1, array.shape[1]))


def _read_dimensions(archive: _Archive) -> ModelConfig:
    """What the arrays' shapes say; the rest is PaliGemma's own."""
    patch, width = archive.shape("img/embedding/kernel", 4)[1:4:2]
    num_patches = archive.shape("img/pos_embedding", 3)[1]
    layers, _, vision_heads, _ = archive.shape(f"{_ATTENTION}/query/kernel", 4)
    grid = math.isqrt(num_patches)
    if grid**2 != num_patches:
        raise archive.broken(f"{num_patches} patches, which make no square")
    depth, heads, hidden, dim = archive.shape("llm/layers/attn/q_einsum/w", 4)
    second = "llm/layers/post_attention_norm/scale" in archive
    scaled_by = hidden / heads if hidden == GEMMA2_27B_WIDTH else dim
    return ModelConfig(
        family="paligemma2" if second else "paligemma",
        vision=VisionConfig(
            image_size=grid * patch,
            patch_size=patch,
            hidden_size=width,
            intermediate_size=archive.shape(f"{_BLOCK}/MlpBlock_0/Dense_0/kernel", 3)[2],
            num_layers=layers,
            num_heads=vision_heads,
            eps=1e-6,
        ),
        text=TextConfig(
            hidden_size=hidden,
            intermediate_size=archive.shape("llm/layers/mlp/linear", 3)[1],
            num_layers=depth,
            num_heads=heads,
            num_kv_heads=archive.shape("llm/layers/attn/kv_einsum/w", 5)[2],
            head_dim=dim,
            query_scale=1 / math.sqrt(scaled_by),
            rope_theta=10_000.0,
            eps=1e-6,
            attn_softcap=50.0 if second else None,
            final_softcap=30.0 if second else None,
            post_norms=second,
        ),
        tied=True,
    )


class _Archive:
    """Arrays of an .npz by their names without `params/`; bfloat16, which numpy stores as bytes, is itself again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = {
                    info.filename.removesuffix(".npy").removeprefix("params/"): info for info in archive.infolist()
                }
                self._members = members
                self._headers = {name: _read_header(archive, info) for name, info in members.items()}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise self.broken(f"{error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._headers

    def shape(self, name: str, num_axes: int | None = None) -> Shape:
        """Shape of an array, which must have `num_axes` axes if that is given."""
        if name not in self._headers:
            raise self.broken(f"no array '{name}'")
        shape = self._headers[name][0]
        if num_axes is not None and len(shape) != num_axes:
            raise self.broken(f"'{name}' of shape {list(shape)}")
        return shape

    def read(self, name: str) -> Array:
        """An array, mapped if it is stored as it is."""
        shape, dtype, fortran, header = self._headers[name]
        info = self._members[name]
        order: Literal["F", "C"] = "F" if fortran else "C"
        if info.compress_type == zipfile.ZIP_STORED:
            with self._path.open("rb") as stream:
                stream.seek(info.header_offset + 26)
                lengths = np.frombuffer(stream.read(4), "<u2")
            offset = info.header_offset + 30 + int(lengths.sum()) + header
            array: Array = np.memmap(self._path, dtype, "r", offset, shape, order)
            return array
        with zipfile.ZipFile(self._path) as archive, archive.open(info) as stream:
            stream.read(header)
            return np.frombuffer(stream.read(), dtype).reshape(shape, order=order)

    def broken(self, found: str) -> CheckpointError:
        return CheckpointError(
            expected=f"a PaliGemma of big_vision in {self._path}",
            found=found,
            action="Download it again; files of fine-tunes hold the same arrays behind `params/`.",
        )


def _read_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[Shape, np.dtype[np.generic], bool, int]:
    """Shape, type, order and the header's length in bytes."""
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype == np.dtype("V2"):
            dtype = np.dtype(ml_dtypes.bfloat16)
        if dtype not in (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
            raise ValueError(f"'{info.filename}' of type {dtype}")
        return tuple(shape), dtype, fortran, stream.tell()
