"""Checkpoints made at random in the forms in which people have them: layouts, types, names, tokenizers, adapters."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoTokenizer, PaliGemmaForConditionalGeneration

from tests.tiny import make_tiny

Tensors = dict[str, torch.Tensor]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Form:
    """One checkpoint.

    Attributes:
        folder: what is exported.
        twin: a folder that transformers reads as the same model, where it cannot read `folder`.
        adapters: merged into it.
        choices: which form it has, aspect by aspect.
        refusals: of the choices that must be refused, what the error has to name.
    """

    folder: Path
    twin: Path
    adapters: list[Path] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)


def edit(path: Path, **changes: Any) -> None:
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(raw | changes))


def write_shards(folder: Path, tensors: Tensors, *, index: bool) -> list[Path]:
    names = list(tensors)
    placed: dict[str, str] = {}
    for number in (0, 1):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        part = {name: tensors[name].contiguous() for name in names[number::2]}
        save_file(part, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    if index:
        edit(folder / INDEX, metadata={"total_size": 1}, weight_map=placed)
    return [folder / name for name in sorted(set(placed.values()))]


def write_single(folder: Path, tensors: Tensors) -> None:
    unshared = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(unshared, folder / SINGLE, metadata={"format": "pt"})


def _shards_without_index(folder: Path, tensors: Tensors) -> None:
    write_shards(folder, tensors, index=False)


def _shards(folder: Path, tensors: Tensors) -> None:
    write_shards(folder, tensors, index=True)


def _stale_index(folder: Path, tensors: Tensors) -> None:
    for path in write_shards(folder, tensors, index=True):
        path.unlink()
    write_single(folder, tensors)


def _both(folder: Path, tensors: Tensors) -> None:
    write_shards(folder, tensors, index=True)
    write_single(folder, tensors)


def _two_sets(folder: Path, tensors: Tensors) -> None:
    write_shards(folder, {name: tensor * 0.5 for name, tensor in tensors.items()}, index=True)
    write_single(folder, tensors)


def _lost_shard(folder: Path, tensors: Tensors) -> None:
    write_shards(folder, tensors, index=True)[-1].unlink()


LAYOUTS: dict[str, Callable[[Path, Tensors], None]] = {
    "single": write_single,
    "shards": _shards,
    "shards without index": _shards_without_index,
    "stale index": _stale_index,
    "both": _both,
    "two sets": _two_sets,
    "lost shard": _lost_shard,
}


def _mixed(name: str) -> torch.dtype:
    return (torch.float32, torch.bfloat16, torch.float16)[len(name) % 3]


TYPES: dict[str, Callable[[str], torch.dtype]] = {
    "float32": lambda name: torch.float32,
    "bfloat16": lambda name: torch.bfloat16,
    "float16": lambda name: torch.float16,
    "float64": lambda name: torch.float64,
    "mixed": _mixed,
}


def _older(name: str) -> str:
    """As transformers 4 wrote them."""
    name = name.removeprefix("model.")
    if name.startswith("language_model.") and not name.startswith(("language_model.model.", "language_model.lm_head.")):
        name = name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return "language_model.lm_head.weight" if name == "lm_head.weight" else name


NAMES: dict[str, Callable[[str], str]] = {
    "plain": lambda name: name,
    "older": _older,
    "_orig_mod": lambda name: f"_orig_mod.{name}",
    "module": lambda name: f"module.{name}",
    "base_model.model": lambda name: f"base_model.model.{name}",
    "fsdp": lambda name: name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
}
READ_BY_TRANSFORMERS = {"layout": {"single", "shards", "stale index", "both", "two sets"}, "names": {"plain", "older"}}


def _added(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s_x>"]})
    tokenizer.add_tokens(["<plain>"])
    tokenizer.save_pretrained(folder)


def _stripping(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<s_x>", lstrip=True), AddedToken("<plain>", rstrip=True, single_word=True)])
    tokenizer.save_pretrained(folder)


def _truncated(folder: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit(folder / "tokenizer.json", truncation=truncation)


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "plain": lambda folder: None,
    "added": _added,
    "stripping": _stripping,
    "truncated": _truncated,
}
GENERATION: dict[str, dict[str, Any] | None] = {
    "plain": {},
    "several ends": {"eos_token_id": [1, 330, 438]},
    "no file": None,
    "sampling": {"do_sample": True, "temperature": 0.7},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "suppress_tokens": {"suppress_tokens": [700]},
    "num_beams": {"num_beams": 2},
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "do_normalize": {"do_normalize": False},
    "rescale_factor": {"rescale_factor": 1 / 127.5},
    "mean and std": {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.4, 0.5]},
    "nearest": {"resample": 0},
    "lanczos": {"resample": 1},
    "bilinear": {"resample": 2},
    "do_convert_rgb": {"do_convert_rgb": None},
    "do_center_crop": {"do_center_crop": True, "crop_size": {"height": 40, "width": 40}},
    "do_resize": {"do_resize": False},
    "other": {"image_processor_type": "ConvNextImageProcessor"},
}
ADAPTERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "plain": {"r": 4, "target_modules": ALL},
    "rslora": {"r": 4, "target_modules": ["q_proj", "fc1"], "use_rslora": True},
    "dora": {"r": 2, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "table": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "table and head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "rows": {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [40, 300]}},
}
REFUSED = {
    "layout": {"two sets": "two sets of weights", "lost shard": "model-00002-of-00002.safetensors"},
    "generation": {name: name for name in ("repetition_penalty", "suppress_tokens", "num_beams")},
    "processor": {"do_center_crop": "do_center_crop", "do_resize": "do_resize", "other": "ConvNextImageProcessor"},
}
"""What an export refuses, and why: weights that are there twice or not at all, decoding that is not greedy, pictures
that are not resized or are not SigLIP's."""


