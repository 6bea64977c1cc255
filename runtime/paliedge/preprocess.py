"""A picture to pixel_values, bit for bit as the PIL-based Hugging Face processor makes them.

Resizing to the square is Pillow's, to uint8; rescaling and normalising a byte has 256 outcomes a
channel, so both are one table.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from paliedge.manifest import Preprocess

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Preprocessor:
    """Turns RGB pictures of any size into pixel_values of the model's size.

    The picture is squashed, not padded: coordinates relative to the square are relative to it.
    """

    def __init__(self, preprocess: Preprocess, image_size: int) -> None:
        self._size_wh = (image_size, image_size)
        self._resampling = _RESAMPLING[preprocess.resample]
        unit = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)[:, None]
        mean, std = (np.array(values, np.float32) for values in (preprocess.mean, preprocess.std))
        self._table = np.ascontiguousarray(((unit - mean) / std).T)

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """RGB picture -> [1, 3, S, S] float32."""
        pixels = np.asarray(image.resize(self._size_wh, self._resampling))
        channels = [table[pixels[..., index]] for index, table in enumerate(self._table)]
        return np.stack(channels)[None]
