"""The child process of onnxruntime-genai: `python -m benchmarks.peers.genai FOLDER --fed FED.json`.

    python -m benchmarks.peers.genai GEMMA --build int4 FOLDER   # by its own model builder, which needs torch

The CPU provider; 8-bit activations (accuracy_level 4, the builder's own choice for CPUs); the head for the last
token alone, which is not its choice but ours and everyone's here; everything else as the builder does it.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.harness import TORCH
from benchmarks.peers.stepping import FloatArray, Stepper, run_stepper

REQUIREMENTS = (
    TORCH,
    "transformers==5.23.0",
    "onnxruntime-genai==0.18.0",
    "onnxruntime==1.31.1",
    "onnx==1.23.2",
    "onnx_ir==0.2.1",
    "safetensors==0.8.0",
    "ml_dtypes==0.6.0",
    "numpy==2.4.6",
)
FORMS = ("fp32", "int8", "int4")
_OPTIONS = ("accuracy_level=4", "prune_lm_head=true", "hf_token=false")
_CONTEXT = 512
_TYPES = {1: "float32", 10: "float16", 16: "bfloat16"}
"""ONNX's numbers."""


class GenAi:
    """A folder of the model builder, fed tokens."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        self._library: Any = importlib.import_module("onnxruntime_genai")
        config = self._library.Config(str(folder))
        options = {"intra_op_num_threads": num_threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = self._library.Model(config)
        self._generator: Any = None

    def reset(self) -> None:
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(max_length=_CONTEXT, do_sample=False)
        self._generator = self._library.Generator(self._model, parameters)

    def step(self, ids: Sequence[int]) -> FloatArray:
        self._generator.append_tokens(np.array([ids], np.int32))
        logits: FloatArray = self._generator.get_logits().reshape(-1)
        return logits


def build(gemma: Path, folder: Path, form: str) -> None:
    """Write `folder` by the model builder, in a process of its own for its memory's sake."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(gemma), "-o", str(folder)]
        options = ["-p", form, "-e", "cpu", "-c", cache, "--extra_options", *_OPTIONS]
        subprocess.run([*command, *options], check=True)


def describe(folder: Path) -> dict[str, Any]:
    """Bytes of the weights that a step reads, and the products and look-ups with their types.

    What is only looked up in is not read: an embedding table that is not the head, the rotations of positions.
    """
    onnx: Any = importlib.import_module("onnx")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    read = {name for node in graph.node if not _looks_up(node) for name in node.input}
    sizes = {tensor.name: _num_bytes(tensor) for tensor in graph.initializer if tensor.name in read}
    return {"bytes_per_token": sum(sizes.values()), "tensors": dict(Counter(_operators(graph)))}


def _looks_up(node: Any) -> bool:
    return node.op_type == "GroupQueryAttention" or bool(node.op_type.startswith("Gather"))


def _num_bytes(tensor: Any) -> int:
    length = [entry.value for entry in tensor.external_data if entry.key == "length"]
    return int(length[0]) if length else len(tensor.raw_data)


def _operators(graph: Any) -> Iterator[str]:
    """One line a node that has weights of its own: the operator and what its attributes say of their type."""
    kinds = {tensor.name: _TYPES.get(tensor.data_type, "other") for tensor in graph.initializer}
    for node in graph.node:
        bits = {entry.name: entry.i for entry in node.attribute if entry.name in ("bits", "block_size")}
        level = [f"accuracy_level {entry.i}" for entry in node.attribute if entry.name == "accuracy_level"]
        place = "head" if "lm_head" in node.name else "table" if "embed" in node.name else "layers"
        if bits and any(name in kinds for name in node.input):
            yield " ".join([place, node.op_type, f"{bits.get('bits', 4)} bits", f"block {bits['block_size']}", *level])
        elif node.op_type in ("MatMul", "Gather") and (stored := [name for name in node.input if name in kinds]):
            yield f"{place} {node.op_type} {kinds[stored[0]]}"


def load(folder: Path, num_threads: int) -> Stepper:
    return GenAi(folder, num_threads)


def main() -> None:
    if "--build" in sys.argv:
        gemma, _, form, folder = sys.argv[1:]
        build(Path(gemma), Path(folder), form)
    elif "--describe" in sys.argv:
        print(json.dumps(describe(Path(sys.argv[1]))))
    else:
        run_stepper(load, ("onnxruntime-genai", "onnxruntime", "transformers", "torch", "numpy"))


if __name__ == "__main__":
    main()
