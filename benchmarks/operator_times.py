"""Where does the time of an answer go? Seconds of each kind of operator, by stage, as ONNX Runtime's profiler tells.

    python -m benchmarks.operator_times BUNDLE ...

For what misses a target: which operators would have to be faster. The profiler itself costs a little.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from unittest.mock import patch

import onnxruntime

from benchmarks.machine import describe_machine
from benchmarks.peers.harness import NUM_TOKENS
from benchmarks.peers.ours import Ours
from paliedge.bundle.bundle import Bundle

GROUPS = ("linear layers", "attention", "the rest")
_ANSWERS = 2
"""Measured, behind one that warms up."""
_ATTENTION = ("MultiHeadAttention", "Softmax")
_LINEAR = ("MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLinear", "Gemm", "FusedGemm")
_PRODUCTS = ("MatMul", "FusedMatMul")


class GraphRun(NamedTuple):
    """One run of a graph: seconds in all, and by group and kind of operator; and how many operators ran."""

    seconds: float
    operators: Mapping[tuple[str, str], float]
    num_operators: int


@contextmanager
def profiled(folder: Path) -> Iterator[None]:
    """Every session that is made meanwhile leaves its profile in `folder`, numbered, when it is let go of."""
    plain, numbers = onnxruntime.SessionOptions, count()

    def options() -> onnxruntime.SessionOptions:
        made = plain()
        made.enable_profiling = True
        made.profile_file_prefix = str(folder / f"{next(numbers)}")
        return made

    with patch("onnxruntime.SessionOptions", options):
        yield


def measure(bundle: Path, num_threads: int) -> dict[str, Any]:
    """Of one bundle: for each stage the seconds of one run, and the share of each kind of operator."""
    manifest = Bundle(bundle, check_hashes=False).manifest
    with tempfile.TemporaryDirectory() as folder:
        with profiled(Path(folder)):
            ours = Ours(bundle, num_threads)
            for _ in range(1 + _ANSWERS):
                ours.answer()
            del ours
        profiles = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    target = next(iter(manifest.targets.values()))
    return {
        "precision": target.precision,
        "image_size": manifest.model.vision.image_size,
        "layers": [manifest.model.vision.num_layers, manifest.model.text.num_layers],
        "fast_prefill": target.prefill is not None,
        "stages": {name: summarise(runs) for name, runs in by_stage([read_runs(one) for one in profiles]).items()},
    }


def read_runs(events: Sequence[Mapping[str, Any]]) -> list[GraphRun]:
    """The runs of a profile, in their order."""
    runs = sorted((one["ts"], one["dur"]) for one in events if one["name"] == "model_run")
    nodes = [one for one in events if one["cat"] == "Node" and one["name"].endswith("_kernel_time")]
    found = []
    for start, duration in runs:
        operators: dict[tuple[str, str], float] = defaultdict(float)
        own = [node for node in nodes if start <= node["ts"] < start + duration]
        for node in own:
            kind = node["args"]["op_name"]
            operators[group_of(kind, len(node["args"]["input_type_shape"])), kind] += node["dur"] / 1e6
        found.append(GraphRun(duration / 1e6, operators, len(own)))
    return found


def group_of(kind: str, num_activations: int) -> str:
    """One of `GROUPS`. A product of two activations is attention's; the profiler does not count weights as inputs."""
    if kind in _ATTENTION or (kind in _PRODUCTS and num_activations > 1):
        return GROUPS[1]
    return GROUPS[0] if kind in (*_LINEAR, *_PRODUCTS) else GROUPS[2]


def by_stage(graphs: Sequence[Sequence[GraphRun]]) -> dict[str, list[GraphRun]]:
    """Of decoder, prefill, if there is one, and vision encoder, the order of loading, without the first answer.

    Behind a prefill of its own the decoder's first run of an answer, on the last token of the prompt, belongs to it.
    """
    decoder, *own_prefill, vision = graphs
    whole = [decoder[start : start + NUM_TOKENS] for start in range(NUM_TOKENS, len(decoder), NUM_TOKENS)]
    prefills = [answer[0] for answer in whole]
    if own_prefill:
        prefills = [add(*both) for both in zip(own_prefill[0][1:], prefills, strict=True)]
    return {"vision": list(vision[1:]), "prefill": prefills, "token": [run for one in whole for run in one[1:]]}


def add(first: GraphRun, second: GraphRun) -> GraphRun:
    """Both, one behind the other."""
    operators = {
        key: first.operators.get(key, 0.0) + second.operators.get(key, 0.0)
        for key in {*first.operators, *second.operators}
    }
    return GraphRun(first.seconds + second.seconds, operators, first.num_operators + second.num_operators)


def summarise(runs: Sequence[GraphRun]) -> dict[str, Any]:
    """Means over runs; shares of the time in operators, those below a hundredth left out."""
    kinds = {key for run in runs for key in run.operators}
    seconds = {key: fmean(run.operators.get(key, 0.0) for run in runs) for key in kinds}
    total = sum(seconds.values())
    ranked = sorted(seconds.items(), key=lambda item: -item[1])
    return {
        "seconds": round(fmean(run.seconds for run in runs), 6),
        "num_operators": runs[0].num_operators,
        "groups": {
            group: round(sum(value for key, value in seconds.items() if key[0] == group) / total, 3) for group in GROUPS
        },
        "operators": {
            f"{kind}, {group}": round(value / total, 3) for (group, kind), value in ranked if value > total / 100
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/operator_times.json"))
    arguments = parser.parse_args()
    found = [measure(bundle, arguments.threads) for bundle in arguments.bundles]
    content = {"machine": describe_machine(), "num_threads": arguments.threads, "bundles": found}
    arguments.results.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
