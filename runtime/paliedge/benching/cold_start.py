"""From nothing to the first answer, in a process of its own: `python -m paliedge.benching.cold_start`.

Reads one JSON object on standard input, prints one on standard output.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paliedge.benching.record import ColdStart
from paliedge.errors import DeviceError

if TYPE_CHECKING:
    from paliedge.backends import BackendOptions


def measure_cold_start(bundle: Path, options: BackendOptions, prompt: str) -> ColdStart:
    """Seconds of a fresh process with this bundle, files in the page cache.

    Raises:
        DeviceError: the process failed; its last words are in `found`.
    """
    order = {"bundle": str(bundle.absolute()), "options": asdict(options), "prompt": prompt}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "paliedge.benching.cold_start"], input=json.dumps(order), capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise DeviceError(
            expected="a fresh process to load the bundle and answer",
            found=(done.stderr.strip().splitlines() or ["that it ended without a word"])[-1],
            action="Leave it out with --no-cold-start, or close what holds the memory.",
        )
    return ColdStart(process=seconds, **json.loads(done.stdout.splitlines()[-1]))


def _start(order: dict[str, Any]) -> dict[str, float]:
    """What the process does; seconds by stage."""
    times, last = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        times[name] = now - last
        last = now

    backends, models, bundles, numpy = (
        import_module(name) for name in ("paliedge.backends", "paliedge.model", "paliedge.bundle", "numpy")
    )
    if order["options"]["backend"] in ("auto", "cpu", "cuda"):
        import_module("paliedge.ort_session")
    lap("imports")
    bundle = bundles.Bundle(Path(order["bundle"]))
    lap("bundle")
    session = backends.open_session(bundle, backends.BackendOptions(**order["options"]), lambda line: None)
    model = models.PaliGemma(bundle, session)
    lap("engine")
    size = bundle.manifest.model.vision.image_size
    for name in ("first_answer", "second_answer"):
        model.generate(numpy.zeros((size, size, 3), numpy.uint8), order["prompt"], max_new_tokens=4, free=True)
        lap(name)
    model.close()
    return times


if __name__ == "__main__":
    print(json.dumps(_start(json.load(sys.stdin))))
