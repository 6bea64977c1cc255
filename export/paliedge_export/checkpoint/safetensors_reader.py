"""A checkpoint's tensors under one spelling, read one at a time from safetensors.

transformers has written PaliGemma's names in several ways; `canonical_name` maps them all to the
newest one without its leading `model.`. Knows nothing of graphs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from paliedge_export.checkpoint.metadata import find_processor, read_preprocess
from paliedge_export.checkpoint.roboflow import read_letterbox
from paliedge_export.checkpoint.weight_files import broken, find_weight_files, some

EMBED_TOKENS = "language_model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
_NO_PARAMETER = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")
"""Buffers that old versions of transformers saved; they are computed, not learned."""

_BETWEEN = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_WRAPPERS = ("module.", "base_model.model.", "model.")
"""Taken off where all names have them; `model.` may be transformers' own, which `canonical_name` takes off, too."""
_FLOATS = ("F32", "F16", "BF16", "F64")
_QUANTISED = {
    "bitsandbytes": re.compile(r"\.(absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.bitsandbytes"),
    "GPTQ": re.compile(r"\.(g_idx)$"),
    "AWQ or GPTQ": re.compile(r"\.(qweight|qzeros)$"),
    "compressed-tensors": re.compile(r"\.weight_(packed|shape|zero_point)$"),
    "fp8 with scales": re.compile(r"\.(weight_scale|weight_scale_inv|input_scale|activation_scale)$"),
    "quanto": re.compile(r"\.weight\._(data|scale|shift)$"),
    "torchao": re.compile(r"\._weight_(qdata|scale)$"),
}
_LOOKS_LIKE = {
    "an adapter that was saved unmerged": re.compile(r"\.(lora_[AB]|base_layer|lora_embedding_[AB]|modules_to_save)\b"),
    "a pi0 policy of lerobot": re.compile(r"paligemma_with_expert\.|^(action_in_proj|state_proj|action_time_mlp_in)\."),
    "KerasHub's names": re.compile(r"^(layers|_layer_checkpoint_dependencies|backbone)[./]|/"),
    "GGUF's names": re.compile(r"^(blk|token_embd|output_norm)\."),
}
_ACTIONS = {
    "an adapter that was saved unmerged": "Merge it with PEFT's merge_and_unload() and save the model, or give "
    "the adapter with --lora.",
    "a pi0 policy of lerobot": "Name the folder with the policy's config.json, whose type is pi0 or pi05.",
    "KerasHub's names": "Convert it with KerasHub's export to transformers.",
    "GGUF's names": "Export from the weights that it was made of.",
}

Shape = tuple[int, ...]
Array = npt.NDArray[Any]


