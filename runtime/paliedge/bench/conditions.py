"""The circumstances of a measurement: machine, clocks, temperatures, load, versions; and whether it was quiet.

Reads the system's files and asks nothing to change. What cannot be read is left out, never guessed.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paliedge.diagnostics.doctor import read_board, read_power_mode

_PACKAGES = (
    *("paliedge", "numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu"),
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu13", "cuda-bindings"),
)
_PRODUCT_INSTRUCTIONS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve", "sve2"),
)
_BUSY_SHARE = 0.05
"""Of the processors; what others may take before figures are doubtful."""
_THROTTLE_COUNTS = (
    "sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count",
    "sys/class/hwmon/hwmon*/oc*_event_cnt",
)
"""Of x86, and a Jetson's over-current events."""
_GPU_SLOWDOWNS = {
    "its power limit": "SwPowerCap",
    "hardware": "HwSlowdown",
    "temperature": "SwThermalSlowdown",
    "temperature of the hardware": "HwThermalSlowdown",
    "the power supply": "HwPowerBrakeSlowdown",
}
"""NVML's reasons for lower clocks that make a figure doubtful."""
_TICKS = os.sysconf("SC_CLK_TCK")


def describe_conditions(root: Path = Path("/")) -> dict[str, str]:
    """Facts by name; `root` is where the system's files lie."""
    found = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": read_processor(root),
        "instructions": " ".join(_instructions(root)),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": _find(root / "proc/meminfo", r"MemTotal:\s*(\d+ kB)"),
        "board": read_board(root),
        "power mode": _power_mode(),
        "governor": _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip(),
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {number}" for name in _PACKAGES if (number := _version(name))),
        "git": _git_revision(),
        **_ask_gpu(root, {"gpu": _gpu_name, "gpu driver": _gpu_driver}),
        **describe_state(root),
    }
    return {name: value for name, value in found.items() if value}


def read_processor(root: Path = Path("/")) -> str:
    """The processor's name, and behind it what tells apart two generations that rent under one name."""
    cpuinfo = root / "proc/cpuinfo"
    numbers = {name: _find(cpuinfo, rf"^{name}\s*: (\S+)") for name in ("cpu family", "model", "CPU part")}
    name = _find(cpuinfo, r"model name\s*: (.+)") or platform.machine()
    return " ".join((name, *(f"{kind} {number}" for kind, number in numbers.items() if number)))


def _instructions(root: Path) -> Iterator[str]:
    """Of those that make products of matrices faster, what the processor has."""
    flags = _find(root / "proc/cpuinfo", r"(?:flags|Features)\s*: (.+)").split()
    return (name for name in _PRODUCT_INSTRUCTIONS if name in flags)


def describe_state(root: Path = Path("/")) -> dict[str, str]:
    """What changes from minute to minute."""
    clocks = [_read(path).strip() for path in sorted(root.glob("sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq"))]
    zones = sorted(root.glob("sys/class/thermal/thermal_zone*"))
    temperatures = {_read(zone / "type").strip(): _read(zone / "temp").strip() for zone in zones}
    throttled = [int(_read(path) or 0) for pattern in _THROTTLE_COUNTS for path in root.glob(pattern)]
    gpus = [_read(path).strip() for path in sorted(root.glob("sys/class/devfreq/*gpu*/cur_freq"))]
    return {
        "load average": " ".join(_read(root / "proc/loadavg").split()[:3]),
        "clocks": ", ".join(f"{int(clock) // 1000} MHz" for clock in clocks if clock.isdigit()),
        "temperatures": ", ".join(
            f"{name} {int(value) / 1000:.0f} C" for name, value in temperatures.items() if value.lstrip("-").isdigit()
        ),
        "throttle count": str(sum(throttled)) if throttled else "",
        "gpu clock": ", ".join(f"{int(clock) // 10**6} MHz" for clock in gpus if clock.isdigit()),
        **_ask_gpu(root, {"gpu clock": _gpu_clock, "gpu temperature": _gpu_heat, "gpu slowed by": _gpu_slowed_by}),
        "slowed by cooling": ", ".join(_cooling(root)),
        "emc clock": _read(root / "sys/kernel/debug/bpmp/debug/clk/emc/rate").strip(),
    }


