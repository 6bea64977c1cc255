"""What does each precision cost in quality? The shapes model on held-out scenes, for every precision and lowering.

    python -m benchmarks.shapes.precisions --scenes 500

Each is exported from the checkpoint and passes the export's own gate first, in a process of its own, as many
at once as there are cores. Graphs that are meant for
TensorRT run through ONNX Runtime, which computes what they say but not as fast.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec

from benchmarks.machine import describe_machine
from benchmarks.shapes.evaluate import evaluate
from paliedge import PaliGemma
from paliedge.backends import BackendOptions
from paliedge.manifest import Precision
from paliedge_export.exporter import export_bundle
from paliedge_export.lowering import TARGETS
from paliedge_export.weights import quantized_bits

CHECKPOINT = Path("benchmarks/shapes/checkpoint")
LIMITS = {"fp16": 0.01, "int8": 0.01, "int4": 0.02}
"""How much AP50 a precision may cost against fp32; captions may cost 0.02."""
LOWERINGS = ("cpu", "jetpack6", "jetpack7")
"""`rtx` has jetpack7's graphs."""


def measure(target: str, precision: str, wide_vision: bool, num_scenes: int, work: Path) -> dict[str, Any]:
    """Scores of one export, its gate's summary and its size; `wide_vision` keeps the vision encoder in 16 bits."""
    folder = work / f"{target}-{precision}-{wide_vision}"
    chosen = next(name for name in TARGETS[target].precisions if name == precision)
    with patch("paliedge_export.weights.quantized_bits", _bits_in_the_decoder) if wide_vision else nullcontext():
        manifest = export_bundle(str(CHECKPOINT), folder, targets=[target], precision=chosen)
    with PaliGemma.load(folder, BackendOptions(num_threads=1)) as model:
        scores = evaluate(model, num_scenes)
    print(target, precision, json.dumps(scores), flush=True)
    return {
        "target": target,
        "precision": precision + (", vision encoder in fp16" if wide_vision else ""),
        "bundle_bytes": sum(file.size for file in manifest.files.values()),
        "gate": msgspec.to_builtins(manifest.comparisons[target]),
        "scores": scores,
    }


def _bits_in_the_decoder(precision: Precision, name: str, width: int) -> int:
    return quantized_bits(precision, name, width) if name.startswith("language_model") else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/shapes_precisions.json"))
    arguments = parser.parse_args()
    wanted = [
        (target, precision, False)
        for target in LOWERINGS
        for precision in ("fp32", *LIMITS)
        if precision in TARGETS[target].precisions
    ]
    wanted.append(("cpu", "int4", True))
    with tempfile.TemporaryDirectory() as work, ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [pool.submit(measure, *one, arguments.scenes, Path(work)) for one in wanted]
        exports = [job.result() for job in jobs]
    content = {"machine": describe_machine(), "exports": exports}
    arguments.results.write_text(json.dumps(content, indent=2) + "\n")
    if faults := find_losses(exports):
        raise SystemExit("; ".join(faults))


def find_losses(exports: list[dict[str, Any]]) -> list[str]:
    """Where a precision costs more than it may."""
    exact = next(one["scores"] for one in exports if one["precision"] == "fp32")
    faults = []
    for one in exports:
        allowed = {"detect_ap50": LIMITS.get(one["precision"].partition(",")[0], 0.0), "caption_exact_match": 0.02}
        for name, limit in allowed.items():
            lost = exact[name] - one["scores"][name]
            if lost > limit:
                faults.append(f"{one['target']} {one['precision']}: {name} lost {lost:.4f}, more than {limit}")
    return faults


if __name__ == "__main__":
    main()
