"""A picture to pixel_values, bit for bit as the PIL-based Hugging Face processor makes them.

Resizing to the square is Pillow's, to uint8; rescaling and normalising a byte has 256 outcomes a
channel, so both are one table.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from paliedge.bundle.manifest import Preprocess

ContentBox = tuple[float, float, float, float]
"""The part of the model's square that a picture fills: x1, y1, x2, y2 from 0 to 1."""
WHOLE: ContentBox = (0.0, 0.0, 1.0, 1.0)


class Preprocessor:
    """Turns RGB pictures of any size into pixel_values of the model's size.

    A squashed picture fills the square: coordinates relative to the square are relative to it. A letterboxed
    one fills its content box.
    """

    def __init__(self, preprocess: Preprocess, image_size: int) -> None:
        self._size_wh = (image_size, image_size)
        self._resampling = Image.Resampling[preprocess.resample.upper()]
        self._letterbox = preprocess.letterbox
        unit = (np.arange(256, dtype=np.float64) * preprocess.rescale_factor).astype(np.float32)[:, None]
        mean, std = (np.array(values, np.float32) for values in (preprocess.mean, preprocess.std))
        self._table = np.ascontiguousarray(((unit - mean) / std).T)

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """RGB picture -> [1, 3, S, S] float32."""
        pixels = np.asarray(self.fit(image))
        channels = [table[pixels[..., index]] for index, table in enumerate(self._table)]
        return np.stack(channels)[None]

    def fit(self, image: Image.Image) -> Image.Image:
        """The picture as the square [S, S] that the model sees."""
        if self._letterbox is None:
            return image.resize(self._size_wh, self._resampling)
        left, top, right, bottom = self._place(image.size)
        square = Image.new("RGB", self._size_wh, self._letterbox)
        square.paste(image.resize((right - left, bottom - top), self._resampling), (left, top))
        return square

    def content_box(self, image_wh: tuple[int, int]) -> ContentBox:
        """Where a picture of this width and height lies in the square: x1, y1, x2, y2 from 0 to 1."""
        if self._letterbox is None:
            return WHOLE
        x1, y1, x2, y2 = (edge / self._size_wh[0] for edge in self._place(image_wh))
        return x1, y1, x2, y2

    def _place(self, image_wh: tuple[int, int]) -> tuple[int, int, int, int]:
        size = self._size_wh[0]
        width, height = (max(1, round(side * size / max(image_wh))) for side in image_wh)
        left, top = (size - width) // 2, (size - height) // 2
        return left, top, left + width, top + height