def _ask_gpu(root: Path, questions: Mapping[str, Callable[[Any, Any], str]]) -> dict[str, str]:
    """What NVML says of the first GPU; nothing without nvidia-ml-py, a driver or a GPU that knows the answer.

    It knows no other root than the machine's own.
    """
    found = {}
    if root != Path("/"):
        return {}
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        device = nvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # not installed, no driver, no GPU
        return {}
    for name, ask in questions.items():
        with suppress(nvml.NVMLError, AttributeError):  # a Jetson's knows hardly any, an old module not all names
            found[name] = ask(nvml, device)
    return found


def _gpu_name(nvml: Any, device: Any) -> str:
    return str(nvml.nvmlDeviceGetName(device))


def _gpu_driver(nvml: Any, device: Any) -> str:
    return str(nvml.nvmlSystemGetDriverVersion())


def _gpu_clock(nvml: Any, device: Any) -> str:
    return f"{nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)} MHz"


def _gpu_heat(nvml: Any, device: Any) -> str:
    return f"{nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)} C"


def _gpu_slowed_by(nvml: Any, device: Any) -> str:
    bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(device)
    return ", ".join(
        name for name, reason in _GPU_SLOWDOWNS.items() if bits & getattr(nvml, f"nvmlClocksEventReason{reason}")
    )


def _cooling(root: Path) -> Iterator[str]:
    """Devices that cooling slows down at the moment, and by how many steps; fans are none."""
    for device in sorted(root.glob("sys/class/thermal/cooling_device*")):
        kind, state = _read(device / "type").strip(), _read(device / "cur_state").strip()
        if "fan" not in kind and state.isdigit() and int(state):
            yield f"{kind} {state}"


class QuietWatch:
    """From its making on: how much of the processors others took, and whether something was slowed down."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._started = self._read()
        self._seen = [describe_state(root)]

    def look(self) -> None:
        """Note what holds at this moment: right behind work, before a GPU has rested."""
        self._seen.append(describe_state(self._root))

    def busy_share(self) -> float:
        """Share of all processor time that went to other processes, 0..1."""
        total, idle, own = (now - then for now, then in zip(self._read(), self._started, strict=True))
        return max(0.0, (total - idle - own) / total) if total else 0.0

    def warnings(self) -> list[str]:
        """Why figures measured meanwhile are doubtful; empty on a quiet machine."""
        found = []
        if (share := self.busy_share()) > _BUSY_SHARE:
            found.append(f"other processes took {share:.0%} of the processors: the machine was not quiet")
        self.look()
        if self._seen[0]["throttle count"] != self._seen[-1]["throttle count"]:
            found.append("the processor was throttled, by its temperature or current")
        for fact, words in (
            ("slowed by cooling", "cooling slowed the machine down:"),
            ("gpu slowed by", "the GPU was slowed down by"),
        ):
            if reasons := dict.fromkeys(state[fact] for state in self._seen if state.get(fact)):
                found.append(f"{words} {'; '.join(reasons)}")
        return found

    def _read(self) -> tuple[float, float, float]:
        """Ticks so far: of all processors, of those idle, of this process and its children."""
        times = [float(text) for text in _find(self._root / "proc/stat", r"cpu +(.+)").split()]
        own = os.times()
        return sum(times[:8]), sum(times[3:5]), _TICKS * sum(own[:4])


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _find(path: Path, pattern: str) -> str:
    found = re.search(pattern, _read(path), re.MULTILINE)
    return found[1] if found else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _power_mode() -> str:
    try:
        return read_power_mode() or ""
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _git_revision() -> str:
    """Of the clone that this package lies in; empty for an installed one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
