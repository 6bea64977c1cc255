"""Roboflow's model package: a checkpoint, or an adapter with its base model, and inference_config.json.

The file says how pictures were brought to the model's size in training. Its form is that of Roboflow's
inference_models, of which this reads what PaliGemma's packages use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.weight_files import INDEX, SINGLE

CONFIG = "inference_config.json"
_ADAPTER, _BASE = "adapter_config.json", "base"

Colour = tuple[int, int, int]


class _Switch(msgspec.Struct):
    enabled: bool = False


class _Size(msgspec.Struct):
    height: int
    width: int


class _Images(msgspec.Struct):
    static_crop: _Switch | None = msgspec.field(default=None, name="static-crop")
    contrast: _Switch | None = None
    grayscale: _Switch | None = None


class _Input(msgspec.Struct):
    resize_mode: str
    training_input_size: _Size | None = None
    color_mode: Literal["rgb", "bgr"] = "rgb"
    padding_value: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None


class _Config(msgspec.Struct):
    network_input: _Input
    image_pre_processing: _Images | None = None


def split_package(folder: Path) -> tuple[Path, Path | None]:
    """The checkpoint in `folder`, and the adapter where `folder` holds one with its base model in `base`.

    An adapter alone is both: its base model lies elsewhere.

    Raises:
        CheckpointError: weights and an adapter, of which nobody can tell whether it is in them.
    """
    if not (folder / _ADAPTER).is_file():
        return folder, None
    if (folder / _BASE).is_dir():
        return folder / _BASE, folder
    if any((folder / name).is_file() for name in (SINGLE, INDEX)):
        raise CheckpointError(
            expected=f"a whole model or an adapter in {folder}",
            found=f"weights and {_ADAPTER}",
            action=f"If the adapter is merged into the weights, remove {_ADAPTER}. If not, move its files to another "
            "folder and give that with --lora.",
        )
    return folder, folder


def read_letterbox(folder: Path) -> Colour | None:
    """The colour with which pictures were padded according to `folder`/inference_config.json; None if they were not.

    Raises:
        CheckpointError: a file of another form, or preparation that a bundle does not repeat.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = msgspec.json.decode(path.read_bytes(), type=_Config)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # ValidationError is a DecodeError
        raise CheckpointError(
            expected=f"Roboflow's preparation of pictures in {path}",
            found=f"{error}",
            action="Download the package again; or delete the file and say with --letterbox if pictures are padded.",
        ) from error
    images, network = config.image_pre_processing or _Images(), config.network_input
    switches = {"static-crop": images.static_crop, "contrast": images.contrast, "grayscale": images.grayscale}
    refused = [name for name, switch in switches.items() if switch and switch.enabled]
    if network.color_mode != "rgb":
        refused.append(f"color_mode '{network.color_mode}'")
    if network.resize_mode not in ("stretch", "letterbox"):
        refused.append(f"resize_mode '{network.resize_mode}'")
    size = network.training_input_size
    if network.resize_mode == "letterbox" and size and size.height != size.width:
        refused.append(f"a letterbox of {size.width} x {size.height} pixels")
    if refused:
        raise CheckpointError(
            expected=f"pictures stretched to a square or padded to one in {path}",
            found=", ".join(refused),
            action="Prepare the pictures so yourself, delete the file and export again, with --letterbox if they "
            "are padded. Or train with Roboflow's 'Stretch to', 'Fit (black edges) in' or 'Fit (white edges) in'.",
        )
    return (network.padding_value or 0,) * 3 if network.resize_mode == "letterbox" else None
