"""The graphs that `backends.arithmetic` asks a processor with, as they are written: `python -m tests.probes`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from paliedge.backends.arithmetic import FOLDER

WIDTH, COLUMNS, BLOCK = 1024, 16, 128
FLOAT16_WIDTH = 16384
_CODES = np.array([[127, 127, -127, -127], [127, -127, 127, -127], [127, 64, -3, 1], [127, -128, 90, -77]], np.int8)
"""Tiled to [WIDTH, COLUMNS]: neighbours in a column all alike, alternating, and neither."""


def _model(nodes: list[onnx.NodeProto], width: int, constants: list[onnx.TensorProto]) -> onnx.ModelProto:
    made = [name for node in nodes for name in node.output if name in OUTPUTS]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in [*made, "weights"]]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])
    graph = helper.make_graph(nodes, "probe", [x], outputs, constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="paliedge")


OUTPUTS = ("int8 weights", "uint8 weights", "4-bit weights", "8-bit weights", "float16 MatMul", "float16 Gemm")


def eight_bit(*, signed: bool) -> onnx.ModelProto:
    """DynamicQuantizeMatMul of weights with a sign, which need no zero point, or without."""
    tile = numpy_helper.from_array(np.array([WIDTH // 4, COLUMNS // 4]), "repeats")
    codes = numpy_helper.from_array(_CODES if signed else _CODES.view(np.uint8) ^ np.uint8(128), "codes")
    scale = numpy_helper.from_array(np.ones(COLUMNS, np.float32), "scale")
    zero = [] if signed else [numpy_helper.from_array(np.uint8(128), "zero")]
    shift = numpy_helper.from_array(np.float32(0 if signed else -128), "shift")
    operands = ["x", "tiled", "scale", *(tensor.name for tensor in zero)]
    nodes = [
        helper.make_node("Tile", ["codes", "repeats"], ["tiled"]),
        helper.make_node("Cast", ["tiled"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["floats", "shift"], ["weights"]),
        helper.make_node("DynamicQuantizeMatMul", operands, [OUTPUTS[0 if signed else 1]], domain="com.microsoft"),
    ]
    return _model(nodes, WIDTH, [tile, codes, scale, shift, *zero])


def blocks() -> onnx.ModelProto:
    """MatMulNBits with 4 and with 8 bits, of the same weights: multiples of 1 from -7 to 7."""
    pattern = np.array([7, 7, -7, 7, 5, -3, 1, 0], np.int8)
    codes = np.tile(np.stack([np.roll(pattern, turn) * (-1 if turn % 3 else 1) for turn in range(COLUMNS)]), WIDTH // 8)
    shape = (COLUMNS, WIDTH // BLOCK, -1)
    pairs = (codes + 8).astype(np.uint8).reshape(-1, 2)
    constants = {
        "weights T": codes,
        "four": (pairs[:, 0] | pairs[:, 1] << 4).reshape(shape),
        "eight": (codes.astype(np.int16) + 128).astype(np.uint8).reshape(shape),
        "scales": np.ones((COLUMNS, WIDTH // BLOCK), np.float32),
    }
    nodes = [
        helper.make_node("Transpose", ["weights T"], ["int8 [K, N]"], perm=[1, 0]),
        helper.make_node("Cast", ["int8 [K, N]"], ["weights"], to=TensorProto.FLOAT),
    ]
    for name, output, bits in (("four", OUTPUTS[2], 4), ("eight", OUTPUTS[3], 8)):
        sizes = {"K": WIDTH, "N": COLUMNS, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        nodes.append(helper.make_node("MatMulNBits", ["x", name, "scales"], [output], domain="com.microsoft", **sizes))
    return _model(nodes, WIDTH, [numpy_helper.from_array(array, name) for name, array in constants.items()])


def float16() -> onnx.ModelProto:
    """A product of float16 ones, whose sum is no float16's to keep up with: above 2,048 they step by 2."""
    shape = numpy_helper.from_array(np.array([FLOAT16_WIDTH, COLUMNS]), "shape")
    one = numpy_helper.from_array(np.ones(1, np.float16), "one")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=one),
        helper.make_node("Cast", ["ones"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["ones"], ["ones T"], perm=[1, 0]),
        helper.make_node("Cast", ["x"], ["half x"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["half x", "ones"], ["product"]),
        helper.make_node("Gemm", ["half x", "ones T"], ["head"], transB=1),
        helper.make_node("Cast", ["product"], [OUTPUTS[4]], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["head"], [OUTPUTS[5]], to=TensorProto.FLOAT),
    ]
    return _model(nodes, FLOAT16_WIDTH, [shape])


def square(operator: str, operand: int, result: int) -> onnx.ModelProto:
    """A product to be timed."""
    inputs = [
        helper.make_tensor_value_info(name, operand, shape) for name, shape in (("a", ["M", "K"]), ("b", ["K", "N"]))
    ]
    output = helper.make_tensor_value_info("y", result, ["M", "N"])
    graph = helper.make_graph([helper.make_node(operator, ["a", "b"], ["y"])], "square", inputs, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


PROBES: dict[str, Callable[[], onnx.ModelProto]] = {
    "eight_bit": partial(eight_bit, signed=False),
    "signed": partial(eight_bit, signed=True),
    "blocks": blocks,
    "float16": float16,
    "integers": partial(square, "MatMulInteger", TensorProto.UINT8, TensorProto.INT32),
    "floats": partial(square, "MatMul", TensorProto.FLOAT, TensorProto.FLOAT),
}


def main() -> None:
    for name, make in PROBES.items():
        onnx.save_model(make(), FOLDER / f"{name}.onnx")


if __name__ == "__main__":
    main()
