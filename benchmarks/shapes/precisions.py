"""What does each precision cost in quality? The shapes model on held-out scenes, for every precision and lowering.

    python -m benchmarks.shapes.precisions --scenes 500

Each is exported from the checkpoint and passes the export's own gate first, in a process of its own, as many
at once as there are cores. Graphs that are meant for
TensorRT run through ONNX Runtime, which computes what they say but not as fast.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.machine import describe_machine
from benchmarks.shapes.evaluate import evaluate
from paliedge import PaliGemma
from paliedge.backends import BackendOptions
from paliedge_export.exporter import Quantization, export_bundle
from paliedge_export.lowering import TARGETS

CHECKPOINT = Path("benchmarks/shapes/checkpoint")
LIMITS = {"fp16": 0.01, "int8": 0.01, "int4": 0.02}
"""How much AP50 a precision may cost against fp32; captions may cost 0.02."""
INT4_BUDGET = 0.5
"""How much the weights may grow by layers that int4 keeps in 16 bits: the gate refuses the shapes model with none, and
its captions want more than the gate does."""
LOWERINGS = ("cpu", "jetpack6", "jetpack7")
"""`rtx` has jetpack7's graphs."""


def measure(target: str, precision: str, num_scenes: int, work: Path) -> dict[str, Any]:
    """Scores of one export, its gate's summary and its size."""
    folder = work / f"{target}-{precision}"
    chosen = next(name for name in TARGETS[target].precisions if name == precision)
    quantization = Quantization(sensitivity=INT4_BUDGET if precision == "int4" else None)
    manifest = export_bundle(str(CHECKPOINT), folder, targets=[target], precision=chosen, quantization=quantization)
    with PaliGemma.load(folder, BackendOptions(num_threads=1)) as model:
        scores = evaluate(model, num_scenes)
    print(target, precision, json.dumps(scores), flush=True)
    return {
        "target": target,
        "precision": precision,
        "bundle_bytes": sum(file.size for file in manifest.files.values()),
        "gate": msgspec.to_builtins(manifest.comparisons[target]),
        "scores": scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/shapes_precisions.json"))
    arguments = parser.parse_args()
    wanted = [
        (target, precision)
        for target in LOWERINGS
        for precision in ("fp32", *LIMITS)
        if precision in TARGETS[target].precisions
    ]
    cores = len(os.sched_getaffinity(0))
    fresh = multiprocessing.get_context("spawn")  # ONNX Runtime's threads do not outlive a fork
    with tempfile.TemporaryDirectory() as work, fresh.Pool(cores, maxtasksperchild=1) as pool:
        jobs = [(*one, arguments.scenes, Path(work)) for one in wanted]
        exports = pool.starmap(measure, jobs, chunksize=1)
    content = {"machine": describe_machine(), "exports": exports}
    arguments.results.write_text(json.dumps(content, indent=2) + "\n")
    if faults := find_losses(exports):
        raise SystemExit("; ".join(faults))


def find_losses(exports: list[dict[str, Any]]) -> list[str]:
    """Where a precision costs more than it may."""
    exact = next(one["scores"] for one in exports if one["precision"] == "fp32")
    faults = []
    for one in exports:
        allowed = {"detect_ap50": LIMITS.get(one["precision"], 0.0), "caption_exact_match": 0.02}
        for name, limit in allowed.items():
            lost = exact[name] - one["scores"][name]
            if lost > limit:
                faults.append(f"{one['target']} {one['precision']}: {name} lost {lost:.4f}, more than {limit}")
    return faults


if __name__ == "__main__":
    main()
