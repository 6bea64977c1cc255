"""Model dimensions from a checkpoint's config.json, with the defaults that transformers fills in.

Only numbers: token ids come from the tokenizer, because `image_token_index` in old configs is wrong.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.weight_files import folders_below, refuse_pointer, some


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP vision encoder: `image_size` and `patch_size` in pixels."""

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    eps: float

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class TextConfig:
    """Gemma or Gemma 2 decoder. `attn_softcap` and `final_softcap` are None where there is none."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scale: float
    rope_theta: float
    eps: float
    attn_softcap: float | None
    final_softcap: float | None
    post_norms: bool

    @property
    def attention_width(self) -> int:
        """Of all heads' queries side by side."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class ModelConfig:
    """A PaliGemma checkpoint's dimensions; `tied`: the output head is the embedding table."""

    family: Literal["paligemma", "paligemma2"]
    vision: VisionConfig
    text: TextConfig
    tied: bool


_GEMMA = {
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
}
_GEMMA2 = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
_LARGEST = 1 << 20
_SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}


def read_config(folder: Path) -> ModelConfig:
    """Read `folder`/config.json.

    Raises:
        CheckpointError: no config.json, not a PaliGemma, or a dimension or activation that is not supported.
    """
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        if below := folders_below(folder):
            raise CheckpointError(
                expected=f"a Hugging Face checkpoint with config.json in {folder}",
                found=f"checkpoints in {some(path.name for path in below)}",
                action=f"Name {below[-1]}.",
            ) from error
        if isinstance(error, ValueError):
            refuse_pointer(folder / "config.json")
        raise CheckpointError(
            expected=f"a Hugging Face checkpoint with config.json in {folder}",
            found="no readable config.json" if isinstance(error, OSError) else "a config.json that is no JSON",
            action="Name the folder that holds config.json, tokenizer.json and the .safetensors files.",
        ) from error
    return parse_config(raw)


def parse_config(raw: Any) -> ModelConfig:
    """What config.json holds.

    Raises:
        CheckpointError: not a PaliGemma, or a dimension or activation that is not supported.
    """
    found = raw.get("model_type") if isinstance(raw, dict) else None
    if found != "paligemma":
        raise _unsupported("model_type", found, "paligemma")
    vision, text = raw.get("vision_config"), raw.get("text_config")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise _unsupported("vision_config and text_config", "a section that is missing", "sections of config.json")
    kind = text.get("model_type", "gemma")
    if kind not in ("gemma", "gemma2"):
        raise _unsupported("text_config.model_type", kind, "gemma or gemma2")
    if kind == "gemma" and text.get("hidden_act") == "gelu":  # what old Gemma configs call the tanh form
        text = text | {"hidden_act": None}
    used = "hidden_activation" if kind == "gemma2" else "hidden_act"
    for name, section in (("hidden_activation", text), (used, text), ("hidden_act", vision)):
        if section.get(name) not in (None, "gelu_pytorch_tanh"):
            raise _unsupported(name, section[name], "gelu_pytorch_tanh")
    if vision.get("vision_use_head"):
        raise _unsupported("vision_use_head", True, "False")
    try:
        return ModelConfig(
            family="paligemma2" if kind == "gemma2" else "paligemma",
            vision=_read_vision(_SIGLIP | vision),
            text=_read_text((_GEMMA2 if kind == "gemma2" else _GEMMA) | text, kind == "gemma2"),
            tied=bool(raw.get("tie_word_embeddings", True)),
        )
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise _unsupported("every dimension", f"{error}", "a number") from error


def _size(raw: dict[str, Any], name: str) -> int:
    value = raw[name]
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise _unsupported(name, value, f"a whole number from 1 to {_LARGEST}")
    return value


def _read_vision(raw: dict[str, Any]) -> VisionConfig:
    config = VisionConfig(
        image_size=_size(raw, "image_size"),
        patch_size=_size(raw, "patch_size"),
        hidden_size=_size(raw, "hidden_size"),
        intermediate_size=_size(raw, "intermediate_size"),
        num_layers=_size(raw, "num_hidden_layers"),
        num_heads=_size(raw, "num_attention_heads"),
        eps=raw.get("layer_norm_eps", 1e-6),
    )
    if config.image_size % config.patch_size or config.hidden_size % config.num_heads:
        supported = "an image that patches divide, and a hidden size that heads divide,"
        raise _unsupported("vision_config", "sizes that do not divide", supported)
    return config


def _read_text(raw: dict[str, Any], second: bool) -> TextConfig:
    scalar = raw.get("query_pre_attn_scalar", 256) if second else raw["head_dim"]
    rope = raw.get("rope_parameters") or {}
    scaling = rope.get("rope_type", "default") if rope else (raw.get("rope_scaling") or "default")
    if scaling != "default":
        raise _unsupported("rope scaling", scaling, "default")
    if raw["num_attention_heads"] % raw["num_key_value_heads"]:
        raise _unsupported("num_key_value_heads", raw["num_key_value_heads"], "a divisor of num_attention_heads")
    return TextConfig(
        hidden_size=_size(raw, "hidden_size"),
        intermediate_size=_size(raw, "intermediate_size"),
        num_layers=_size(raw, "num_hidden_layers"),
        num_heads=_size(raw, "num_attention_heads"),
        num_kv_heads=_size(raw, "num_key_value_heads"),
        head_dim=_size(raw, "head_dim"),
        query_scale=1 / math.sqrt(scalar),
        rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10_000.0)),
        eps=raw.get("rms_norm_eps", 1e-6),
        attn_softcap=raw.get("attn_logit_softcapping", 50.0) if second else None,
        final_softcap=raw.get("final_logit_softcapping", 30.0) if second else None,
        post_norms=second,
    )


def _unsupported(name: str, found: object, supported: str) -> CheckpointError:
    return CheckpointError(
        expected=f"{supported} as {name}",
        found=f"{found!r} in config.json",
        action="Name a checkpoint of PaliGemma or PaliGemma 2; for another model use its own exporter.",
    )
