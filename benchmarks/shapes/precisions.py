"""What does each precision cost in quality? The shapes model on held-out scenes, for every precision and lowering.

    python -m benchmarks.shapes.precisions

The scenes and what a precision may cost are those of `benchmarks.shapes.goals`; differences are paired, scene by scene.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from benchmarks.machine import describe_machine
from benchmarks.shapes.evaluate import evaluate
from benchmarks.shapes.goals import JUDGED, LOSSES
from benchmarks.shapes.scores import Answers, Scorer, find_losses
from paliedge import PaliGemma
from paliedge.backends.select import BackendOptions
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import MANIFEST, Manifest
from paliedge_export.exporter import export_bundle
from paliedge_export.options import Quantization
from paliedge_export.targets import TARGETS
from paliedge_export.weights.files import QUANTIZED

CHECKPOINT = Path("benchmarks/shapes/checkpoint")
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


def measure(
    target: str, precision: str, budget: float, vision: str, seeds: Sequence[int], work: Path
) -> tuple[dict[str, Any], Answers]:
    """One export behind the vision encoder of `vision`'s precision, with its gate's summary and its size."""
    manifest, vision_manifest = _export(target, precision, budget, work), _export(target, vision, budget, work)
    with _load(work, target, precision) as model, _load(work, target, vision) as encoder:
        answers = evaluate(cast(PaliGemma, BehindVision(model, encoder)), seeds)
    print("measured", target, precision, budget, vision, flush=True)
    own, other = (_vision_bytes(one, target) for one in (manifest, vision_manifest))
    description = {
        "target": target,
        "precision": precision,
        "sensitivity": budget,
        "vision": vision,
        "bundle_bytes": sum(file.size for file in manifest.files.values()) - own + other,
        "gate": msgspec.to_builtins(manifest.comparisons[target]),
    }
    return description, answers


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
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/shapes_precisions.json"))
    arguments = parser.parse_args()
    wanted = [
        (target, precision, 0.0, precision)
        for target in LOWERINGS
        for precision in ("fp32", *LOSSES)
        if precision in TARGETS[target].precisions
    ]
    wanted += [(LOWERINGS[0], "int4", INT4_BUDGET, "int4"), (LOWERINGS[0], "int4", 0.0, "fp16")]
    cores = len(os.sched_getaffinity(0))
    fresh = multiprocessing.get_context("spawn")  # ONNX Runtime's threads do not outlive a fork
    with tempfile.TemporaryDirectory() as work, fresh.Pool(cores, maxtasksperchild=1) as pool:
        jobs = [(*one, JUDGED, Path(work, "-".join(map(str, one)))) for one in wanted]
        measured = pool.starmap(measure, jobs, chunksize=1)
        exports = pool.starmap(add_scores, [(*one, measured[0][1]) for one in measured])
    arguments.results.write_text(json.dumps({"machine": describe_machine(), "exports": exports}, indent=2) + "\n")
    if faults := find_faults(exports):
        raise SystemExit("; ".join(faults))


def add_scores(description: dict[str, Any], answers: Answers, exact: Answers) -> dict[str, Any]:
    """`description` with the scores of `answers`, and how much worse they are than those of `exact`."""
    scorer = Scorer(answers)
    return description | {"scores": scorer.scores(), "losses": find_losses(Scorer(exact), scorer)}


def find_faults(exports: list[dict[str, Any]]) -> list[str]:
    """Where a precision costs more than it may."""
    return [
        f"{one['target']} {one['precision']} {one['sensitivity']}: {name} lost {loss['lost']}, more than {limit}"
        for one in exports
        if (limit := LOSSES.get(one["precision"])) is not None
        for name, loss in one["losses"].items()
        if loss["lost"] > limit
    ]


if __name__ == "__main__":
    main()
