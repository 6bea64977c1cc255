"""The tokenizer as a fine-tune saved it, made ready for a bundle.

What training leaves in tokenizer.json and what does not belong to a prompt is taken out: truncation and padding. Tokens
that only the files beside it name are added, as transformers adds them. Of all special tokens only those that users
must not say stay special.
"""

# Tests: tests/export/checkpoint/test_tokenizer.py.
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from paliedge.bundle.manifest import Tokens
from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.weight_files import refuse_pointer

FILE = "tokenizer.json"
HELD_BACK = ("<image>", "<bos>", "<eos>", "<pad>")
"""What the runtime puts into prompts itself; in a user's text it is text."""
_SENTENCEPIECE, _CONFIG, _ADDED, _SPECIAL = (
    *("tokenizer.model", "tokenizer_config.json"),
    *("added_tokens.json", "special_tokens_map.json"),
)
FILES = (FILE, _CONFIG, _ADDED, _SPECIAL)
"""In which tokens may be named."""
_INSTEAD = (_SENTENCEPIECE, _ADDED)
"""Files of a tokenizer that mean nothing without `FILE`."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_NUM_LOCATIONS, _NUM_SEGMENTATIONS = 1024, 128


class PreparedTokenizer(NamedTuple):
    """A bundle's tokenizer.json, and the ids in it.

    Attributes:
        content: the file.
        tokens: the ids that a runtime knows.
        special: every id that the checkpoint's own file marks as special.
        notes: what was changed, for people.
    """

    content: bytes
    tokens: Tokens
    special: frozenset[int]
    notes: tuple[str, ...]


def read_tokenizer(folders: Sequence[Path]) -> PreparedTokenizer:
    """The tokenizer of the first of `folders` that has one: an adapter's goes before its base model's.

    Ids never come from config.json, whose image token may be wrong.

    Raises:
        CheckpointError: no tokenizer.json, one without PaliGemma's tokens, or one that does not go with the files
            beside it.
    """
    folder = next((one for one in folders if any((one / name).is_file() for name in (FILE, *_INSTEAD))), None)
    if folder is None or not (folder / FILE).is_file():
        raise _without_file(folders if folder is None else [folder])
    path = folder / FILE
    refuse_pointer(path)
    original = path.read_bytes()
    raw = _read_json(path)
    notes = [f"{FILE} carries a {name}, which is left out" for name in ("truncation", "padding") if raw.get(name)]
    changed = raw | {"truncation": None, "padding": None}
    changed["added_tokens"] = [
        token | {"special": token["content"] in HELD_BACK} for token in raw.get("added_tokens", [])
    ]
    missing = _add_missing(folder, changed)
    notes += [f"{FILE} lacks {_some(missing)}, which files beside it name: added"] if missing else []
    if _has_chat_template(folder):
        notes.append("the tokenizer's chat template is not applied: give its words as the prompt")
    content = original if changed == raw else json.dumps(changed, ensure_ascii=False).encode()
    special = frozenset(token["id"] for token in raw.get("added_tokens", []) if token["special"])
    return PreparedTokenizer(content, _read_tokens(path, content), special, tuple(notes))


def _has_chat_template(folder: Path) -> bool:
    config = folder / _CONFIG
    named = any((folder / name).is_file() for name in _CHAT_TEMPLATES)
    return named or (config.is_file() and bool(_read_json(config).get("chat_template")))


def _without_file(folders: Sequence[Path]) -> CheckpointError:
    sentencepiece = next((one for one in folders if any((one / name).is_file() for name in _INSTEAD)), None)
    if sentencepiece:
        there = [name for name in _INSTEAD if (sentencepiece / name).is_file()]
        return CheckpointError(
            expected=f"PaliGemma's {FILE} in {sentencepiece}",
            found=f"{' and '.join(there)} alone",
            action="Convert it where sentencepiece is installed: `from transformers import AutoTokenizer; "
            f"AutoTokenizer.from_pretrained('{sentencepiece}').save_pretrained('{sentencepiece}')`.",
        )
    return CheckpointError(
        expected=f"PaliGemma's {FILE} in {folders[-1]}",
        found="no such file",
        action=f"Take {FILE} from the checkpoint that yours was trained from.",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            expected=f"JSON in {path}", found=f"a file that does not load ({error})", action="Copy it again."
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(expected=f"a JSON object in {path}", found="something else", action="Copy it again.")
    return raw


def _add_missing(folder: Path, raw: dict[str, Any]) -> list[str]:
    """Add the tokens that files beside tokenizer.json name and it lacks, behind its last one; their names."""
    added = {token["content"]: token for token in raw.get("added_tokens", [])}
    known = added.keys() | set(_vocabulary_of(raw))
    missing: list[str] = []
    for token, wanted in _named_tokens(folder):
        name = token["content"]
        if name in added and wanted is not None:
            added[name].update({flag: token[flag] for flag in _FLAGS if flag in token})
        if name in known:
            continue
        index = 1 + max([token["id"] for token in raw["added_tokens"]] + [*_vocabulary_of(raw).values()], default=-1)
        if wanted is not None and wanted != index:
            raise CheckpointError(
                expected=f"the token '{name}' in {folder / FILE}",
                found=f"it only in a file beside that, as {wanted} where the next free id is {index}",
                action="Save the tokenizer again with transformers' save_pretrained, and export that.",
            )
        flags = {flag: token.get(flag, False) for flag in _FLAGS}
        raw["added_tokens"].append({"id": index, "content": name, **flags, "special": False})
        known.add(name)
        missing.append(name)
    return missing


def _vocabulary_of(raw: dict[str, Any]) -> dict[str, int]:
    vocabulary = raw.get("model", {}).get("vocab", {})
    return vocabulary if isinstance(vocabulary, dict) else {}


def _named_tokens(folder: Path) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Tokens that tokenizer_config.json or else the older files name, in the order of their ids if these are known.

    Those without an id are special ones, in transformers' order; each has the flags that the file gives it.
    """
    config = _read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    if decoder := config.get("added_tokens_decoder"):
        for index, token in sorted(decoder.items(), key=lambda item: int(item[0])):
            yield _describe(token), int(index)
    elif (folder / _ADDED).is_file():
        for name, index in sorted(_read_json(folder / _ADDED).items(), key=lambda item: int(item[1])):
            yield _describe(name), int(index)
    special = _read_json(folder / _SPECIAL) if (folder / _SPECIAL).is_file() else {}
    for source in (config, special):
        named = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
        for name in [*named, *sorted(name for name in source if name.endswith("_token") and name not in named)]:
            if isinstance(source.get(name), str | dict):
                yield _describe(source[name]), None
        for name in ("additional_special_tokens", "extra_special_tokens"):
            listed = source.get(name) or []
            for token in listed.values() if isinstance(listed, dict) else listed:
                yield _describe(token), None


