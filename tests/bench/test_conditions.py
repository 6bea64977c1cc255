"""What is read of a machine: conditions, whether it is quiet, and power, from a made-up system's files."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paliedge.bench.conditions import QuietWatch, describe_conditions
from paliedge.bench.power import find_meter
from paliedge.bench.record import Roofs
from paliedge.bench.roofs import higher, measure_cpu, measure_cpu_apart, no_roofs


def write(root: Path, name: str, content: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    write(tmp_path, "proc/device-tree/model", "NVIDIA Jetson Orin Nano\0")
    write(tmp_path, "proc/loadavg", "0.50 0.40 0.30 1/200 1234\n")
    write(tmp_path, "proc/meminfo", "MemTotal:        7620000 kB\n")
    write(tmp_path, "proc/stat", "cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 50 0 50 400 0 0 0 0 0 0\n")
    write(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "schedutil\n")
    for core in range(2):
        write(tmp_path, f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", "1510400\n")
    write(tmp_path, "sys/class/devfreq/17000000.gpu/cur_freq", "625000000\n")
    write(tmp_path, "sys/class/thermal/thermal_zone0/type", "gpu-thermal\n")
    write(tmp_path, "sys/class/thermal/thermal_zone0/temp", "51250\n")
    sensor = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    write(tmp_path, f"{sensor}/in1_label", "VDD_IN\n")
    write(tmp_path, f"{sensor}/in1_input", "5000\n")
    write(tmp_path, f"{sensor}/curr1_input", "2000\n")
    return tmp_path


def test_conditions_are_read_and_what_is_not_there_is_left_out(jetson: Path) -> None:
    found = describe_conditions(jetson)
    assert found["board"] == "NVIDIA Jetson Orin Nano"
    assert found["memory"] == "7620000 kB"
    assert found["governor"] == "schedutil"
    assert found["clocks"] == "1510 MHz, 1510 MHz"
    assert found["gpu clock"] == "625 MHz"
    assert found["temperatures"] == "gpu-thermal 51 C"
    assert found["load average"] == "0.50 0.40 0.30"
    assert "paliedge" in found["packages"]
    assert "throttle count" not in found
    assert "" not in found.values()


@pytest.mark.parametrize(
    ("cpuinfo", "processor", "instructions"),
    [
        (
            "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512_vnni sse\n",
            "AMD EPYC cpu family 26 model 2",
            "avx2 avx512_vnni",
        ),
        (
            "model name\t: ARMv8 Processor rev 1 (v8l)\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd42\n",
            "ARMv8 Processor rev 1 (v8l) CPU part 0xd42",
            "asimddp",
        ),
    ],
)
def test_two_generations_of_a_processor_are_told_apart(
    jetson: Path, cpuinfo: str, processor: str, instructions: str
) -> None:
    write(jetson, "proc/cpuinfo", cpuinfo)
    found = describe_conditions(jetson)
    assert found["processor"] == processor
    assert found["instructions"] == instructions


def test_the_power_mode_and_the_revision_of_the_code_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paliedge.bench.conditions.read_power_mode", lambda: "MAXN_SUPER")
    found = describe_conditions()
    assert found["power mode"] == "MAXN_SUPER"
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert found["git"].removesuffix("-dirty") == revision


pynvml: Any = import_module("pynvml")


class NvmlError(Exception):
    """As NVML's own for what a GPU does not know."""


def nvml_of(**changes: object) -> SimpleNamespace:
    """NVML of a GPU that is hot, with the constants of the real module."""
    real = {name: getattr(pynvml, name) for name in dir(pynvml) if name.startswith(("nvmlClocksEventReason", "NVML_"))}
    said: dict[str, object] = {
        "NVMLError": NvmlError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda device: "NVIDIA L4",
        "nvmlSystemGetDriverVersion": lambda: "580.95.05",
        "nvmlDeviceGetClockInfo": lambda device, clock: {pynvml.NVML_CLOCK_SM: 1200}[clock],
        "nvmlDeviceGetTemperature": lambda device, sensor: {pynvml.NVML_TEMPERATURE_GPU: 84}[sensor],
        "nvmlDeviceGetCurrentClocksEventReasons": lambda device: 0x1 | 0x20,  # idle, and too warm
    }
    return SimpleNamespace(**(real | said | changes))


def test_a_gpus_name_clocks_and_heat_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml_of())
    found = describe_conditions()
    names = ("gpu", "gpu driver", "gpu clock", "gpu temperature", "gpu slowed by")
    assert [found[name] for name in names] == ["NVIDIA L4", "580.95.05", "1200 MHz", "84 C", "temperature"]


def test_a_gpu_that_was_slowed_down_under_load_and_rests_again_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = iter((0x1, 0x20, 0x4, 0x1))  # idle, too warm, at its power limit, idle
    nvml = nvml_of(nvmlDeviceGetCurrentClocksEventReasons=lambda device: next(reasons))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    watch = QuietWatch()
    watch.look()
    watch.look()
    assert "the GPU was slowed down by temperature; its power limit" in watch.warnings()


