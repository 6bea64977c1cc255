"""Packages as Roboflow's inference_models reads them: what they say about pictures is kept, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.numpy import save_file
from transformers import PaliGemmaForConditionalGeneration

from paliedge.errors import CheckpointError, UsageError
from paliedge_export.checkpoint.lora import Adapted
from paliedge_export.checkpoint.opening import open_checkpoint
from paliedge_export.checkpoint.roboflow import CONFIG, read_letterbox
from paliedge_export.exporter import export_bundle
from tests.paths import SHAPES_CHECKPOINT
from tests.tiny import make_tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for a name that goes
INPUT: dict[str, Any] = {
    "training_input_size": {"height": 56, "width": 56},
    "dataset_version_resize_dimensions": None,
    "dynamic_spatial_size_supported": False,
    "dynamic_spatial_size_mode": None,
    "color_mode": "rgb",
    "resize_mode": "stretch",
    "padding_value": None,
    "input_channels": 3,
    "scaling_factor": 255,
    "normalization": None,
}
IMAGES: dict[str, Any] = {"auto-orient": {"enabled": True}, "static-crop": None, "contrast": None, "grayscale": None}
CROP = {"enabled": True, "x_min": 10, "x_max": 90, "y_min": 0, "y_max": 100}


def write_config(folder: Path, network: dict[str, Any], images: dict[str, Any] | None = None) -> None:
    content = {
        "image_pre_processing": None if images is None else IMAGES | images,
        "network_input": INPUT | network,
        "forward_pass": {"static_batch_size": 1, "max_dynamic_batch_size": None},
        "post_processing": None,
        "model_initialization": None,
    }
    (folder / CONFIG).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with its base model, as Roboflow keeps a fine-tune."""
    folder = tmp_path_factory.mktemp("package")
    make_tiny(folder / "base", "paligemma")
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder / "base")
    options = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, options).save_pretrained(str(folder))
    write_config(folder, {"resize_mode": "letterbox", "padding_value": 127}, {})
    return folder


def test_a_package_is_exported_as_it_is(package: Path, tmp_path: Path) -> None:
    manifest = export_bundle(str(package), tmp_path / "bundle", compare=False)
    assert manifest.preprocess.letterbox == (127, 127, 127)
    tensors = open_checkpoint(str(package))
    assert isinstance(tensors, Adapted)
    assert len(tensors.changed) == 2 * (tensors.config.text.num_layers + tensors.config.vision.num_layers)
    assert tensors.read_preprocess().letterbox == (127, 127, 127)
    told = export_bundle(str(package), tmp_path / "told", letterbox=(1, 2, 3), compare=False)
    assert told.preprocess.letterbox == (1, 2, 3)


def test_what_lies_beside_the_adapter_is_found(package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    shutil.copy(SHAPES_CHECKPOINT / "mask_decoder.safetensors", folder)
    (folder / "calibration").mkdir()
    Image.new("RGB", (50, 40), "red").save(folder / "calibration" / "0.png")
    (folder / "config.json").write_text("{}")  # an adapter is one, whatever lies beside it
    manifest = export_bundle(str(folder), tmp_path / "bundle", precision="int8", compare=False)
    assert manifest.targets["cpu"].mask_decoder
    assert manifest.preprocess.letterbox == (127, 127, 127)


def test_a_colour_does_not_hide_what_is_refused(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "package")
    write_config(tmp_path / "package", {}, {"static-crop": CROP})
    with pytest.raises(CheckpointError, match="static-crop"):
        export_bundle(str(tmp_path / "package"), tmp_path / "bundle", letterbox=(0, 0, 0), compare=False)


def test_the_adapter_of_a_package_takes_no_second_one(package: Path) -> None:
    with pytest.raises(UsageError, match="Leave out --lora"):
        open_checkpoint(str(package), [package])
    tensors = open_checkpoint(str(package / "base"), [package])
    assert tensors.read_preprocess().letterbox == (127, 127, 127)


def test_an_adapter_alone_names_its_base_model_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = {"peft_type": "LORA", "lora_alpha": 8, "base_model_name_or_path": "nobody/has-this"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"nobody/has-this --lora {tmp_path}"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("network", "images", "colour"),
    [
        ({}, None, None),
        ({"resize_mode": "letterbox"}, {}, (0, 0, 0)),
        ({"resize_mode": "letterbox", "padding_value": 255}, {"static-crop": CROP | {"enabled": False}}, (255,) * 3),
    ],
)
def test_pictures_are_stretched_or_padded(
    network: dict[str, Any], images: dict[str, Any] | None, colour: Any, tmp_path: Path
) -> None:
    write_config(tmp_path, network, images)
    assert read_letterbox(tmp_path) == colour


@pytest.mark.parametrize(
    ("network", "images", "found"),
    [
        ({"resize_mode": "letterbox-reflect-edges"}, {}, "letterbox-reflect-edges"),
        ({"resize_mode": "center-crop"}, {}, "center-crop"),
        ({"color_mode": "bgr"}, {}, "bgr"),
        ({}, {"static-crop": CROP}, "static-crop"),
        ({}, {"grayscale": {"enabled": True}}, "grayscale"),
        ({}, {"contrast": {"enabled": True, "type": "Contrast Stretching"}}, "contrast"),
        ({"resize_mode": "letterbox", "training_input_size": {"height": 640, "width": 480}}, {}, "480 x 640"),
        ({"padding_value": 300}, {}, "padding_value"),
        ({"resize_mode": None}, {}, "resize_mode"),
    ],
)
def test_what_a_bundle_does_not_repeat_is_refused_by_name(
    network: dict[str, Any], images: dict[str, Any], found: str, tmp_path: Path
) -> None:
    write_config(tmp_path, network, images)
    with pytest.raises(CheckpointError, match=found):
        read_letterbox(tmp_path)
    for content in (b"{", b'{"network_input": "\xff"}'):
        (tmp_path / CONFIG).write_bytes(content)
        with pytest.raises(CheckpointError, match=str(tmp_path / CONFIG)):
            read_letterbox(tmp_path)
