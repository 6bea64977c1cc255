"""Which of ONNX Runtime's integer products is fast at what? Why int8 and int4 on `cpu` are what they are.

    python -m benchmarks.cpu_products

Gemma-2B's gate or up, 2048 x 16384, both in one, and its down projection, at one row (a decode step) and at 272 (a
prefill). All products take turns, so that a machine that changes its speed changes it for all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.machine import describe_machine
from paliedge_export.weights.integers import INT8_ZERO, without_sign

SHAPES = ((2048, 16384), (2048, 32768), (16384, 2048))
ROWS = (1, 272)
GROUP = 128
_DOMAIN = "com.microsoft"


def _model(kind: str, width: int, out: int, weights: dict[str, Any], **attributes: int) -> onnx.ModelProto:
    domain = _DOMAIN if kind != "MatMul" else ""
    node = helper.make_node(kind, ["x", *weights], ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        kind,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", out])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(_DOMAIN, 1)], ir_version=10
    )


def make_products(width: int, out: int) -> dict[str, onnx.ModelProto]:
    """One product of each kind with random weights [width, out]."""
    rng = np.random.default_rng(0)

    def blocks(bits: int, level: int) -> onnx.ModelProto:
        codes = rng.integers(0, 256, (out, width // GROUP, GROUP * bits // 8), np.uint8)
        weights = {"weight": codes, "scale": np.full((out, width // GROUP), 1e-3, np.float32)}
        shape = {"K": width, "N": out, "bits": bits, "block_size": GROUP}
        return _model("MatMulNBits", width, out, weights, **shape, accuracy_level=level)

    codes = rng.integers(-127, 128, (width, out), np.int8)
    scale = np.full(out, 1e-3, np.float32)
    dynamic = {"weight": without_sign(codes), "scale": scale, "zero": np.asarray(INT8_ZERO, np.uint8)}
    return {
        "float32 MatMul": _model("MatMul", width, out, {"weight": codes.astype(np.float32)}),
        "int8 DynamicQuantizeMatMul": _model("DynamicQuantizeMatMul", width, out, dynamic),
        "int8 MatMulNBits, accuracy_level 4": blocks(8, 4),
        "int4 MatMulNBits, accuracy_level 4": blocks(4, 4),
        "int4 MatMulNBits, accuracy_level 1": blocks(4, 1),
    }


def _runner(model: onnx.ModelProto, rows: int, width: int, num_threads: int) -> Callable[[], float]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or it takes the next one's cores
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((rows, width)).astype(np.float32)

    def run() -> float:
        session.run(None, {"x": x})
        started = time.perf_counter()
        session.run(None, {"x": x})
        return time.perf_counter() - started

    return run


def measure(width: int, out: int, num_threads: int, num_rounds: int) -> list[dict[str, Any]]:
    """Median milliseconds of each product, and its rate: operations a second, and bytes of weights."""
    found = []
    for rows in ROWS:
        products = make_products(width, out)
        runners = {name: _runner(model, rows, width, num_threads) for name, model in products.items()}
        times: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(num_rounds):
            for name, run in runners.items():
                times[name].append(run())
        for name, model in products.items():
            seconds = statistics.median(times[name])
            size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
            found.append(
                {
                    "product": name,
                    "shape": [width, out],
                    "rows": rows,
                    "ms": round(1000 * seconds, 3),
                    "giga_operations": round(2e-9 * rows * width * out / seconds, 1),
                    "weight_gigabytes": round(1e-9 * size / seconds, 2),
                }
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/cpu_products.json"))
    arguments = parser.parse_args()
    num_threads = len(os.sched_getaffinity(0))
    found = [one for shape in SHAPES for one in measure(*shape, num_threads, arguments.rounds)]
    content = {"machine": describe_machine(), "num_threads": num_threads, "products": found}
    arguments.results.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
