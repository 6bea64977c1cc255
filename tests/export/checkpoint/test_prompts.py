"""Templates travel from the checkpoint's name, or a file, into what the model is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from paliedge import GenerationOptions, PaliGemma
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Prompts
from paliedge.cli import main
from paliedge.errors import UsageError
from paliedge.inputs.prompt import PromptMaker, fill
from paliedge_export.checkpoint.prompts import PRESETS, choose_prompts
from paliedge_export.exporter import export_bundle
from tests.tiny import make_tiny


@pytest.mark.parametrize(
    ("checkpoint", "preset"),
    [
        ("google/paligemma-3b-ft-docvqa-448", "docvqa"),
        ("google/paligemma-3b-ft-refcoco-seg-896", "refcoco-seg"),
        ("google/paligemma-3b-ft-aokvqa-mc-224", "aokvqa-mc"),
        ("google/paligemma2-3b-ft-docci-448", "mix"),
        ("google/paligemma-3b-ft-vqav2-448", "mix"),
        ("google/paligemma-3b-mix-224", "mix"),
        ("my-docvqa-model", "mix"),
    ],
)
def test_a_known_fine_tune_is_known_by_its_name(checkpoint: str, preset: str) -> None:
    assert choose_prompts(None, checkpoint) == PRESETS[preset]
    assert choose_prompts("docvqa", checkpoint) == PRESETS["docvqa"]


@pytest.mark.parametrize(
    ("preset", "segment", "answer"),
    [
        ("mix", "segment the cat", "answer en why?"),
        ("docvqa", "segment the cat", "why?"),
        ("chartqa", "segment the cat", "why?"),
        ("pope", "segment the cat", "why?"),
        ("ai2d", "segment the cat", "answer en  why?"),
        ("aokvqa-mc", "segment the cat", "answer en  why?"),
        ("refcoco-seg", "the cat", "answer en why?"),
    ],
)
def test_a_known_fine_tune_is_asked_as_it_was_trained(preset: str, segment: str, answer: str) -> None:
    """As big_vision's configs/proj/paligemma/transfers have it, blanks and all."""
    prompts = choose_prompts(preset, "x")
    assert PromptMaker(prompts).segment("the cat").text == segment
    assert PromptMaker(prompts).ask("why?").text == answer
    assert PromptMaker(prompts).detect("cat ; dog").text == "detect cat ; dog"
    assert PromptMaker(prompts).caption().text == "caption en"
    assert PromptMaker(prompts).ocr().text == "ocr"


def test_a_file_says_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"ocr": "read", "detect": "find {labels}!"}))
    assert choose_prompts(str(file), "x") == Prompts(ocr="read", detect="find {labels}!")


@pytest.mark.parametrize(
    "content", ['{"detekt": "x"}', '{"detect": "find"}', '{"answer": "say"}', "no json", '{"ocr": 3}']
)
def test_a_file_that_cannot_be_meant_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(UsageError):
        choose_prompts(str(tmp_path / "prompts.json"), "x")
    with pytest.raises(UsageError, match="docvqa"):
        choose_prompts("docvqb", "x")


def test_what_a_user_writes_is_taken_as_it_is() -> None:
    assert fill("answer {lang} {question}", lang="en", question="what is {lang}?") == "answer en what is {lang}?"
    assert fill("{labels}", labels=r"a\1 {b}") == r"a\1 {b}"


def test_the_bundle_asks_in_the_checkpoints_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(tmp_path / "checkpoint", "paligemma")
    prompts = {"answer": "Q {question}", "segment": "{labels}", "describe": "tell {lang}", "question": "for {answer}?"}
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    bundle = tmp_path / "bundle"
    export_bundle(str(tmp_path / "checkpoint"), bundle, prompts=str(tmp_path / "p.json"), compare=False)
    assert Bundle(bundle).manifest.prompts == Prompts(**prompts)
    shown = CliRunner().invoke(main, ["info", str(bundle)]).stdout
    assert "answer: 'Q {question}', question: 'for {answer}?'" in shown
    assert "left as codes" in shown
    asked: list[str] = []
    with PaliGemma.load(bundle) as model:
        tokenizer = model._make_request._tokenizer
        encode = tokenizer.encode_prefix

        def note(text: str, **options: Any) -> list[int]:
            asked.append(text)
            return encode(text, **options)

        monkeypatch.setattr(tokenizer, "encode_prefix", note)
        image = np.zeros((20, 20, 3), np.uint8)
        model.ask(image, "why?", options=GenerationOptions(max_new_tokens=1))
        model.segment(image, "the left one", options=GenerationOptions(max_new_tokens=1))
        model.caption(image, "de", style="describe", options=GenerationOptions(max_new_tokens=1))
        model.caption(image, style="cap", options=GenerationOptions(max_new_tokens=1))
        model.caption(image, options=GenerationOptions(max_new_tokens=1))
        model.question(image, "two", options=GenerationOptions(max_new_tokens=1))
    assert asked == ["Q why?", "the left one", "tell de", "cap en", "caption en", "for two?"]


def test_a_letterbox_travels_with_the_bundle(tmp_path: Path) -> None:
    make_tiny(tmp_path / "checkpoint", "paligemma")
    bundle = tmp_path / "bundle"
    manifest = export_bundle(str(tmp_path / "checkpoint"), bundle, letterbox=(0, 0, 0))
    assert manifest.preprocess.letterbox == (0, 0, 0)
    assert manifest.comparisons["cpu"].token_match == 1.0  # transformers saw the same squares
    with PaliGemma.load(bundle) as model:
        assert model.encode(np.zeros((20, 40, 3), np.uint8)).content_box == (0, 0.25, 1, 0.75)


@pytest.mark.parametrize(("colour", "code"), [("#727272", 0), ("greyish", 2)])
def test_the_letterbox_has_a_colour(colour: str, code: int, tmp_path: Path) -> None:
    make_tiny(tmp_path / "checkpoint", "paligemma")
    command = ["export", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "b"), "--no-compare", "--letterbox", colour]
    assert CliRunner().invoke(main, command).exit_code == code
    if not code:
        assert Bundle(tmp_path / "b").manifest.preprocess.letterbox == (0x72,) * 3
