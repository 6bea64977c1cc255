"""Bundles of published sizes without their weights: manifests, and on disk files that are nothing but holes.

Parameters are counted from transformers' models on its meta device, in millions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from paliedge.bundle import Bundle
from paliedge.manifest import File, Graph, Limits, Manifest, Model, Precision, Target, Text, Vision, write_manifest
from paliedge.model import SHIPPED_BUNDLE

VISION_MILLIONS = {224: 412.44, 448: 413.33, 896: 416.87}
PATCH_SIZE = 14
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "float16"}
_ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Size:
    """A published model: its decoder's dimensions, and parameters of projector and decoder layers in millions."""

    family: Literal["paligemma", "paligemma2"]
    text: Text
    projector_millions: float
    layers_millions: float
    rows: int = 257216


PALIGEMMA_3B = Size(
    "paligemma",
    Text(num_layers=18, hidden_size=2048, intermediate_size=16384, num_heads=8, num_kv_heads=1, head_dim=256),
    2.36,
    1981.88,
)
PALIGEMMA2_3B = Size(
    "paligemma2",
    Text(num_layers=26, hidden_size=2304, intermediate_size=9216, num_heads=8, num_kv_heads=4, head_dim=256),
    2.66,
    2024.52,
)


def make_manifest(
    size: Size = PALIGEMMA_3B,
    image_size: int = 224,
    *,
    precision: Precision = "fp16",
    target: str = "jetpack7",
    tied: bool = True,
) -> Manifest:
    """The manifest of such a bundle with one target; all that does not matter is the shipped bundle's."""
    itemsize = _ITEMSIZE[precision]
    vision = Vision(
        image_size=image_size,
        patch_size=PATCH_SIZE,
        num_layers=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_image_tokens=(image_size // PATCH_SIZE) ** 2,
    )
    head = size.rows * size.text.hidden_size * itemsize
    sizes = {
        "vision.weights": round((VISION_MILLIONS[image_size] + size.projector_millions) * 1e6) * itemsize,
        "decoder.weights": round(size.layers_millions * 1e6) * itemsize,
        "table.weights": head,
    }
    names = ("decoder.weights", "table.weights" if tied else "head.weights")
    if not tied:
        sizes["head.weights"] = head
    shipped = Bundle(SHIPPED_BUNDLE, check_hashes=False).manifest
    return msgspec.structs.replace(
        shipped,
        model=Model(family=size.family, vision=vision, text=size.text),
        limits=Limits(prefix=vision.num_image_tokens + 128, new_tokens=256),
        embedding=msgspec.structs.replace(
            shipped.embedding,
            file="table.weights",
            dtype=_DTYPES[precision],
            rows=size.rows,
        ),
        targets={
            target: Target(
                precision=precision,
                cache_update="in_place",
                vision_encoder=Graph(file="vision.onnx", weights=("vision.weights",), inputs=(), outputs=()),
                decoder=Graph(file="decoder.onnx", weights=names, inputs=(), outputs=()),
            )
        },
        files={name: File(size=number, sha256="0" * 64) for name, number in sizes.items()}
        | {name: File(size=0, sha256="0" * 64) for name in ("vision.onnx", "decoder.onnx", "tokenizer.json")},
        golden=None,
    )


def write_hollow_bundle(folder: Path, manifest: Manifest) -> Path:
    """A bundle whose files have the right sizes and take no space."""
    folder.mkdir()
    for name, file in manifest.files.items():
        (folder / name).touch()
        os.truncate(folder / name, file.size)
    write_manifest(folder, manifest)
    return folder
