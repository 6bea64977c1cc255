"""Dimensions from config.json, with the defaults that transformers fills in."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PaliGemmaConfig

from benchmarks.make_checkpoint import TEXT_CONFIGS, hub_config
from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.config import ModelConfig, read_config

Json = dict[str, Any]
SECOND = TEXT_CONFIGS["paligemma2-3b"]
HUB_CONFIGS: dict[str, Json] = {
    **{f"paligemma-3b-{size}": hub_config(TEXT_CONFIGS["paligemma-3b"], size) for size in (224, 448, 896)},
    "paligemma2-3b-224": hub_config(SECOND, 224),
    "paligemma2-10b-448": hub_config(
        SECOND
        | {
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
        },
        448,
    ),
    "paligemma2-28b-896": hub_config(
        SECOND
        | {
            "head_dim": 128,
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "num_attention_heads": 32,
            "num_hidden_layers": 46,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 144,
        },
        896,
    ),
}


def read(folder: Path, raw: object) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw))
    return read_config(folder)


def changed(edit: Callable[[Json], object], name: str = "paligemma2-3b-224") -> Json:
    raw = copy.deepcopy(HUB_CONFIGS[name])
    edit(raw)
    return raw


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_every_dimension_is_the_one_that_transformers_reads(name: str, tmp_path: Path) -> None:
    config = read(tmp_path, HUB_CONFIGS[name])
    wanted = PaliGemmaConfig.from_dict(HUB_CONFIGS[name])
    vision, text = wanted.vision_config, wanted.text_config
    assert config.family == ("paligemma" if text.model_type == "gemma" else "paligemma2")
    assert config.tied is wanted.tie_word_embeddings is True
    assert config.vision.image_size == vision.image_size == int(name.rsplit("-", 1)[1])
    assert config.vision.num_image_tokens == text.num_image_tokens
    for field, theirs in {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}.items():
        assert getattr(config.vision, field) == getattr(vision, theirs), field
        assert getattr(config.text, field) == getattr(text, theirs), field
    for field in ("patch_size", "hidden_size", "intermediate_size"):
        assert getattr(config.vision, field) == getattr(vision, field), field
    for field in ("hidden_size", "intermediate_size", "head_dim"):
        assert getattr(config.text, field) == getattr(text, field), field
    assert config.vision.eps == vision.layer_norm_eps
    assert config.text.num_kv_heads == text.num_key_value_heads
    assert config.text.eps == text.rms_norm_eps
    assert config.text.rope_theta == text.rope_parameters["rope_theta"]
    assert config.text.attn_softcap == getattr(text, "attn_logit_softcapping", None)
    assert config.text.final_softcap == getattr(text, "final_logit_softcapping", None)
    assert config.text.post_norms is (text.model_type == "gemma2")


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_sections_with_nothing_in_them_have_the_defaults_of_transformers(kind: str, tmp_path: Path) -> None:
    raw = {"model_type": "paligemma", "text_config": {"model_type": kind}, "vision_config": {"patch_size": 14}}
    config, wanted = read(tmp_path, raw), PaliGemmaConfig.from_dict(copy.deepcopy(raw))
    text, vision = wanted.text_config, wanted.vision_config
    assert (config.text.hidden_size, config.text.intermediate_size) == (text.hidden_size, text.intermediate_size)
    assert (config.text.num_layers, config.text.num_heads) == (text.num_hidden_layers, text.num_attention_heads)
    assert (config.text.num_kv_heads, config.text.head_dim) == (text.num_key_value_heads, text.head_dim)
    assert config.text.attn_softcap == getattr(text, "attn_logit_softcapping", None)
    assert config.text.final_softcap == getattr(text, "final_logit_softcapping", None)
    assert (config.vision.hidden_size, config.vision.image_size) == (vision.hidden_size, vision.image_size)
    assert (config.vision.num_layers, config.vision.num_heads) == (vision.num_hidden_layers, vision.num_attention_heads)


@pytest.mark.parametrize(
    ("name", "scale"),
    [("paligemma-3b-224", 256**-0.5), ("paligemma2-10b-448", 256**-0.5), ("paligemma2-28b-896", 1 / 12)],
)
def test_the_28b_model_scales_queries_by_its_own_number(name: str, scale: float, tmp_path: Path) -> None:
    assert read(tmp_path, HUB_CONFIGS[name]).text.query_scale == pytest.approx(scale, rel=1e-12)


def test_softcaps_can_be_other_numbers_or_off(tmp_path: Path) -> None:
    edit = {"attn_logit_softcapping": None, "final_logit_softcapping": 7.0}
    text = read(tmp_path, changed(lambda raw: raw["text_config"].update(edit))).text
    assert (text.attn_softcap, text.final_softcap) == (None, 7.0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5000.0},
        {"rope_parameters": None, "rope_scaling": None, "rope_theta": 5000.0},
    ],
)
def test_the_rotary_base_is_read_in_old_and_new_spelling(rope: Json, tmp_path: Path) -> None:
    raw = changed(lambda raw: raw["text_config"].update(rope))
    wanted = PaliGemmaConfig.from_dict(copy.deepcopy(raw)).text_config.rope_parameters["rope_theta"]
    assert read(tmp_path, raw).text.rope_theta == wanted == 5000.0


def test_the_old_gemma_name_of_the_tanh_gelu_is_accepted(tmp_path: Path) -> None:
    raw = changed(lambda raw: raw["text_config"].update(hidden_act="gelu"), "paligemma-3b-224")
    assert PaliGemmaConfig.from_dict(copy.deepcopy(raw)).text_config.hidden_act == "gelu_pytorch_tanh"
    assert read(tmp_path, raw).family == "paligemma"


@pytest.mark.parametrize("section", ["vision_config", "text_config"])
def test_a_config_without_a_section_is_refused(section: str, tmp_path: Path) -> None:
    """transformers would take 3B sizes for it; no published checkpoint leaves one out."""
    with pytest.raises(CheckpointError, match="a section that is missing"):
        read(tmp_path, changed(lambda raw: raw.pop(section)))


@pytest.mark.parametrize(
    ("section", "edit"),
    [
        ("text_config", {"head_dim": None}),
        ("text_config", {"num_hidden_layers": "18"}),
        ("text_config", {"hidden_size": 2048.0}),
        ("text_config", {"num_key_value_heads": 0}),
        ("text_config", {"rope_parameters": [1]}),
        ("vision_config", {"patch_size": 0}),
        ("vision_config", {"image_size": True}),
        ("vision_config", {"num_attention_heads": -16}),
    ],
)
def test_a_dimension_that_is_no_number_is_refused(section: str, edit: Json, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read(tmp_path, changed(lambda raw: raw[section].update(edit)))


def test_an_untied_head_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, changed(lambda raw: raw.update(tie_word_embeddings=False))).tied is False


@pytest.mark.parametrize(
    ("name", "edit", "found"),
    [
        ("paligemma-3b-224", lambda raw: raw.update(model_type="llava"), "llava"),
        ("paligemma-3b-224", lambda raw: raw["text_config"].update(model_type="gemma3"), "gemma3"),
        ("paligemma-3b-224", lambda raw: raw["text_config"].update(hidden_act="relu"), "relu"),
        ("paligemma2-3b-224", lambda raw: raw["text_config"].update(hidden_activation="relu"), "relu"),
        ("paligemma-3b-224", lambda raw: raw["vision_config"].update(hidden_act="gelu"), "gelu"),
        ("paligemma-3b-224", lambda raw: raw["vision_config"].update(vision_use_head=True), "True"),
        ("paligemma-3b-224", lambda raw: raw["vision_config"].update(image_size=225), "sizes that do not divide"),
        ("paligemma2-3b-224", lambda raw: raw["text_config"].update(num_key_value_heads=3), "3"),
        ("paligemma2-3b-224", lambda raw: raw["text_config"].update(rope_scaling={"type": "linear"}), "linear"),
        (
            "paligemma2-3b-224",
            lambda raw: raw["text_config"].update(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
            "yarn",
        ),
    ],
)
def test_what_the_graphs_cannot_express_is_refused(
    name: str, edit: Callable[[Json], object], found: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, changed(edit, name))
    assert found in caught.value.found


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model_type"):
        read(tmp_path, ["paligemma"])


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        read_config(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        read_config(tmp_path)
