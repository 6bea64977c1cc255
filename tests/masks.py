"""The published mask decoder's layout with random weights, and what it computes, in NumPy.

Written from the layers' definitions, independently of the exporter: a convolution is a sum over kernel
places, a transposed one spreads each input pixel over the output.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
PUBLISHED: dict[str, Any] = {"width": 128, "dim": 512, "channels": (128, 64, 32, 16)}
"""Of vae-oid.npz."""


def random_mask_decoder(
    seed: int = 0, *, width: int = 16, dim: int = 24, channels: tuple[int, ...] = (16, 8, 8, 4)
) -> dict[str, Array]:
    """Tensors in the published keys and layout."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {"_vq_vae._embedding": rng.normal(size=(128, dim)).astype(np.float32)}

    def add(name: str, shape: tuple[int, ...], out: int) -> None:
        fan_in = np.prod(shape) / out
        tensors[f"{name}.weight"] = (rng.normal(size=shape) * np.sqrt(2 / fan_in)).astype(np.float32)
        tensors[f"{name}.bias"] = rng.normal(scale=0.1, size=out).astype(np.float32)

    add("decoder.0", (width, dim, 1, 1), width)
    for block in ("decoder.2.net", "decoder.3.net"):
        for place, kernel in ((0, 3), (2, 3), (4, 1)):
            add(f"{block}.{place}", (width, width, kernel, kernel), width)
    wide = width
    for place, narrow in zip((4, 6, 8, 10), channels, strict=True):
        add(f"decoder.{place}", (wide, narrow, 4, 4), narrow)
        wide = narrow
    add("decoder.12", (1, wide, 1, 1), 1)
    return tensors


def decode_masks(tensors: dict[str, Array], codes: Array) -> Array:
    """codes [N, 16] -> masks [N, 64, 64], in float64."""
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
    return np.stack([_decode(tensors, row) for row in codes])


def _decode(tensors: dict[str, Array], codes: Array) -> Array:
    x = tensors["_vq_vae._embedding"][codes].reshape(4, 4, -1).transpose(2, 0, 1)
    x = _relu(_convolve(x, tensors, "decoder.0"))
    for block in ("decoder.2.net", "decoder.3.net"):
        inner = _relu(_convolve(x, tensors, f"{block}.0"))
        inner = _relu(_convolve(inner, tensors, f"{block}.2"))
        x = x + _convolve(inner, tensors, f"{block}.4")
    for place in (4, 6, 8, 10):
        x = _relu(_spread(x, tensors, f"decoder.{place}"))
    mask: Array = _convolve(x, tensors, "decoder.12")[0]
    return mask


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _convolve(x: Array, tensors: dict[str, Array], name: str) -> Array:
    """Same size: [C, H, W] -> [D, H, W]."""
    weight = tensors[f"{name}.weight"]
    half, (_, height, width) = weight.shape[2] // 2, x.shape
    padded = np.pad(x, ((0, 0), (half, half), (half, half)))
    total = np.zeros((len(weight), height, width))
    for row in range(weight.shape[2]):
        for column in range(weight.shape[3]):
            window = padded[:, row : row + height, column : column + width]
            total += np.einsum("dc,chw->dhw", weight[:, :, row, column], window)
    return total + tensors[f"{name}.bias"][:, None, None]


def _spread(x: Array, tensors: dict[str, Array], name: str) -> Array:
    """Twice the size: each pixel adds weight [in, out, 4, 4] around its place, one pixel beyond is cut off."""
    weight, (_, height, width) = tensors[f"{name}.weight"], x.shape
    total = np.zeros((weight.shape[1], 2 * height + 2, 2 * width + 2))
    for row in range(4):
        for column in range(4):
            added = np.einsum("cd,chw->dhw", weight[:, :, row, column], x)
            total[:, row : row + 2 * height : 2, column : column + 2 * width : 2] += added
    return total[:, 1:-1, 1:-1] + tensors[f"{name}.bias"][:, None, None]
