"""A checkpoint with a LoRA adapter merged into it, in float32, as each tensor is read.

The format is PEFT's: adapter_config.json and adapter_model.safetensors. With A [r, in] and B [out, r] a
weight becomes W + s B A, where s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv
2312.03732); DoRA (arXiv 2402.09353) then gives each row the length that it has learned. What the adapter
holds in full (modules_to_save, biases, rows of single tokens) takes the place of the checkpoint's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.config import ModelConfig
from paliedge_export.checkpoint.safetensors_reader import (
    EMBED_TOKENS,
    LM_HEAD,
    Array,
    Checkpoint,
    canonical_name,
    unwrapped_names,
)
from paliedge_export.checkpoint.weight_files import refuse_pointer

CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PART = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$"
)
_TOKENS = re.compile(r"\.token_adapter\.(?:trainable_tokens_delta|default\.trainable_tokens_delta|\S*delta\S*)$")
_TABLES = (EMBED_TOKENS, LM_HEAD)
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that take something out of the base model's own weights."""
_MERGE = "Merge it with PEFT's merge_and_unload(), save the model and export that."


class Adapter:
    """One adapter's folder, read.

    Args:
        folder: as PEFT saves it.
        weight: how much of it is merged; 1 is all.

    Attributes:
        base: the model that it was trained on, as it says: a hub id or a folder of that machine; empty if it does not.
        base_revision: the branch, tag or commit of that id, if it says one.
        replaced: tensors by canonical name that it holds whole.
        token_rows: of the tables, the rows by index that it holds.
        changes_nothing: whether all its products are zero and it holds nothing else.
    """

    def __init__(self, folder: Path, weight: float = 1.0) -> None:
        self.folder = folder
        self.weight = weight
        self._options = _read_options(folder)
        self.base = str(self._options.get("base_model_name_or_path") or "")
        self.base_revision: str | None = self._options.get("revision")
        self.parts: dict[str, dict[str, Array]] = {}
        self.replaced: dict[str, Array] = {}
        self.token_rows: dict[str, Array] = {}
        self._modules: dict[str, str] = {}
        if (folder / _WEIGHTS).is_file():
            refuse_pointer(folder / _WEIGHTS)
        try:
            tensors = load_file(folder / _WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise _refused(folder, f"{error}", f"An adapter is {CONFIG} and {_WEIGHTS}, as PEFT saves it.") from error
        plain = unwrapped_names(tensors)
        for key, tensor in tensors.items():
            self._take(plain[key], tensor)
        if weight != 1.0 and (self.replaced or self.token_rows or self._options.get("use_dora")):
            raise _refused(folder, f"a weight of {weight:g}, for one that holds more than products", _MERGE)

    @property
    def changed(self) -> set[str]:
        """Names of the tensors that it changes."""
        return self.parts.keys() | self.replaced.keys() | self.token_rows.keys()

    @property
    def changes_nothing(self) -> bool:
        ups = [parts.get("lora_B", parts.get("lora_embedding_B")) for parts in self.parts.values()]
        is_zero = all(up is not None and not np.asarray(up, np.float32).any() for up in ups)
        return is_zero and not self.replaced and not self.token_rows and not self._options.get("use_dora")

    def apply(self, name: str, weight: Array) -> Array:
        """A tensor with this adapter's changes; those of tables are in `weight`'s type where nothing is added."""
        weight = self.replaced.get(name, weight)
        if name in self.parts:
            weight = _merge(weight, self.parts[name], self.weight * self._scale(name))
        return self.apply_tokens(name, weight)

    def apply_tokens(self, name: str, weight: Array) -> Array:
        """A table with the rows of single tokens that this adapter holds for the table `name`."""
        if name in self.token_rows:
            weight = np.array(weight, np.float32)
            weight[self.token_indices] = self.token_rows[name]
        return weight

    @property
    def token_indices(self) -> list[int]:
        """Of the rows in `token_rows`."""
        indices = self._options.get("trainable_token_indices") or []
        return list(next(iter(indices.values())) if isinstance(indices, dict) else indices)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Hold what it has for a tensor against that tensor's shape before it: B A must fit, DoRA's lengths too."""
        if name in self.replaced:
            found = self.replaced[name].shape
            if found[1:] != shape[1:] or (found != shape and name not in _TABLES):
                raise self._misfit(name, self.replaced[name], shape)
            shape = found
        if name in self.token_rows:
            rows = self.token_rows[name]
            if rows.shape != (len(self.token_indices), *shape[1:]) or max(self.token_indices, default=0) >= shape[0]:
                raise self._misfit(name, rows, shape)
        if name not in self.parts:
            return
        parts = self.parts[name]
        table = name == EMBED_TOKENS
        wanted = {"lora_embedding_A", "lora_embedding_B"} if table else {"lora_A", "lora_B"}
        wanted |= {"lora_magnitude_vector"} if self._options.get("use_dora") else set()
        if parts.keys() != wanted:
            found_parts = f"for '{name}' only {', '.join(sorted(parts))}"
            raise _refused(self.folder, found_parts, f"It should have {', '.join(sorted(wanted))}: save it again.")
        if table and "lora_magnitude_vector" in parts:
            raise _refused(self.folder, "DoRA on the embedding table, which is not merged here", _MERGE)
        down, up = _factors(parts)
        if up.shape[:1] != shape[:1] or down.size != len(down) * math.prod(shape[1:]) or up.size != len(up) * len(down):
            raise self._misfit(name, up, shape)
        if "lora_magnitude_vector" in parts and (len(shape) != 2 or parts["lora_magnitude_vector"].size != shape[0]):
            raise self._misfit(name, parts["lora_magnitude_vector"], shape)

    def belongs_nowhere(self, name: str) -> CheckpointError:
        """The error for a tensor that the checkpoint does not have."""
        found = f"'{name}', which belongs to nothing in the checkpoint"
        return _refused(self.folder, found, "Name the base model that the adapter was trained on.")

    def _take(self, key: str, tensor: Array) -> None:
        path = key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        part, token = _PART.search(path), _TOKENS.search(path)
        if token:
            self.token_rows[canonical_name(path[: token.start()] + ".weight")] = tensor
            return
        name = canonical_name(path[: part.start()] + ".weight" if part else path)
        if part:
            self.parts.setdefault(name, {})[part[1]] = tensor
            self._modules[name] = path[: part.start()]
        else:
            self.replaced[name] = tensor

    def _misfit(self, name: str, tensor: Array, shape: tuple[int, ...]) -> CheckpointError:
        found = f"'{name}' of shape {list(tensor.shape)} for a tensor of shape {list(shape)}"
        return _refused(self.folder, found, "Name the base model that the adapter was trained on.")

    def _scale(self, name: str) -> float:
        rank = len(_factors(self.parts[name])[0])
        alpha = float(self._options["lora_alpha"])
        for pattern, special in (self._options.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", self._modules[name]):
                alpha = float(special)
                break
        return alpha / (math.sqrt(rank) if self._options.get("use_rslora") else rank)


class Adapted(Checkpoint):
    """A checkpoint's tensors with adapters' changes, one adapter after another.

    Where table and head are one tensor and an adapter changes one of the two, they are two afterwards, as they were in
    its training. A table with more rows takes the place of the checkpoint's; a head that has no rows for them gets rows
    of zeros, which never win.

    Args:
        folder: of the base model that the adapters were trained on.
        config: its configuration.
        adapters: in the order in which they are merged.

    Raises:
        CheckpointError: see `Checkpoint`; an adapter with a tensor that fits nothing in the checkpoint.
    """

    _adapters: Sequence[Adapter] = ()
    _has_own_head = _splits = False
    _last: tuple[str, Array] | None = None
    """A table is asked for in pieces, one table after the other."""

    def __init__(self, folder: Path, config: ModelConfig, adapters: Sequence[Adapter]) -> None:
        super().__init__(folder, config)
        self._has_own_head = super().__contains__(LM_HEAD)
        self._splits = not self._has_own_head and any(
            self._changes_one(adapter, EMBED_TOKENS, LM_HEAD) or LM_HEAD in adapter.changed for adapter in adapters
        )
        self._adapters = adapters
        for adapter in adapters:
            for name in sorted(adapter.changed):
                if name not in self:
                    raise adapter.belongs_nowhere(name)
                adapter.check(name, super().shape(self._stored(name)))
        self.changed: Sequence[str] = sorted({name for adapter in adapters for name in adapter.changed})

    @staticmethod
    def _changes_one(adapter: Adapter, one: str, other: str) -> bool:
        """Whether it trained the table alone; rows of single tokens are trained in both where both are one."""
        trained = adapter.parts.keys() | adapter.replaced.keys()
        return (one in trained) != (other in trained)

    @property
    def folders(self) -> list[Path]:
        return [*(adapter.folder for adapter in self._adapters), self.folder]

    @property
    def num_rows(self) -> int:
        return self.shape(EMBED_TOKENS)[0]

    def _stored(self, name: str) -> str:
        """Under which name the checkpoint has a tensor: a head of its own may have been the table."""
        return EMBED_TOKENS if name == LM_HEAD and not self._has_own_head else name

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (name == LM_HEAD and self._splits)

    def __iter__(self) -> Iterator[str]:
        yield from super().__iter__()
        if self._splits:
            yield LM_HEAD

    def __len__(self) -> int:
        return super().__len__() + self._splits

    def __getitem__(self, name: str) -> Array:
        weight = super().__getitem__(self._stored(name))
        for adapter in self._adapters:
            weight = adapter.apply(name, weight)
            if name == LM_HEAD and not self._has_own_head and name not in adapter.token_rows:
                weight = adapter.apply_tokens(EMBED_TOKENS, weight)
        missing = self.shape(name)[0] - len(weight)
        return np.pad(weight, [(0, missing), (0, 0)]) if missing > 0 else weight

    def shape(self, name: str) -> tuple[int, ...]:
        if name in _TABLES:
            rows = [super().shape(self._stored(name))[0]]
            names = _TABLES if name == LM_HEAD else (EMBED_TOKENS,)
            holders = [adapter.replaced for adapter in self._adapters]
            rows += [len(replaced[one]) for replaced in holders for one in names if one in replaced]
            return (max(rows) if name == LM_HEAD else rows[-1], *super().shape(self._stored(name))[1:])
        return super().shape(name)

    def rows(self, name: str, start: int, stop: int) -> Array:
        touched = any({name, EMBED_TOKENS if name == LM_HEAD else name} & adapter.changed for adapter in self._adapters)
        if touched or not super().__contains__(name):
            if self._last is None or self._last[0] != name:
                self._last = name, self[name]
            return self._last[1][start:stop]
        return super().rows(name, start, stop)


def _factors(parts: Mapping[str, Array]) -> tuple[Array, Array]:
    """A [r, in] and B [out, r]; those of a table, whose rows are its inputs, change their places."""
    if "lora_embedding_A" in parts:
        return np.asarray(parts["lora_embedding_B"], np.float32).T, np.asarray(parts["lora_embedding_A"], np.float32).T
    return np.asarray(parts["lora_A"], np.float32), np.asarray(parts["lora_B"], np.float32)


def _merge(weight: Array, parts: Mapping[str, Array], scale: float) -> Array:
    down, up = _factors(parts)
    product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    merged = np.asarray(weight, np.float32) + np.float32(scale) * product.reshape(weight.shape)
    if "lora_magnitude_vector" in parts:
        lengths = np.linalg.norm(merged, axis=1, keepdims=True)
        merged *= np.asarray(parts["lora_magnitude_vector"], np.float32).reshape(-1, 1) / lengths
    return np.asarray(merged, np.float32)


def _read_options(adapter: Path) -> dict[str, Any]:
    try:
        options = json.loads((adapter / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(adapter, f"{error}", f"An adapter is {CONFIG} and {_WEIGHTS}, as PEFT saves it.") from error
    if not isinstance(options, dict) or options.get("peft_type") != "LORA":
        kind = options.get("peft_type") if isinstance(options, dict) else options
        raise _refused(adapter, f"an adapter of the kind {kind}", _MERGE)
    begins = str(options.get("init_lora_weights", "")).lower()
    for name, there in (
        ("fan_in_fan_out", options.get("fan_in_fan_out")),
        ("lora_bias", options.get("lora_bias")),
        (f"init_lora_weights {begins}", begins.startswith(_CHANGED_BASE)),
        ("layer_replication", options.get("layer_replication")),
        (
            "trainable_token_indices of several layers",
            isinstance(options.get("trainable_token_indices"), dict) and len(options["trainable_token_indices"]) > 1,
        ),
        ("target_parameters", options.get("target_parameters")),
        ("alora_invocation_tokens", options.get("alora_invocation_tokens")),
        ("a number as lora_alpha", not isinstance(options.get("lora_alpha"), int | float)),
    ):
        if there:
            found = f"no {name}" if name.startswith("a number") else f"one with {name}, which is not merged here"
            raise _refused(adapter, found, _MERGE)
    return options


def _refused(adapter: Path, found: str, action: str) -> CheckpointError:
    return CheckpointError(expected=f"a LoRA adapter for this checkpoint in {adapter}", found=found, action=action)
