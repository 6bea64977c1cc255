"""How much memory and time does an export take? It must fit a workstation, and the larger boards.

    python -m benchmarks.make_checkpoint /path/checkpoint --model paligemma-3b
    python -m benchmarks.export_memory /path/checkpoint --work /path/with/space
    python -m benchmarks.export_memory /path/checkpoint --work /path/with/space --calibrate IMAGES \\
        --precision int8 --precision int4 --results benchmarks/results/export_memory_quantized.json

Each export runs in a process of its own with the comparison off. `peak_rss` is what the system
counted (ru_maxrss); `peak_anonymous` and `peak_file_backed` are sampled apart, and their sum is no
less than it: pages of mapped files can be dropped when memory runs short, anonymous ones cannot.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

_INTERVAL_S = 0.05


def measure_export(checkpoint: Path, output: Path, precision: str, calibrate: Path | None) -> dict[str, Any]:
    """Export in a child process and watch it; sizes in bytes."""
    command = [sys.executable, "-m", "benchmarks.export_memory", str(checkpoint), "--child", str(output), precision]
    command += ["--calibrate", str(calibrate)] if calibrate else []
    started = time.perf_counter()
    peaks = {"RssAnon": 0, "RssFile": 0}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            for line in _lines(f"/proc/{child.pid}/status"):
                name, _, rest = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(rest.split()[0]) * 1024)
            time.sleep(_INTERVAL_S)
        assert child.stdout is not None
        answer = child.stdout.read()
    if child.returncode:
        raise SystemExit(f"the export ended with {child.returncode}")
    return {
        "checkpoint": checkpoint.name,
        "precision": precision,
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_rss": int(answer),
        "peak_anonymous": peaks["RssAnon"],
        "peak_file_backed": peaks["RssFile"],
        "checkpoint_bytes": _folder_bytes(checkpoint),
        "bundle_bytes": _folder_bytes(output),
    }


def _run_child(checkpoint: Path, output: str, precision: str, calibrate: Path | None) -> None:
    from paliedge_export.exporter import export_bundle
    from paliedge_export.options import Quantization
    from paliedge_export.weights.files import DTYPES

    chosen = next(name for name in DTYPES if name == precision)
    export_bundle(str(checkpoint), Path(output), precision=chosen, quantization=Quantization(calibrate), compare=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # the process has just ended
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, default=Path(), help="folder for the bundles")
    parser.add_argument("--keep", action="store_true", help="do not delete the bundles")
    parser.add_argument("--precision", action="append", help="fp32 and fp16 unless told")
    parser.add_argument("--calibrate", type=Path, help="images for int8 and int4")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/export_memory.json"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        output, precision = arguments.child
        _run_child(arguments.checkpoint, output, precision, arguments.calibrate)
        return
    exports = []
    for precision in arguments.precision or ("fp32", "fp16"):
        output = arguments.work / f"export-memory-{precision}"
        try:
            exports.append(measure_export(arguments.checkpoint, output, precision, arguments.calibrate))
        finally:
            if not arguments.keep:
                shutil.rmtree(output, ignore_errors=True)
        print(json.dumps(exports[-1]), flush=True)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": describe_machine(), "exports": exports}
    arguments.results.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
