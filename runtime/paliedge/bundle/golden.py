"""Golden answers, the bundle's golden.npz: pictures, prompts, and a reference's answers to them.

They travel in the bundle, so that any machine can hold its own answers against the exporting one's.
"""

# Tests: tests/export/test_exporter.py and tests/cli/test_bundles.py.
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from paliedge.bundle.bundle import Bundle

GOLDEN = "golden.npz"


@dataclass(frozen=True)
class Golden:
    """Every prompt on every image, and the exporting machine's answers.

    Attributes:
        images: [I, H, W, 3] uint8.
        prompts: P of them.
        token_ids: [I, P, T] int64, filled up with end-of-sequence.
        log_probs: [I, P, T] float32.
    """

    images: npt.NDArray[np.uint8]
    prompts: list[str]
    token_ids: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float32]


def load_golden(bundle: Bundle) -> Golden | None:
    """The bundle's golden answers; None for a bundle without any."""
    if bundle.manifest.golden is None:
        return None
    with np.load(bundle.path(bundle.manifest.golden), allow_pickle=False) as file:
        return Golden(file["images"], file["prompts"].tolist(), file["token_ids"], file["log_probs"])


def write_golden(path: Path, golden: Golden) -> None:
    """Write what `load_golden` reads."""
    np.savez_compressed(
        path,
        images=golden.images,
        prompts=np.array(golden.prompts),
        token_ids=golden.token_ids,
        log_probs=golden.log_probs,
    )
