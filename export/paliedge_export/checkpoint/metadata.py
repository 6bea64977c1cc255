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
            action="config.json and preprocessor_config.json must belong together.",
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
