"""How a checkpoint's answers end, and what else its generation_config.json asks for, as transformers reads it."""

# Tests: tests/export/checkpoint/test_generation.py.
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from paliedge.bundle.manifest import Tokens
from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.tokenizer import PreparedTokenizer

FILE = "generation_config.json"
_CHANGE_GREEDY: Mapping[str, object] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "forced_decoder_ids": None,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "sequence_bias": None,
    "min_length": 0,
    "min_new_tokens": None,
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "stop_strings": None,
    "dola_layers": None,
    "watermarking_config": None,
}
"""Settings that make greedy answers others, and the values that leave them alone, as does null."""
_NOT_DONE = ("cache_implementation", "token_healing", "assistant_early_exit", "prompt_lookup_num_tokens")
"""Settings of how transformers computes, which change answers by roundings at most, and of what it adds to prompts."""
_NAMED = ("max_length", "max_new_tokens", "max_time")
"""Settings that end an answer early; a bundle has limits of its own."""


def read_ends(folders: Sequence[Path], tokenizer: PreparedTokenizer) -> tuple[Tokens, list[str]]:
    """The tokenizer's ids with all that end an answer, and notes on what the file asks for and a bundle does not do.

    As in transformers generation_config.json decides; without it config.json, and without that the tokenizer.

    Raises:
        CheckpointError: a setting that changes greedy answers, or an end that is no token.
    """
    tokens = tokenizer.tokens
    path = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
    asked = _read(path) if path else _from_config(folders[-1] / "config.json")
    if wrong := [name for name, usual in _CHANGE_GREEDY.items() if _acts(asked.get(name), usual)]:
        raise CheckpointError(
            expected=f"a {FILE} that leaves greedy answers as they are",
            found=", ".join(f"{name} {json.dumps(asked[name])}" for name in wrong),
            action=f"A bundle decodes greedily and nothing more: take {wrong[0]} out of {path or 'config.json'}.",
        )
    listed = asked.get("eos_token_id")
    ends = [tokens.eos] if listed is None else listed if isinstance(listed, list) else [listed]
    if not ends or any(type(index) is not int or not 0 <= index < tokens.vocab_size for index in ends):
        raise CheckpointError(
            expected=f"eos_token_id of tokens, 0 to {tokens.vocab_size - 1}",
            found=f"{json.dumps(listed)} in {path or 'config.json'}",
            action="Take the file from the checkpoint that yours was trained from.",
        )
    notes = [f"{FILE} asks for {name} {asked[name]}: give it with each request" for name in _NAMED if asked.get(name)]
    if path and listed is None:
        notes.append(f"{FILE} names no end of answers: they end at the tokenizer's <eos>")
    notes += [f"{FILE} asks for {name}, which a bundle does not do" for name in _NOT_DONE if asked.get(name)]
    if asked.get("do_sample"):
        notes.append(f"{FILE} asks for sampling: a bundle answers greedily")
    eos = tokens.eos if tokens.eos in ends else ends[0]
    spoken = tuple(sorted(set(ends) - tokenizer.special - {eos}))
    return msgspec.structs.replace(tokens, eos=eos, ends=tuple(sorted(set(ends))), spoken_ends=spoken), notes


def _acts(value: object, usual: object) -> bool:
    return value is not None and value != usual and value != []


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(expected=f"JSON in {path}", found="something else", action="Copy it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(expected=f"a JSON object in {path}", found="something else", action="Copy it again.")
    return raw


def _from_config(path: Path) -> dict[str, Any]:
    """What transformers makes of a config.json without a generation_config.json beside it."""
    if not path.is_file():
        return {}
    raw = _read(path)
    text = raw.get("text_config") or {}
    found = {name: value for name, value in raw.items() if value is not None}
    for name in ("eos_token_id", *_CHANGE_GREEDY):
        if found.get(name, _CHANGE_GREEDY.get(name)) == _CHANGE_GREEDY.get(name) and name in text:
            found[name] = text[name]
    return found
