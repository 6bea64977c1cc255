"""A checkpoint's tensors under one spelling, read one at a time from safetensors.

transformers has written PaliGemma's names in several ways; `canonical_name` maps them all to the
newest one without its leading `model.`. Knows nothing of graphs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives numpy the bfloat16 that safetensors asks it for
import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from paliedge.bundle.manifest import Preprocess
from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.config import ModelConfig
from paliedge_export.checkpoint.metadata import read_preprocess
from paliedge_export.checkpoint.roboflow import read_letterbox

EMBED_TOKENS = "language_model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
_NO_PARAMETER = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")
"""Buffers that old versions of transformers saved; they are computed, not learned."""

Shape = tuple[int, ...]
Array = npt.NDArray[Any]


def canonical_name(name: str) -> str:
    """`language_model.model.layers.0...` and `model.language_model.layers.0...` to `language_model.layers.0...`."""
    name = re.sub(r"^model\.(?=vision_tower|multi_modal_projector|language_model)", "", name)
    name = re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^language_model\.model\.", "language_model.", name)


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor that the model needs, except those with a row a token: table and head."""
    return dict(_vision_shapes(config)) | dict(_text_shapes(config))


def _vision_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    vision = config.vision
    width, inner = vision.hidden_size, vision.intermediate_size
    root = "vision_tower"
    yield f"{root}.embeddings.patch_embedding.weight", (width, 3, vision.patch_size, vision.patch_size)
    yield f"{root}.embeddings.patch_embedding.bias", (width,)
    yield f"{root}.embeddings.position_embedding.weight", (vision.num_image_tokens, width)
    for index in range(vision.num_layers):
        layer = f"{root}.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{layer}.self_attn.{name}.weight", (width, width)
            yield f"{layer}.self_attn.{name}.bias", (width,)
        for name, shape in (("fc1", (inner, width)), ("fc2", (width, inner))):
            yield f"{layer}.mlp.{name}.weight", shape
            yield f"{layer}.mlp.{name}.bias", shape[:1]
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{layer}.{name}.weight", (width,)
            yield f"{layer}.{name}.bias", (width,)
    yield f"{root}.post_layernorm.weight", (width,)
    yield f"{root}.post_layernorm.bias", (width,)
    yield "multi_modal_projector.linear.weight", (config.text.hidden_size, width)
    yield "multi_modal_projector.linear.bias", (config.text.hidden_size,)


def _text_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    text = config.text
    width, inner = text.hidden_size, text.intermediate_size
    norms = ["input_layernorm", "post_attention_layernorm"]
    if text.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for index in range(text.num_layers):
        layer = f"language_model.layers.{index}"
        yield f"{layer}.self_attn.q_proj.weight", (text.attention_width, width)
        yield f"{layer}.self_attn.k_proj.weight", (text.num_kv_heads * text.head_dim, width)
        yield f"{layer}.self_attn.v_proj.weight", (text.num_kv_heads * text.head_dim, width)
        yield f"{layer}.self_attn.o_proj.weight", (width, text.attention_width)
        yield f"{layer}.mlp.gate_proj.weight", (inner, width)
        yield f"{layer}.mlp.up_proj.weight", (inner, width)
        yield f"{layer}.mlp.down_proj.weight", (width, inner)
        for norm in norms:
            yield f"{layer}.{norm}.weight", (width,)
    yield "language_model.norm.weight", (width,)


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies, and what its file's header says of it."""

    path: Path
    key: str
    shape: Shape
    dtype: str


class Checkpoint(Mapping[str, Array]):
    """Tensors by canonical name, each read from its file when asked for.

    A file is mapped only while it is read: pages of a map that stays count as this process's memory.

    Attributes:
        changed: names of the tensors that are not what the files in `folder` say.
        why_no_reference: why transformers cannot read it; empty where it can.

    Raises:
        CheckpointError: no weights; a shard that is missing or damaged. Or a tensor that is missing, left
            over, of a wrong shape, or no 16- or 32-bit float.
    """

    changed: Sequence[str] = ()
    why_no_reference = ""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self.config = config
        self._entries: dict[str, _Entry] = {}
        for path in _weight_files(folder):
            self._add_file(path)
        self._check(config)

    @property
    def folders(self) -> list[Path]:
        """Where small files may lie that belong to it, those of an adapter first."""
        return [self.folder]

    def read_preprocess(self) -> Preprocess:
        """How its own files say that pictures are brought to the model's size."""
        preprocess = read_preprocess(self.folder, self.config.vision.image_size)
        return msgspec.structs.replace(preprocess, letterbox=read_letterbox(self.folders[0]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # and nothing is read, as Mapping would

    def __getitem__(self, name: str) -> Array:
        entry = self._entries[name]
        with safe_open(entry.path, framework="np") as file:
            return np.asarray(file.get_tensor(entry.key))

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` to `stop` of a matrix, without reading the others."""
        entry = self._entries[name]
        with safe_open(entry.path, framework="np") as file:
            return np.asarray(file.get_slice(entry.key)[start:stop])

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, from its file's header."""
        return self._entries[name].shape

    def _add_file(self, path: Path) -> None:
        try:
            entries = _read_header(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                expected=f"a safetensors file at {path}",
                found=f"{error}",
                action="Download or copy the checkpoint again.",
            ) from error
        for entry in entries:
            name = canonical_name(entry.key)
            if _NO_PARAMETER.search(name):
                continue
            if name in self._entries:
                raise _broken(self.folder, f"'{name}' twice", "Remove the weight files of the other version.")
            self._entries[name] = entry

    def _check(self, config: ModelConfig) -> None:
        wanted = expected_shapes(config)
        width = config.text.hidden_size
        tables = {EMBED_TOKENS, LM_HEAD} if LM_HEAD in self or not config.tied else {EMBED_TOKENS}
        if missing := sorted((wanted.keys() | tables) - self.keys()):
            raise _broken(self.folder, f"no tensor {_some(missing)}", "Check that every shard of it is there.")
        if surplus := sorted(self.keys() - wanted.keys() - tables):
            raise _broken(
                self.folder, f"tensors left over: {_some(surplus)}", "Merge adapters first; remove other heads."
            )
        wanted |= {name: (*self.shape(name)[:1], width) for name in tables}
        for name, shape in wanted.items():
            if self.shape(name) != shape:
                raise _broken(
                    self.folder,
                    f"'{name}' of shape {list(self.shape(name))} where config.json says {list(shape)}",
                    "Take config.json and weights from the same checkpoint.",
                )
            if self._entries[name].dtype not in ("F32", "F16", "BF16"):
                raise _broken(
                    self.folder,
                    f"'{name}' of type {self._entries[name].dtype}",
                    "Export from weights that are not quantised: float32, float16 or bfloat16.",
                )


def _read_header(path: Path) -> list[_Entry]:
    with safe_open(path, framework="np") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  safe_open is no mapping
        return [_Entry(path, key, tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise _broken(folder, f"an unreadable {index.name}", "Download or copy the checkpoint again.") from error
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise _broken(folder, f"no {_some(absent)}, which {index.name} names", "Download the missing shards.")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    raise _broken(
        folder, "no model.safetensors and no model.safetensors.index.json", "Save the model with safe_serialization."
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{name}'" for name in names[:5]) + more


def _broken(folder: Path, found: str, action: str) -> CheckpointError:
    return CheckpointError(expected=f"a complete PaliGemma checkpoint in {folder}", found=found, action=action)
