"""PaliGemma and PaliGemma 2 on Jetson-class hardware, without torch.

from paliedge import PaliGemma

model = PaliGemma.load("bundle")
for found in model.detect("photo.jpg", ["cat", "dog"]).detections:
    print(found.label, found.box)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paliedge.errors import PaliEdgeError
    from paliedge.locations import Detection
    from paliedge.masks import Mask
    from paliedge.model import EncodedImage, PaliGemma, Piece
    from paliedge.results import Generation, Timings

__version__ = "0.1.0"
__all__ = [
    "Detection",
    "EncodedImage",
    "Generation",
    "Mask",
    "PaliEdgeError",
    "PaliGemma",
    "Piece",
    "Timings",
    "__version__",
]

_HOMES = {
    "Detection": "locations",
    "EncodedImage": "model",
    "Generation": "results",
    "Mask": "masks",
    "PaliEdgeError": "errors",
    "PaliGemma": "model",
    "Piece": "model",
    "Timings": "results",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `paliedge --help` needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'paliedge' has no attribute '{name}'")
    return getattr(import_module(f"paliedge.{_HOMES[name]}"), name)
