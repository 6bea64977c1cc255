"""Integer weights stay near the floats they stand for, and their bytes are what ONNX and ONNX Runtime read.

What a layout means is ONNX Runtime's to say: it dequantises and multiplies what was packed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from paliedge_export.weights.integers import (
    Quantized,
    dequantize,
    find_group,
    pack_blocks,
    pack_int4,
    quantize_int4,
    quantize_int8,
)

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
SMALLEST_STEP = 2.0**-20
"""Of a channel that is nothing but zeros, or all but."""
FEW = settings(max_examples=25, deadline=None)
SIZES = st.floats(1e-9, 1e3)


def make_weight(seed: int, rows: int, columns: int, sizes: list[float]) -> Floats:
    """[rows, columns], columns in turn of `sizes`, normal with a heavy tail."""
    rng = np.random.default_rng(seed)
    weight: Floats = (rng.standard_t(4, (rows, columns)) * np.resize(sizes, columns)).astype(np.float32)
    return weight


def group_errors(weight: Floats, rebuilt: Array, importance: Floats, group: int) -> Array:
    """Squared errors, weighed, of each group and column: [K / group, N]."""
    errors = (rebuilt.astype(np.float64) - weight) ** 2 * importance[:, None]
    return np.asarray(errors.reshape(-1, group, weight.shape[1]).sum(1))


def run(
    nodes: list[onnx.NodeProto], stored: list[TensorProto], dtype: int, shape: tuple[int, ...], feed: dict[str, Array]
) -> Array:
    """The output `y` of a graph of `nodes` in ONNX Runtime."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in feed.items()]
    outputs = [helper.make_tensor_value_info("y", dtype, shape)]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializer=stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0])


@FEW
@given(st.integers(0, 99), st.lists(SIZES, min_size=1, max_size=5), st.sampled_from([np.float32, np.float16]))
@example(0, [1e-9, 1e-4, 1e-3, 5e-3, 1e3], np.float16)
@pytest.mark.parametrize("axis", [0, 1])
def test_int8_weights_are_within_half_a_step_and_the_largest_is_not_clipped(
    axis: int, seed: int, sizes: list[float], scale_dtype: type[np.floating[Any]]
) -> None:
    channels = np.ascontiguousarray(make_weight(seed, 12, 6, sizes).T)
    channels[5] = 0
    weight = channels if axis == 0 else channels.T
    quantized = quantize_int8(weight, axis, scale_dtype)
    assert quantized.codes.dtype == np.int8
    assert quantized.codes.shape == weight.shape
    assert quantized.scales.dtype == scale_dtype
    assert quantized.scales.shape == (len(channels),)

    steps = quantized.scales.astype(np.float64)
    codes = (quantized.codes.T if axis == 1 else quantized.codes).astype(np.float64)
    largest = np.abs(channels).max(1)
    assert (np.abs(codes * steps[:, None] - channels) <= steps[:, None] * 0.500001).all()
    assert (steps * 127 * 1.000001 >= largest).all()
    finest = np.spacing(quantized.scales).astype(np.float64)  # no larger than the next number of its type
    assert (steps <= np.maximum(largest / 127, SMALLEST_STEP) * 1.000001 + finest).all()
    assert np.abs(codes).max() <= 127  # TensorRT's integers have no use for -128
    rebuilt = dequantize(quantized, axis)
    np.testing.assert_allclose(rebuilt.T if axis == 1 else rebuilt, codes * steps[:, None], rtol=1e-6)


@pytest.mark.parametrize(("size", "group"), [(2048, 128), (4304, 16), (320, 64), (48, 16), (1152, 128), (24, 0)])
def test_a_group_is_128_or_the_largest_smaller_power_of_two_that_divides(size: int, group: int) -> None:
    assert find_group(size) == group


