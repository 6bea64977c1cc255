"""What a bundle's manifest takes from a checkpoint's small files: token ids and preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec
from tokenizers import Tokenizer

from paliedge.bundle.manifest import Preprocess, Tokens
from paliedge.errors import CheckpointError

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_NUM_LOCATIONS, _NUM_SEGMENTATIONS = 1024, 128
_RESAMPLE: dict[int, Literal["bicubic", "bilinear"]] = {3: "bicubic", 2: "bilinear"}


def read_tokens(folder: Path) -> Tokens:
    """Token ids from `folder`/tokenizer.json, never from config.json, whose image token may be wrong.

    Raises:
        CheckpointError: no tokenizer.json, or a tokenizer without PaliGemma's tokens.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception for whatever is wrong with the file
        raise CheckpointError(
            expected=f"PaliGemma's tokenizer.json in {folder}",
            found="no such file" if not path.is_file() else f"a file that does not load ({error})",
            action="Take tokenizer.json from the checkpoint that yours was trained from.",
        ) from error
    locations = [f"<loc{index:04d}>" for index in range(_NUM_LOCATIONS)]
    segmentations = [f"<seg{index:03d}>" for index in range(_NUM_SEGMENTATIONS)]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    names = ("<bos>", "<eos>", "<pad>", "<image>", *locations, *segmentations)
    ids = {name: vocabulary.get(name, -1) for name in names}
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    absent = [name for name, index in ids.items() if index < 0]
    in_order = all(
        ids[name] == ids[group[0]] + place for group in (locations, segmentations) for place, name in enumerate(group)
    )
    if absent or len(newline) != 1 or not in_order:
        some = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
        raise CheckpointError(
            expected="a tokenizer with 1024 location, 128 segmentation and image tokens and a newline token",
            found=f"none of {some}" if absent else "other ids than PaliGemma's order gives",
            action="Take tokenizer.json from a PaliGemma checkpoint; this is a plain Gemma tokenizer.",
        )
    highest = max(index for name, index in vocabulary.items() if name != "<image>")
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
        vocab_size=highest + 1,
    )


def read_preprocess(folder: Path, image_size: int) -> Preprocess:
    """Resampling, mean and deviation from preprocessor_config.json or processor_config.json.

    Raises:
        CheckpointError: an unreadable file, a size that is not the model's, an unknown resampling.
    """
    raw = _read_processor(folder)
    size = raw.get("size", {"height": image_size, "width": image_size})
    resample = raw.get("resample", 3)
    if size != {"height": image_size, "width": image_size} or resample not in (*_RESAMPLE,):
        raise CheckpointError(
            expected=f"preprocessing to {image_size} x {image_size} pixels, bicubic (3) or bilinear (2)",
            found=f"size {size} and resample {resample}",
            action="Take config.json and preprocessor_config.json from the same checkpoint.",
        )
    mean, std = (raw.get(name, [0.5, 0.5, 0.5]) for name in ("image_mean", "image_std"))
    try:
        return msgspec.convert({"resample": _RESAMPLE[resample], "mean": mean, "std": std}, Preprocess)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            expected="image_mean and image_std of three numbers",
            found=f"{error}",
            action="Take preprocessor_config.json from the checkpoint that yours was trained from.",
        ) from error


def _read_processor(folder: Path) -> dict[str, Any]:
    for name in PROCESSOR_FILES:
        path = folder / name
        if path.is_file():
            try:
                raw = json.loads(path.read_text())
                return dict(raw.get("image_processor", raw))
            except (ValueError, AttributeError, TypeError) as error:
                raise CheckpointError(
                    expected=f"JSON in {path}", found="something else", action="Copy the checkpoint again."
                ) from error
    return {}
