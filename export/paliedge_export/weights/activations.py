"""What calibration remembers of the inputs of linear layers: per channel, the largest value and the mean square.

Two numbers a channel are all that smoothing, activation scales and 4-bit scales need. So calibrating
holds no activations, and its result is small enough to travel in the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from paliedge.errors import UsageError

STATISTICS = "calibration.safetensors"
Floats = npt.NDArray[np.float32]
_ACTION = "Calibrate again: --calibrate with a folder of images."


@dataclass
class InputStatistics:
    """Of one linear layer's input: `absmax` and `mean_square` [K] over `rows` vectors."""

    absmax: Floats
    mean_square: Floats
    rows: int

    def add(self, absmax: Floats, mean_square: Floats, rows: int) -> None:
        """Take the statistics of `rows` more vectors."""
        self.absmax = np.maximum(self.absmax, absmax)
        total = self.rows + rows
        self.mean_square = (self.mean_square * (self.rows / total) + mean_square * (rows / total)).astype(np.float32)
        self.rows = total


@dataclass
class Statistics:
    """By the names of the linear layers; `source` says what they were taken from."""

    source: str
    inputs: dict[str, InputStatistics] = field(default_factory=dict)

    def add(self, name: str, absmax: Floats, mean_square: Floats, rows: int) -> None:
        if name in self.inputs:
            self.inputs[name].add(absmax, mean_square, rows)
        else:
            self.inputs[name] = InputStatistics(absmax, mean_square, rows)

    def save(self, path: Path) -> None:
        """Write to a .safetensors file."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, found in self.inputs.items():
            arrays[f"{name}/absmax"] = found.absmax
            arrays[f"{name}/mean_square"] = found.mean_square
            arrays[f"{name}/rows"] = np.array([found.rows])
        save_file(arrays, path, metadata={"source": self.source})


def load_statistics(path: Path, widths: Mapping[str, int]) -> Statistics:
    """Read what `Statistics.save` wrote, for a model whose linear layers have inputs of `widths`.

    Raises:
        UsageError: no such file, another model's, or numbers that are none.
    """
    statistics = Statistics("")
    try:
        with safe_open(path, framework="np") as file:
            statistics.source = (file.metadata() or {})["source"]
            for name in widths:
                absmax, mean_square, rows = (
                    file.get_tensor(f"{name}/{part}") for part in ("absmax", "mean_square", "rows")
                )
                statistics.inputs[name] = InputStatistics(absmax, mean_square, int(rows.item()))
    except (OSError, ValueError, KeyError, OverflowError, SafetensorError) as error:
        raise UsageError(
            expected=f"the statistics of this model in {path}", found=f"{error}", action=_ACTION
        ) from error
    for name, width in widths.items():
        entry = statistics.inputs[name]
        parts = (entry.absmax, entry.mean_square)
        fitting = all(part.shape == (width,) and part.dtype == np.float32 for part in parts)
        if not (fitting and entry.rows > 0 and all((np.isfinite(part) & (part >= 0)).all() for part in parts)):
            raise UsageError(
                expected=f"{width} finite numbers for '{name}' in {path}",
                found=f"{entry.absmax.dtype} of shape {list(entry.absmax.shape)}, another model's or damaged",
                action=_ACTION,
            )
    return statistics