@pytest.mark.parametrize("error", [NvmlError, AttributeError])
def test_what_a_gpu_does_not_tell_is_left_out(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not know, or the module is older than the question."""

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "pynvml", nvml_of(nvmlDeviceGetCurrentClocksEventReasons=refuse))
    found = describe_conditions()
    assert found["gpu"] == "NVIDIA L4"
    assert "gpu slowed by" not in found
    assert not any("GPU" in line for line in QuietWatch().warnings())


def test_a_jetsons_own_sensor_counts_joules(jetson: Path) -> None:
    meter = find_meter(jetson, gpu=True)
    assert meter is not None
    assert meter.sensor == "INA3221 VDD_IN"
    started = time.perf_counter()
    first = meter.joules()
    time.sleep(0.5)
    joules, seconds = meter.joules() - first, time.perf_counter() - started
    meter.close()
    assert joules == pytest.approx(10.0 * seconds, rel=0.3)  # 5 V x 2 A


def test_without_an_input_rail_the_others_are_added(jetson: Path) -> None:
    """As on an AGX Orin, whose two sensors have these rails."""
    for chip, rails in (("1-0040", ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")), ("1-0041", ("VDDQ_VDD2_1V8AO",))):
        for number, rail in enumerate(rails, 1):
            folder = f"sys/bus/i2c/drivers/ina3221/{chip}/hwmon/hwmon3"
            write(jetson, f"{folder}/in{number}_label", f"{rail}\n")
            write(jetson, f"{folder}/in{number}_input", "5000\n")
            write(jetson, f"{folder}/curr{number}_input", f"{1000 * number}\n")
    meter = find_meter(jetson, gpu=True)
    assert meter is not None
    assert meter.sensor == "INA3221 VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
    started, first = time.perf_counter(), meter.joules()
    time.sleep(0.5)
    joules, seconds = meter.joules() - first, time.perf_counter() - started
    meter.close()
    assert joules == pytest.approx(30.0 * seconds, rel=0.3)  # 5 V x (1 + 2 + 3) A


def test_a_sum_of_rails_that_lacks_one_is_no_figure(jetson: Path) -> None:
    write(jetson, "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/in1_label", "VDD_GPU_SOC\n")
    assert find_meter(jetson, gpu=False) is None


def test_nvml_counts_the_gpus_millijoules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda device: 5000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = find_meter(tmp_path, gpu=True)
    assert meter is not None
    assert meter.sensor.startswith("NVML")
    assert meter.joules() == 5.0


def test_rapl_counts_packages_and_not_their_parts(tmp_path: Path) -> None:
    write(tmp_path, "sys/class/powercap/intel-rapl:0/energy_uj", "5000000\n")
    write(tmp_path, "sys/class/powercap/intel-rapl:0:0/energy_uj", "3000000\n")
    write(tmp_path, "sys/class/powercap/intel-rapl:1/energy_uj", "1000000\n")
    meter = find_meter(tmp_path)
    assert meter is not None
    assert meter.joules() == pytest.approx(6.0)
    assert find_meter(tmp_path / "absent") is None


def test_a_machine_where_others_work_is_not_quiet(jetson: Path) -> None:
    watch = QuietWatch(jetson)
    assert watch.warnings() == []
    write(jetson, "proc/stat", "cpu  100 0 100 1800 0 0 0 0 0 0\n")
    assert watch.warnings() == []
    write(jetson, "proc/stat", "cpu  10100 0 100 10800 0 0 0 0 0 0\n")
    assert 0.4 < watch.busy_share() < 0.6
    assert "not quiet" in watch.warnings()[0]


@pytest.mark.parametrize(("kind", "words"), [("cpufreq-cpu0", ["cooling slowed"]), ("pwm-fan", [])])
def test_a_device_that_cooling_slows_down_is_told_and_a_fan_is_none(jetson: Path, kind: str, words: list[str]) -> None:
    device = "sys/class/thermal/cooling_device1"
    write(jetson, f"{device}/type", f"{kind}\n")
    write(jetson, f"{device}/cur_state", "0\n")
    watch = QuietWatch(jetson)
    assert watch.warnings() == []
    write(jetson, f"{device}/cur_state", "2\n")
    assert [text[:14] for text in watch.warnings()] == words


@pytest.mark.parametrize(
    "counter",
    [
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count",
        "sys/class/hwmon/hwmon2/oc3_event_cnt",
    ],
)
def test_a_throttled_processor_is_told(jetson: Path, counter: str) -> None:
    write(jetson, counter, "3\n")
    watch = QuietWatch(jetson)
    assert watch.warnings() == []
    write(jetson, counter, "4\n")
    assert "throttled" in watch.warnings()[0]


def test_a_probe_that_fails_leaves_no_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    found = measure_cpu_apart(1)
    assert (found.read_bytes_per_s, found.flops_per_s, found.int8_ops_per_s) == (None, None, None)
    assert "not measured" in found.how


def test_roofs_are_what_arithmetic_can_reach() -> None:
    found = measure_cpu(1)
    assert found.read_bytes_per_s is not None
    assert found.flops_per_s is not None
    assert found.int8_ops_per_s is not None
    assert 1e8 < found.read_bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s < 1e14
    assert 1e8 < found.int8_ops_per_s < 1e15


def test_the_higher_of_two_probes_is_the_roof() -> None:
    first = Roofs(read_bytes_per_s=3.0, flops_per_s=None, how="numpy", int8_ops_per_s=7.0)
    second = Roofs(read_bytes_per_s=2.0, flops_per_s=5.0, how="numpy", int8_ops_per_s=8.0)
    assert higher(first, second) == Roofs(read_bytes_per_s=3.0, flops_per_s=5.0, how="numpy", int8_ops_per_s=8.0)
    assert higher(no_roofs("a"), no_roofs("b")) == no_roofs("a")


def test_without_onnx_runtime_integers_have_no_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "paliedge.backends.ort")
    found = measure_cpu(1)
    assert found.int8_ops_per_s is None
    assert "integers" not in found.how
