"""Checkpoints in random forms: answers are those of transformers' own reading, or the export names what it refuses.

30 of them here, 2,000 by `make soak`.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, PaliGemmaForConditionalGeneration
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from paliedge import GenerationOptions, PaliGemma
from paliedge.errors import CheckpointError
from paliedge_export.exporter import export_bundle
from tests.export.forms import ASPECTS, Form, choose, make_form, refusals_of

NUM_FORMS = int(os.environ.get("PALIEDGE_NUM_FORMS", "30"))
NUM_TOKENS = 8
TIE = 1e-3
IMAGE = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
PROMPTS = ["caption en", "read <s_x> and <plain>"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def answer_with_transformers(form: Form, prompt: str) -> tuple[list[int], list[torch.Tensor], set[int]]:
    """Greedy tokens, the logits behind each, and the ids that end an answer; adapters unmerged, as in training."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(
        form.twin, dtype=torch.float32, attn_implementation="eager"
    )
    for adapter in form.adapters:
        model = PeftModel.from_pretrained(model, str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(form.twin)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    prompt_ids = tokenizer(f"<bos>{prompt}\n", add_special_tokens=False, truncation=False, padding=False).input_ids
    pixels = SiglipImageProcessorPil.from_pretrained(form.twin)([IMAGE], return_tensors="pt").pixel_values
    ids = torch.tensor([[image_token] * 16 + prompt_ids])
    inputs: dict[str, Any] = {"input_ids": ids, "pixel_values": pixels.float()}
    inputs |= {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    options: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings for sampling
        found = model.eval().generate(**inputs, **options)
    ends = model.generation_config.eos_token_id
    tokens: list[int] = found.sequences[0, ids.shape[1] :].tolist()
    return tokens, [one[0] for one in found.logits], set(ends if isinstance(ends, list) else [ends])


def check_answers(form: Form, folder: Path) -> None:
    export_bundle(str(form.folder), folder / "bundle", adapters=form.adapters, compare=False, precision="fp32")
    with PaliGemma.load(folder / "bundle") as model:
        assert model.manifest.tokens.end_ids == answer_with_transformers(form, PROMPTS[0])[2], form.choices
        for prompt in PROMPTS:
            wanted, logits, _ = answer_with_transformers(form, prompt)
            answer = model.generate(IMAGE, prompt, GenerationOptions(max_new_tokens=NUM_TOKENS, free=True))
            ours = list(answer.token_ids)
            if answer.finish_reason == "stop" and len(ours) < len(wanted):
                ours.append(wanted[len(ours)])  # an end that is no text is no part of our answer
                assert ours[-1] in model.manifest.tokens.end_ids, form.choices
            for index, (one, other) in enumerate(zip(ours, wanted, strict=True)):
                if one != other:
                    margin = float(logits[index].max() - logits[index][one])
                    assert margin < TIE, (form.choices, prompt, ours, wanted, margin)
                    break  # a tie that rounding decided; what follows is another answer


@pytest.mark.parametrize("seed", range(NUM_FORMS))
def test_a_random_form_answers_as_transformers_or_is_refused_by_name(seed: int, tmp_path: Path) -> None:
    form = make_form(seed, tmp_path)
    if not form.refusals:
        check_answers(form, tmp_path)
        return
    with pytest.raises(CheckpointError) as caught:
        export_bundle(str(form.folder), tmp_path / "bundle", adapters=form.adapters, compare=False)
    assert any(name in str(caught.value) for name in form.refusals), (form.choices, str(caught.value))


def test_refusals_are_few_and_every_form_comes_up() -> None:
    """What is refused stands in a table; all else has to be exported."""
    drawn = [choose(seed) for seed in range(300)]
    assert sum(bool(refusals_of(choices)) for choices in drawn) < 0.45 * len(drawn)
    for aspect, forms in ASPECTS.items():
        assert {choices[aspect] for choices in drawn} == set(forms)
