"""What the shapes model has to reach, and on which scenes.

Written down before its training went on, and not changed since. The scenes were never looked at before, nor their
answers.
"""

from __future__ import annotations

from benchmarks.shapes.scenes import HELD_OUT_SEED

JUDGED = range(HELD_OUT_SEED + 100_000, HELD_OUT_SEED + 101_000)
"""Seeds of the scenes that the scores are of. Four fifths stand on photographs that training has never seen."""

CHOOSING = range(HELD_OUT_SEED - 20_000_000, HELD_OUT_SEED - 20_000_000 + 500)
"""Seeds of the scenes by which weights are chosen, on the photographs of training.

Candidates are the last checkpoint of the last run, and its mean with the one before. The better one is that with the
smaller sum of what its fp32 scores lack of the goals below. It ships, whatever its scores on the judged scenes.
"""

FIRST_SAMPLE = HELD_OUT_SEED + 130_000
"""The shipped scenes are the first three from this seed on that show enough (`benchmarks.shapes.samples`)."""

LEAST = {
    "detect_ap50": 0.97,
    "detect_ap50_several_labels": 0.95,
    "segment_mean_iou": 0.85,
    "caption_exact_match": 0.93,
    "counting": 0.98,
    "colour": 0.99,
}
MOST = {"ocr_character_error_rate": 0.04}
LOSSES = {"fp16": 0.005, "int8": 0.005, "int4": 0.015}
"""How much worse than fp32's each of these scores may be, on the same scenes, on every target."""


def lacking(scores: dict[str, float]) -> dict[str, float]:
    """By how much each score misses its goal; those that reach it are left out."""
    found = {name: least - scores[name] for name, least in LEAST.items()}
    found |= {name: scores[name] - most for name, most in MOST.items()}
    return {name: round(value, 4) for name, value in found.items() if value > 0}
