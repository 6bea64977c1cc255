"""Bundles of published sizes without their weights: manifests, and on disk files that are nothing but holes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import (
    File,
    Graph,
    Limits,
    Manifest,
    Model,
    Precision,
    Target,
    Text,
    Vision,
    write_manifest,
)
from paliedge.model import SHIPPED_BUNDLE
from paliedge.planning.roofline import count_parameters

PATCH_SIZE = 14
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "float16", "int8": "int8", "int4": "int8"}
_BYTES = {"fp32": (4, 4, 4), "fp16": (2, 2, 2), "bf16": (2, 2, 2), "int8": (1, 1, 1), "int4": (1, 33 / 64, 1)}
"""Of a parameter of the vision encoder, of the decoder's layers and of head and table."""


@dataclass(frozen=True)
class Size:
    """A model's decoder, and the rows of its embedding table."""

    family: Literal["paligemma", "paligemma2"]
    text: Text
    rows: int = 257216


PALIGEMMA_3B = Size(
    "paligemma",
    Text(num_layers=18, hidden_size=2048, intermediate_size=16384, num_heads=8, num_kv_heads=1, head_dim=256),
)
PALIGEMMA2_3B = Size(
    "paligemma2",
    Text(num_layers=26, hidden_size=2304, intermediate_size=9216, num_heads=8, num_kv_heads=4, head_dim=256),
)
COUNTED = (
    (PALIGEMMA_3B, 224, 412_442_352 + 2_361_344, 1_981_884_416, 526_778_368),
    (PALIGEMMA_3B, 448, 413_327_088 + 2_361_344, 1_981_884_416, 526_778_368),
    (PALIGEMMA_3B, 896, 416_866_032 + 2_361_344, 1_981_884_416, 526_778_368),
    (PALIGEMMA2_3B, 224, 412_442_352 + 2_656_512, 2_024_517_888, 592_625_664),
    (PALIGEMMA2_3B, 448, 413_327_088 + 2_656_512, 2_024_517_888, 592_625_664),
    (PALIGEMMA2_3B, 896, 416_866_032 + 2_656_512, 2_024_517_888, 592_625_664),
)
"""Model, pixels, and the parameters of vision encoder with projector, decoder layers and head, as transformers'
models have them on its meta device."""


def make_manifest(
    size: Size = PALIGEMMA_3B,
    image_size: int = 224,
    *,
    precision: Precision = "fp16",
    target: str = "jetpack7",
    tied: bool = True,
) -> Manifest:
    """The manifest of such a bundle with one target; all that does not matter is the shipped bundle's."""
    vision = Vision(
        image_size=image_size,
        patch_size=PATCH_SIZE,
        num_layers=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_image_tokens=(image_size // PATCH_SIZE) ** 2,
    )
    names = ("decoder.weights", "table.weights" if tied else "head.weights")
    shipped = Bundle(SHIPPED_BUNDLE, check_hashes=False).manifest
    manifest = msgspec.structs.replace(
        shipped,
        model=Model(family=size.family, vision=vision, text=size.text),
        limits=Limits(prefix=vision.num_image_tokens + 128, new_tokens=256),
        embedding=msgspec.structs.replace(
            shipped.embedding,
            file="table.weights",
            dtype=_DTYPES[precision],
            rows=size.rows,
            row_scales="table.scales" if _DTYPES[precision] == "int8" else None,
        ),
        targets={
            target: Target(
                precision=precision,
                cache_update="in_place",
                vision_encoder=Graph(file="vision.onnx", weights=("vision.weights",), inputs=(), outputs=()),
                decoder=Graph(file="decoder.onnx", weights=names, inputs=(), outputs=()),
                mask_decoder=None,
                prefill=None,
                independent_rows=True,
            )
        },
        golden=None,
        calibration=None,
        precision_report=None,
    )
    files = {name: File(size=number, sha256="0" * 64) for name, number in _file_sizes(manifest).items()}
    return msgspec.structs.replace(manifest, files=files)


def _file_sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of each file; graphs and tokenizer are empty, and the head of an untied model is as large as its table."""
    parameters = count_parameters(manifest)
    (target,) = manifest.targets.values()
    vision, layers, head = _BYTES[target.precision]
    sizes = dict.fromkeys(("vision.onnx", "decoder.onnx", manifest.tokenizer), 0)
    sizes["vision.weights"] = round(parameters.vision * vision)
    sizes["decoder.weights"] = round(parameters.layers * layers)
    sizes["table.weights"] = sizes[target.decoder.weights[-1]] = parameters.head * head
    if manifest.embedding.row_scales:
        sizes[manifest.embedding.row_scales] = 4 * manifest.embedding.rows
    return sizes


def write_hollow_bundle(folder: Path, manifest: Manifest) -> Path:
    """A bundle whose files have the right sizes and take no space."""
    folder.mkdir()
    for name, file in manifest.files.items():
        (folder / name).touch()
        os.truncate(folder / name, file.size)
    write_manifest(folder, manifest)
    return folder
