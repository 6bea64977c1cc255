"""The PaliGemma inside a pi0, pi0.5 or pi0-FAST policy, as lerobot and openpi's port to PyTorch save it.

A policy is one file: PaliGemma's tensors behind `paligemma_with_expert.paligemma.`, an action expert that reads its
cache, and a few projections. The names and dimensions are those of lerobot 0.4's source. Only PaliGemma is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from paliedge.bundle.manifest import Preprocess
from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.config import ModelConfig, parse_config
from paliedge_export.checkpoint.hub import find_tokenizer
from paliedge_export.checkpoint.safetensors_reader import Checkpoint, unwrapped_names
from paliedge_export.checkpoint.tokenizer import FILE as TOKENIZER_FILE

_TYPES = ("pi0", "pi05", "pi0_fast")
_BEFORE = re.compile(r"^(.*\.)?paligemma_with_expert\.paligemma\.")
"""What stands before PaliGemma's own names; older lerobot has statistics of its normaliser beside them."""
_TOKENIZER = "google/paligemma-3b-pt-224"
_PREPROCESSOR = "policy_preprocessor.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma_2b": {"hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 16384},
    "gemma_300m": {"hidden_size": 1024, "num_hidden_layers": 18, "intermediate_size": 4096},
}
HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}
VISION: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}


def is_policy(folder: Path) -> bool:
    """Whether `folder`/config.json is a policy's: lerobot's says its type, openpi's only the variants."""
    raw = _read(folder / "config.json")
    return raw.get("type") in _TYPES or "paligemma_variant" in raw


class Pi0Checkpoint(Checkpoint):
    """A policy's PaliGemma, by canonical names.

    Args:
        folder: with config.json and model.safetensors. Without a tokenizer.json it is the one of the hub repository
            that the policy names.

    Raises:
        CheckpointError: another variant, no tokenizer, or tensors that are not there.
    """

    why_no_reference = "transformers does not read the folder of a policy"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, _read_dimensions(folder))
        self._tokenizer = folder if (folder / TOKENIZER_FILE).is_file() else _find_tokenizer(folder)

    @property
    def folders(self) -> list[Path]:
        return [self.folder, self._tokenizer]

    def read_preprocess(self) -> Preprocess:
        """The policies': bilinear, padded to a square with black."""
        return Preprocess(resample="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, letterbox=(0, 0, 0))

    def _plain_names(self, names: Collection[str]) -> dict[str, str]:
        plain = {name: _BEFORE.sub("", name) for name in names if _BEFORE.match(name)}
        inner = unwrapped_names(plain.values())
        return {name: inner[without] for name, without in plain.items()}


def _read_dimensions(folder: Path) -> ModelConfig:
    raw = _read(folder / "config.json")
    variant = raw.get("paligemma_variant", "gemma_2b")
    size = (raw.get("image_resolution") or [224])[0]
    if variant not in VARIANTS:
        raise CheckpointError(
            expected=f"a paligemma_variant of {' or '.join(VARIANTS)} in {folder / 'config.json'}",
            found=f"{variant!r}",
            action="Merge adapters into the policy first; other variants are not exported.",
        )
    text = {"model_type": "gemma", **VARIANTS[variant], **HEADS}
    return parse_config(
        {"model_type": "paligemma", "text_config": text, "vision_config": VISION | {"image_size": size}}
    )


def _find_tokenizer(folder: Path) -> Path:
    """Of the repository that the policy's preprocessor names."""
    steps = _read(folder / _PREPROCESSOR).get("steps") or []
    names = [step.get("config", {}).get("tokenizer_name") for step in steps if isinstance(step, dict)]
    name = next((name for name in names if isinstance(name, str)), _TOKENIZER)
    try:
        return find_tokenizer(name)
    except CheckpointError as error:
        raise CheckpointError(
            expected=f"a tokenizer.json in {folder}, or that of {name} from the hub",
            found=error.found,
            action=f"Copy tokenizer.json of {name} into the folder. {error.action}",
        ) from error


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}