def unwrapped_names(names: Collection[str]) -> dict[str, str]:
    """Each name without what torch.compile, DDP, FSDP, PEFT or Lightning put before it or between its parts."""
    if not names:
        return {}
    plain = {name: _BETWEEN.sub("", name) for name in names}
    while prefix := next((one for one in _WRAPPERS if all(name.startswith(one) for name in plain.values())), None):
        plain = {name: inner.removeprefix(prefix) for name, inner in plain.items()}
    return plain


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
        CheckpointError: no weights, a shard that is missing or damaged, a tensor that is missing,
            left over, of a wrong shape, or no 16- or 32-bit float.
    """

    changed: Sequence[str] = ()
    why_no_reference = ""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self.config = config
        self._entries: dict[str, _Entry] = {}
        self._take_files(find_weight_files(folder))
        self._check(config)

    @property
    def num_rows(self) -> int:
        """Rows of the embedding table."""
        return self.shape(EMBED_TOKENS)[0]

    @property
    def folders(self) -> list[Path]:
        """Where small files may lie that belong to it, those of an adapter first."""
        return [self.folder]

    def read_preprocess(self) -> Preprocess:
        """How its own files say that pictures are brought to the model's size."""
        preprocess = read_preprocess(find_processor(self.folders) or self.folder, self.config.vision.image_size)
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
            return _as_float(file.get_tensor(entry.key))

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` to `stop` of a matrix, without reading the others."""
        entry = self._entries[name]
        with safe_open(entry.path, framework="np") as file:
            return _as_float(file.get_slice(entry.key)[start:stop])

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, from its file's header."""
        return self._entries[name].shape

    def _take_files(self, paths: Sequence[Path]) -> None:
        """Note where every tensor lies, under its canonical name."""
        entries: list[_Entry] = []
        for path in paths:
            try:
                entries += _read_header(path)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    expected=f"a safetensors file at {path}",
                    found=f"{error}",
                    action="Download or copy the checkpoint again.",
                ) from error
        plain = self._plain_names({entry.key for entry in entries})
        for entry in entries:
            name = canonical_name(plain.get(entry.key, ""))
            if not name or _NO_PARAMETER.search(name):
                continue
            if name in self._entries:
                raise broken(self.folder, f"'{name}' twice", "Remove the weight files of the other version.")
            self._entries[name] = entry
        if self.config.tied and EMBED_TOKENS not in self._entries and LM_HEAD in self._entries:
            self._entries[EMBED_TOKENS] = self._entries.pop(LM_HEAD)  # one tensor, which kept its other name

    def _plain_names(self, names: Collection[str]) -> dict[str, str]:
        """The names of the tensors that belong to the model, each without what stands before it."""
        return unwrapped_names(names)

    def _check(self, config: ModelConfig) -> None:
        wanted = expected_shapes(config)
        width = config.text.hidden_size
        tables = {EMBED_TOKENS, LM_HEAD} if LM_HEAD in self or not config.tied else {EMBED_TOKENS}
        surplus = sorted(self.keys() - wanted.keys() - tables)
        missing = sorted((wanted.keys() | tables) - self.keys())
        if surplus or missing:
            raise self._explain(surplus, missing)
        wanted |= {name: (*self.shape(name)[:1], width) for name in tables}
        for name, shape in wanted.items():
            kind = self._entries[name].dtype
            if kind not in _FLOATS:
                what = ", fp8 without scales" if kind.startswith("F8") else ""
                raise self._quantised(f"'{name}' of type {kind}{what}")
            if self.shape(name) != shape:
                raise broken(
                    self.folder,
                    f"'{name}' of shape {list(self.shape(name))} where config.json says {list(shape)}",
                    "config.json and weights must belong together.",
                )

    def _explain(self, surplus: list[str], missing: list[str]) -> CheckpointError:
        """The error for names that do not fit, by what they look like."""
        for method, names in _QUANTISED.items():
            if any(map(names.search, surplus)):
                return self._quantised(f"weights that are quantised by {method}")
        for what, names in _LOOKS_LIKE.items():
            if any(map(names.search, surplus)):
                return broken(self.folder, f"{what}: {some(surplus)}", _ACTIONS[what])
        if missing and not surplus:
            return broken(self.folder, f"no tensor {some(missing)}", "Check that every shard of it is there.")
        if not missing:
            return broken(self.folder, f"left over: {some(surplus)}", "They belong to no PaliGemma: leave them out.")
        starts = {name.partition(".")[0] for name in surplus}
        common = f", all of which begin with '{next(iter(starts))}.'" if len(starts) == 1 else ""
        return broken(
            self.folder,
            f"no tensor {some(missing)}, and other ones: {some(surplus)}{common}",
            "config.json and weights must belong together; take off what a wrapper has put before the names.",
        )

    def _quantised(self, found: str) -> CheckpointError:
        return broken(
            self.folder,
            found,
            "Export from its 16-bit weights: the model that was quantised, or that with --lora; int8 and int4 are made "
            "here with --precision.",
        )


def _as_float(array: Array) -> Array:
    """As it is stored, but for doubles, which transformers reads as floats, too."""
    return np.asarray(array, np.float32) if array.dtype == np.float64 else np.asarray(array)


def _read_header(path: Path) -> list[_Entry]:
    with safe_open(path, framework="np") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  safe_open is no mapping
        return [_Entry(path, key, tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()]
