"""Build an ONNX graph node by node while its weights stream into a file.

Activations are float32 everywhere; a matrix product casts its operands to the compute type and its
result back. That is the whole precision policy: float16 in the matrix products and in the stored
weights, float32 in norms, softmax, activation functions and the residual stream. With float32 as
the compute type the casts vanish. Knows nothing of PaliGemma.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

OPSET = 20
IR_VERSION = 10
"""What the oldest supported readers take: ONNX Runtime 1.23.2 and TensorRT 10.3."""

_ALIGNMENT = 4096
Array = npt.NDArray[Any]


class WeightFile:
    """A file of raw little-endian tensors, each at a page boundary so that readers can map it."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._stream = path.open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def append(self, pieces: Iterator[Array]) -> tuple[int, int]:
        """Write the pieces of one tensor; returns its offset and length in bytes."""
        offset = -(-self._stream.tell() // _ALIGNMENT) * _ALIGNMENT
        self._stream.seek(offset)
        for piece in pieces:
            self._stream.write(np.ascontiguousarray(piece).data)
        return offset, self._stream.tell() - offset


class GraphBuilder:
    """Collects nodes; every method returns the name of the tensor it makes."""

    def __init__(self, name: str, weights: WeightFile, compute_type: npt.DTypeLike) -> None:
        self.name = name
        self.compute_type = np.dtype(compute_type)
        self.weight_files = {weights.name}
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, tensor: str, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> None:
        """Declare `tensor` an output called `name`."""
        self._nodes.append(helper.make_node("Identity", [tensor], [name], name=name))
        self._outputs.append(_value_info(name, dtype, shape))

    def op(self, kind: str, *inputs: str, domain: str = "", name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output."""
        name = name or f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name=name, domain=domain, **attributes))
        return name

    def split(self, x: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Cut `x` along `axis`."""
        name = f"Split_{len(self._nodes)}"
        outputs = [f"{name}.{index}" for index in range(len(sizes))]
        self._nodes.append(helper.make_node("Split", [x, self.ints(*sizes)], outputs, name=name, axis=axis))
        return outputs

    def constant(self, value: Any, dtype: npt.DTypeLike = np.float32) -> str:
        """A small constant inside the graph; equal ones are shared."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = name
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return self._constants[key]

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def weight(self, name: str, array: Array, dtype: npt.DTypeLike | None = None) -> str:
        """A learned tensor, written to the weight file as `dtype` (the compute type unless told)."""
        dtype = np.dtype(dtype or self.compute_type)
        offset, length = self._weights.append(iter([array.astype(dtype)]))
        return self.external(name, dtype, array.shape, self._weights.name, offset, length)

    def external(
        self, name: str, dtype: npt.DTypeLike, shape: Sequence[int], file: str, offset: int, length: int
    ) -> str:
        """A learned tensor that already lies in `file`."""
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", file), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        self.weight_files.add(file)
        return name

    def compute(self, tensor: str) -> str:
        """Cast a float32 activation to the compute type."""
        return self._cast(tensor, self.compute_type)

    def matmul(self, first: str, second: str) -> str:
        """Matrix product of two operands of the compute type, as float32."""
        return self._cast(self.op("MatMul", first, second), np.float32)

    def linear(self, x: str, name: str, weight: Array, bias: Array | None = None) -> str:
        """x @ weight.T + bias, for `weight` [out, in] as checkpoints store it."""
        product = self.matmul(self.compute(x), self.weight(f"{name}.weight", weight.T))
        if bias is None:
            return product
        return self.op("Add", product, self.weight(f"{name}.bias", bias, np.float32))

    def _cast(self, tensor: str, dtype: npt.DTypeLike) -> str:
        if self.compute_type == np.float32:
            return tensor
        return self.op("Cast", tensor, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def build(self) -> onnx.ModelProto:
        """The model, its weights left in their files."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        domains = {node.domain for node in self._nodes} - {""}
        opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="paliedge")


def _value_info(name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
