"""What `paliedge doctor` finds: on boards that are a folder of files, with GPUs and TensorRTs that are made up."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from paliedge.backends.cuda import GpuInfo
from paliedge.backends.trt import match
from paliedge.backends.trt.flavours import ANY_GPU, TensorRt, find_flavours
from paliedge.bundle.manifest import MANIFEST, Engine, File, Plan, Precision
from paliedge.diagnostics import doctor
from paliedge.diagnostics.doctor import Finding, examine
from paliedge.errors import DeviceError, ResourceError
from paliedge.model import SHIPPED_BUNDLE
from paliedge.planning.memory import FreeMemory
from tests.large import make_manifest, write_hollow_bundle

NO_GPU = DeviceError(expected="an NVIDIA GPU", found="none", action="Look for one.")
ORIN = GpuInfo("Orin", "8.7", integrated=True, free_memory=3 * 10**9, total_memory=8 * 10**9)
CARD = GpuInfo("NVIDIA H200", "9.0", integrated=False, free_memory=139 * 10**9, total_memory=140 * 10**9)
R36_4_3 = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC"
MODEL = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"


def find(root: Path, bundles: Iterable[Path] = ()) -> dict[str, Finding]:
    """Findings by topic; whatever is not well comes with what to do, and nothing else does."""
    findings = examine(tuple(bundles), root)
    for finding in findings:
        assert (finding.status == "ok") == (finding.action == ""), finding
        assert finding.value
    return {finding.topic: finding for finding in findings}


def make_board(root: Path, release: str = R36_4_3) -> Path:
    (root / "etc").mkdir()
    (root / "etc/nv_tegra_release").write_text(release + "\n# KERNEL_VARIANT: oot\n")
    write_model(root, MODEL)
    return root


def write_model(root: Path, model: str) -> None:
    (root / "proc/device-tree").mkdir(parents=True)
    (root / "proc/device-tree/model").write_bytes(model.encode() + b"\0")


def put_nvpmodel(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str | None) -> None:
    """The only program on PATH, or none."""
    folder.mkdir()
    if script is not None:
        (folder / "nvpmodel").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "nvpmodel").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither GPU nor TensorRT, whatever this machine has."""
    monkeypatch.setattr(doctor, "probe_gpu", lambda: NO_GPU)
    monkeypatch.setattr(doctor, "find_flavours", lambda: iter(()))


@pytest.mark.parametrize(
    ("release", "jetpack", "status"),
    [
        (R36_4_3, "6.2 (L4T 36.4.3)", "ok"),
        ("# R36 (release), REVISION: 4.4, GCID: 41062509", "6.2.1 (L4T 36.4.4)", "ok"),
        ("# R36 (release), REVISION: 4.0, GCID: 37537400", "6.1 (L4T 36.4.0)", "ok"),
        ("# R36 (release), REVISION: 3.0, GCID: 36106755", "6.0 (L4T 36.3.0)", "ok"),
        ("# R38 (release), REVISION: 2.0, GCID: 1", "7.0 or 7.1 (L4T 38.2.0)", "ok"),
        ("# R39 (release), REVISION: 2.0, GCID: 1", "7.2 (L4T 39.2.0)", "ok"),
        ("# R39 (release), REVISION: 2.10, GCID: 1", "7.2 (L4T 39.2.10)", "ok"),
        ("# R36 (release), REVISION: 40.3, GCID: 1", "unknown (L4T 36.40.3)", "note"),
        ("# R36 (release), REVISION: 4.30, GCID: 1", "6.1 or 6.2 (L4T 36.4.30)", "ok"),
        ("# R35 (release), REVISION: 6.1, GCID: 1", "unknown (L4T 35.6.1)", "note"),
    ],
)
def test_jetpack_is_told_by_its_l4t(release: str, jetpack: str, status: str, tmp_path: Path) -> None:
    findings = find(make_board(tmp_path, release))
    assert (findings["jetpack"].value, findings["jetpack"].status) == (jetpack, status)
    assert findings["jetson"] == Finding("jetson", MODEL)
    (tmp_path / "proc/device-tree/model").unlink()
    assert find(tmp_path)["jetson"].value == "unknown model"


