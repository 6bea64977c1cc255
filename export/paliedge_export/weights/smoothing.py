"""Move the size of activations into the weights, where it costs nothing, before they are quantised.

The idea is SmoothQuant's (arXiv 2211.10438) for 8 bits and AWQ's (arXiv 2306.00978) for 4: channels
that are large, or that matter, get a scale of their own. Here each layer takes the strength whose
estimated error is least, none at all included. The scaled model computes what the old one did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from paliedge_export.checkpoint.config import ModelConfig
from paliedge_export.checkpoint.safetensors_reader import Array, Checkpoint
from paliedge_export.weights.activations import InputStatistics, Statistics
from paliedge_export.weights.integers import (
    INT8_MAX,
    Floats,
    Quantized,
    dequantize,
    quantize_int4,
)
from paliedge_export.weights.linears import Linear, linears

_STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_SAMPLED_COLUMNS = 256
"""Output channels that an error is estimated on."""
_LARGEST_SCALE = 1024.0
_WORTHWHILE = 0.95
"""Of the error without scales: what must be left at most for scales to be taken. Weights that were trained in the
grid that they will be rounded to lose more by leaving it than an estimate this close can say."""


class Smoothed(Mapping[str, Array]):
    """A checkpoint whose tensors are scaled as they are read; tables pass as they are."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._rows: dict[str, Floats] = {}
        self._columns: dict[str, Floats] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint)

    def __len__(self) -> int:
        return len(self._checkpoint)

    def __getitem__(self, name: str) -> Array:
        tensor = self._checkpoint[name]
        rows, columns = self._rows.get(name), self._columns.get(name)
        if rows is None and columns is None:
            return tensor
        tensor = tensor.astype(np.float32)
        if rows is not None and _is_rms_norm(name):  # Gemma stores its norms' weights less one
            return np.asarray((1 + tensor) / rows - 1)
        if rows is not None:
            tensor /= rows.reshape(-1, *[1] * (tensor.ndim - 1))
        if columns is not None:
            tensor *= columns
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of a table."""
        return self._checkpoint.rows(name, start, stop)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._checkpoint.shape(name)

    def scale(self, linear: Linear, scales: Floats) -> None:
        """Divide the input channels of `linear` by `scales`, one for each producing channel."""
        for name in linear.producers:
            self._rows[name] = scales
        for name in linear.weights:
            self._columns[name] = _for_inputs(linear, scales)


@dataclass(frozen=True)
class Smoothing:
    """The scaled checkpoint, the statistics of its inputs, and how strongly each layer was scaled (0: not)."""

    tensors: Smoothed | Checkpoint
    inputs: Mapping[str, InputStatistics]
    strengths: Mapping[str, float]


def smooth(
    checkpoint: Checkpoint, config: ModelConfig, statistics: Statistics, bits: Callable[[Linear], int]
) -> Smoothing:
    """Scale each linear layer for the `bits` that its weight will have."""
    tensors = Smoothed(checkpoint)
    inputs, strengths = {}, {}
    for linear in linears(config):
        found = statistics.inputs[linear.name]
        strength, scales = 0.0, None
        if linear.producers:
            strength, scales = _choose(checkpoint, linear, found, bits(linear))
        if scales is not None:
            tensors.scale(linear, scales)
            wide = _for_inputs(linear, scales)
            found = InputStatistics(found.absmax / wide, found.mean_square / wide**2, found.rows)
        inputs[linear.name], strengths[linear.name] = found, strength
    return Smoothing(tensors, inputs, strengths)


def unsmoothed(checkpoint: Checkpoint, statistics: Statistics) -> Smoothing:
    """No layer scaled."""
    return Smoothing(checkpoint, statistics.inputs, dict.fromkeys(statistics.inputs, 0.0))


def _choose(checkpoint: Checkpoint, linear: Linear, found: InputStatistics, bits: int) -> tuple[float, Floats | None]:
    """The strength whose error is least, and its scales; 0 and None where none is clearly better."""
    weight = np.concatenate([_some_rows(checkpoint[name]) for name in linear.weights]).T  # [K, sample]
    error = _error_int8 if bits == 8 else _error_int4
    best = _WORTHWHILE * error(weight, found.absmax, found.mean_square)
    strength, chosen = 0.0, None
    for candidate in _STRENGTHS:
        scales = _scales(linear, found, weight, candidate, bits)
        wide = _for_inputs(linear, scales)
        remaining = error(weight * wide[:, None], found.absmax / wide, found.mean_square / wide**2)
        if remaining < best:
            best, strength, chosen = remaining, candidate, scales
    return strength, chosen


def _some_rows(weight: Array) -> Floats:
    step = max(1, len(weight) // _SAMPLED_COLUMNS)
    return np.asarray(weight[::step], np.float32)


def _scales(linear: Linear, found: InputStatistics, weight: Floats, strength: float, bits: int) -> Floats:
    """One for each producing channel, their middle at 1. A channel that is never used keeps 1."""
    activation = found.absmax if bits == 8 else np.sqrt(found.mean_square)
    largest = _for_producers(linear, activation)
    scales = largest**strength
    if bits == 8:
        scales /= np.maximum(_for_producers(linear, np.abs(weight).max(1)), 1e-8) ** (1 - strength)
    used = (largest > 0) & (scales > 0)
    if not used.any():
        return np.ones_like(scales)
    scales = scales / np.exp(np.log(scales, where=used, out=np.zeros_like(scales))[used].mean())
    return np.where(used, scales, 1).clip(1 / _LARGEST_SCALE, _LARGEST_SCALE).astype(np.float32)


def _error_int8(weight: Floats, absmax: Floats, mean_square: Floats) -> float:
    """Expected square of the output's error: rounding of the activations by one scale, of the weights by channels."""
    activation_step = absmax.max() / INT8_MAX
    weight_steps = np.abs(weight).max(0) / INT8_MAX
    return float(activation_step**2 * (weight**2).sum() + mean_square.sum() * (weight_steps**2).sum()) / 12


def _error_int4(weight: Floats, absmax: Floats, mean_square: Floats) -> float:
    """The same for 4-bit weights, whose error is measured; activations keep 16 bits."""
    quantized: Quantized = quantize_int4(weight, mean_square)
    return float((mean_square[:, None] * (dequantize(quantized) - weight) ** 2).sum())


def _for_inputs(linear: Linear, scales: Floats) -> Floats:
    """Scales of producing channels, repeated for the query heads that share them: [K]."""
    return np.repeat(scales.reshape(linear.groups, 1, -1), linear.shares, axis=1).reshape(-1)


def _for_producers(linear: Linear, channels: Floats) -> Floats:
    """The largest of the input channels [K] that a producing channel feeds."""
    return np.asarray(channels.reshape(linear.groups, linear.shares, -1).max(1).reshape(-1))


def _is_rms_norm(name: str) -> bool:
    return name.startswith("language_model") and name.endswith("norm.weight")
