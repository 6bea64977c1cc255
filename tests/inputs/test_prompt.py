"""Prompt to prefix ids and back, with a tokenizer of Gemma's form."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.shapes.vocabulary import build_tokenizer, write_tokenizer
from paliedge.bundle.manifest import Prompts, Tokens
from paliedge.errors import BundleError, UsageError
from paliedge.inputs.prompt import Prompt, PromptMaker, free_prompt
from paliedge.inputs.tokenizer import MAX_PROMPT_CHARACTERS, PromptTokenizer

PROMPTS = PromptMaker(Prompts())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(build_tokenizer(50), folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokens(reference: Any) -> Tokens:
    names = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "image": "<image>", "newline": "\n"}
    names |= {"first_location": "<loc0000>", "first_segmentation": "<seg000>", "vocab_size": "<image>"}
    ids = {name: reference.convert_tokens_to_ids(text) for name, text in names.items()}
    return Tokens(num_locations=1024, num_segmentations=128, **ids)


@pytest.fixture(scope="module")
def tokenizer(folder: Path, tokens: Tokens) -> PromptTokenizer:
    return PromptTokenizer(folder / "tokenizer.json", tokens)


PLAIN = [
    "detect red circle ; blue square",
    "caption en",
    "answer en what colour is the star?",
    "ocr",
    "",
    " two  spaces ",
    "tab\tand é, 猫, 😀, \0 and ▁",
    "lines\nin\n\nbetween",
]


@pytest.mark.parametrize("text", PLAIN)
def test_a_prefix_is_bos_the_text_and_a_newline_as_transformers_has_it(
    text: str, tokenizer: PromptTokenizer, tokens: Tokens, reference: Any
) -> None:
    ids = tokenizer.encode_prefix(text)
    assert ids[0] == tokens.bos
    assert ids[-1] == tokens.newline
    assert ids == reference(text + "\n").input_ids
    assert ids == tokenizer.encode_prefix(text, location_tokens=False)


@pytest.mark.parametrize("text", PLAIN)
def test_decoding_a_prompt_gives_the_prompt(text: str, tokenizer: PromptTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode_prefix(text)) == text.replace("▁", " ") + "\n"


def test_one_trailing_newline_is_dropped_and_no_more(tokenizer: PromptTokenizer, tokens: Tokens) -> None:
    plain = tokenizer.encode_prefix("detect star")
    assert tokenizer.encode_prefix("detect star\n") == plain
    assert tokenizer.encode_prefix("detect star\n\n") == [*plain, tokens.newline]
    assert tokenizer.encode_prefix("\n") == [tokens.bos, tokens.newline]


def test_location_and_segmentation_tokens_in_a_prompt_are_tokens(tokenizer: PromptTokenizer, tokens: Tokens) -> None:
    ids = tokenizer.encode_prefix("<loc0001><loc1023> <seg001><seg127>")
    assert ids[1:3] == [tokens.first_location + 1, tokens.first_location + 1023]
    assert ids[-3:-1] == [tokens.first_segmentation + 1, tokens.first_segmentation + 127]


def test_they_are_text_where_location_tokens_is_off(tokenizer: PromptTokenizer, tokens: Tokens) -> None:
    text = "<loc0000> <loc1023><seg000><seg127>"
    ids = tokenizer.encode_prefix(text, location_tokens=False)
    assert all(token < tokens.first_location for token in ids)
    assert tokenizer.decode(ids) == text + "\n"
    assert tokenizer.encode_prefix(text)[1] == tokens.first_location, "the other tokenizer stays as it was"


@pytest.mark.parametrize("text", ["<loc1024>", "<loc1>", "<seg128>", "<seg0001>", "< loc0001>"])
def test_names_of_no_token_are_text(text: str, tokenizer: PromptTokenizer, tokens: Tokens) -> None:
    assert all(token < tokens.first_location for token in tokenizer.encode_prefix(text))


@pytest.mark.parametrize("location_tokens", [True, False])
@pytest.mark.parametrize("name", ["<image>", "<bos>", "<eos>", "<pad>", "<unk>"])
def test_control_tokens_in_a_prompt_are_text(
    name: str, location_tokens: bool, tokenizer: PromptTokenizer, reference: Any
) -> None:
    ids = tokenizer.encode_prefix(f"a {name} b", location_tokens=location_tokens)
    assert reference.convert_tokens_to_ids(name) not in ids[1:]
    assert tokenizer.decode(ids) == f"a {name} b\n"


def test_a_prompt_that_is_too_long_is_refused(tokenizer: PromptTokenizer) -> None:
    assert len(tokenizer.encode_prefix("\0" * MAX_PROMPT_CHARACTERS)) == MAX_PROMPT_CHARACTERS + 2
    with pytest.raises(UsageError, match="found 100001") as caught:
        tokenizer.encode_prefix("\0" * (MAX_PROMPT_CHARACTERS + 1))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["a\ud800b", "\udcff"])
def test_a_lone_surrogate_is_refused(text: str, tokenizer: PromptTokenizer) -> None:
    with pytest.raises(UsageError, match="lone surrogate"):
        tokenizer.encode_prefix(text)


def test_decoding_spells_locations_out_and_leaves_control_tokens_out(
    tokenizer: PromptTokenizer, tokens: Tokens
) -> None:
    ids = [tokens.bos, tokens.first_location + 7, tokens.first_segmentation + 7, tokens.pad, tokens.image, tokens.eos]
    assert tokenizer.decode(ids) == "<loc0007><seg007>"


def test_streamed_pieces_joined_are_the_decoded_text(tokenizer: PromptTokenizer, tokens: Tokens) -> None:
    text = "<loc0001><loc1023> red star 😀猫é\0 ; a 👩‍👩‍👧 flag 🇫🇷"
    ids = [*tokenizer.encode_prefix(text), tokens.eos]
    stream = tokenizer.decode_stream()
    pieces = [stream(token) for token in ids]
    assert "".join(pieces) == tokenizer.decode(ids) == text + "\n"
    assert "�" not in "".join(pieces)
    assert pieces[1] == "<loc0001>"
    assert "😀" in pieces


def test_two_streams_do_not_share_their_unfinished_characters(tokenizer: PromptTokenizer) -> None:
    first, second = tokenizer.decode_stream(), tokenizer.decode_stream()
    for token in tokenizer.encode_prefix("😀")[1:-1]:
        assert first(token) == second(token)


def test_ids_that_are_no_utf_8_neither_end_a_stream_nor_cost_other_text(
    tokenizer: PromptTokenizer, tokens: Tokens, reference: Any
) -> None:
    first_byte = reference.convert_tokens_to_ids("<0x00>")
    location = tokens.first_location + 5
    rng = random.Random(0)
    for _ in range(2000):
        ids = [first_byte + rng.randrange(128, 256) if rng.random() < 0.7 else location for _ in range(12)]
        stream = tokenizer.decode_stream()
        streamed = "".join(stream(token) for token in [*ids, location])
        assert streamed.count("<loc0005>") == ids.count(location) + 1
        assert streamed.endswith("<loc0005>")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (PROMPTS.caption(), "caption en"),
        (PROMPTS.caption("de", "cap"), "cap de"),
        (PROMPTS.caption(style="describe"), "describe en"),
        (PROMPTS.caption("fr", "describe"), "describe fr"),
        (PROMPTS.ask("why?"), "answer en why?"),
        (PROMPTS.ask("why?", "de"), "answer de why?"),
        (PROMPTS.question("two"), "question en two"),
        (PROMPTS.question("two", "es"), "question es two"),
        (PROMPTS.ocr(), "ocr"),
    ],
)
def test_unless_told_a_checkpoint_is_asked_in_the_words_of_the_mixed_ones(prompt: Prompt, text: str) -> None:
    assert prompt == Prompt(text)


@pytest.mark.parametrize("make", [PROMPTS.ask, PROMPTS.question])
def test_a_question_has_words(make: Any) -> None:
    assert make("why?").text.endswith(" why?")
    with pytest.raises(UsageError, match="no text"):
        make(" ")


@pytest.mark.parametrize(
    "labels",
    [
        "a;b",
        "a ;b",
        "a; b",
        " a ; b ; ",
        ";a;;b",
        ["a", "b"],
        ("a", "b"),
        ["a;b"],
        ["a ;", "b"],
        {"a": 0, "b": 1},
    ],
)
@pytest.mark.parametrize("make", [PROMPTS.detect, PROMPTS.segment])
def test_labels_mean_the_same_however_they_are_written(make: Any, labels: Any) -> None:
    assert make(labels) == make("a ; b") == make(label for label in ("a", "b"))
    assert make(labels).boxes.labels == ["a", "b"]
    assert make(labels).text.endswith(" a ; b")


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("", "an empty one"),
        (" ; ", "an empty one"),
        ([], "none"),
        (["a", " "], "an empty one"),
        (["a", None], "None among them"),
        ([1], "1 \\(int\\) among them"),
        (3, "3 \\(int\\)"),
        (None, "None"),
        (b"a", "b'a' \\(bytes\\)"),
        ("detect a", "'detect a'"),
        ("a ; detect b", "'detect b'"),
        ("<image>detect a", "'<image>detect a'"),
    ],
)
def test_what_is_no_label_is_refused_in_a_sentence(labels: Any, found: str) -> None:
    with pytest.raises(UsageError, match=f"found {found}"):
        PROMPTS.detect(labels)


def test_a_label_may_begin_like_another_task() -> None:
    assert PROMPTS.detect("segment display").text == "detect segment display"


@pytest.mark.parametrize("prompt", ["<image>detect a", " <image> caption en", None, 3])
def test_a_free_prompt_is_text_without_transformers_image_token(prompt: Any) -> None:
    with pytest.raises(UsageError, match="expected a prompt"):
        free_prompt(prompt)


def test_a_file_that_is_no_tokenizer_is_a_bundle_error(tmp_path: Path, tokens: Tokens) -> None:
    path = tmp_path / "tokenizer.json"
    for content in ("", "{}", "[" * 5000):
        path.write_text(content)
        with pytest.raises(BundleError):
            PromptTokenizer(path, tokens)
