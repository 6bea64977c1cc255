"""Integers for weights: symmetric, 8 bits a channel or 4 bits a group. Knows arrays, no model.

Each scale is rounded to what will be stored before the codes are made from it, so that rounding it
costs no accuracy.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
GROUP = 128
"""Weights that share a 4-bit scale; fewer where the matrix does not divide."""
_SMALLEST_GROUP = 16
_CLIPS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
"""Shares of a group's largest weight that its outermost code may stand for."""
_COLUMNS_AT_A_TIME = 512
_SMALLEST_SCALE = 2.0**-20
INT8_MAX, INT4_MIN, INT4_MAX = 127, -8, 7
INT8_ZERO = 128
"""The zero of 8-bit codes that are stored without a sign."""


class Quantized(NamedTuple):
    """`codes` int8 of the weight's shape, and the scales that they are multiples of."""

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[Any]


def quantize_int8(weight: Floats, axis: int, scale_dtype: npt.DTypeLike = np.float32) -> Quantized:
    """8 bits with one scale for each index of `axis`, the channel; scales have that axis' length."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    scales = _round_up(np.abs(weight).max(others) / INT8_MAX, scale_dtype)
    shape = [1] * weight.ndim
    shape[axis] = -1
    codes = np.rint(weight / scales.astype(np.float32).reshape(shape))
    return Quantized(codes.clip(-INT8_MAX, INT8_MAX).astype(np.int8), scales)


def find_group(size: int) -> int:
    """Weights a group along an axis of `size`: 128, or the largest smaller power of two that divides it; 0 if none."""
    group = GROUP
    while group >= _SMALLEST_GROUP and size % group:
        group //= 2
    return group if group >= _SMALLEST_GROUP else 0


def quantize_int4(weight: Floats, importance: Floats) -> Quantized:
    """4 bits with one float16 scale for each group of rows and each column: scales [K / group, N].

    Args:
        weight: [K, N].
        importance: [K], the mean square of what each row is multiplied with. Each group's range is the one
            of `_CLIPS` whose errors weigh least.
    """
    group = find_group(len(weight))
    starts = range(0, weight.shape[1], _COLUMNS_AT_A_TIME)
    columns = (weight[:, start : start + _COLUMNS_AT_A_TIME] for start in starts)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy lets go of the interpreter while it computes
        pieces = list(pool.map(lambda part: _quantize_columns(part, importance, group), columns))
    return Quantized(*(np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True)))


def _quantize_columns(weight: Floats, importance: Floats, group: int) -> Quantized:
    grouped = weight.reshape(-1, group, weight.shape[1])
    weighing = importance.reshape(-1, group, 1)
    largest = np.abs(grouped).max(1)
    best_error = np.full(largest.shape, np.inf, np.float64)
    scales = np.empty(largest.shape, np.float16)
    codes = np.empty(grouped.shape, np.int8)
    for clip in _CLIPS:
        candidate = _round_up(largest * (clip / INT4_MAX), np.float16)
        step = candidate.astype(np.float32)[:, None]
        found = np.rint(grouped / step).clip(INT4_MIN, INT4_MAX)
        error = ((found * step - grouped) ** 2 * weighing).sum(1)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        scales = np.where(better, candidate, scales)
        np.copyto(codes, found.astype(np.int8), where=better[:, None])
    return Quantized(codes.reshape(weight.shape), scales)


def dequantize(quantized: Quantized, axis: int = 0) -> Floats:
    """The weight that the codes stand for; `axis` is that of the groups, or the channels' of one scale each."""
    codes, scales = quantized
    wide = scales.astype(np.float32)
    if wide.ndim == 1:
        shape = [1] * codes.ndim
        shape[axis] = -1
        return np.multiply(codes, wide.reshape(shape), dtype=np.float32)
    return np.multiply(codes, np.repeat(wide, codes.shape[0] // wide.shape[0], axis=0), dtype=np.float32)


def pack_int4(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """ONNX's INT4: two codes a byte in the order of the tensor, the first in the lower half."""
    return _join(codes.reshape(-1, 2).view(np.uint8))


def without_sign(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """8-bit codes as uint8 with their zero at `INT8_ZERO`."""
    shifted: npt.NDArray[np.uint8] = codes.view(np.uint8) ^ np.uint8(INT8_ZERO)
    return shifted


def pack_blocks(codes: npt.NDArray[np.int8], group: int, bits: int) -> npt.NDArray[np.uint8]:
    """com.microsoft's MatMulNBits: codes [N, K] to [N, K / group, group * bits / 8], zero in the middle.

    With 4 bits, two codes a byte, the first in the lower half.
    """
    offset = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    packed = offset if bits == 8 else _join(offset.reshape(-1, 2))
    return packed.reshape(len(codes), -1, group * bits // 8)


def _join(pairs: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Two 4-bit codes a byte, the first in the lower half; their upper halves do not count."""
    joined: npt.NDArray[np.uint8] = np.bitwise_or(pairs[:, 0] & np.uint8(15), pairs[:, 1] << np.uint8(4))
    return joined


def _round_up(scales: Floats, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """To `dtype`, never down: the largest weight must not be clipped. Never 0."""
    exact = np.maximum(scales, _SMALLEST_SCALE).astype(np.float32)
    rounded = exact.astype(dtype)
    return np.where(rounded.astype(np.float32) < exact, np.nextafter(rounded, np.array(np.inf, dtype)), rounded)
