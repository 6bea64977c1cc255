"""The machine that a measurement comes from."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("paliedge", "numpy", "onnx", "onnxruntime", "pillow")


def describe_machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, Python and package versions."""
    processors, memory = (Path(f"/proc/{name}").read_text().splitlines() for name in ("cpuinfo", "meminfo"))
    cpu = [line.split(":", 1)[1].strip() for line in processors if line.startswith("model name")]
    kilobytes = [int(line.split()[1]) for line in memory if line.startswith("MemTotal")]
    return {
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(kilobytes[0] / 1e6, 1),
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
    }