@pytest.mark.parametrize("release", ["", "Ubuntu 22.04", "\udcff\udc80 no text"])
def test_a_board_without_a_readable_release_is_no_other_computer(release: str, tmp_path: Path) -> None:
    make_board(tmp_path, release="")
    (tmp_path / "etc/nv_tegra_release").write_bytes(release.encode(errors="surrogateescape"))
    findings = find(tmp_path)
    assert findings["jetson"].value == MODEL
    assert findings["jetpack"].value == "unknown"
    assert "/etc/nv_tegra_release" in findings["jetpack"].action


@pytest.mark.parametrize(("model", "value"), [(None, "no"), ("Raspberry Pi 5 Model B Rev 1.0", "no, Raspberry Pi 5")])
def test_another_computer_is_not_asked_for_its_power_mode(
    model: str | None, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvpmodel(monkeypatch, tmp_path / "bin", f"touch {tmp_path}/asked")
    if model:
        write_model(tmp_path, model)
    findings = find(tmp_path)
    assert findings["jetson"].value.startswith(value)
    assert not {"jetpack", "power mode"} & set(findings)
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("release", "python", "status"),
    [
        (R36_4_3, (3, 10, 12), "ok"),
        (R36_4_3, (3, 12, 3), "note"),
        ("# R36 (release), REVISION: 9.9", (3, 11, 0), "note"),
        ("# R39 (release), REVISION: 2.0", (3, 12, 3), "ok"),
    ],
)
def test_jetpack_6_has_tensorrt_for_one_python(
    release: str, python: tuple[int, ...], status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(version_info=python))
    finding = find(make_board(tmp_path, release))["python"]
    assert finding.status == status
    assert ("Python 3.10 alone" in finding.action) == (status == "note")


