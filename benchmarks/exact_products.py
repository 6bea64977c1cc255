"""What do right 8-bit products cost on this processor?

    python -m benchmarks.exact_products BUNDLE...     # int8 for `cpu`, as exported now

Each bundle's decoder and encoder in three forms, in turns, each in a process of its own: `unsigned` is the bundle as it
is; `converted` has its weights signed, as before 0.2, which ONNX Runtime converts while it loads; `cut` has them signed
and multiplied as the processor's kernels come: on x86 without VNNI sums are cut there, elsewhere they are right.
`ratios` are of one round: their median and range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from benchmarks.signed_weights import sign_weights
from paliedge import GenerationOptions, PaliGemma
from paliedge.backends import ort
from paliedge.backends.arithmetic import Arithmetic
from paliedge.bundle.bundle import Bundle

FORMS = ("cut", "converted", "unsigned")
FIGURES = ("load_s", "vision_ms", "prefill_ms", "token_ms", "peak_gb")
_PROMPT = "detect yellow star ; green circle ; blue triangle"
_NEW_TOKENS = 10
RESULTS = Path(__file__).parent / "results" / "exact_products.json"


def measure(bundle: Path, form: str, answers: int) -> dict[str, float]:
    """Medians of one process, whose first answer does not count."""
    if form == "cut":
        ort._EXACT = ()
        ort.examine_arithmetic = lambda kind: Arithmetic(kind, {})  # type: ignore[assignment]
    ort.VERSION  # noqa: B018  what is imported is no part of loading
    started = time.perf_counter()
    model = PaliGemma.load(bundle)
    load_s = time.perf_counter() - started
    image = np.random.default_rng(0).integers(0, 255, (112, 112, 3), np.uint8)
    vision: list[float] = []
    prefill: list[float] = []
    token: list[float] = []
    for number in range(answers + 1):
        seen = model.encode(image)
        answer = model.generate(seen, _PROMPT, options=GenerationOptions(max_new_tokens=_NEW_TOKENS))
        if number:
            vision.append(seen.vision_ms)
            prefill.append(answer.timings.prefill_ms)
            token += answer.timings.decode_ms
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found = {"load_s": load_s, "vision_ms": statistics.median(vision), "prefill_ms": statistics.median(prefill)}
    return found | {"token_ms": statistics.median(token), "peak_gb": int(rows["VmHWM"].split()[0]) / 1e6}


def run_rounds(bundle: Path, rounds: int, answers: int) -> dict[str, Any]:
    """Every form once a round, the order turned round by round."""
    with tempfile.TemporaryDirectory(dir=bundle.parent) as scratch:
        signed = Path(scratch) / "signed"
        sign_weights(bundle, signed)
        folders = {"cut": signed, "converted": signed, "unsigned": bundle}
        times: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
        for number in range(rounds):
            for form in FORMS[number % 3 :] + FORMS[: number % 3]:
                command = [sys.executable, "-m", "benchmarks.exact_products", str(folders[form]), "--form", form]
                done = subprocess.run([*command, "--answers", str(answers)], capture_output=True, text=True, check=True)
                times[form].append(json.loads(done.stdout))
                print(f"round {number + 1}: {form}: {done.stdout.strip()}", flush=True)
    return {
        "medians": {
            form: {name: statistics.median(one[name] for one in times[form]) for name in FIGURES} for form in FORMS
        },
        "ratios": {
            f"{form}_over_cut": {name: _spread(times[form], times["cut"], name) for name in FIGURES}
            for form in ("converted", "unsigned")
        },
        "rounds": times,
    }


def _spread(ones: list[dict[str, float]], others: list[dict[str, float]], name: str) -> dict[str, float]:
    ratios = [one[name] / other[name] for one, other in zip(ones, others, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answers", type=int, default=5, help="measured in each process")
    parser.add_argument("--form", choices=FORMS, help="measure one form here and print it; what rounds start")
    options = parser.parse_args()
    if options.form:
        print(json.dumps(measure(options.bundles[0], options.form, options.answers)))
        return
    probes = {kind: dict(ort.examine_arithmetic(kind).wrong) for kind in ("eight_bit", "signed")}
    measured = []
    for bundle in options.bundles:
        model = Bundle(bundle).manifest.model
        size = {"name": bundle.name, "layers": model.text.num_layers, "hidden_size": model.text.hidden_size}
        measured.append(size | run_rounds(bundle, options.rounds, options.answers))
    found = {"machine": describe_machine(), "wrong": probes, "rounds": options.rounds, "bundles": measured}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
