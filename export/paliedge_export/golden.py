"""Goldens: a few images and prompts with a reference's answers.

They travel in the bundle, so that any machine can check its own run against the exporting one's. Where
there was no reference (fp32 without torch) they are the graphs' own answers, and are compared with nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

GOLDEN = "golden.npz"
PROMPTS = ("caption en", "detect cat ; dog", "answer en what is this?")
NUM_NEW_TOKENS = 12
_NUM_IMAGES = 2
_CANVAS = 256


@dataclass(frozen=True)
class Golden:
    """Answers of a reference, every prompt on every image.

    Attributes:
        reference: who gave them.
        images: [I, H, W, 3] uint8.
        image_features: [I, N, H] float32.
        token_ids: [I, P, T] greedy tokens; decoding goes on past end-of-sequence.
        log_probs: [I, P, T] float32, their log-probabilities.
    """

    reference: str
    images: npt.NDArray[np.uint8]
    image_features: npt.NDArray[np.float32]
    token_ids: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float32]


def golden_images() -> npt.NDArray[np.uint8]:
    """Pictures with edges, gradients and noise; any will do, these need no file."""
    rows, columns = np.mgrid[0:_CANVAS, 0:_CANVAS]
    images = []
    for index in range(_NUM_IMAGES):
        noise = np.random.default_rng(index).integers(0, 32, (_CANVAS, _CANVAS, 3))
        disc = (rows - 90 - 40 * index) ** 2 + (columns - 150 + 50 * index) ** 2 < 60**2
        ramps = np.stack([rows * 0.7, columns * 0.7, (rows + columns) * 0.35], -1)
        images.append(np.where(disc[..., None], (200, 60, 30 + 150 * index), ramps) + noise)
    return np.stack(images).clip(0, 255).astype(np.uint8)


def write_golden(path: Path, golden: Golden) -> None:
    """Write `golden` without its features, which are large."""
    arrays: dict[str, Any] = {
        "images": golden.images,
        "prompts": np.array(PROMPTS),
        "token_ids": golden.token_ids,
        "log_probs": golden.log_probs,
    }
    np.savez_compressed(path, **arrays)
