"""What this processor's arithmetic is worth: products whose sums are known, asked of the operators that graphs use.

A processor's name and flags do not tell. x86 without VNNI cuts pairs of 8-bit products that do not fit 16 bits. On ARM
ONNX Runtime adds float16 products up in float16 from 1.29 on. Knows no backend: its callers bring one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Kind = Literal["eight_bit", "signed", "blocks", "float16"]
"""Products of 8-bit matrices with weights without a sign, with signed ones, of floats with weights in blocks of 4 and 8
bits, of float16."""
NAMES: Mapping[Kind, str] = {
    "eight_bit": "8-bit products",
    "signed": "8-bit products of signed weights",
    "blocks": "products of 4- and 8-bit blocks",
    "float16": "float16 sums",
}
FOLDER = Path(__file__).with_name("probes")
"""A graph for each kind, written by `tests/probes.py`: "x" float32 [rows, K], its products [rows, N], and the "weights"
float32 [K, N] that it is multiplied with."""
INTEGERS, FLOATS = FOLDER / "integers.onnx", FOLDER / "floats.onnx"
"""The product of "a" [M, K] and "b" [K, N], both uint8 or both float32, and nothing else."""
_SIZE, _REPEATS = 384, 5
_NUM_ROWS = (1, 3, 16)
"""Kernels differ by the number of rows."""
_TOLERANCE: Mapping[Kind, float] = {"eight_bit": 1e-5, "signed": 1e-5, "blocks": 1e-2, "float16": 1e-5}
"""Of the largest sum. All numbers are whole ones that are exact but for float32's last bits. What kernels make of the
floats that are multiplied with blocks is up to them, within 8 bits."""
_BLOCK = 128
_STRIDE = 37

Array = npt.NDArray[Any]


class Arithmetic(NamedTuple):
    """What a probe found.

    Attributes:
        kind: of products.
        wrong: by product a sum that is off, over the right one; empty where all are exact.
    """

    kind: Kind
    wrong: Mapping[str, float]

    def __str__(self) -> str:
        if not self.wrong:
            return f"{NAMES[self.kind]}: exact"
        off = ", ".join(f"{share:.3g} of the right sum with {name}" for name, share in self.wrong.items())
        return f"{NAMES[self.kind]}: wrong, {off}"


def probe(kind: Kind, load: Callable[[Path], Any]) -> Arithmetic:
    """Ask for the products of one kind, in about a millisecond; `load` opens a graph as an `InferenceSession`."""
    session = load(FOLDER / f"{kind}.onnx")
    width = session.get_inputs()[0].shape[1]
    names = [output.name for output in session.get_outputs()]
    wrong: dict[str, float] = {}
    for x in _operands(kind, width):
        *products, weights = session.run(names, {"x": x})
        exact = x @ weights
        limit = _TOLERANCE[kind] * np.abs(exact).max()
        for name, product in zip(names, products, strict=False):
            error = np.abs(product - exact)
            if not error.max() <= limit and name not in wrong:  # also what is no number
                index = np.unravel_index(error.argmax(), error.shape)
                wrong[name] = float(product[index] / exact[index])
    return Arithmetic(kind, wrong)


def measure_rate(load: Callable[[Path], Any]) -> float:
    """Operations a second of 8-bit products over those of float32, each the best of a few."""

    def seconds(path: Path, dtype: npt.DTypeLike) -> float:
        session = load(path)
        operands = dict.fromkeys("ab", np.ones((_SIZE, _SIZE), dtype))
        return best_seconds(lambda: session.run(None, operands), _REPEATS)

    return seconds(FLOATS, np.float32) / seconds(INTEGERS, np.uint8)


def best_seconds(work: Callable[[], object], repeats: int) -> float:
    """The shortest of several runs: what others take of the machine only adds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _operands(kind: Kind, width: int) -> list[Array]:
    """Whole numbers that each operator rounds to themselves: the ends of its range are among them."""
    found = []
    for rows in _NUM_ROWS:
        x = np.arange(rows * width, dtype=np.int64).reshape(rows, width) * _STRIDE % 255
        if kind in ("eight_bit", "signed"):  # measured together at run time: from 0 to 255 and from -128 to 127
            x[:, :2] = 0, 255
            found += [x, x - 128]
        elif kind == "blocks":  # measured by the block
            x[:, ::_BLOCK] = 0
            found.append(x - 127)
        else:
            found.append(np.ones_like(x))
    return [x.astype(np.float32) for x in found]
