"""Adapters as PEFT writes them, merged as PEFT merges them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration

from paliedge import PaliGemma
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Precision
from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.config import read_config
from paliedge_export.checkpoint.lora import Adapted, Adapter
from paliedge_export.checkpoint.safetensors_reader import Checkpoint, canonical_name
from paliedge_export.exporter import export_bundle
from paliedge_export.options import Quantization
from tests.export.test_quantized_export import bring_samples
from tests.tiny import make_tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for a name that goes
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""What the common fine-tuning tools adapt: in the decoder, and of the vision encoder what is called alike."""
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    "maestro": {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": ALL,
        "task_type": "CAUSAL_LM",
    },
    "rslora": {"r": 8, "lora_alpha": 16, "target_modules": ALL, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_dora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "up_proj": 32},
    },
    "projector-in-full": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "modules_to_save": ["linear"]},
    "biases": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "fc1"], "bias": "lora_only"},
    "patches": {"r": 4, "lora_alpha": 8, "target_modules": ["patch_embedding", "fc2"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_tiny(folder, "paligemma")
    return folder


def adapt(base: Path, adapter: Path, options: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Write an adapter with random weights; returns the tensors that PEFT's merge gives."""
    torch.manual_seed(1)
    model = PaliGemmaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(str(adapter))
    merged = adapted.merge_and_unload()
    return {canonical_name(name): value.numpy() for name, value in merged.state_dict().items()}


def open_adapted(base: Path, adapter: Path) -> Adapted:
    return Adapted(base, read_config(base), [Adapter(adapter)])


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_every_tensor_is_what_peft_makes_of_it(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    expected = adapt(base, tmp_path, options)
    plain, found = Checkpoint(base, read_config(base)), open_adapted(base, tmp_path)
    assert found.changed
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert (name in found.changed) == (not np.array_equal(found[name], plain[name])), name


def test_names_of_older_transformers_are_found(base: Path, tmp_path: Path) -> None:
    expected = adapt(base, tmp_path, KINDS["lora"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    older = {}
    for key, tensor in tensors.items():
        path = key.removeprefix("base_model.model.model.")
        path = path.replace("language_model.layers", "language_model.model.layers")
        older["base_model.model." + path.replace("vision_tower.encoder", "vision_tower.vision_model.encoder")] = tensor
    assert not older.keys() & tensors.keys()
    save_file(older, tmp_path / "adapter_model.safetensors")
    found = open_adapted(base, tmp_path)
    for name in found.changed:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_bundle_answers_as_the_merged_model_does(base: Path, tmp_path: Path) -> None:
    """fp32: the export itself compares with transformers, whose weights were replaced; here PEFT did it."""
    adapt(base, tmp_path / "adapter", KINDS["maestro"])
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    first = export_bundle(str(base), tmp_path / "one", adapters=[tmp_path / "adapter"])
    second = export_bundle(str(tmp_path / "merged"), tmp_path / "other")
    plain = export_bundle(str(base), tmp_path / "plain")
    answers = [golden_tokens(tmp_path / name) for name in ("one", "other", "plain")]
    assert np.array_equal(answers[0], answers[1])
    assert not np.array_equal(answers[0], answers[2])
    assert first.comparisons["cpu"].token_match == second.comparisons["cpu"].token_match == 1.0
    assert plain.comparisons["cpu"].reference.startswith("transformers")


def merge(base: Path, adapter: Path, output: Path) -> None:
    """Write the checkpoint that PEFT makes of base and adapter."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    shutil.copytree(base, output)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)


def make_exact(adapter: Path) -> None:
    """Round its numbers to 64ths, whose products are exact: PEFT and NumPy then merge to the last bit alike."""
    file = adapter / "adapter_model.safetensors"
    save_file({name: np.round(tensor * 64) / 64 for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_an_adapter_is_merged_before_anything_is_measured_or_rounded(
    precision: Precision, base: Path, tmp_path: Path
) -> None:
    adapt(base, tmp_path / "adapter", KINDS["maestro"])
    make_exact(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    bring_samples(tmp_path, 2)
    adapted, merged, plain = (
        export_bundle(
            str(checkpoint),
            tmp_path / "bundle",
            precision=precision,
            quantization=Quantization(tmp_path / "calibration"),
            adapters=[adapter] if adapter else [],
            compare=False,
        ).files
        for checkpoint, adapter in ((base, tmp_path / "adapter"), (tmp_path / "merged", None), (base, None))
    )
    assert adapted == merged
    changed = {name for name in adapted if adapted[name] != plain[name]}
    assert {f"decoder.{precision}.contrib.weights", "calibration.safetensors"} <= changed


def golden_tokens(bundle: Path) -> np.ndarray[Any, Any]:
    with np.load(bundle / "golden.npz") as file:
        return np.asarray(file["token_ids"])


def spoil(adapter: Path, **options: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        *[({"init_lora_weights": kind}, kind) for kind in ("pissa_niter_4", "olora", "corda", "loftq", "lora_ga")],
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": {"embed_tokens": [3], "lm_head": [3]}}, "trainable_token_indices"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"use_dora": True}, "lora_magnitude_vector"),
    ],
)
def test_a_kind_that_is_not_merged_is_refused_by_name(
    options: dict[str, Any], named: str, base: Path, tmp_path: Path
) -> None:
    adapt(base, tmp_path, {"r": 2, "target_modules": ["q_proj"]})
    spoil(tmp_path, **options)
    with pytest.raises(CheckpointError, match=named):
        open_adapted(base, tmp_path)


def test_a_tensor_that_belongs_to_nothing_is_an_error(base: Path, tmp_path: Path) -> None:
    adapt(base, tmp_path, {"r": 2, "target_modules": ["q_proj"]})
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    extra = "base_model.model.model.language_model.layers.99.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {extra: np.zeros((2, 48), np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"layers\.99"):
        open_adapted(base, tmp_path)
    some = next(key for key in tensors if "lora_B" in key)
    save_file({key: value for key, value in tensors.items() if key != some}, file)
    with pytest.raises(CheckpointError, match="lora_B"):
        open_adapted(base, tmp_path)
    save_file(tensors | {some: np.zeros((7, 2), np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"\[7, 2\]"):
        open_adapted(base, tmp_path)


TABLES: dict[str, dict[str, Any]] = {
    "head-and-table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "products-on-the-table": {"target_modules": ["q_proj", "embed_tokens"]},
    "products-on-the-head": {"target_modules": ["q_proj", "lm_head"]},
    "rows-of-tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [40, 300, 1577]}},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("options", TABLES.values(), ids=TABLES)
def test_a_table_or_head_of_its_own_answers_as_peft_does_unmerged(
    options: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    """As in training, where table and head of a tied model part as soon as one of the two is trained alone."""
    make_tiny(tmp_path / "base", "paligemma", tied=tied)
    torch.manual_seed(1)
    model = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    export_bundle(str(tmp_path / "base"), tmp_path / "bundle", adapters=[tmp_path / "adapter"])
    manifest = Bundle(tmp_path / "bundle").manifest
    assert manifest.comparisons["cpu"].token_match == 1.0
    ids = torch.tensor([[1578] * 16 + [2, 50, 60, 108]])
    image = np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8)
    with PaliGemma.load(tmp_path / "bundle") as ours:
        pixels = torch.from_numpy(ours._preprocess(Image.fromarray(image)))
        wanted = (
            adapted.eval()
            .generate(
                input_ids=ids,
                pixel_values=pixels,
                attention_mask=torch.ones_like(ids),
                token_type_ids=torch.zeros_like(ids),
                max_new_tokens=8,
                do_sample=False,
            )[0, ids.shape[1] :]
            .tolist()
        )
        engine_ids = ids[0, 16:].tolist()
        encoded, cache = ours.encode(image), ours._session.new_cache()
        embed, last = ours._answerer._embed, ours.manifest.tokens.vocab_size - 1
        token = ours._session.prefill(cache, [encoded.features], embed(engine_ids), (0, last))
        found = [token.token_id]
        while len(found) < len(wanted):
            (token,) = ours._session.decode(cache, embed([found[-1]]), [(0, last)])
            found.append(token.token_id)
    assert found == wanted


def test_adapters_are_added_up_in_their_order_and_by_their_weights(base: Path, tmp_path: Path) -> None:
    name = "language_model.layers.0.self_attn.q_proj.weight"
    for number, rank in ((1, 2), (2, 4)):
        adapt(base, tmp_path / str(number), {"r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]})
    plain = Checkpoint(base, read_config(base))[name]
    first, second = (open_adapted(base, tmp_path / number)[name] - plain for number in ("1", "2"))
    adapters = [Adapter(tmp_path / "1", 0.25), Adapter(tmp_path / "2")]
    found = Adapted(base, read_config(base), adapters)[name]
    np.testing.assert_allclose(found, plain + 0.25 * first + second, rtol=1e-4, atol=1e-5)
    whole = tmp_path / "whole"
    adapt(base, whole, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["linear"]})
    with pytest.raises(CheckpointError, match=r"weight of 0\.5"):
        Adapter(whole, 0.5)


def test_a_folder_without_an_adapter_says_what_one_is(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        open_adapted(base, tmp_path)
    adapt(base, tmp_path, {"r": 2, "target_modules": ["q_proj"]})
    (tmp_path / "adapter_model.safetensors").write_text("no tensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        open_adapted(base, tmp_path)
