"""Percentiles, spreads and ratios of samples. Knows only numbers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

MIN_FOR_P90, MIN_FOR_P99 = 10, 100
"""Fewer samples say nothing about such a percentile. (MLPerf's rules ask for 64 and 662 before they believe one.)"""
_RESAMPLES = 2_000


class Summary(msgspec.Struct, frozen=True):
    """Statistics of samples, in their unit; a percentile is None where there are too few for it."""

    n: int
    mean: float
    std: float
    min: float
    p50: float
    p90: float | None
    p99: float | None
    max: float


def summarise(samples: Sequence[float]) -> Summary:
    """Statistics of at least one sample; `std` is the sample standard deviation, 0 for a single one."""
    values = np.asarray(samples, np.float64)
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return Summary(
        n=len(values),
        mean=float(values.mean()),
        std=float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        min=float(values.min()),
        p50=p50,
        p90=p90 if len(values) >= MIN_FOR_P90 else None,
        p99=p99 if len(values) >= MIN_FOR_P99 else None,
        max=float(values.max()),
    )


class Ratio(msgspec.Struct, frozen=True):
    """Median of the second samples over median of the first, and where 95 % of such ratios lie."""

    ratio: float
    low: float
    high: float


def compare_medians(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Ratio of medians with its bootstrap interval (percentile method, B. Efron 1979)."""
    rng = np.random.default_rng(0)
    one, other = (np.asarray(samples, np.float64) for samples in (first, second))
    drawn = _medians(other, rng) / _medians(one, rng)
    low, high = np.percentile(drawn, (2.5, 97.5)).tolist()
    return Ratio(float(np.median(other) / np.median(one)), low, high)


def _medians(values: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Medians of resamples; large sets are thinned out first, evenly, which keeps memory small."""
    values = values[np.linspace(0, len(values) - 1, min(len(values), 1_000)).astype(int)]
    medians: npt.NDArray[np.float64] = np.median(rng.choice(values, (_RESAMPLES, len(values))), axis=1)
    return medians
