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
    from paliedge.answering import EncodedImage, Piece
    from paliedge.errors import PaliEdgeError
    from paliedge.locations import Detection
    from paliedge.masks import Mask
    from paliedge.model import PaliGemma
    from paliedge.results import Generation, Timings
    from paliedge.views import Boxes, Masks

__version__ = "0.2.0"
__all__ = [
    "Boxes",
    "Detection",
    "EncodedImage",
    "Generation",
    "Mask",
    "Masks",
    "PaliEdgeError",
    "PaliGemma",
    "Piece",
    "Timings",
    "__version__",
]

_HOMES = {
    "Boxes": "views",
    "Detection": "locations",
    "EncodedImage": "answering",
    "Generation": "results",
    "Mask": "masks",
    "Masks": "views",
    "PaliEdgeError": "errors",
    "PaliGemma": "model",
    "Piece": "answering",
    "Timings": "results",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `paliedge --help` needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'paliedge' has no attribute '{name}'")
    return getattr(import_module(f"paliedge.{_HOMES[name]}"), name)
