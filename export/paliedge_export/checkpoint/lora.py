"""A checkpoint with a LoRA adapter merged into it, in float32, as each tensor is read.

The format is PEFT's: adapter_config.json and adapter_model.safetensors. With A [r, in] and B [out, r] a
weight becomes W + s B A. Here s is alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv
2312.03732). DoRA (arXiv 2402.09353) then gives each row the length that it has learned. What the adapter
holds in full (modules_to_save, biases) takes the place of the checkpoint's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.config import ModelConfig
from paliedge_export.checkpoint.safetensors_reader import EMBED_TOKENS, LM_HEAD, Array, Checkpoint, canonical_name

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PART = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$"
)
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that take something out of the base model's own weights."""
_SAVED = f"Name a folder with {_CONFIG} and {_WEIGHTS}, as PEFT saves an adapter."
_MERGE = "Merge it with PEFT's merge_and_unload(), save the model and export that."


class Adapted(Checkpoint):
    """A checkpoint's tensors with an adapter's changes.

    Args:
        folder: of the base model that the adapter was trained on.
        config: its configuration.
        adapter: folder of the adapter.

    Attributes:
        adapter: its folder.

    Raises:
        CheckpointError: see `Checkpoint`; no adapter, one of a kind that is not merged here, or one with a
            tensor that fits nothing in the checkpoint.
    """

    def __init__(self, folder: Path, config: ModelConfig, adapter: Path) -> None:
        super().__init__(folder, config)
        self.adapter = adapter
        self._options = _read_options(adapter)
        self._parts: dict[str, dict[str, Array]] = {}
        self._modules: dict[str, str] = {}
        self._replaced: dict[str, Array] = {}
        try:
            tensors = load_file(adapter / _WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise _refused(adapter, f"{error}", _SAVED) from error
        for key, tensor in tensors.items():
            self._take(key, tensor)
        for name, parts in self._parts.items():
            self._check_parts(name, parts)
        self.changed: Sequence[str] = sorted(self._parts.keys() | self._replaced.keys())

    @property
    def folders(self) -> list[Path]:
        return [self.adapter, self.folder]

    def __getitem__(self, name: str) -> Array:
        if name in self._replaced:
            return self._replaced[name]
        weight = super().__getitem__(name)
        return _merge(weight, self._parts[name], self._scale(name)) if name in self._parts else weight

    def rows(self, name: str, start: int, stop: int) -> Array:
        return self._replaced[name][start:stop] if name in self._replaced else super().rows(name, start, stop)

    def _take(self, key: str, tensor: Array) -> None:
        """Find the place of one of the adapter's tensors."""
        path = key.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        part = _PART.search(path)
        name = canonical_name(path[: part.start()] + ".weight" if part else path)
        if name not in self or (part and name in (EMBED_TOKENS, LM_HEAD)):
            what = "a table, whose rows are not merged here" if name in self else "nothing in the checkpoint"
            action = _MERGE if name in self else "Name the base model that the adapter was trained on."
            raise _refused(self.adapter, f"'{key}', which belongs to {what}", action)
        if part:
            self._parts.setdefault(name, {})[part[1]] = tensor
            self._modules[name] = path[: part.start()]
        elif tensor.shape == self.shape(name):
            self._replaced[name] = tensor
        else:
            raise self._misfit(key, tensor, self.shape(name))

    def _check_parts(self, name: str, parts: Mapping[str, Array]) -> None:
        """B A must have the weight's shape; the vector of lengths belongs to DoRA and to it alone."""
        shape = self.shape(name)
        wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if self._options.get("use_dora") else set())
        if parts.keys() != wanted:
            found = f"only {', '.join(sorted(parts))} for '{name}'"
            raise _refused(self.adapter, found, f"Save it again, with {', '.join(sorted(wanted))}.")
        down, up = parts["lora_A"], parts["lora_B"]
        if up.shape[:1] != shape[:1] or down.size != len(down) * math.prod(shape[1:]) or up.size != len(up) * len(down):
            raise self._misfit(name, up, shape)
        if "lora_magnitude_vector" in parts and (len(shape) != 2 or parts["lora_magnitude_vector"].size != shape[0]):
            raise self._misfit(name, parts["lora_magnitude_vector"], shape)

    def _misfit(self, name: str, tensor: Array, shape: tuple[int, ...]) -> CheckpointError:
        found = f"'{name}' of shape {list(tensor.shape)} for a tensor of shape {list(shape)}"
        return _refused(self.adapter, found, "Name the base model that the adapter was trained on.")

    def _scale(self, name: str) -> float:
        rank = len(self._parts[name]["lora_A"])
        alpha = float(self._options["lora_alpha"])
        for pattern, special in (self._options.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", self._modules[name]):
                alpha = float(special)
                break
        return alpha / (math.sqrt(rank) if self._options.get("use_rslora") else rank)


def _merge(weight: Array, parts: Mapping[str, Array], scale: float) -> Array:
    down, up = (np.asarray(parts[name], np.float32) for name in ("lora_A", "lora_B"))
    product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    merged = np.asarray(weight, np.float32) + np.float32(scale) * product.reshape(weight.shape)
    if "lora_magnitude_vector" in parts:
        lengths = np.linalg.norm(merged, axis=1, keepdims=True)
        merged *= np.asarray(parts["lora_magnitude_vector"], np.float32).reshape(-1, 1) / lengths
    return np.asarray(merged, np.float32)


def _read_options(adapter: Path) -> dict[str, Any]:
    try:
        options = json.loads((adapter / _CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(adapter, f"{error}", _SAVED) from error
    if not isinstance(options, dict) or options.get("peft_type") != "LORA":
        kind = options.get("peft_type") if isinstance(options, dict) else options
        raise _refused(adapter, f"an adapter of the kind {kind}", _MERGE)
    begins = str(options.get("init_lora_weights", "")).lower()
    for name, there in (
        ("fan_in_fan_out", options.get("fan_in_fan_out")),
        ("lora_bias", options.get("lora_bias")),
        (f"init_lora_weights {begins}", begins.startswith(_CHANGED_BASE)),
        ("layer_replication", options.get("layer_replication")),
        ("trainable_token_indices", options.get("trainable_token_indices")),
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
