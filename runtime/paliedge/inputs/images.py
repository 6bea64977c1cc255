"""The border where images come in: path, bytes, PIL or numpy to one RGB picture.

Only JPEG, PNG, WEBP and BMP are decoded, and their size is checked on the header first. Whatever a
decoder raises leaves here as ImageError with a fixed sentence. Knows nothing of models.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from paliedge.errors import ImageError

ImageSource: TypeAlias = "str | Path | bytes | Image.Image | npt.NDArray[np.uint8]"

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_PIXELS = 32_000_000
_WHITE = (255, 255, 255, 255)
_WARNINGS = Lock()
"""Held while warnings are ignored: their filters belong to the whole process."""
_UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageSource, *, bgr: bool = False) -> Image.Image:
    """An RGB picture, upright after its EXIF orientation, transparency composited on white.

    Args:
        source: a path, the bytes of an image file, a PIL image, or a uint8 array. An array is [H, W, 3] (RGB),
            [H, W, 4] (RGBA) or [H, W] (grey).
        bgr: the array's channels are blue, green, red (OpenCV's order); for arrays only.

    Raises:
        ImageError: not one of the four formats, damaged, over 32 megapixels, or an array of another
            shape or type.
    """
    if isinstance(source, np.ndarray):
        return _image_from_array(source, bgr)
    if bgr:
        raise ImageError(
            expected="a numpy array with bgr=True", found=f"{type(source).__name__}", action="Leave bgr out."
        )
    if isinstance(source, Image.Image):
        _check_size(source.size)
        return _decode(source, "the PIL image")
    if isinstance(source, bytes):
        return _decode_file(io.BytesIO(source), f"{len(source)} bytes")
    if not isinstance(source, str | os.PathLike):
        raise ImageError(
            expected="a path, the bytes of an image file, a PIL image or a numpy array",
            found=type(source).__name__,
            action="Give one of these; several pictures in one prompt are an `ImageSet` of them.",
        )
    if "://" in str(source):  # not shown: an address may hold a password
        raise ImageError(
            expected="the path of an image file",
            found="an address",
            action="Fetch the picture first. Streams are for the command, such as `paliedge detect`.",
        )
    path = Path(source)
    try:
        if not path.is_file():  # a pipe would block, a device never end
            raise FileNotFoundError
        stream = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError(
            expected=f"a readable image file at {path}",
            found="a folder" if os.path.isdir(path) else "none",
            action="Check the path and its permissions.",
        ) from error
    with stream:
        return _decode_file(stream, str(path))


def _decode_file(stream: BinaryIO, name: str) -> Image.Image:
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata; size is checked below, whatever Pillow warns of
        try:
            image = Image.open(stream, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ImageError(
                expected="a JPEG, PNG, WEBP or BMP image",
                found=f"something else in {name}",
                action="Convert it to one of these formats.",
            ) from error
        except Image.DecompressionBombError as error:
            raise _too_large("countless") from error
        except Exception as error:
            raise _damaged(name) from error
        _check_size(image.size)
        return _decode(image, name)


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        picture = _rgb_from_image(_upright(image))
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more on bad files
        raise _damaged(name) from error
    picture.info = {}  # the orientation is applied: who loads the result again must not turn it again
    return picture


def _upright(image: Image.Image) -> Image.Image:
    """As ImageOps.exif_transpose, which also rewrites the metadata and fails where a tag is odd."""
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _rgb_from_image(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversions would clip it at 255
        image = _bytes_from_16_bit(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _bytes_from_16_bit(image: Image.Image) -> Image.Image:
    grey = np.asarray(image).clip(0, 65535)
    values = (grey >> 8).astype(np.uint8)
    if "transparency" not in image.info:
        return Image.fromarray(values)
    alpha = np.where(grey == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([values, alpha], axis=-1))


def _image_from_array(array: npt.NDArray[Any], bgr: bool) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        raise ImageError(
            expected="a uint8 array of shape [H, W], [H, W, 3] or [H, W, 4]",
            found=f"{array.dtype} of shape {list(array.shape)}",
            action="Scale the values to 0..255, put the channels last, and pass one image at a time.",
        )
    _check_size((array.shape[1], array.shape[0]))
    if channels == 1:
        array = array.reshape(array.shape[:2])
    elif bgr:
        array = array[..., [2, 1, 0, 3][:channels]]
    return _rgb_from_image(Image.fromarray(np.ascontiguousarray(array)))


def _check_size(size_wh: tuple[int, int]) -> None:
    width, height = size_wh
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width} x {height}")
    if width < 1 or height < 1:
        raise _damaged("the image")


def _too_large(found: str) -> ImageError:
    return ImageError(
        expected=f"an image of at most {MAX_PIXELS // 1_000_000} megapixels",
        found=f"{found} pixels",
        action="Scale it down first; the model sees a small square of it anyway.",
    )


def _damaged(name: str) -> ImageError:
    return ImageError(
        expected="a whole image file", found=f"damaged or cut off data in {name}", action="Copy or save it again."
    )