@pytest.mark.parametrize(
    ("script", "value", "status"),
    [
        ("echo 'NV Power Mode: MAXN'; echo 0", "MAXN", "ok"),
        ("echo 'NV Power Mode: MAXN_SUPER'; echo 2", "MAXN_SUPER", "ok"),
        ("echo 'NVPM VERB: parsed'; echo 'NV Power Mode: 15W'; echo 0", "15W", "note"),
        ("printf '\\377\\376 no text'", "unknown", "note"),
        ("echo 'NVPM ERROR: no permission' >&2; exit 1", "unknown", "note"),
        (None, "unknown: `nvpmodel -q` did not answer (FileNotFoundError)", "note"),
    ],
)
def test_power_mode(
    script: str | None, value: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvpmodel(monkeypatch, tmp_path / "bin", script)
    finding = find(make_board(tmp_path))["power mode"]
    assert (finding.value, finding.status) == (value, status)
    # by the board's own list: 0 is the fastest of some boards, and 15 W of an Orin Nano
    assert ("`sudo nvpmodel -m ID`; then `sudo jetson_clocks`" in finding.action) == (value == "15W")


@pytest.mark.parametrize("script", ["exec /bin/sleep 9", "/bin/sleep 3; echo 'NV Power Mode: MAXN'"])
def test_a_power_mode_that_hangs_is_waited_for_a_moment(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.3)
    put_nvpmodel(monkeypatch, tmp_path / "bin", script)
    started = time.monotonic()
    finding = find(make_board(tmp_path))["power mode"]
    assert time.monotonic() - started < 2
    assert "TimeoutExpired" in finding.value


def test_packages_have_their_versions() -> None:
    findings = find(Path("absent"))
    for name in ("paliedge", "numpy", "onnxruntime"):
        assert findings[name] == Finding(name, version(name))
    assert "CPUExecutionProvider" in findings["providers"].value


@pytest.mark.parametrize(("name", "status"), [("pillow", "problem"), ("cuda-bindings", "note")])
def test_a_missing_package_is_as_bad_as_what_needs_it(name: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(asked: str) -> str:
        if asked == name:
            raise PackageNotFoundError(asked)
        return version(asked)

    monkeypatch.setattr(doctor, "version", without)
    findings = find(Path("absent"))
    assert (findings[name].value, findings[name].status) == ("not installed", status)
    assert findings["numpy"].status == "ok"


def test_flavours_that_are_there_have_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    flavours = [TensorRt("tensorrt", None, "10.3.0"), TensorRt("rtx", None, "1.7.1.116")]
    monkeypatch.setattr(doctor, "find_flavours", lambda: iter(flavours))
    findings = find(Path("absent"))
    assert findings["TensorRT"] == Finding("TensorRT", "10.3.0")
    assert findings["TensorRT for RTX"] == Finding("TensorRT for RTX", "1.7.1.116")


@pytest.mark.parametrize("content", ["raise OSError('libnvinfer.so.10: no such file')", "__version__ = '8.6.2'"])
def test_a_flavour_that_does_not_load_says_why(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.setattr(doctor, "find_flavours", find_flavours)
    findings = find(tmp_path)
    broken = findings["TensorRT's Python module" if "raise" in content else "TensorRT 10.3 (JetPack 6.2) or later"]
    assert broken.value in ("libnvinfer.so.10: no such file", "TensorRT 8.6.2")
    assert {broken.status, findings["TensorRT for RTX"].status} == {"note"}


def test_the_gpu_is_described_or_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(Path("absent"))["gpu"].status == "note"
    monkeypatch.setattr(doctor, "probe_gpu", lambda: ORIN)
    expected = "Orin, integrated, compute capability 8.7, 3.0 of 8.0 GB free"
    assert find(Path("absent"))["gpu"] == Finding("gpu", expected)
    monkeypatch.setattr(doctor, "probe_gpu", lambda: CARD)
    assert "integrated" not in find(Path("absent"))["gpu"].value


def test_memory_and_disk_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_memory", lambda: FreeMemory(5_200_000_000, 1_500_000_000))
    findings = {finding.topic: finding for finding in examine((), tmp_path)}
    assert findings["memory"].value == "5.2 GB free, 1.5 GB of swap free"
    assert findings["disk"].value.endswith(f"free at {Path.cwd()}")


def test_a_system_that_does_not_tell_its_memory_is_examined_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> FreeMemory:
        raise ResourceError(expected="MemAvailable in a file", found="none", action="Run this on Linux.")

    monkeypatch.setattr(doctor, "available_memory", refuse)
    assert find(Path("absent"))["memory"] == Finding(
        "memory", "no MemAvailable in a file", "note", "Run this on Linux."
    )


TENSORRT, RTX = TensorRt("tensorrt", None, "10.3.0"), TensorRt("rtx", None, "1.7.1.116")
ON_TENSORRT, ON_RTX, ON_ORT = "  on TensorRT 10.3.0", "  on TensorRT for RTX 1.7.1.116", "  on ONNX Runtime"


def put_machine(monkeypatch: pytest.MonkeyPatch, gpu: GpuInfo, *flavours: TensorRt, free: float = 30e9) -> None:
    """A machine with this GPU, these TensorRTs and so much memory of the host."""
    for module in (doctor, match):
        monkeypatch.setattr(module, "probe_gpu", lambda: gpu)
    monkeypatch.setattr(doctor, "find_flavours", lambda: iter(flavours))
    monkeypatch.setattr(doctor, "available_memory", lambda: FreeMemory(int(free), 0))


def hide_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "paliedge.backends.ort", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)


def make_engine(trt: TensorRt, version: str | None = None, capability: str = "8.7") -> Engine:
    plan = Plan(file=f"{trt.flavour}.plan", profiles=())
    return Engine(
        target="jetpack6",
        flavour=trt.flavour,
        version=version or trt.version,
        compute_capability=ANY_GPU if trt.flavour == "rtx" else capability,
        gpu="any" if trt.flavour == "rtx" else "Orin",
        precision="fp16",
        vision_encoder=plan,
        decoder=plan,
        mask_decoder=None,
        timing_cache=None,
    )


def write_bundle(folder: Path, *engines: Engine, target: str = "jetpack6", precision: Precision = "fp16") -> Path:
    """3B in 16 bits, without its weights."""
    manifest = make_manifest(target=target, precision=precision)
    plans = {engine.decoder.file: File(size=9, sha256="0" * 64) for engine in engines}
    manifest = msgspec.structs.replace(manifest, engines=engines, files=manifest.files | plans)
    return write_hollow_bundle(folder / "large", manifest)


def test_the_shipped_bundle_runs_without_a_gpu() -> None:
    findings = find(Path("absent"), [SHIPPED_BUNDLE])
    assert findings[f"bundle {SHIPPED_BUNDLE}"] == Finding(
        f"bundle {SHIPPED_BUNDLE}", "checkpoint, graphs for cpu fp32"
    )
    assert findings[ON_ORT] == Finding(ON_ORT, "can run cpu's graphs")
    assert not [finding for finding in findings.values() if finding.status == "problem"]


def test_engines_without_a_gpu_are_no_problem_while_there_is_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_flavours", lambda: iter([RTX]))
    folder = write_bundle(tmp_path, make_engine(RTX))
    findings = find(tmp_path, [folder])
    assert findings[f"bundle {folder}"].value.endswith("graphs for jetpack6 fp16")
    assert (findings[ON_RTX].value, findings[ON_RTX].status) == ("no GPU to run on", "note")
    assert findings[ON_ORT].value == "can run jetpack6's graphs"


def test_nothing_to_run_a_bundle_with_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_onnxruntime(monkeypatch)
    findings = find(tmp_path, [SHIPPED_BUNDLE])
    assert findings["onnxruntime"].status == "note"
    assert findings[ON_ORT].status == "problem"
    assert 'pip install "paliedge[cpu]"' in findings[ON_ORT].action


def test_an_onnx_runtime_that_breaks_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("paliedge.backends.ort", "onnxruntime"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('numpy.core.multiarray failed to import\\nat length')")
    monkeypatch.syspath_prepend(tmp_path)
    findings = find(tmp_path, [SHIPPED_BUNDLE])
    assert findings["onnxruntime"].value == "numpy.core.multiarray failed to import"
    assert findings[ON_ORT].status == "problem"


@pytest.mark.parametrize("damage", ["lost bundle", "lost manifest", "other manifest", "lost file", "short file"])
def test_a_bundle_that_is_not_whole_is_a_problem(damage: str, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path)
    kind, part = damage.split()
    path = {"bundle": folder, "manifest": folder / MANIFEST, "file": folder / "decoder.weights"}[part]
    if kind == "lost":
        path.rename(tmp_path / "elsewhere")
    else:
        path.write_text("{")
    findings = find(tmp_path, [folder])
    assert findings[f"bundle {folder}"].status == "problem"
    assert ON_ORT not in findings


def test_an_engine_that_fits_is_all_that_a_bundle_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_machine(monkeypatch, ORIN, TENSORRT)
    hide_onnxruntime(monkeypatch)
    folder = write_bundle(tmp_path, make_engine(TENSORRT))
    findings = find(tmp_path, [folder])
    assert findings[ON_TENSORRT] == Finding(ON_TENSORRT, "an engine that fits, fp16 from jetpack6")
    assert findings[ON_ORT].status == "note"


@pytest.mark.parametrize(
    "engine", [make_engine(TENSORRT, "10.7.0"), make_engine(TENSORRT, capability="11.0")], ids=["version", "GPU"]
)
@pytest.mark.parametrize("target", ["jetpack6", "cpu"])
def test_engines_for_something_else_stop_a_run(
    engine: Engine, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_machine(monkeypatch, ORIN, TENSORRT)
    folder = write_bundle(tmp_path, engine, target=target)
    finding = find(tmp_path, [folder])[ON_TENSORRT]
    assert finding.status == "problem"
    assert f"only engines for {engine.version} on Orin" in finding.value
    can_build = f"`paliedge build {folder} --flavour tensorrt`"
    assert finding.action == (
        can_build
        if target == "jetpack6"
        else "Export it again: `paliedge export CHECKPOINT -o BUNDLE --target jetpack6`."
    )


def test_engines_for_something_else_do_not_matter_beside_one_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_machine(monkeypatch, ORIN, TENSORRT, RTX)
    folder = write_bundle(tmp_path, make_engine(TENSORRT), make_engine(RTX, "1.6.0"))
    findings = find(tmp_path, [folder])
    assert findings[ON_TENSORRT].status == "ok"
    assert (findings[ON_RTX].status, findings[ON_RTX].value[:22]) == ("note", "only engines for 1.6.0")


@pytest.mark.parametrize(
    ("target", "value", "action"),
    [
        ("jetpack6", "no engine yet; one can be built from jetpack6", "`paliedge build {} --flavour tensorrt`"),
        (
            "cpu",
            "no engine yet; this is a bundle for cpu",
            "Export it again: `paliedge export CHECKPOINT -o BUNDLE --target jetpack6`.",
        ),
    ],
)
def test_a_bundle_without_engines_is_told_how_to_get_one(
    target: str, value: str, action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_machine(monkeypatch, ORIN, TENSORRT)
    folder = write_bundle(tmp_path, target=target)
    assert find(tmp_path, [folder])[ON_TENSORRT] == Finding(ON_TENSORRT, value, "note", action.format(folder))


@pytest.mark.parametrize(
    ("integrated", "free_gpu", "free_host", "status"),
    [(True, 30e9, 3e9, "problem"), (True, 3e9, 30e9, "ok"), (False, 3e9, 30e9, "problem"), (False, 30e9, 3e9, "ok")],
)
def test_memory_is_the_hosts_where_the_gpu_is_integrated(
    integrated: bool, free_gpu: float, free_host: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = GpuInfo("GPU", "8.7", integrated, int(free_gpu), int(40e9))
    put_machine(monkeypatch, gpu, TENSORRT, free=free_host)
    folder = write_bundle(tmp_path, make_engine(TENSORRT))
    finding = find(tmp_path, [folder])[ON_TENSORRT]
    assert finding.status == status
    assert finding.value.startswith("3.0 GB free, where it takes 5." if status == "problem" else "an engine that fits")


def test_bf16_graphs_need_a_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_bundle(tmp_path, make_engine(TENSORRT), precision="bf16")
    finding = find(tmp_path, [folder])[ON_ORT]
    assert (finding.status, finding.value[:9]) == ("problem", "bf16 ones")
    assert "--target cpu" in finding.action
    put_machine(monkeypatch, ORIN, TENSORRT)
    assert find(tmp_path, [folder])[ON_ORT].status == "note"


def put_distribution(folder: Path, name: str) -> None:
    """What pip leaves of an installed package."""
    info = folder / f"{name.replace('-', '_')}-1.23.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.23.0\n")


@pytest.mark.parametrize("name", ["onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"])
def test_two_onnx_runtimes_in_one_environment_are_a_problem(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find(tmp_path)["onnxruntime"].status == "ok"
    put_distribution(tmp_path / "site", name)
    monkeypatch.syspath_prepend(tmp_path / "site")
    finding = find(tmp_path)["onnxruntime"]
    assert finding.status == "problem"
    assert f"pip uninstall onnxruntime {name}" in finding.action


def test_an_onnx_runtime_for_gpus_without_cuda_was_displaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's wheel for a Jetson, over which pip has put PyPI's."""
    put_distribution(tmp_path / "site", "onnxruntime-gpu")
    monkeypatch.syspath_prepend(tmp_path / "site")
    there = importlib.metadata.distributions
    monkeypatch.setattr(doctor, "distributions", lambda: [one for one in there() if one.name != "onnxruntime"])
    finding = find(tmp_path)["onnxruntime-gpu"]
    assert (finding.value, finding.status) == ("1.23.0", "problem")
    assert "NVIDIA's own wheel" in finding.action
