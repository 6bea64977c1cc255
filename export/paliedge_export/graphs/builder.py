"""Build an ONNX graph node by node; its weights already lie in files.

Activations are float32 everywhere; a matrix product casts its operands to the compute type and its
result back. That is the whole precision policy: 16 bit in the matrix products and in the stored
weights, float32 in norms, softmax, activation functions and the residual stream. With float32 as
the compute type the casts vanish. Such a graph is strongly typed: a builder has nothing to decide.
A weight stored in integers brings its own product with it, by the layout that it is stored in.
Knows nothing of PaliGemma.
"""

# Tests: tests/export/graphs/test_graph_traps.py.
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from paliedge_export.targets import Lowering
from paliedge_export.weights.files import INT4, StoredTensor
from paliedge_export.weights.integers import INT8_ZERO, find_group

_IR_VERSIONS = {20: 10, 21: 10, 24: 11}
"""By opset; 10 and 20 are what the oldest supported readers take: ONNX Runtime 1.23.2 and TensorRT 10.3."""
_FIRST_OPSET_WITH_INT4 = 21
_CONTRIB = "com.microsoft"
_INT8_ACTIVATIONS = 4
"""MatMulNBits' accuracy_level for products of integers. Without it 8-bit weights are a hundred times slower."""


def layer_output(layer: str) -> str:
    """Name of the tensor that leaves a layer: the residual stream [B, S, H], the decoder's last one [B, 1, H]."""
    return f"{layer}.output"


