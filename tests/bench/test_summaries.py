"""Statistics and ratios on samples whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from paliedge.bench.summaries import compare_medians, summarise


def test_percentiles_of_known_samples() -> None:
    found = summarise([float(value) for value in range(1, 1002)])
    assert (found.n, found.min, found.max, found.mean) == (1001, 1, 1001, 501)
    assert (found.p50, found.p90, found.p99) == (501, 901, 991)
    assert found.std == pytest.approx(289.1081, abs=1e-3)  # sqrt(n (n + 1) / 12) for 1 ... n


def test_a_percentile_of_too_few_samples_is_not_told() -> None:
    assert summarise([1.0] * 9).p90 is None
    assert summarise([1.0] * 10).p90 == 1
    assert summarise([1.0] * 99).p99 is None
    assert summarise([1.0] * 100).p99 == 1
    assert summarise([3.0]).std == 0


@pytest.mark.parametrize("scale", [1.0, 1.3, 0.5])
def test_about_ninety_five_in_a_hundred_intervals_hold_the_true_ratio(scale: float) -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(100):
        first, second = (rng.normal(10, 1, 60) for _ in range(2))
        found = compare_medians(first.tolist(), (scale * second).tolist())
        assert found.low <= found.ratio <= found.high
        held += found.low < scale < found.high
    assert 88 <= held <= 99


def test_an_outlier_moves_neither_ratio_nor_interval() -> None:
    samples = [10.0 + index % 3 for index in range(90)]
    assert compare_medians(samples, [*samples, 1e6]).high < 1.15