def _describe(token: Any) -> dict[str, Any]:
    return token if isinstance(token, dict) else {"content": str(token)}


def _read_tokens(path: Path, content: bytes) -> Tokens:
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises plain Exception for whatever is wrong with the file
        raise CheckpointError(
            expected=f"PaliGemma's {FILE} in {path.parent}",
            found=f"a file that does not load ({error})",
            action=f"Take {FILE} from the checkpoint that yours was trained from.",
        ) from error
    locations = [f"<loc{index:04d}>" for index in range(_NUM_LOCATIONS)]
    segmentations = [f"<seg{index:03d}>" for index in range(_NUM_SEGMENTATIONS)]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    names = (*HELD_BACK, *locations, *segmentations)
    ids = {name: vocabulary.get(name, -1) for name in names}
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    absent = [name for name, index in ids.items() if index < 0]
    in_order = all(
        ids[name] == ids[group[0]] + index for group in (locations, segmentations) for index, name in enumerate(group)
    )
    if absent or len(newline) != 1 or not in_order:
        raise CheckpointError(
            expected="a tokenizer with 1024 location, 128 segmentation and image tokens and a newline token",
            found=f"none of {_some(absent)}" if absent else "other ids than PaliGemma's order gives",
            action=f"This is a plain Gemma tokenizer; take {FILE} from a PaliGemma checkpoint.",
        )
    return Tokens(
        bos=ids["<bos>"],
        eos=ids["<eos>"],
        pad=ids["<pad>"],
        image=ids["<image>"],
        newline=newline[0],
        first_location=ids[locations[0]],
        num_locations=_NUM_LOCATIONS,
        first_segmentation=ids[segmentations[0]],
        num_segmentations=_NUM_SEGMENTATIONS,
        vocab_size=1 + max(index for name, index in vocabulary.items() if name != "<image>"),
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
