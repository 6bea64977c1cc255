"""The tokenizer as fine-tunes save it: what training leaves in it does not act, what it added stands for itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from paliedge.errors import CheckpointError
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge_export.checkpoint.tokenizer import read_tokenizer
from tests.export.conftest import Tiny

Edit = Callable[[Path], None]
PROMPTS = [
    "caption en",
    "<s_invoice>",
    "read <s_invoice> now</s_invoice>",
    "a <plain> b",
    "<unk> and <x7>",
    "a\tb\n\nc",
]


@pytest.fixture
def folder(paligemma: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(paligemma.checkpoint, tmp_path / "checkpoint"))


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    raw = json.loads(path.read_text()) if path.exists() else {}
    edit(raw)
    path.write_text(json.dumps(raw))


def save_with_transformers(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s_invoice>", "</s_invoice>"]})
    tokenizer.add_tokens(["<plain>"])
    tokenizer.save_pretrained(folder)


def truncate(folder: Path) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    edit_json(folder / "tokenizer.json", lambda raw: raw.update(truncation=truncation))


def pad(folder: Path) -> None:
    padding = {"strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "<pad>"}
    edit_json(folder / "tokenizer.json", lambda raw: raw.update(padding=padding))


def name_in_added_tokens(folder: Path) -> None:
    """As slow tokenizers of older transformers save it: tokenizer.json knows nothing of it."""
    next_id = 1 + max(token["id"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"])
    (folder / "added_tokens.json").write_text(json.dumps({"<x7>": next_id}))
    config = folder / "tokenizer_config.json"
    edit_json(config, lambda raw: raw.pop("added_tokens_decoder", None))


@pytest.mark.parametrize(
    "edit", [save_with_transformers, truncate, pad, name_in_added_tokens], ids=lambda one: one.__name__
)
def test_prompts_are_what_transformers_makes_of_the_same_folder(edit: Edit, folder: Path) -> None:
    edit(folder)
    prepared = read_tokenizer([folder])
    ours, theirs = PromptTokenizer(prepared.content, prepared.tokens), AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        assert ours.encode_prefix(prompt) == theirs(f"<bos>{prompt}\n", add_special_tokens=False).input_ids, prompt


def test_image_bos_eos_and_pad_are_held_back_and_nothing_else(folder: Path) -> None:
    save_with_transformers(folder)
    prepared = read_tokenizer([folder])
    tokenizer, tokens = PromptTokenizer(prepared.content, prepared.tokens), prepared.tokens
    for name in ("<image>", "<bos>", "<eos>", "<pad>"):
        assert not {tokens.image, tokens.bos, tokens.eos, tokens.pad} & set(tokenizer.encode_prefix(name)[1:]), name
    assert len(tokenizer.encode_prefix("<s_invoice>")) == 3


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_is_named_as_not_applied(place: str, folder: Path) -> None:
    if place.endswith(".json"):
        edit_json(folder / place, lambda raw: raw.update(chat_template="{{ messages }}"))
    else:
        (folder / place).write_text("{{ messages }}")
    (note,) = read_tokenizer([folder]).notes
    assert "chat template is not applied" in note


def test_a_tokenizer_that_needs_no_change_is_copied_byte_for_byte(folder: Path) -> None:
    prepared = read_tokenizer([folder])
    assert prepared.notes == ()
    changed = json.loads(prepared.content)
    wanted = json.loads((folder / "tokenizer.json").read_text())
    assert {name: value for name, value in changed.items() if name != "added_tokens"} == {
        name: value for name, value in wanted.items() if name != "added_tokens"
    }


def test_what_was_left_out_is_said(folder: Path) -> None:
    truncate(folder)
    pad(folder)
    assert [note.split(",")[0] for note in read_tokenizer([folder]).notes] == [
        "tokenizer.json carries a truncation",
        "tokenizer.json carries a padding",
    ]


def test_a_tokenizer_beside_an_adapter_goes_before_the_bases(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(folder, adapter)
    save_with_transformers(adapter)
    assert read_tokenizer([adapter, folder]).tokens.vocab_size > read_tokenizer([folder]).tokens.vocab_size
    (adapter / "tokenizer.json").unlink()
    assert read_tokenizer([adapter, folder]).tokens == read_tokenizer([folder]).tokens


def test_sentencepieces_file_alone_is_refused_with_the_way_to_convert_it(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model alone.*save_pretrained"):
        read_tokenizer([folder])


def test_a_token_whose_id_is_taken_is_refused_by_name(folder: Path) -> None:
    name_in_added_tokens(folder)
    edit_json(folder / "added_tokens.json", lambda raw: raw.update({"<x8>": 1}))
    with pytest.raises(CheckpointError, match="<x8>"):
        read_tokenizer([folder])


def flag_tokens(folder: Path) -> None:
    """Tokens that only tokenizer_config.json knows, with blanks that belong to them."""
    known = {token["id"]: token for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    token = {"content": "<ls>", "lstrip": True, "rstrip": True, "single_word": False, "normalized": False}
    listed = {**known, 1 + max(known): token | {"special": False}}
    decoder = {str(index): {name: one[name] for name in one if name != "id"} for index, one in listed.items()}
    edit_json(folder / "tokenizer_config.json", lambda raw: raw.update(added_tokens_decoder=decoder))


def name_separator(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda raw: raw.update(sep_token="<sep>", cls_token="<cls>"))


@pytest.mark.parametrize("edit", [flag_tokens, name_separator], ids=lambda one: one.__name__)
def test_tokens_of_tokenizer_config_are_what_transformers_makes_of_them(edit: Edit, folder: Path) -> None:
    edit(folder)
    prepared = read_tokenizer([folder])
    ours, theirs = PromptTokenizer(prepared.content, prepared.tokens), AutoTokenizer.from_pretrained(folder)
    for prompt in ("read <ls> now", "a<ls>b", "a <sep> b<cls>", "<sep><cls>"):
        assert ours.encode_prefix(prompt) == theirs(f"<bos>{prompt}\n", add_special_tokens=False).input_ids, prompt


def test_an_image_token_that_is_not_marked_as_special_is_held_back_too(folder: Path) -> None:
    def unmark(raw: Any) -> None:
        for token in raw["added_tokens"]:
            token["special"] = token["special"] and token["content"] != "<image>"

    edit_json(folder / "tokenizer.json", unmark)
    prepared = read_tokenizer([folder])
    ids = PromptTokenizer(prepared.content, prepared.tokens).encode_prefix("what <image> is")
    assert prepared.tokens.image not in ids


@pytest.mark.parametrize("name", ["tokenizer.model", "added_tokens.json"])
def test_a_tokenizer_beside_an_adapter_that_cannot_be_read_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"adapter; found {name} alone"):
        read_tokenizer([adapter, folder])


def test_a_tokenizer_that_git_left_out_is_called_that(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_tokenizer([folder])
