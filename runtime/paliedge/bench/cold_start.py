"""From nothing to the first answer, in a process of its own: `python -m paliedge.bench.cold_start`.

Reads one JSON object on standard input, prints one on standard output.
"""

# Tests: tests/cli/test_bench.py.
from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from paliedge.bench.record import ColdStart
from paliedge.errors import DeviceError
from paliedge.generation.request import GenerationOptions

if TYPE_CHECKING:
    from paliedge.backends.select import BackendOptions
    from paliedge.inputs.images import ImageSource


def measure_cold_start(bundle: Path, options: BackendOptions, image: ImageSource, prompt: str) -> ColdStart:
    """Seconds of one fresh process with this bundle, files in the page cache, that answers the same query twice.

    Raises:
        DeviceError: the process failed; its last words are in `found`.
    """
    import numpy as np  # the fresh process times this import

    from paliedge.inputs.images import load_image

    command = [sys.executable, "-m", "paliedge.bench.cold_start"]
    order = {"bundle": str(bundle.absolute()), "options": asdict(options), "prompt": prompt}
    try:
        with TemporaryDirectory() as folder:
            pixels = Path(folder, "image.npy")
            np.save(pixels, np.asarray(load_image(image)))
            started = time.perf_counter()
            text = json.dumps(order | {"image": str(pixels)})
            done = subprocess.run(command, input=text, capture_output=True, text=True)
            seconds = time.perf_counter() - started
    except OSError as error:
        raise DeviceError(
            expected="room for a picture in the folder for temporary files",
            found=str(error),
            action="Make room there or name another with TMPDIR, or leave the cold start out with --no-cold-start.",
        ) from error
    if done.returncode:
        raise DeviceError(
            expected="an answer from the bundle in a fresh process",
            found=(done.stderr.strip().splitlines() or ["an end without a word"])[-1],
            action="Leave it out with --no-cold-start, or close what holds the memory.",
        )
    return ColdStart(process=seconds, **json.loads(done.stdout.splitlines()[-1]))


def _start(order: dict[str, Any]) -> dict[str, float | None]:
    """What the process does; seconds by stage."""
    times: dict[str, float | None] = {}
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        times[name] = now - last
        last = now

    backends, models, bundles, numpy = (
        import_module(name)
        for name in ("paliedge.backends.select", "paliedge.model", "paliedge.bundle.bundle", "numpy")
    )
    if order["options"]["backend"] in ("auto", "cpu", "cuda"):
        import_module("paliedge.backends.ort")
    lap("imports")
    bundle = bundles.Bundle(Path(order["bundle"]))
    lap("bundle")
    session = backends.open_session(bundle, backends.BackendOptions(**order["options"]), lambda line: None)
    model = models.PaliGemma(bundle, session)
    lap("engine")
    image = numpy.load(order["image"])
    last = time.perf_counter()
    for name in ("first_answer", "second_answer"):
        model.generate(image, order["prompt"], options=GenerationOptions(max_new_tokens=4, free=True))
        lap(name)
        times.setdefault("graph_capture", session.graph_capture_s)
    model.close()
    return times


if __name__ == "__main__":
    print(json.dumps(_start(json.load(sys.stdin))))
