"""How much power the machine takes, where a sensor tells. Nothing is estimated: without a sensor there is no meter.

| sensor | where | what it tells |
|---|---|---|
| INA3221 of a Jetson, in sysfs | the module's input, or the sum of its rails | volts and amperes, sampled |
| NVML, of `nvidia-ml-py` | desktop GPUs | the GPU's joules since the driver was loaded |
| RAPL, in sysfs | Intel and AMD processors, for root | the package's joules |
"""

# Tests: tests/bench/test_conditions.py.
from __future__ import annotations

import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Protocol

_INPUT_RAIL = "VDD_IN"
_AGX_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
"""An AGX Orin does not measure its input; these do not contain one another, other rails lie behind the last."""
_PERIOD_S = 0.05


class Meter(Protocol):
    """Attributes: sensor: its name."""

    sensor: str

    def joules(self) -> float:
        """Since some moment in the past; only differences mean something."""
        ...

    def close(self) -> None: ...


class CountingMeter:
    """A sensor that counts joules itself."""

    def __init__(self, sensor: str, joules: Callable[[], float]) -> None:
        self.sensor = sensor
        self.joules = joules

    def close(self) -> None: ...


class SamplingMeter:
    """A sensor that tells watts: a thread asks it twenty times a second and adds up."""

    def __init__(self, sensor: str, watts: Callable[[], float]) -> None:
        self.sensor = sensor
        self._watts = watts
        self._joules = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power", daemon=True)
        self._thread.start()

    def joules(self) -> float:
        return self._joules

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._stop.wait(_PERIOD_S):
            now = time.perf_counter()
            self._joules += self._watts() * (now - last)
            last = now


def find_meter(root: Path = Path("/"), *, gpu: bool = False) -> Meter | None:
    """The sensor that sees most of the machine; `gpu` says that a GPU does the work."""
    return _jetson(root) or (_nvml() if gpu else _rapl(root))


def _jetson(root: Path) -> Meter | None:
    """All power of the module: from its input, or from the rails that are fed by it."""
    rails = {
        _text(path): (folder / f"in{number}_input", folder / f"curr{number}_input")
        for folder in sorted(root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*"))
        for path in folder.glob("in*_label")
        for number in [path.name.removeprefix("in").removesuffix("_label")]
    }
    wanted = (_INPUT_RAIL,) if _INPUT_RAIL in rails else _AGX_RAILS
    if not rails.keys() >= set(wanted):
        return None

    def watts() -> float:
        """Millivolts by milliamperes."""
        return sum(int(_text(volts)) * int(_text(amperes)) / 1e6 for volts, amperes in map(rails.__getitem__, wanted))

    return SamplingMeter(f"INA3221 {' + '.join(wanted)}", watts)


def _nvml() -> Meter | None:
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        device = nvml.nvmlDeviceGetHandleByIndex(0)
        nvml.nvmlDeviceGetTotalEnergyConsumption(device)
    except Exception:  # not installed, no driver, or a GPU that does not count
        return None
    return CountingMeter("NVML, the GPU alone", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1000)


def _rapl(root: Path) -> Meter | None:
    counters = sorted(root.glob("sys/class/powercap/intel-rapl:[0-9]*/energy_uj"))
    counters = [path for path in counters if path.parent.name.count(":") == 1]  # packages, not their parts
    try:
        for path in counters:
            int(_text(path))
    except (OSError, ValueError):  # for root alone
        return None
    if not counters:
        return None
    return CountingMeter("RAPL, the processor package", lambda: sum(int(_text(path)) for path in counters) / 1e6)


def _text(path: Path) -> str:
    return path.read_text().strip()
