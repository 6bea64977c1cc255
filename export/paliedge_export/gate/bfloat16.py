"""Run a bf16 graph where no kernel for it exists: the same graph on float32 with every rounding made explicit.

ONNX Runtime's CPU provider has no bfloat16 matrix product, but it casts. So each bfloat16 tensor becomes a
float32 one that has been through bfloat16: weights, what a graph casts, and the results of products. What
is left out is the order in which a GPU adds up, which float16 graphs have no check for either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import onnx
from onnx import TensorProto, helper

from paliedge.bundle.digests import describe_file
from paliedge.bundle.manifest import Graph, Manifest, Tensor, write_manifest

_ROUNDED = ("Attention", "MatMul", "Softmax")
"""Operators that compute; the others only move what is rounded already. The head's Gemm is float16."""


@contextmanager
def emulated(folder: Path, manifest: Manifest, target: str) -> Iterator[None]:
    """Meanwhile the bundle in `folder` has, for `target`, float32 graphs that round as its own would."""
    chosen = manifest.targets[target]
    vision_encoder, decoder = (_emulate_graph(folder, graph) for graph in (chosen.vision_encoder, chosen.decoder))
    replaced = msgspec.structs.replace(chosen, precision="fp32", vision_encoder=vision_encoder, decoder=decoder)
    files = {graph.file: describe_file(folder / graph.file) for graph in (vision_encoder, decoder)}
    changed = msgspec.structs.replace(
        manifest, targets=manifest.targets | {target: replaced}, files=manifest.files | files
    )
    write_manifest(folder, changed)
    try:
        yield
    finally:
        for name in files:
            (folder / name).unlink()
        write_manifest(folder, manifest)


def emulate(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph on float32, its bfloat16 roundings as pairs of casts."""
    graph = model.graph
    narrow = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    nodes = [_cast(name, f"{name}.float", TensorProto.FLOAT) for name in sorted(narrow)]
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [f"{name}.float" if name in narrow else name for name in node.input]
        to = {item.name: item.i for item in node.attribute}.get("to")
        rounds = (node.op_type == "Cast" and to == TensorProto.BFLOAT16) or node.op_type in _ROUNDED
        if not rounds:
            nodes.append(copy)
            continue
        (name,) = node.output
        if node.op_type == "Cast":
            copy.output[:] = [f"{name}.bfloat16"]
            nodes += [copy]
        else:
            copy.output[:] = [f"{name}.exact"]
            nodes += [copy, _cast(f"{name}.exact", f"{name}.bfloat16", TensorProto.BFLOAT16)]
        nodes.append(_cast(f"{name}.bfloat16", name, TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    return model


def _emulate_graph(folder: Path, graph: Graph) -> Graph:
    model = emulate(onnx.load(folder / graph.file, load_external_data=False))
    name = f"emulated.{graph.file}"
    onnx.save_model(model, folder / name)
    return msgspec.structs.replace(
        graph,
        file=name,
        inputs=tuple(_widen(tensor) for tensor in graph.inputs),
        outputs=tuple(_widen(tensor) for tensor in graph.outputs),
    )


def _widen(tensor: Tensor) -> Tensor:
    return msgspec.structs.replace(tensor, dtype="float32") if tensor.dtype == "bfloat16" else tensor


def _cast(source: str, result: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], name=f"cast_{result}", to=to)
