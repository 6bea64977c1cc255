"""Every node of a TensorRT-bound graph is one that the oldest TensorRT of its target accepts.

`tensorrt_operators.json` holds the operators and their types of onnx-tensorrt's own lists: TensorRT
10.3 (JetPack 6), and what 10.15 (JetPack 7 has 10.16) has besides or otherwise. The lists' restrictions
on attributes and inputs are the functions below; a graph whose operator has one there must pass it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from paliedge.bundle.bundle import Bundle
from paliedge_export.exporter import export_bundle
from tests.export.conftest import Tiny

LISTS = json.loads((Path(__file__).parent / "tensorrt_operators.json").read_text())
OPERATORS = {
    "jetpack6": LISTS["10.3"]["operators"],
    "jetpack7": LISTS["10.3"]["operators"] | LISTS["10.15"]["operators"],
}
OPSETS = {"jetpack6": LISTS["10.3"]["opset"], "jetpack7": LISTS["10.15"]["opset"]}
TYPE_NAMES = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT64: "INT64",
    TensorProto.INT32: "INT32",
    TensorProto.BOOL: "BOOL",
    TensorProto.INT8: "INT8",
    TensorProto.INT4: "INT4",
}


class Walk:
    """A graph with the type and rank of every tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False).graph
        self.nodes = list(inferred.node)
        self.constants = {tensor.name for tensor in inferred.initializer}
        self.types = {tensor.name: TYPE_NAMES[tensor.data_type] for tensor in inferred.initializer}
        self.values = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in inferred.initializer
            if not tensor.dims and tensor.data_location != TensorProto.EXTERNAL
        }
        self.ranks = {tensor.name: len(tensor.dims) for tensor in inferred.initializer}
        for info in (*inferred.input, *inferred.value_info, *inferred.output):
            self.types[info.name] = TYPE_NAMES[info.type.tensor_type.elem_type]
            self.ranks[info.name] = len(info.type.tensor_type.shape.dim)
        self.inputs = {info.name: info.type.tensor_type.shape.dim for info in inferred.input}

    def attributes(self, node: onnx.NodeProto) -> dict[str, object]:
        return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def needs_constant(place: int) -> Callable[[Walk, onnx.NodeProto], str]:
    """The list says: this input must be an initializer."""

    def check(walk: Walk, node: onnx.NodeProto) -> str:
        given = node.input[place] if len(node.input) > place else ""
        return "" if given in walk.constants else f"input {place} is no constant"

    return check


def check_layer_norm(walk: Walk, node: onnx.NodeProto) -> str:
    return "" if len(node.output) == 1 else "more than its first output"


def check_attention(walk: Walk, node: onnx.NodeProto) -> str:
    if any(walk.ranks[name] != 4 for name in node.input):
        return "an input that has not four dimensions"
    if len(node.input) > 4 or len(node.output) > 1:
        return "past, lengths or present"
    odd = set(walk.attributes(node)) - {"scale", "is_causal"}
    return f"attributes {odd}" if odd else ""


def check_tensor_scatter(walk: Walk, node: onnx.NodeProto) -> str:
    cache = walk.inputs.get(node.input[0])
    if cache is None or not cache[2].dim_value:
        return "a cache that is no input of fixed length"
    attributes = walk.attributes(node)
    return "" if attributes.get("axis", -2) == -2 and attributes.get("mode", b"linear") == b"linear" else "axis or mode"


def check_quantisation(walk: Walk, node: onnx.NodeProto) -> str:
    """Symmetric: no zero point, or a constant that is 0; scales that are constants."""
    if node.input[1] not in walk.constants:
        return "a scale that is no constant"
    if len(node.input) > 2 and node.input[2] and walk.values.get(node.input[2], 1) != 0:
        return "a zero point that is not 0"
    return ""


RESTRICTIONS: dict[str, Callable[[Walk, onnx.NodeProto], str]] = {
    "Attention": check_attention,
    "DequantizeLinear": check_quantisation,
    "QuantizeLinear": check_quantisation,
    "CumSum": needs_constant(1),
    "LayerNormalization": check_layer_norm,
    "ReduceLogSumExp": needs_constant(1),
    "ReduceMax": needs_constant(1),
    "ReduceMean": needs_constant(1),
    "ReduceSum": needs_constant(1),
    "Slice": needs_constant(3),
    "Squeeze": needs_constant(1),
    "TensorScatter": check_tensor_scatter,
    "Unsqueeze": needs_constant(1),
}
RESULTS = dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), ("BOOL",)) | {
    "ArgMax": ("INT64",),
    "DequantizeLinear": ("FP32", "FP16"),
    "QuantizeLinear": ("INT8",),
    "Shape": ("INT64",),
}
"""Operators whose result has another type than what they work on."""
OPERANDS = dict.fromkeys(
    ("Expand", "GatherElements", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "Slice", "Split", "Squeeze",
     "TensorScatter", "Unsqueeze"),
    ("INT64",),
) | {
    "DequantizeLinear": ("FP32", "FP16"), "Gather": ("INT64",), "QuantizeLinear": ("INT8",), "Where": ("BOOL",)
}  # fmt: skip
"""Operators with an operand, shape, index or condition, of another type than what they work on."""
WITH_RESTRICTION_BUT_NO_CHECK = {
    "AveragePool", "ConvTranspose", "DeformConv", "Dropout", "GridSample", "ImageScaler",
    "InstanceNormalization", "ScatterND", "TopK", "Resize", "NonMaxSuppression", "ScatterElements",
}  # fmt: skip
"""None of these is in a graph yet; a graph that brings one brings its check."""


