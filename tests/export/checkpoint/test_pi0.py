"""Policies in the forms that lerobot and openpi save them; what comes out is the PaliGemma that went in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paliedge.errors import CheckpointError, UsageError
from paliedge_export.checkpoint import hub, pi0
from paliedge_export.checkpoint.config import read_config
from paliedge_export.checkpoint.opening import open_checkpoint
from paliedge_export.checkpoint.safetensors_reader import Checkpoint
from paliedge_export.exporter import export_bundle
from tests.tiny import make_tiny

LEROBOT = {"type": "pi05", "paligemma_variant": "gemma_2b", "image_resolution": [56, 56], "dtype": "bfloat16"}
OPENPI = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m", "image_resolution": [56, 56]}
INNER = "paligemma_with_expert.paligemma."
EXPERT = {
    "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj.weight": (16, 8),
    "paligemma_with_expert.gemma_expert.model.norm.dense.weight": (8, 8),
    "paligemma_with_expert.gemma_expert.lm_head.weight": (64, 8),
    "action_in_proj.weight": (8, 32),
    "time_mlp_in.bias": (8,),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_tiny(folder, "paligemma")
    return folder


@pytest.fixture(autouse=True)
def tiny(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy's config names a variant; here the variant has the tiny model's dimensions."""
    raw = json.loads((plain / "config.json").read_text())
    text, vision = raw["text_config"], raw["vision_config"]
    monkeypatch.setattr(pi0, "VARIANTS", {"gemma_2b": {name: text[name] for name in pi0.VARIANTS["gemma_2b"]}})
    monkeypatch.setattr(pi0, "HEADS", {name: text[name] for name in pi0.HEADS})
    monkeypatch.setattr(pi0, "VISION", {name: vision[name] for name in pi0.VISION})


def old_spelling(name: str) -> str:
    """Of transformers 4: the language model has a model of its own."""
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.").replace("model.model.", "model.")


def make_policy(
    plain: Path, folder: Path, config: dict[str, Any], spell: Callable[[str], str], *, tokenizer: bool = True
) -> Path:
    folder.mkdir()
    tensors = {INNER + spell(name): value for name, value in load_file(plain / "model.safetensors").items()}
    tensors |= {name: np.ones(shape, np.float32) for name, shape in EXPERT.items()}
    if config.get("type"):
        tensors = {f"model.{name}": value for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        (folder / "tokenizer.json").write_bytes((plain / "tokenizer.json").read_bytes())
    return folder


FORMS: dict[str, tuple[dict[str, Any], Callable[[str], str]]] = {
    "lerobot": (LEROBOT, lambda name: name),
    "lerobot, tied table under the head's name": (
        LEROBOT,
        lambda name: "lm_head.weight" if name.endswith("embed_tokens.weight") else name,
    ),
    "lerobot, pi0": (LEROBOT | {"type": "pi0"}, old_spelling),
    "openpi": (OPENPI, old_spelling),
    "pi0-FAST": ({"type": "pi0_fast", "image_resolution": [56, 56]}, lambda name: name),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_paligemma_in_a_policy_is_the_one_that_was_put_in(form: str, plain: Path, tmp_path: Path) -> None:
    config, spell = FORMS[form]
    lines: list[str] = []
    found = open_checkpoint(str(make_policy(plain, tmp_path / "policy", config, spell)), report=lines.append)
    wanted = Checkpoint(plain, read_config(plain))
    assert found.config == wanted.config
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(found[name], value), name
    assert any("action expert is left out" in line for line in lines)


def test_a_policy_is_exported_and_says_why_transformers_was_not_asked(plain: Path, tmp_path: Path) -> None:
    folder = make_policy(plain, tmp_path / "policy", *FORMS["lerobot"])
    manifest = export_bundle(str(folder), tmp_path / "bundle")
    export_bundle(str(plain), tmp_path / "wanted", compare=False)
    for name in ("decoder.fp32.weights", "vision_encoder.fp32.weights", "embed_tokens.fp32.weights"):
        assert (tmp_path / "bundle" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()
    assert manifest.preprocess.letterbox == (0, 0, 0)
    assert manifest.preprocess.resample == "bilinear"
    assert manifest.reference is not None
    assert "policy" in manifest.reference.not_compared


def test_the_tokenizer_is_that_of_the_repository_that_the_policy_names(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_policy(plain, tmp_path / "policy", *FORMS["lerobot"], tokenizer=False)
    asked: list[tuple[str, list[str]]] = []

    def download(repository: str, revision: str | None, wanted: list[str]) -> Path:
        asked.append((repository, wanted))
        return plain

    monkeypatch.setattr(hub, "download", download)
    assert open_checkpoint(str(folder)).folders == [folder, plain]
    step = {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "me/tokenizer"}}
    (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": [{"registry_name": "x"}, step]}))
    open_checkpoint(str(folder))
    assert [repository for repository, _ in asked] == ["google/paligemma-3b-pt-224", "me/tokenizer"]
    assert not any("safetensors" in pattern for _, wanted in asked for pattern in wanted)


def test_without_network_the_message_names_the_file_to_copy(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_policy(plain, tmp_path / "policy", *FORMS["lerobot"], tokenizer=False)

    def download(*arguments: object) -> Path:
        raise CheckpointError(expected="it", found="no network", action="Wait.")

    monkeypatch.setattr(hub, "download", download)
    with pytest.raises(CheckpointError, match=r"Copy tokenizer.json of google/paligemma-3b-pt-224 into"):
        open_checkpoint(str(folder))


def test_what_is_no_policy_of_these_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = make_policy(plain, tmp_path / "policy", *FORMS["lerobot"])
    with pytest.raises(UsageError, match="--lora"):
        open_checkpoint(str(folder), ["adapter"])
    (folder / "config.json").write_text(json.dumps(LEROBOT | {"paligemma_variant": "gemma_2b_lora"}))
    with pytest.raises(CheckpointError, match="gemma_2b_lora"):
        open_checkpoint(str(folder))
    (folder / "config.json").write_text(json.dumps({"type": "smolvla"}))
    with pytest.raises(CheckpointError, match="model_type"):
        open_checkpoint(str(folder))


def test_statistics_of_an_older_policy_beside_the_model_do_not_matter(plain: Path, tmp_path: Path) -> None:
    folder = make_policy(plain, tmp_path / "policy", *FORMS["lerobot"])
    tensors = load_file(folder / "model.safetensors")
    tensors["normalize_inputs.buffer_observation_state.mean"] = np.zeros(8, np.float32)
    save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(str(folder)).keys() == Checkpoint(plain, read_config(plain)).keys()