class GraphBuilder:
    """Collects nodes; every method returns the name of the tensor it makes."""

    def __init__(
        self,
        name: str,
        lowering: Lowering,
        tensors: Mapping[str, StoredTensor],
        compute_type: npt.DTypeLike,
    ) -> None:
        self.name = name
        self.compute_type = np.dtype(compute_type)
        self.lowering = lowering
        self._opset = lowering.opset
        self._tensors = tensors
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._rounded: dict[tuple[str, str], str] = {}
        self.weight_files: set[str] = set()

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, tensor: str, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> None:
        """Declare `tensor` an output called `name`; one that was just made has no other name from now on."""
        assert tensor not in {output.name for output in self._outputs}
        if self._nodes[-1].output[:] == [tensor]:
            self._nodes[-1].name = self._nodes[-1].output[0] = name
        else:
            self.op("Identity", tensor, name=name)
        self._outputs.append(_value_info(name, dtype, shape))

    def op(self, kind: str, *inputs: str, domain: str = "", name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, both called `name`."""
        name = name or f"{kind}_{len(self._nodes)}"
        self.ops(kind, inputs, [name], domain=domain, **attributes)
        return name

    def ops(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> None:
        """Add a node with several outputs, called `outputs`; those called "" it does not make."""
        self._nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain, **attributes))

    def split(self, x: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Cut `x` along `axis`."""
        name = f"Split_{len(self._nodes)}"
        outputs = [f"{name}.{index}" for index in range(len(sizes))]
        self.ops("Split", [x, self.ints(*sizes)], outputs, axis=axis)
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

    def weight(self, name: str) -> str:
        """A learned tensor."""
        if name not in self._initializers:
            stored = self._tensors[name]
            tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(stored.dtype), dims=stored.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", stored.file), ("offset", stored.offset), ("length", stored.length)):
                tensor.external_data.add(key=key, value=str(value))
            self._initializers[name] = tensor
            self.weight_files.add(stored.file)
        return name

    def cast(self, tensor: str, dtype: npt.DTypeLike) -> str:
        """Between float32 and the compute type; nothing where they are the same."""
        if self.compute_type == np.float32:
            return tensor
        return self.op("Cast", tensor, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def compute(self, tensor: str) -> str:
        """Cast a float32 activation to the compute type."""
        return self.cast(tensor, self.compute_type)

    def matmul(self, first: str, second: str) -> str:
        """Matrix product of two operands of the compute type, as float32."""
        return self._product("MatMul", first, second, self.compute_type)

    def linear(self, x: str, name: str, *, beside: str | None = None, per_token: bool = False) -> str:
        """x @ weight + bias as float32, the weight [in, out]; a bias only where one is stored.

        Args:
            x: float32 [..., K].
            name: the layer's.
            beside: a layer that reads the same `x`, under whose name its scale is stored.
            per_token: tokens of `x` differ in size, so that they should not share a scale that is
                measured at run time.
        """
        stored = self._tensors[f"{name}.weight"]
        dtype = stored.dtype
        if dtype == np.uint8 and len(stored.shape) == 2:
            return self._linear_dynamic(x, name, per_token=per_token)
        if dtype == np.uint8:
            return self._matmul_blocks(x, f"{name}.weight", f"{name}.weight_scale", bits=4)
        if dtype == np.int8:
            product = self._matmul_quantized(x, name, f"{beside or name}.input_scale")
        elif dtype == INT4:
            product = self.matmul(self.compute(x), self._dequantize_groups(name))
        else:
            product = self.matmul(self.compute(x), self._weight_to_multiply(f"{name}.weight"))
        if f"{name}.bias" not in self._tensors:
            return product
        return self.op("Add", product, self.weight(f"{name}.bias"))

    def head(self, x: str, weight: str, scales: str) -> str:
        """x @ weight.T as float32, in the type in which `weight` [out, in] is stored; integers have `scales`."""
        dtype = self._tensors[weight].dtype
        if dtype == np.uint8:
            return self._matmul_blocks(x, weight, scales, bits=8)
        if dtype == np.int8:
            dtype = self._tensors[scales].dtype
            rows = self.op("DequantizeLinear", self.weight(weight), self.weight(scales), axis=0)
        elif self.compute_type == np.float32:
            dtype, rows = self.compute_type, self._weight_to_multiply(weight)
        else:
            rows = self.weight(weight)
        return self._product("Gemm", self.cast(x, dtype), rows, dtype, transB=1)

    def _linear_dynamic(self, x: str, name: str, *, per_token: bool) -> str:
        """Integer product of activations that are measured at run time, by one scale for all tokens.

        Both sides are uint8. x86 without VNNI adds pairs of uint8 x int8 products up in 16 bits and cuts what is
        above. ONNX Runtime's way around that converts int8 weights anew at each load.
        `per_token` divides each token by its largest value before, and multiplies the result by it. Its magnitude
        is taken from both ends: absolute values would be a tensor as large as the input, written and read again.
        """
        weight = self.weight(f"{name}.weight"), self.weight(f"{name}.weight_scale")
        zero = self.constant(INT8_ZERO, np.uint8)
        bias = self.weight(f"{name}.bias") if f"{name}.bias" in self._tensors else ""
        if not per_token:
            return self.op("DynamicQuantizeMatMul", x, *weight, zero, bias, domain=_CONTRIB)
        axis = self.ints(-1)
        ends = self.op("ReduceMax", x, axis), self.op("Neg", self.op("ReduceMin", x, axis))
        largest = self.op("Max", *ends, self.constant(1e-12))
        product = self.op("DynamicQuantizeMatMul", self.op("Div", x, largest), *weight, zero, domain=_CONTRIB)
        product = self.op("Mul", product, largest)
        return self.op("Add", product, bias) if bias else product

    def _matmul_blocks(self, x: str, weight: str, scales: str, bits: int) -> str:
        """x @ weight.T of a weight in blocks, each with its scale; activations get one a block at run time."""
        out, blocks, size = self._tensors[weight].shape
        block_size = size * 8 // bits
        return self.op(
            "MatMulNBits",
            *(x, self.weight(weight), self.weight(scales)),
            domain=_CONTRIB,
            K=blocks * block_size,
            N=out,
            bits=bits,
            block_size=block_size,
            accuracy_level=_INT8_ACTIVATIONS,
        )

    def _matmul_quantized(self, x: str, name: str, input_scale: str) -> str:
        """Explicit, symmetric and static: what every TensorRT replaces by one product of integers."""
        if (x, input_scale) not in self._rounded:
            scale = self.weight(input_scale)
            quantized = self.op("QuantizeLinear", x, scale, self.constant(0, np.int8))
            rounded = self.op("DequantizeLinear", quantized, scale, self.constant(0, np.int8))
            self._rounded[x, input_scale] = rounded
        rounded = self._rounded[x, input_scale]
        weight = self.op("DequantizeLinear", self.weight(f"{name}.weight"), self.weight(f"{name}.weight_scale"), axis=1)
        return self.op("MatMul", rounded, weight)

    def _dequantize_groups(self, name: str) -> str:
        """A 4-bit weight in the type of its scales; TensorRT reads it as it is stored."""
        self._opset = max(self._opset, _FIRST_OPSET_WITH_INT4)
        weight, scales = f"{name}.weight", f"{name}.weight_scale"
        group = find_group(self._tensors[weight].shape[0])
        stored = self._tensors[scales].dtype
        wide = self.op("DequantizeLinear", self.weight(weight), self.weight(scales), axis=0, block_size=group)
        if stored == self.compute_type:
            return wide
        return self.op("Cast", wide, to=helper.np_dtype_to_tensor_dtype(self.compute_type))

    def _weight_to_multiply(self, name: str) -> str:
        """A weight in the compute type; one that stays in 16 bits beside integers may be stored in another."""
        weight = self.weight(name)
        if self._tensors[name].dtype == self.compute_type:
            return weight
        return self.op("Cast", weight, to=helper.np_dtype_to_tensor_dtype(self.compute_type))

    def _product(self, kind: str, first: str, second: str, dtype: npt.DTypeLike, **attributes: Any) -> str:
        """The product as float32, rounded to `dtype` on its way.

        TensorRT may add up a float16 product in float16. Casts of both operands to float32 and of the
        result back are how it is told not to: it replaces them by one float16 kernel that adds up in
        float32. A result left in float32 would make it keep the weights in float32.
        """
        if self.lowering.accumulate_float32 and np.dtype(dtype) == np.float16:
            first, second = self.cast(first, np.float32), self.cast(second, np.float32)
            product = self.cast(self.op(kind, first, second, **attributes), dtype)
        else:
            product = self.op(kind, first, second, **attributes)
        return self.cast(product, np.float32)

    def build(self) -> onnx.ModelProto:
        """The model, its weights left in their files."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        domains = {node.domain for node in self._nodes} - {""}
        opsets = [
            helper.make_opsetid("", self._opset),
            *(helper.make_opsetid(domain, 1) for domain in sorted(domains)),
        ]
        ir_version = _IR_VERSIONS[self._opset]
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="paliedge")


def _value_info(name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
