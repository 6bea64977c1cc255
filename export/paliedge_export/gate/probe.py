"""Run a bundle's graphs with a view inside: what leaves each layer, and what goes into each linear layer.

Outputs are added to a copy of the graph; nothing of its computation changes. Weights stay in their
files, mapped, so that the whole model is never held in memory.
"""

# Tests: tests/export/weights/test_activations.py.
from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from paliedge.backends.session import FloatArray, present_name
from paliedge.bundle.manifest import Graph, Target
from paliedge_export.graphs.builder import layer_output
from paliedge_export.graphs.decoder import LAST_HIDDEN

Array = npt.NDArray[Any]
Outputs = dict[str, Array]
_LARGE_BYTES = 500_000_000
"""Of weights: a model above is not held in floats where its graphs have integers."""
ABSMAX, MEAN_SQUARE, ROWS = ".absmax", ".mean_square", ".rows"


class ProbedGraphs:
    """One target's graphs with more outputs. Not for more than one answer at a time.

    Args:
        folder: where the graphs and their weights lie.
        target: whose.
        capacity: rows of a cache.
        statistics: give the largest value and the mean square of each channel that enters a linear layer,
            too; for float graphs.
        prepack: see `paliedge.backends.ort.load_graph`.
    """

    def __init__(self, folder: Path, target: Target, capacity: int, *, statistics: bool, prepack: bool) -> None:
        self._in_place = target.cache_update == "in_place"
        self._capacity = capacity
        self._cache_inputs = [tensor for tensor in target.decoder.inputs if "past_key_values" in tensor.name]
        from paliedge.backends.ort import load_graph  # an export that compares nothing does without ONNX Runtime

        num_threads = len(os.sched_getaffinity(0))
        fold = sum((folder / name).stat().st_size for name in target.weights) < _LARGE_BYTES

        def load(graph: Graph) -> Any:
            model = onnx.load(folder / graph.file, load_external_data=False)
            _add_outputs(model, statistics=statistics)
            path = folder / f"probed.{graph.file}"
            onnx.save_model(model, path)
            try:
                return load_graph(path, num_threads, prepack=prepack, fold=fold)
            finally:
                path.unlink()

        self._vision, self._decoder = load(target.vision_encoder), load(target.decoder)
        self._prefill = load(target.prefill) if target.prefill else None
        self._names = [output.name for output in self._decoder.get_outputs()]
        self._past: Outputs = {}
        self._length = 0

    def encode(self, pixel_values: FloatArray) -> Outputs:
        """[1, 3, S, S] to `image_features` and what was asked for."""
        names = [output.name for output in self._vision.get_outputs()]
        return dict(zip(names, self._vision.run(names, {"pixel_values": pixel_values}), strict=True))

    def prefill(self, inputs_embeds: FloatArray, allowed: tuple[int, int]) -> Outputs:
        """Start over with a prefix [S, H]."""
        self._past = self._empty_cache(self._capacity if self._in_place else 0)
        self._length = 0
        self._prefix = len(inputs_embeds)
        if not self._prefill:
            return self._run(inputs_embeds, allowed)
        positions = np.arange(1, self._prefix + 1)[None]
        names = [output.name for output in self._prefill.get_outputs()]
        found = self._prefill.run(names, {"inputs_embeds": inputs_embeds[None], "position_ids": positions})
        outputs = dict(zip(names, found, strict=True))
        self._length = self._prefix - 1
        for tensor in self._cache_inputs:
            self._past[tensor.name] = outputs.pop(present_name(tensor.name))[:, :, : self._length]
        return {f"prefill.{name}": array for name, array in outputs.items()} | self._run(inputs_embeds[-1:], allowed)

    def decode(self, inputs_embeds: FloatArray, allowed: tuple[int, int]) -> Outputs:
        """Append one token [H]."""
        return self._run(inputs_embeds[None], allowed)

    def _run(self, inputs_embeds: FloatArray, allowed: tuple[int, int]) -> Outputs:
        length = len(inputs_embeds)
        inputs = self._past | {
            "inputs_embeds": inputs_embeds[None],
            "position_ids": np.arange(self._length + 1, self._length + length + 1)[None],
            "prefix_length": np.array([self._prefix]),
            "allowed_ids": np.array([allowed]),
        }
        outputs = dict(zip(self._names, self._decoder.run(self._names, inputs), strict=True))
        for tensor in self._cache_inputs:
            new = outputs.pop(present_name(tensor.name))
            old = self._past[tensor.name]
            self._past[tensor.name] = new if self._in_place else np.concatenate([old, new], axis=2)
        self._length += length
        return outputs

    def _empty_cache(self, capacity: int) -> Outputs:
        shapes: dict[str, list[Any]] = {tensor.name: [1, *tensor.shape[1:]] for tensor in self._cache_inputs}
        return {
            tensor.name: np.zeros([*shapes[tensor.name][:2], capacity, shapes[tensor.name][3]], tensor.dtype)
            for tensor in self._cache_inputs
        }


def layer_names(outputs: Iterable[str]) -> list[str]:
    """Those of `outputs` that leave a layer, without their ending."""
    ending = layer_output("")
    return [name.removesuffix(ending) for name in outputs if name.endswith(ending)]


def _add_outputs(model: onnx.ModelProto, *, statistics: bool) -> None:
    names = [name for node in model.graph.node for name in node.output]
    wanted = [name for name in names if name.endswith(layer_output("")) or name == LAST_HIDDEN]
    if statistics:
        wanted += _add_statistics(model)
    for name in wanted:
        kind = TensorProto.INT64 if name.endswith(ROWS) else TensorProto.FLOAT
        model.graph.output.append(helper.make_tensor_value_info(name, kind, None))


def _add_statistics(model: onnx.ModelProto) -> list[str]:
    """Of each product's first operand, where the second is a stored weight; names of the new tensors."""
    stored = {tensor.name for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL}
    axes = onnx.numpy_helper.from_array(np.array([0, 1]), "axes of tokens")
    nodes, names = [], []
    seen: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored and node.input[0] not in seen:
            x, linear = node.input[0], node.input[1].removesuffix(".weight")
            seen.add(x)  # of layers that read the same, the first one's name stands for all
            made = [linear + ending for ending in (".abs", ABSMAX, ".square", MEAN_SQUARE, ROWS)]
            nodes += [
                helper.make_node("Abs", [x], made[:1]),
                helper.make_node("ReduceMax", [made[0], axes.name], made[1:2], keepdims=0),
                helper.make_node("Mul", [x, x], made[2:3]),
                helper.make_node("ReduceMean", [made[2], axes.name], made[3:4], keepdims=0),
                helper.make_node("Shape", [x], made[4:], end=2),
            ]
            names += [made[1], made[3], made[4]]
    model.graph.initializer.append(axes)
    model.graph.node.extend(nodes)
    return names
