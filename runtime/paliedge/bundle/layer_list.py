"""What an engine's kernels read and write: the list of its layers, as a file of the bundle."""

# Tests: tests/backends/trt/test_layers.py.
from __future__ import annotations

from pathlib import Path

import msgspec

from paliedge.errors import BundleError

LAYER_LIST = ".layers"
"""The suffix of such a file; it has its plan's name otherwise."""
ITEM_BYTES = {
    "Float": 4.0,
    "Half": 2.0,
    "BFloat16": 2.0,
    "Int8": 1.0,
    "UInt8": 1.0,
    "Bool": 1.0,
    "FP8": 1.0,
    "Int4": 0.5,
    "FP4": 0.5,
    "Int32": 4.0,
    "Int64": 8.0,
}
"""By TensorRT's names of types."""


class LayerTensor(msgspec.Struct, frozen=True):
    """A tensor that a kernel reads or writes.

    Attributes:
        dtype: a key of `ITEM_BYTES`.
        shape: -1 where it depends on the rows and tokens of a step.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel of an engine.

    Attributes:
        kind: TensorRT's word for it, such as "gemm" or "kgen".
        profile: the optimization profile that it is of, from 0.
        inputs, constants, outputs: `constants` are weights.
        nodes: names of the graph's nodes that it does the work of.
    """

    name: str
    kind: str
    profile: int
    inputs: tuple[LayerTensor, ...]
    constants: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    nodes: tuple[str, ...]


class LayerList(msgspec.Struct, frozen=True, kw_only=True):
    """The layers of an engine.

    Attributes:
        weight_bytes: of all weights; 0 where the source does not tell.
        scratch_bytes: of each profile's activations.
    """

    layers: tuple[Layer, ...]
    weight_bytes: int
    scratch_bytes: tuple[int, ...]

    def of(self, profile: int) -> list[Layer]:
        """The layers of one profile, in the order in which they run."""
        return [layer for layer in self.layers if layer.profile == profile]


def write_layer_list(path: Path, found: LayerList) -> None:
    """Write it as JSON."""
    path.write_bytes(msgspec.json.encode(found))


def read_layer_list(path: Path) -> LayerList:
    """Read what `write_layer_list` wrote.

    Raises:
        BundleError: it is no such file.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=LayerList)
    except (OSError, msgspec.DecodeError) as error:
        raise BundleError(
            expected=f"a list of layers in {path}", found=str(error), action="Build again with `--force`."
        ) from error
