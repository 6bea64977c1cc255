"""What does each precision cost in quality? The shapes model on held-out scenes, for every precision and lowering.

    python -m benchmarks.shapes.precisions --scenes 500

Each is exported from the checkpoint and passes the export's own gate first, in a process of its own, as many
at once as there are cores. Graphs that are meant for TensorRT run through ONNX Runtime, which computes what they say
but not as fast. On one target int4 is measured with a budget of layers that stay in 16 bits, too, and behind fp16's
vision encoder: are its own 8 bits enough?
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any, cast

import msgspec

from benchmarks.machine import describe_machine
from benchmarks.shapes.evaluate import evaluate
from paliedge import PaliGemma
from paliedge.backends.select import BackendOptions
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import MANIFEST, Manifest
from paliedge_export.exporter import export_bundle
from paliedge_export.options import Quantization
from paliedge_export.targets import TARGETS
from paliedge_export.weights.files import QUANTIZED

CHECKPOINT = Path("benchmarks/shapes/checkpoint")
LIMITS = {"fp16": 0.01, "int8": 0.01, "int4": 0.02}
"""How much AP50 a precision may cost against fp32."""
CAPTION_LIMIT = 0.02
"""How many exact captions."""
INT4_BUDGET = 0.5
"""How much the weights may grow by layers that int4 keeps in 16 bits."""
LOWERINGS = ("cpu", "jetpack6", "jetpack7")
"""`rtx` has jetpack7's graphs."""


class BehindVision:
    """A model that sees through another's vision encoder."""

    def __init__(self, model: PaliGemma, encoder: PaliGemma) -> None:
        self._model = model
        self.encode = encoder.encode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def measure(target: str, precision: str, budget: float, vision: str, num_scenes: int, work: Path) -> dict[str, Any]:
    """Scores of one export behind the vision encoder of `vision`'s precision, its gate's summary and its size."""
    manifest, vision_manifest = _export(target, precision, budget, work), _export(target, vision, budget, work)
    with _load(work, target, precision) as model, _load(work, target, vision) as encoder:
        scores = evaluate(cast(PaliGemma, BehindVision(model, encoder)), num_scenes)
    print(target, precision, budget, vision, json.dumps(scores), flush=True)
    own, other = (_vision_bytes(one, target) for one in (manifest, vision_manifest))
    return {
        "target": target,
        "precision": precision,
        "sensitivity": budget,
        "vision": vision,
        "bundle_bytes": sum(file.size for file in manifest.files.values()) - own + other,
        "gate": msgspec.to_builtins(manifest.comparisons[target]),
        "scores": scores,
    }


def _export(target: str, precision: str, budget: float, work: Path) -> Manifest:
    folder = work / f"{target}-{precision}"
    if (folder / MANIFEST).exists():
        return Bundle(folder).manifest
    chosen = next(name for name in TARGETS[target].precisions if name == precision)
    quantization = Quantization(sensitivity=budget if budget and chosen in QUANTIZED else None)
    return export_bundle(str(CHECKPOINT), folder, targets=[target], precision=chosen, quantization=quantization)


def _load(work: Path, target: str, precision: str) -> PaliGemma:
    return PaliGemma.load(work / f"{target}-{precision}", BackendOptions(threads=1))


def _vision_bytes(manifest: Manifest, target: str) -> int:
    return sum(manifest.files[name].size for name in manifest.targets[target].vision_encoder.weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/shapes_precisions.json"))
    arguments = parser.parse_args()
    wanted = [
        (target, precision, 0.0, precision)
        for target in LOWERINGS
        for precision in ("fp32", *LIMITS)
        if precision in TARGETS[target].precisions
    ]
    wanted += [(LOWERINGS[0], "int4", INT4_BUDGET, "int4"), (LOWERINGS[0], "int4", 0.0, "fp16")]
    cores = len(os.sched_getaffinity(0))
    fresh = multiprocessing.get_context("spawn")  # ONNX Runtime's threads do not outlive a fork
    with tempfile.TemporaryDirectory() as work, fresh.Pool(cores, maxtasksperchild=1) as pool:
        jobs = [(*one, arguments.scenes, Path(work, "-".join(map(str, one)))) for one in wanted]
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
        allowed = {"detect_ap50": LIMITS.get(one["precision"], 0.0), "caption_exact_match": CAPTION_LIMIT}
        for name, limit in allowed.items():
            lost = exact[name] - one["scores"][name]
            if lost > limit:
                who = f"{one['target']} {one['precision']} {one['sensitivity']}"
                faults.append(f"{who}: {name} lost {lost:.4f}, more than {limit}")
    return faults


if __name__ == "__main__":
    main()
