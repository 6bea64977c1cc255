"""Answers end where generation_config.json says, and what else it asks for is refused or told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.generation import read_ends
from paliedge_export.checkpoint.tokenizer import read_tokenizer
from tests.export.conftest import Tiny


@pytest.fixture
def folder(paligemma: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(paligemma.checkpoint, tmp_path / "checkpoint"))


def read(folder: Path, **settings: Any) -> tuple[tuple[int, ...], tuple[int, ...], int, list[str]]:
    (folder / "generation_config.json").write_text(json.dumps(settings))
    tokens, notes = read_ends([folder], read_tokenizer([folder]))
    return tokens.ends, tokens.spoken_ends, tokens.eos, notes


def test_every_id_ends_an_answer_and_ends_that_are_text_belong_to_it(folder: Path) -> None:
    assert read(folder, eos_token_id=1)[:3] == ((1,), (), 1)
    assert read(folder, eos_token_id=[1, 700])[:3] == ((1, 700), (700,), 1)
    assert read(folder, eos_token_id=[701, 700])[:3] == ((700, 701), (700,), 701)
    assert read(folder, eos_token_id=0)[:3] == ((0,), (), 0)


def test_without_the_file_config_json_decides_as_in_transformers(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    tokenizer = read_tokenizer([folder])
    for edit, ends in (({"eos_token_id": [1, 44]}, (1, 44)), ({"eos_token_id": None}, (1,))):
        (folder / "config.json").write_text(json.dumps(config | edit))
        assert read_ends([folder], tokenizer)[0].ends == ends


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 3},
        {"suppress_tokens": [5]},
        {"begin_suppress_tokens": [5, 6]},
        {"forced_bos_token_id": 7},
        {"forced_eos_token_id": 1},
        {"bad_words_ids": [[5]]},
        {"sequence_bias": [[[5], -10.0]]},
        {"min_new_tokens": 4},
        {"num_beams": 4},
        {"stop_strings": ["."]},
    ],
    ids=lambda one: next(iter(one)),
)
def test_a_setting_that_changes_greedy_answers_is_refused_by_name(settings: dict[str, Any], folder: Path) -> None:
    with pytest.raises(CheckpointError, match=next(iter(settings))):
        read(folder, **settings)


def test_settings_that_change_nothing_pass_and_limits_are_told(folder: Path) -> None:
    plain: dict[str, Any] = {
        "eos_token_id": 1,
        "repetition_penalty": 1.0,
        "num_beams": 1,
        "suppress_tokens": None,
        "bad_words_ids": [],
        "top_k": 50,
    }
    assert read(folder, **plain)[3] == []
    assert "max_new_tokens 20" in read(folder, eos_token_id=1, max_new_tokens=20)[3][0]
    assert "sampling" in read(folder, eos_token_id=1, do_sample=True)[3][0]
    assert "cache_implementation" in read(folder, eos_token_id=1, cache_implementation="quantized")[3][0]
    assert "names no end" in read(folder, eos_token_id=None)[3][0]


@pytest.mark.parametrize("ends", [[], [10**7], ["<eos>"], [True]], ids=str)
def test_an_end_that_is_no_token_is_refused(ends: list[Any], folder: Path) -> None:
    with pytest.raises(CheckpointError, match="eos_token_id"):
        read(folder, eos_token_id=ends)
