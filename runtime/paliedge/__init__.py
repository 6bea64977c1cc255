"""PaliGemma and PaliGemma 2 on Jetson-class hardware, without torch.

from paliedge import PaliGemma

model = PaliGemma.load("bundle")
for found in model.detect("photo.jpg", ["cat", "dog"]).detections:
    print(found.label, found.box)
"""

from paliedge.errors import PaliEdgeError
from paliedge.locations import Detection
from paliedge.model import EncodedImage, PaliGemma, Piece
from paliedge.results import Generation, Timings

__version__ = "0.1.0"
__all__ = [
    "Detection",
    "EncodedImage",
    "Generation",
    "PaliEdgeError",
    "PaliGemma",
    "Piece",
    "Timings",
    "__version__",
]