@FEW
@given(st.integers(0, 99), st.lists(SIZES, min_size=1, max_size=4), st.sampled_from([16, 48, 64, 256]))
@example(0, [1e-9, 1e-5, 0.0, 1e-4], 64)
def test_int4_weights_are_within_half_a_step_unless_clipped_and_no_worse_than_plainly_rounded(
    seed: int, sizes: list[float], rows: int
) -> None:
    weight = make_weight(seed, rows, 4, sizes)
    weight[:, 2] = 0
    importance = np.random.default_rng(seed + 1).lognormal(0, 2, rows).astype(np.float32)
    group = find_group(rows)
    codes, scales = quantize_int4(weight, importance)
    assert codes.dtype == np.int8
    assert codes.shape == weight.shape
    assert scales.dtype == np.float16
    assert scales.shape == (rows // group, 4)
    assert codes.min() >= -8
    assert codes.max() <= 7
    assert (scales > 0).all()

    steps = np.repeat(scales.astype(np.float64), group, axis=0)
    errors = np.abs(codes * steps - weight) / steps
    clipped = ((codes == 7) & (weight > 7 * steps)) | ((codes == -8) & (weight < -8 * steps))
    assert errors[~clipped].max() <= 0.500001
    largest = np.abs(weight).reshape(-1, group, 4).max(1)
    assert (scales.astype(np.float64) * 7 >= largest * 0.7 * 0.999999).all()
    np.testing.assert_array_equal(dequantize(Quantized(codes, scales)), codes * steps)

    exact = np.maximum(largest / np.float32(7), np.float32(SMALLEST_STEP))
    plain = exact.astype(np.float16)
    plain = np.where(plain < exact, np.nextafter(plain, np.float16(np.inf)), plain)
    plain_steps = np.repeat(plain.astype(np.float64), group, axis=0)
    rounded = np.rint(weight / plain_steps).clip(-7, 7) * plain_steps
    found, wanted = (group_errors(weight, rebuilt, importance, group) for rebuilt in (codes * steps, rounded))
    assert (found <= wanted * 1.0001).all()


def test_int4_ranges_are_searched_where_importance_pays() -> None:
    """On weights with tails a good part of the plain error goes; what is the most important loses the least."""
    weight = make_weight(3, 256, 40, [0.05])
    flat = np.ones(256, np.float32)
    steps = np.repeat(np.abs(weight).reshape(2, 128, 40).max(1) / 7, 128, axis=0)
    plain = group_errors(weight, np.rint(weight / steps) * steps, flat, 128).sum()
    assert group_errors(weight, dequantize(quantize_int4(weight, flat)), flat, 128).sum() < 0.9 * plain
    for row in (0, 77, 200):
        important = flat.copy()
        important[row] = 1e5
        before, after = (
            ((dequantize(quantize_int4(weight, one)) - weight)[row] ** 2).sum() for one in (flat, important)
        )
        assert after < 0.8 * before, row


def test_columns_of_a_wide_matrix_are_quantised_as_if_alone() -> None:
    """Columns are taken in portions: those of the last one have no others' scales."""
    weight = make_weight(5, 16, 4100, [0.02, 1.0, 30.0])
    importance = np.linspace(0.1, 4, 16, dtype=np.float32)
    codes, scales = quantize_int4(weight, importance)
    for column in (0, 4095, 4096, 4099):
        alone = quantize_int4(weight[:, column : column + 1], importance)
        np.testing.assert_array_equal(codes[:, column], alone.codes[:, 0])
        np.testing.assert_array_equal(scales[:, column], alone.scales[:, 0])


@pytest.mark.parametrize("rows", [48, 256])
def test_packed_int4_is_what_onnx_dequantises(rows: int) -> None:
    quantized = quantize_int4(make_weight(0, rows, 6, [1.0, 0.01]), np.ones(rows, np.float32))
    codes, scales = quantized
    codes[:2, 0] = (-8, 7)
    group = find_group(rows)
    stored = [
        helper.make_tensor("weight", TensorProto.INT4, codes.shape, pack_int4(codes).tobytes(), raw=True),
        onnx.numpy_helper.from_array(scales, "scale"),
    ]
    node = helper.make_node("DequantizeLinear", ["weight", "scale"], ["y"], axis=0, block_size=group)
    found = run([node], stored, TensorProto.FLOAT16, codes.shape, {})
    np.testing.assert_array_equal(found, dequantize(quantized).astype(np.float16))


@pytest.mark.parametrize(("rows", "group"), [(48, 16), (256, 128)])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_blocks_are_what_matmulnbits_multiplies(bits: int, rows: int, group: int) -> None:
    """Times the identity, so that the product is the weight; group by group its scales differ."""
    rng = np.random.default_rng(bits)
    limit = 1 << (bits - 1)
    codes = rng.integers(-limit, limit, (rows, 6)).astype(np.int8)
    codes[:2, 0] = (-limit, limit - 1)
    scales = rng.uniform(0.01, 2, (rows // group, 6)).astype(np.float32)
    packed = pack_blocks(np.ascontiguousarray(codes.T), group, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (6, rows // group, group * bits // 8)
    stored = [
        onnx.numpy_helper.from_array(packed, "weight"),
        onnx.numpy_helper.from_array(np.ascontiguousarray(scales.T), "scale"),
    ]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "weight", "scale"],
        ["y"],
        domain="com.microsoft",
        K=rows,
        N=6,
        bits=bits,
        block_size=group,
        accuracy_level=0,
    )
    found = run([node], stored, TensorProto.FLOAT, codes.shape, {"x": np.eye(rows, dtype=np.float32)})
    np.testing.assert_allclose(found, dequantize(Quantized(codes, scales)), rtol=1e-6)
