"""Does a decode step cost the same however long the answer is, and a larger picture what its operations say?

    python -m benchmarks.scaling --work FOLDER

On bundles of full width with 6 + 6 layers, at 224, 448 and 896 pixels, each in a process of its own, in turns. With
fp32 all operations run at one rate; with int8 the linear layers run faster than attention, whose share grows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.peers.harness import NUM_PROMPT_TOKENS, Engine, take_turns
from benchmarks.peers.whole_model import SHAPES, copy_samples
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import MANIFEST, Manifest
from paliedge.planning.roofline import decoder_flops, vision_flops

IMAGE_SIZES = (224, 448, 896)
PRECISIONS = ("int8", "fp32")
NUM_LAYERS = 6
LONG = 101
"""Tokens of the long answer: a step behind 5 tokens is compared with one behind 90 to 100."""
_EARLY, _LATE = slice(4, 14), slice(90, 100)


def prepare(folder: Path, precision: str) -> dict[int, Path]:
    """A bundle for each size, made where there is none; the first one's calibration serves the others."""
    bundles = {size: folder / f"{precision}-{size}" for size in IMAGE_SIZES}
    first = bundles[IMAGE_SIZES[0]]
    for size, bundle in bundles.items():
        if not (bundle / MANIFEST).exists():
            checkpoint = folder / f"checkpoint-{size}"
            if not (checkpoint / "calibration").exists():
                make_checkpoint(checkpoint, "paligemma-3b", size, NUM_LAYERS)
                copy_samples(SHAPES / "calibration", checkpoint / "calibration", 2)
            command = [str(Path(sys.executable).with_name("paliedge")), "export", str(checkpoint), "-o", str(bundle)]
            command += ["--precision", precision, "--no-compare"]
            if precision == "int8" and bundle != first:
                command += ["--calibrate", str(first)]
            subprocess.run(command, check=True, stdout=sys.stderr)
    return bundles


def engines(bundles: Mapping[int, Path], precision: str, num_threads: int) -> list[Engine]:
    """A short answer at each size, and the long one at the smallest."""
    start = (sys.executable, "-m", "benchmarks.peers.ours")
    rest = ("--threads", str(num_threads), "--answers", "2")
    asked = [(str(size), bundle, 2) for size, bundle in bundles.items()]
    asked.append(("long", bundles[IMAGE_SIZES[0]], LONG))
    return [
        Engine(f"{precision} {name}", precision, (*start, str(bundle), *rest, "--tokens", str(tokens)))
        for name, bundle, tokens in asked
    ]


def flatness(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median of late decode steps over that of early ones; and the range of this over answers."""
    ratios = [
        statistics.median(answer["tokens"][_LATE]) / statistics.median(answer["tokens"][_EARLY])
        for one in rounds
        for answer in one["answers"]
    ]
    return {
        "late_over_early": round(statistics.median(ratios), 4),
        "late_over_early_range": [round(min(ratios), 4), round(max(ratios), 4)],
    }


def operations(manifest: Manifest) -> int:
    """Of vision and prefill."""
    prefix = manifest.model.vision.num_image_tokens + NUM_PROMPT_TOKENS
    return vision_flops(manifest.model) + decoder_flops(manifest, prefix, prefix)


def growth(seconds: Mapping[int, float], flops: Mapping[int, int]) -> list[dict[str, Any]]:
    """Of each size, seconds and operations; `over_flops`: how much more than they say, measured by the first size."""
    first = min(seconds)
    return [
        {
            "image_size": size,
            "flops": flops[size],
            "seconds": round(seconds[size], 3),
            "over_flops": round(seconds[size] / seconds[first] / (flops[size] / flops[first]), 3),
        }
        for size in sorted(seconds)
    ]


def summarise(
    bundles: Mapping[int, Path], precision: str, rounds: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """What the rounds say of one precision."""
    seconds = {
        size: statistics.median(
            answer["vision"] + answer["prefill"] for one in rounds[f"{precision} {size}"] for answer in one["answers"]
        )
        for size in IMAGE_SIZES
    }
    flops = {size: operations(Bundle(bundle, check_hashes=False).manifest) for size, bundle in bundles.items()}
    return {**flatness(rounds[f"{precision} long"]), "sizes": growth(seconds, flops)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and bundles; 30 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/scaling.json"))
    arguments = parser.parse_args()
    bundles = {precision: prepare(arguments.work.resolve(), precision) for precision in PRECISIONS}
    load = os.getloadavg()[0]
    everybody = [one for precision in PRECISIONS for one in engines(bundles[precision], precision, arguments.threads)]
    rounds = take_turns(everybody, arguments.rounds)
    content = {
        "machine": describe_machine(),
        "model": f"PaliGemma-3B's width, {NUM_LAYERS} + {NUM_LAYERS} layers",
        "num_threads": arguments.threads,
        "num_rounds": arguments.rounds,
        "load_average_before": load,
        "precisions": {precision: summarise(bundles[precision], precision, rounds) for precision in PRECISIONS},
    }
    arguments.results.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
