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
    from paliedge.generation.answering import EncodedImage, Piece
    from paliedge.model import PaliGemma
    from paliedge.results.arrays import Boxes, Masks
    from paliedge.results.generation import Generation, Timings
    from paliedge.results.locations import Detection
    from paliedge.results.masks import Mask

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
    "Boxes": "results.arrays",
    "Detection": "results.locations",
    "EncodedImage": "generation.answering",
    "Generation": "results.generation",
    "Mask": "results.masks",
    "Masks": "results.arrays",
    "PaliEdgeError": "errors",
    "PaliGemma": "model",
    "Piece": "generation.answering",
    "Timings": "results.generation",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `paliedge --help` needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'paliedge' has no attribute '{name}'")
    return getattr(import_module(f"paliedge.{_HOMES[name]}"), name)
