"""Does it pay to encode the next picture while this one is answered?

    python -m benchmarks.overlap [BUNDLE ...]

The same pictures, as PNG files are, with and without `overlap`, in turns; the shipped bundle unless others are named.
Where the operators of one answer keep every core busy there is nothing to gain; a model so small that it runs on one
thread leaves a core free.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.machine import describe_machine
from benchmarks.shapes.scenes import HELD_OUT_SEED, make_scene
from paliedge import GenerationOptions, PaliGemma
from paliedge.model import SHIPPED_BUNDLE

_FEWEST, _MOST = 4, 200
PROMPT = "detect red circle ; blue square ; green star"


def make_pictures(count: int, size: int) -> list[bytes]:
    """Scenes as files of `size` x `size` pixels, as a camera's would be."""
    files = []
    for number in range(count):
        stream = io.BytesIO()
        Image.fromarray(make_scene(HELD_OUT_SEED + number).image).resize((size, size)).save(stream, "PNG")
        files.append(stream.getvalue())
    return files


def time_answers(model: PaliGemma, pictures: Sequence[bytes], max_new_tokens: int, *, overlap: bool) -> float:
    """Seconds a picture."""
    started = time.perf_counter()
    requests = ((index, picture, PROMPT) for index, picture in enumerate(pictures))
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    for _ in model.generate_batch(requests, options, overlap=overlap, batch_size=1):
        pass
    return (time.perf_counter() - started) / len(pictures)


def _time_both(
    model: PaliGemma, pictures: Sequence[bytes], max_new_tokens: int, *, overlap_first: bool
) -> tuple[float, float]:
    """Without and with overlap; who comes first takes turns."""
    first = time_answers(model, pictures, max_new_tokens, overlap=overlap_first)
    second = time_answers(model, pictures, max_new_tokens, overlap=not overlap_first)
    return (second, first) if overlap_first else (first, second)


def measure(
    bundle: Path, pictures: Sequence[bytes], seconds: float, rounds: int, max_new_tokens: int
) -> dict[str, Any]:
    """Medians over the rounds; `speedup` is that of overlap in each round, its median and its range.

    As many of `pictures` as take about `seconds` without overlap.
    """
    with PaliGemma.load(bundle) as model:
        time_answers(model, pictures[:2], max_new_tokens, overlap=False)
        count = round(seconds / time_answers(model, pictures[:2], max_new_tokens, overlap=False))
        pictures = pictures[: max(count, _FEWEST)]
        pairs = [_time_both(model, pictures, max_new_tokens, overlap_first=bool(turn % 2)) for turn in range(rounds)]
        manifest = model.manifest
    ratios = [plain / overlapped for plain, overlapped in pairs]
    plain, overlapped = (statistics.median(values) for values in zip(*pairs, strict=True))
    return {
        "precision": manifest.targets["cpu"].precision,
        "bundle_bytes": sum(file.size for file in manifest.files.values()),
        "pictures": len(pictures),
        "rounds": rounds,
        "max_new_tokens": max_new_tokens,
        "seconds_a_picture": round(plain, 5),
        "seconds_a_picture_overlapped": round(overlapped, 5),
        "speedup": round(statistics.median(ratios), 3),
        "speedup_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="*", default=[SHIPPED_BUNDLE])
    parser.add_argument("--seconds", type=float, default=10, help=f"of each turn, at most {_MOST} pictures")
    parser.add_argument("--size", type=int, default=640, help="of the pictures, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/overlap.json"))
    arguments = parser.parse_args()
    pictures = make_pictures(_MOST, arguments.size)
    load = os.getloadavg()[0]
    found = [
        measure(bundle, pictures, arguments.seconds, arguments.rounds, arguments.max_new_tokens)
        for bundle in arguments.bundles
    ]
    content = {"machine": describe_machine(), "load_average_before": load, "bundles": found}
    arguments.results.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
