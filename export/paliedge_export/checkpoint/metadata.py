"""How pictures are brought to the model's size, as the checkpoint's processor files say."""

# Tests: tests/export/checkpoint/test_metadata.py.
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from paliedge.bundle.manifest import Preprocess, Resample
from paliedge.errors import CheckpointError

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""In the order of transformers; the first one counts if it has a section `image_processor`."""
_SIGLIP = "Siglip"
_RESAMPLE: dict[int, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""By Pillow's numbers."""
_SWITCHES: Mapping[str, tuple[bool, bool]] = {
    "do_resize": (True, False),
    "do_rescale": (True, True),
    "do_normalize": (True, True),
    "do_convert_rgb": (True, True),
}
"""What each does unless told, and whether it may be off. All pictures are RGB here, so that nothing is converted."""


def describe_switches(preprocess: Preprocess) -> list[str]:
    """Notes on steps that the processor's file switches off."""
    notes = []
    if preprocess.rescale_factor == 1.0:
        notes.append("the processor's file has do_rescale: false, which is obeyed: pixels stay 0 to 255")
    if preprocess.mean == (0.0,) * 3 and preprocess.std == (1.0,) * 3:
        notes.append("the processor's file has do_normalize: false, which is obeyed: mean 0, deviation 1")
    return notes


def read_preprocess(folder: Path, image_size: int) -> Preprocess:
    """Resampling, scale, mean and deviation, with the defaults of SigLIP's processor.

    Raises:
        CheckpointError: an unreadable file, a size that is not the model's, or a step that is not done here.
    """
    raw = {name: value for name, value in _read_processor(folder).items() if value is not None}
    kind = str(raw.get("image_processor_type", raw.get("feature_extractor_type", _SIGLIP)))
    if not kind.startswith(_SIGLIP):
        raise CheckpointError(
            expected=f"SigLIP's image processor in {folder}, PaliGemma's own",
            found=f"{kind} in the processor's file",
            action="Take preprocessor_config.json from the checkpoint that yours was trained from.",
        )
    square = {"height": image_size, "width": image_size}
    size, resample = raw.get("size", square), raw.get("resample", 3)
    if isinstance(size, dict):
        size = {name: value for name, value in size.items() if value is not None}
    if size == image_size:
        size = square
    if size != square or type(resample) is not int or resample not in _RESAMPLE:
        raise CheckpointError(
            expected=f"preprocessing to {image_size} x {image_size} pixels with one of Pillow's filters, 0 to 5",
            found=f"size {json.dumps(size)} and resample {json.dumps(resample)}",
            action="Take preprocessor_config.json from the checkpoint that config.json is of.",
        )
    on = {name: bool(raw.get(name, usual)) for name, (usual, _) in _SWITCHES.items()}
    wrong = [f"{name}: false" for name, (_, may_be_off) in _SWITCHES.items() if not on[name] and not may_be_off]
    wrong += [f"{name}: true" for name, value in raw.items() if name.startswith("do_") and value and name not in on]
    if wrong:
        raise CheckpointError(
            expected="a processor that resizes, rescales and normalises pictures, and does nothing else",
            found=f"{', '.join(wrong)} in the processor's file in {folder}",
            action="Prepare the pictures so yourself, take the switch out of the file and export again.",
        )
    settings = {
        "resample": _RESAMPLE[resample],
        "rescale_factor": raw.get("rescale_factor", 1 / 255) if on["do_rescale"] else 1.0,
        "mean": raw.get("image_mean", [0.5] * 3) if on["do_normalize"] else [0.0] * 3,
        "std": raw.get("image_std", [0.5] * 3) if on["do_normalize"] else [1.0] * 3,
    }
    try:
        return msgspec.convert(_three(settings), Preprocess)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            expected="image_mean and image_std of three numbers, and a number as rescale_factor",
            found=f"{error}",
            action="Take preprocessor_config.json from the checkpoint that yours was trained from.",
        ) from error


def asks_for_torchvision(folder: Path) -> bool:
    """Whether the processor's file names transformers' image processor on torchvision, which resizes otherwise."""
    raw = _read_processor(folder)
    named = str(raw.get("image_processor_type", "")).endswith("Fast")
    return named or raw.get("use_fast") is True or raw.get("backend") == "torchvision"


def find_processor(folders: Sequence[Path]) -> Path | None:
    """The first of the folders that holds a processor's file: an adapter's goes before its base model's."""
    return next((folder for folder in folders if any((folder / name).is_file() for name in PROCESSOR_FILES)), None)


def _three(settings: dict[str, Any]) -> dict[str, Any]:
    """One number stands for three channels."""
    return {
        name: [value] * 3 if name in ("mean", "std") and isinstance(value, int | float) else value
        for name, value in settings.items()
    }


def _read_processor(folder: Path) -> dict[str, Any]:
    for name in PROCESSOR_FILES:
        path = folder / name
        if path.is_file():
            try:
                raw = dict(json.loads(path.read_text()).items())
                if name != PROCESSOR_FILES[0]:
                    return raw
                if "image_processor" in raw:
                    return dict(raw["image_processor"])
            except (ValueError, AttributeError, TypeError) as error:
                raise CheckpointError(
                    expected=f"JSON in {path}", found="something else", action="Copy the checkpoint again."
                ) from error
    return {}
