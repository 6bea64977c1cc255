"""The machine that a measurement comes from."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paliedge.bench.conditions import read_processor

_PACKAGES = ("paliedge", "numpy", "onnx", "onnxruntime", "pillow")


def describe_machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, Python and package versions."""
    memory = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = [int(line.split()[1]) for line in memory if line.startswith("MemTotal")]
    return {
        "cpu": read_processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(kilobytes[0] / 1e6, 1),
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
    }