def find_faults(path: Path, target: str) -> list[str]:
    model = onnx.load(path, load_external_data=False)
    (opset,) = [item.version for item in model.opset_import if item.domain == ""]
    walk = Walk(model)
    # TensorRT reads INT4 from 10.0 on, and ONNX has it in opset 21: a model with it is stamped no lower.
    highest = max(OPSETS[target][1], 21) if "INT4" in walk.types.values() else OPSETS[target][1]
    faults = [] if opset <= highest else [f"opset {opset}"]
    for node in walk.nodes:
        allowed = OPERATORS[target].get(node.op_type)
        if node.domain not in ("", "ai.onnx") or allowed is None:
            faults.append(f"{node.name}: {node.domain or 'onnx'}.{node.op_type} is not on the list")
            continue
        inputs = {walk.types.get(name, "unknown") for name in node.input if name}
        results = {walk.types.get(name, "unknown") for name in node.output}
        odd = inputs - {*allowed, *OPERANDS.get(node.op_type, ())}
        odd |= results - {*allowed, *RESULTS.get(node.op_type, ())}
        faults += [f"{node.name}: {node.op_type} of {odd}"] if odd else []
        fault = RESTRICTIONS[node.op_type](walk, node) if node.op_type in RESTRICTIONS else ""
        faults += [f"{node.name}: {fault}"] if fault else []
        assert node.op_type not in WITH_RESTRICTION_BUT_NO_CHECK, node.op_type
    return faults


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_every_node_is_on_the_targets_list(precision: str, tiny: Tiny, tmp_path: Path) -> None:
    export_bundle(
        str(tiny.checkpoint),
        tmp_path / "bundle",
        targets=["jetpack6", "jetpack7"],
        precision=precision,  # type: ignore[arg-type]
        quantization=tiny.calibrated(precision),
        compare=False,
    )
    bundle = Bundle(tmp_path / "bundle")
    for name, target in bundle.manifest.targets.items():
        for graph in filter(None, (target.vision_encoder, target.decoder, target.mask_decoder)):
            assert find_faults(bundle.path(graph.file), name) == []


def test_the_walk_refuses_what_tensorrt_does(tiny: Tiny, tmp_path: Path) -> None:
    export_bundle(str(tiny.checkpoint), tmp_path / "b", targets=["cpu", "jetpack7"], precision="fp16", compare=False)
    faults = find_faults(tmp_path / "b" / "vision_encoder.cpu.onnx", "jetpack6")
    assert any("com.microsoft.MultiHeadAttention" in fault for fault in faults)
    faults = find_faults(tmp_path / "b" / "decoder.opset24.onnx", "jetpack6")
    assert any("TensorScatter is not on the list" in fault for fault in faults)
    assert any("opset" in fault for fault in faults)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"q_num_heads": 4}, "q_num_heads"),
    ],
)
def test_the_walk_refuses_attentions_that_tensorrt_does_not_take(
    change: dict[str, float], words: str, paligemma: Tiny, tmp_path: Path
) -> None:
    export_bundle(str(paligemma.checkpoint), tmp_path / "b", targets=["jetpack7"], compare=False)
    path = tmp_path / "b" / "decoder.opset24.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in change.items())
    onnx.save(model, path)
    assert any(words in fault for fault in find_faults(path, "jetpack7"))


def test_gemma_2_never_uses_the_attention_operator(paligemma2: Tiny, tmp_path: Path) -> None:
    """TensorRT's has no softcap."""
    export_bundle(str(paligemma2.checkpoint), tmp_path / "b", targets=["jetpack7"], compare=False)
    model = onnx.load(tmp_path / "b" / "decoder.opset24.onnx", load_external_data=False)
    kinds = {node.op_type for node in model.graph.node}
    assert {"Tanh", "TensorScatter"} <= kinds
    assert "Attention" not in kinds
