"""Layer lists are read from what TensorRT for RTX logs and from what TensorRT's inspector says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paliedge.backends.trt.flavours import TensorRt
from paliedge.backends.trt.layers import layers_from_inspector, layers_from_log, list_layers
from paliedge.bundle.layer_list import LayerTensor, read_layer_list, write_layer_list
from paliedge.errors import BundleError

LINEAR = "Format: (Linear) Row major linear format"
LOG = [
    "Layer: {ForeignNode[Slice_0...log_prob]} Host Persistent: 80 bytes Device Persistent: 0 bytes",
    "Total Activation Memory: 4096 bytes",
    "Total Activation Memory: 8192 bytes",
    "Total Weights Memory: 1048576 bytes",
    f"""Engine Layer Information:
Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [], ParameterType: ShapeH2D
Name: MatMul_7_myl1_2, LayerType: gemm, Inputs: [ {{ Name: x_myl1, Dimensions: [-1,128], Strides: [128,1], \
StrideOrder: [1,0], Datatype: Int8, {LINEAR} }}], Constants: [ {{ Name: w, Dimensions: [128,192], Strides: [192,1], \
StrideOrder: [1,0], Datatype: Int4, {LINEAR} }}], Outputs: [ {{ Name: y, Dimensions: [-1,192], Strides: [192,1], \
StrideOrder: [1,0], Datatype: Float, {LINEAR} }}], TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: MatMul_7]\
[ONNX Layer: DequantizeLinear_5]""",
    f"Name: __myl_Move_myl3_3, LayerType: kgen, Inputs: [ {{ Name: past_key_values.0.key [profile 1], Dimensions: "
    f"[-1,1,448,32], Strides: [14336,14336,32,1], StrideOrder: [3,2,1,0], Datatype: Half, {LINEAR} }}], Constants: [], "
    "Outputs: [], TacticName: , StreamId: 0, Metadata: ",
]


def test_a_log_tells_kernels_weights_and_scratch() -> None:
    found = layers_from_log(LOG)
    assert (found.weight_bytes, found.scratch_bytes) == (1048576, (4096, 8192))
    (product,), (move,) = found.of(0), found.of(1)
    assert (product.kind, product.nodes) == ("gemm", ("MatMul_7", "DequantizeLinear_5"))
    assert product.inputs == (LayerTensor("x_myl1", "Int8", (-1, 128)),)
    assert product.constants == (LayerTensor("w", "Int4", (128, 192)),)
    assert product.outputs == (LayerTensor("y", "Float", (-1, 192)),)
    assert move.inputs == (LayerTensor("past_key_values.0.key", "Half", (-1, 1, 448, 32)),)


@pytest.mark.parametrize(
    ("described", "dtype"),
    [
        ({"Format/Datatype": "Half"}, "Half"),
        ({"Format/Datatype": "Row major linear FP16 format"}, "Half"),
        ({"Format/Datatype": "Row major Int8 format"}, "Int8"),
        ({"Datatype": "BFloat16", "Format": "Row major linear format"}, "BFloat16"),
    ],
)
def test_an_inspector_tells_the_same(described: dict[str, str], dtype: str) -> None:
    def layer(name: str, **more: Any) -> dict[str, Any]:
        tensor = {"Name": "x", "Location": "Device", "Dimensions": [1, -1, 64]} | described
        return {"Name": name, "LayerType": "gemm", "Inputs": [tensor], "Outputs": []} | more

    layers = [layer("MatMul_7", Metadata="[ONNX Layer: MatMul_7]"), layer("MatMul_7 [profile 1]"), layer("wait")]
    layers[-1]["LayerType"] = "wait"
    found = layers_from_inspector(json.dumps({"Layers": layers, "Bindings": ["x"]}), (10, 20))
    assert found.scratch_bytes == (10, 20)
    assert [one.profile for one in found.layers] == [0, 1]
    assert found.layers[0].inputs == (LayerTensor("x", dtype, (1, -1, 64)),)
    assert found.layers[0].nodes == ("MatMul_7",)


@pytest.mark.parametrize("log", [[], LOG[:4], [LOG[4].replace("Int4", "Int3")]], ids=["none", "no-layers", "odd-type"])
def test_what_is_told_in_another_way_is_no_list_and_no_error(log: list[str]) -> None:
    """On a board that nobody has seen a build of an hour must not be lost for it."""
    trt = TensorRt("rtx", None, "1.7.1")  # the log has it all
    assert list_layers(trt, b"", LOG) is not None
    assert list_layers(trt, b"", log) is None


def test_a_list_comes_back_from_its_file(tmp_path: Path) -> None:
    found = layers_from_log(LOG)
    write_layer_list(tmp_path / "decoder.layers", found)
    assert read_layer_list(tmp_path / "decoder.layers") == found
    (tmp_path / "decoder.layers").write_text("{}")
    with pytest.raises(BundleError, match=r"decoder\.layers"):
        read_layer_list(tmp_path / "decoder.layers")
