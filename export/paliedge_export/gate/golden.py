"""Goldens: two drawn pictures and a few prompts with a reference's answers.

They travel in the bundle, so that any machine can check its own run against the exporting one's. A
quantised bundle's are its own graphs' answers, and so are those of a bundle without a reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from paliedge_export.gate.compare import Answers

GOLDEN = "golden.npz"
PROMPTS = ("caption en", "detect cat ; dog", "answer en what is this?")
"""For a head that can say everything."""
_NUM_IMAGES = 2
_CANVAS = 256


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


def write_golden(path: Path, prompts: Sequence[str], answers: Answers, eos: int) -> None:
    """Write answers to `prompts` on `golden_images`: token_ids and log_probs [I, P, T], filled up with `eos`."""
    length = max(len(answer.tokens) for row in answers.answers for answer in row)
    shape = (len(answers.answers), len(prompts), length)
    token_ids, log_probs = np.full(shape, eos, np.int64), np.zeros(shape, np.float32)
    for index, row in enumerate(answers.answers):
        for place, answer in enumerate(row):
            token_ids[index, place, : len(answer.tokens)] = answer.tokens
            log_probs[index, place, : len(answer.tokens)] = answer.log_probs
    arrays: dict[str, Any] = {
        "images": golden_images(),
        "prompts": np.array(prompts),
        "token_ids": token_ids,
        "log_probs": log_probs,
    }
    np.savez_compressed(path, **arrays)
