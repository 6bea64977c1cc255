"""PaliGemma and PaliGemma 2 on Jetson-class hardware, without torch.

from paliedge import PaliGemma

model = PaliGemma.load("bundle")
for detection in model.detect("photo.jpg", ["cat", "dog"]).detections:
    print(detection.label, detection.box)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paliedge.backends.select import BackendOptions
    from paliedge.errors import (
        BuildError,
        BundleError,
        CheckpointError,
        ClosedError,
        DeviceError,
        EngineMismatchError,
        ImageError,
        MissingExtraError,
        OutputError,
        PaliEdgeError,
        PrecisionError,
        ResourceError,
        UsageError,
    )
    from paliedge.generation.request import EncodedImage, GenerationOptions, ImageSet
    from paliedge.inputs.images import load_image
    from paliedge.inputs.prompt import Prompt
    from paliedge.model import PaliGemma
    from paliedge.results.arrays import Boxes, Masks
    from paliedge.results.generation import DeviceTimings, Generation, Piece, Timings
    from paliedge.results.locations import Detection
    from paliedge.results.masks import Mask

__version__ = "0.2.0"
__all__ = [
    "BackendOptions",
    "Boxes",
    "BuildError",
    "BundleError",
    "CheckpointError",
    "ClosedError",
    "Detection",
    "DeviceError",
    "DeviceTimings",
    "EncodedImage",
    "EngineMismatchError",
    "Generation",
    "GenerationOptions",
    "ImageError",
    "ImageSet",
    "Mask",
    "Masks",
    "MissingExtraError",
    "OutputError",
    "PaliEdgeError",
    "PaliGemma",
    "Piece",
    "PrecisionError",
    "Prompt",
    "ResourceError",
    "Timings",
    "UsageError",
    "__version__",
    "load_image",
]

_HOMES = {
    "backends.select": ("BackendOptions",),
    "generation.request": ("EncodedImage", "GenerationOptions", "ImageSet"),
    "inputs.images": ("load_image",),
    "inputs.prompt": ("Prompt",),
    "model": ("PaliGemma",),
    "results.arrays": ("Boxes", "Masks"),
    "results.generation": ("DeviceTimings", "Generation", "Piece", "Timings"),
    "results.locations": ("Detection",),
    "results.masks": ("Mask",),
}
"""Where the public names live; all others are errors."""


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `paliedge --help` needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module 'paliedge' has no attribute '{name}'")
    home = next((home for home, names in _HOMES.items() if name in names), "errors")
    return getattr(import_module(f"paliedge.{home}"), name)


def __dir__() -> list[str]:
    return __all__