def write_adapter(base: Path, folder: Path, options: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    model = PaliGemmaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(lora_alpha=8, **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder))


ASPECTS: dict[str, list[str]] = {
    "layout": list(LAYOUTS),
    "type": list(TYPES),
    "names": list(NAMES),
    "tokenizer": list(TOKENIZERS),
    "generation": list(GENERATION),
    "processor": list(PROCESSORS),
    "adapter": list(ADAPTERS),
    "words and pictures": ["in the checkpoint", "beside the adapter"],
}
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
"""What a fine-tune may leave beside its adapter, and is meant more than what the base model has."""


def choose(seed: int) -> dict[str, str]:
    """Aspect by aspect what form number `seed` is; the first of each, the usual one, as often as all together."""
    rng = random.Random(seed)
    choices = {aspect: rng.choice(forms) if rng.random() < 0.5 else forms[0] for aspect, forms in ASPECTS.items()}
    choices["family"] = rng.choice(["paligemma", "paligemma2"])
    choices["tied"] = rng.choice(["tied", "tied", "untied"])
    return choices


def refusals_of(choices: dict[str, str]) -> list[str]:
    """What an error has to name, if the form is to be refused."""
    return [names[choices[aspect]] for aspect, names in REFUSED.items() if choices[aspect] in names]


def make_form(seed: int, folder: Path) -> Form:
    """The form number `seed`; the same on every machine."""
    choices = choose(seed)
    twin, made = folder / "twin", folder / "base"
    make_tiny(twin, choices["family"], seed=seed, tied=choices["tied"] == "tied")
    tensors = load_file(twin / SINGLE)
    typed = {name: tensor.to(TYPES[choices["type"]](name)) for name, tensor in tensors.items()}
    write_single(twin, typed)
    shutil.copytree(twin, folder / "plain")
    TOKENIZERS[choices["tokenizer"]](twin)
    settings = GENERATION[choices["generation"]]
    if settings is None:
        (twin / "generation_config.json").unlink()
    else:
        edit(twin / "generation_config.json", **settings)
    edit(twin / "preprocessor_config.json", **PROCESSORS[choices["processor"]])
    shutil.copytree(twin, made)
    (made / SINGLE).unlink()
    LAYOUTS[choices["layout"]](made, {NAMES[choices["names"]](name): tensor for name, tensor in typed.items()})
    form = Form(made, twin, choices=choices)
    if all(choices[aspect] in readable for aspect, readable in READ_BY_TRANSFORMERS.items()):
        form.twin = made
    if options := ADAPTERS[choices["adapter"]]:
        write_adapter(twin, folder / "adapter", options, seed)
        edit(folder / "adapter" / "adapter_config.json", base_model_name_or_path=str(made))
        form.adapters.append(folder / "adapter")
        if choices["words and pictures"] == "beside the adapter":
            form.twin = twin
            for name in _BESIDE:
                shutil.copyfile(twin / name, folder / "adapter" / name)
                shutil.copyfile(folder / "plain" / name, made / name)
    form.refusals = refusals_of(choices)
    return form
