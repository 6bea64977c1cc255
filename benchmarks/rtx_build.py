"""What does building engines of full size take, and do both of the decoder's profiles share the weights?

    python -m benchmarks.make_checkpoint /path/checkpoint --model paligemma-3b
    paliedge export /path/checkpoint -o /path/bundle --target jetpack6 --target jetpack7 --no-compare
    python -m benchmarks.rtx_build /path/bundle
    python -m benchmarks.rtx_build /path/int8 /path/int4 --results benchmarks/results/rtx_build_precisions.json

TensorRT for RTX builds without a GPU, so this is what one can know without a board: that the graphs are
taken at this size, and how much memory that asks for. Each plan is built in a process of its own and
thrown away. Fails where an engine is more than 5 % larger than its weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from paliedge.backends.trt.build import SMALLEST_WORKSPACE, make_order, run_order
from paliedge.backends.trt.flavours import ANY_GPU, load_flavour
from paliedge.backends.trt.match import Part
from paliedge.backends.trt.profiles import design_engine
from paliedge.bundle.bundle import Bundle

TARGETS = ("jetpack6", "jetpack7")
"""`rtx` has jetpack7's graphs."""
LARGEST_RATIO = 1.05


_PARTS: tuple[Part, ...] = ("vision_encoder", "decoder")


def measure_build(bundle: Bundle, target: str, part: Part, work: Path) -> dict[str, Any]:
    """Build one plan; sizes in bytes."""
    manifest, trt = bundle.manifest, load_flavour("rtx")
    engine = design_engine(manifest, trt, target, ANY_GPU, "none")
    graph = {"vision_encoder": manifest.targets[target].vision_encoder, "decoder": manifest.targets[target].decoder}[
        part
    ]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        order = make_order(bundle, engine, part, Path(folder), SMALLEST_WORKSPACE)
        cost = run_order(part, order, lambda name, progress: None)
        size = Path(order.plan).stat().st_size
    weights = sum(manifest.files[name].size for name in graph.weights)
    return {
        "target": target,
        "part": part,
        "precision": engine.precision,
        "tensorrt_rtx": trt.version,
        "num_profiles": len(order.profiles),
        "seconds": round(cost.seconds, 1),
        "peak_memory": cost.peak_memory,
        "weight_bytes": weights,
        "engine_bytes": size,
        "engine_per_weight": round(size / weights, 4),
        "peak_memory_per_weight": round(cost.peak_memory / weights, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--work", type=Path, default=Path(), help="folder for the plans, which are deleted")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/rtx_build.json"))
    arguments = parser.parse_args()
    bundles = [Bundle(folder) for folder in arguments.bundles]
    builds = []
    for bundle, target, part in product(bundles, TARGETS, _PARTS):
        builds.append(measure_build(bundle, target, part, arguments.work))
        print(json.dumps(builds[-1]), flush=True)
    content = {"machine": describe_machine(), "checkpoint": bundles[0].manifest.producer.checkpoint, "builds": builds}
    arguments.results.write_text(json.dumps(content, indent=2) + "\n")
    odd = [build for build in builds if build["engine_per_weight"] > LARGEST_RATIO]
    if odd:
        raise SystemExit(f"larger than {LARGEST_RATIO} x the weights: {odd}")


if __name__ == "__main__":
    main()
