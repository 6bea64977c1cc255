"""What this machine has, which engines of a bundle fit it, and what to do about what is missing.

Reads and asks, changes nothing; as useful without a GPU as with one.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from paliedge.backends.cuda import GpuInfo

from paliedge.backends.select import find_ort_target
from paliedge.backends.trt.flavours import ANY_GPU, TensorRt, find_flavours
from paliedge.backends.trt.match import choose_target, describe, engine_for, probe_gpu
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Manifest
from paliedge.diagnostics.installed import find_outside
from paliedge.errors import EngineMismatchError, PaliEdgeError, ResourceError
from paliedge.planning.memory import available_memory, check_run_memory

Status = Literal["ok", "note", "problem"]
_RELEASE = re.compile(r"# R(\d+) \(release\), REVISION: ([\d.]+)")
_JETPACK = {
    "36.3": "6.0",
    "36.4": "6.1 or 6.2",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "38": "7.0 or 7.1",
    "39.2": "7.2",
}
"""JetPack by the longest matching start of its L4T version."""
_OTHER_ORT = (
    *("onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-training"),
    *("onnxruntime-qnn", "onnxruntime-rocm", "onnxruntime-migraphx"),
)
_PACKAGES = ("paliedge", "numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu", "cuda-bindings")
_JETPACK_6, _PYTHON_OF_JETPACK_6 = "36", (3, 10)
_TIMEOUT_S = 5


class Finding(NamedTuple):
    """One fact, whether it is as it should be, and if not what to do.

    "note": something is not there that this machine may not need; "problem": a bundle cannot run as asked.
    """

    topic: str
    value: str
    status: Status = "ok"
    action: str = ""


def examine(bundles: Sequence[Path], root: Path = Path("/")) -> list[Finding]:
    """Look at the machine, then at each bundle; `root` is where its system files lie."""
    gpu, onnxruntime = probe_gpu(), _probe_onnxruntime()
    flavours = list(find_flavours())
    engines = [trt for trt in flavours if isinstance(trt, TensorRt)]
    return [
        *_examine_system(root),
        *_examine_packages(onnxruntime),
        *(_examine_flavour(trt) for trt in flavours),
        _examine_cuda(),
        _examine_gpu(gpu),
        *_examine_resources(bundles),
        *(finding for folder in bundles for finding in _examine_bundle(folder, engines, gpu, onnxruntime)),
    ]


def _examine_system(root: Path) -> Iterator[Finding]:
    yield Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    model = read_board(root)
    release = _RELEASE.search(_read(root / "etc/nv_tegra_release"))
    yield _examine_python(release[1] if release else None)
    if not release and "Jetson" not in model:
        yield Finding("jetson", "no" + (f", {model}" if model else ""))
        return
    yield Finding("jetson", model or "unknown model")
    if release:
        yield _examine_jetpack(f"{release[1]}.{release[2]}")
    else:
        yield Finding("jetpack", "unknown", "note", "Read /etc/nv_tegra_release; in a container, outside of it.")
    yield _examine_power_mode()


def read_board(root: Path = Path("/")) -> str:
    """The board's name by its device tree; "" where there is none. /proc's is a link to /sys's."""
    paths = (root / "sys/firmware/devicetree/base/model", root / "proc/device-tree/model")
    return next(filter(None, (_read(path).strip("\0\n ") for path in paths)), "")


def _examine_python(l4t_major: str | None) -> Finding:
    if l4t_major == _JETPACK_6 and sys.version_info[:2] != _PYTHON_OF_JETPACK_6:
        action = "Make the environment with `/usr/bin/python3`: JetPack 6 has TensorRT for Python 3.10 alone."
        return Finding("python", platform.python_version(), "note", action)
    return Finding("python", platform.python_version())


def _examine_jetpack(l4t: str) -> Finding:
    jetpack = next((name for start, name in sorted(_JETPACK.items(), reverse=True) if _starts(l4t, start)), None)
    if jetpack:
        return Finding("jetpack", f"{jetpack} (L4T {l4t})")
    return Finding("jetpack", f"unknown (L4T {l4t})", "note", "paliedge knows JetPack 6.1 to 6.2.1 and 7.2.")


def _examine_power_mode() -> Finding:
    unknown = "Ask `sudo nvpmodel -q`; in a container, outside of it."
    try:
        mode = read_power_mode()
    except (OSError, subprocess.TimeoutExpired) as error:
        found = f"unknown: `nvpmodel -q` did not answer ({type(error).__name__})"
        return Finding("power mode", found, "note", unknown)
    if not mode:
        return Finding("power mode", "unknown", "note", unknown)
    if mode.startswith("MAXN"):
        return Finding("power mode", mode)
    action = (
        "`grep POWER_MODEL /etc/nvpmodel.conf` lists all; take the fastest, MAXN where there is one, with "
        "`sudo nvpmodel -m ID`; then `sudo jetson_clocks`."
    )
    return Finding("power mode", mode, "note", action)


def read_power_mode() -> str | None:
    """A Jetson's power mode; None where `nvpmodel` says something else.

    Raises:
        OSError, subprocess.TimeoutExpired: there is no `nvpmodel`, or it does not answer.
    """
    command = ["nvpmodel", "-q"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False)
    mode = re.search(r"NV Power Mode: *(\S+)", done.stdout.decode(errors="replace"))
    return mode[1] if mode else None


def _probe_onnxruntime() -> list[str] | PaliEdgeError:
    """Its providers, or why there are none."""
    try:
        from paliedge.backends.ort import available_providers
    except PaliEdgeError as error:
        return error
    return available_providers()


def _examine_packages(onnxruntime: list[str] | PaliEdgeError) -> Iterator[Finding]:
    for name in _PACKAGES:
        try:
            found, problem = version(name), _problem_of(name, onnxruntime)
            yield Finding(name, found, "problem" if problem else "ok", problem)
        except PackageNotFoundError:
            if name in ("onnxruntime-gpu", "cuda-bindings"):
                yield Finding(name, "not installed", "note", "Only needed to run on a GPU.")
            elif name != "onnxruntime":  # its finding comes with its providers
                yield Finding(name, "not installed", "problem", "Install paliedge again.")
    for outside in find_outside():
        yield Finding("versions", str(outside), "note", outside.action)
    if isinstance(onnxruntime, PaliEdgeError):
        yield Finding("onnxruntime", onnxruntime.found, "note", onnxruntime.action)
    else:
        yield Finding("providers", ", ".join(onnxruntime))
        yield _examine_arithmetic()


def _problem_of(name: str, onnxruntime: list[str] | PaliEdgeError) -> str:
    """What is wrong with an installed ONNX Runtime: all of its packages lie in one folder, where the last one wins."""
    if not name.startswith("onnxruntime"):
        return ""
    there = sorted({str(one.name) for one in distributions() if str(one.name).startswith("onnxruntime")})
    there = [one for one in there if one in ("onnxruntime", *_OTHER_ORT)]
    wanted = "onnxruntime-gpu" if "onnxruntime-gpu" in there else there[-1] if there else name
    if len(there) > 1:
        return (
            f"{' and '.join(there)} overwrite each other: run `pip uninstall {' '.join(there)}`, then install one of "
            f"them again, such as `pip install {wanted}`; on a Jetson NVIDIA's own wheel of it."
        )
    if name == "onnxruntime-gpu" and isinstance(onnxruntime, list) and "CUDAExecutionProvider" not in onnxruntime:
        return (
            "It has no CUDA: another package has taken its place, or it was not built for this machine. Run "
            "`pip install --force-reinstall onnxruntime-gpu`; on a Jetson with NVIDIA's own wheel."
        )
    return ""


def _examine_arithmetic() -> Finding:
    from paliedge.backends.arithmetic import NAMES
    from paliedge.backends.ort import WITHOUT, compare_rates, examine_arithmetic

    found = [examine_arithmetic(kind) for kind in NAMES]
    value = "; ".join([*map(str, found), f"8-bit products at {compare_rates():.1f} times the rate of float32's"])
    wrong = [one.kind for one in found if one.wrong]
    if wrong:
        action = " ".join([*dict.fromkeys(WITHOUT[kind] for kind in wrong), "Bundles with such products are refused."])
        return Finding("arithmetic", value, "note", action)
    return Finding("arithmetic", value)


def _examine_flavour(found: TensorRt | PaliEdgeError) -> Finding:
    if isinstance(found, PaliEdgeError):
        return Finding(found.expected, found.found, "note", found.action)
    return Finding(describe(found, ANY_GPU).rsplit(" ", 1)[0], found.version)


def _examine_cuda() -> Finding:
    """A driver may be newer than the bindings; older by a major version, nothing works."""
    try:
        from paliedge.backends.cuda import cuda_versions

        driver, runtime = cuda_versions()
    except PaliEdgeError as error:
        return Finding("driver", error.found, "note", error.action)
    value = f"driver for CUDA {driver}, bindings for {runtime}"
    if driver == "none":
        return Finding("driver", value, "note", "Only needed to run on a GPU.")
    if int(driver.split(".")[0]) < int(runtime.split(".")[0]):
        major = driver.split(".")[0]
        return Finding(
            "driver", value, "problem", f'Run `pip install "cuda-bindings=={major}.*"`, or update the driver.'
        )
    return Finding("driver", value)


def _examine_gpu(gpu: GpuInfo | PaliEdgeError) -> Finding:
    if isinstance(gpu, PaliEdgeError):
        return Finding("gpu", gpu.found, "note", "Bundles run on the CPU; engines need an NVIDIA GPU and its driver.")
    return Finding("gpu", str(gpu))


def _examine_resources(bundles: Sequence[Path]) -> Iterator[Finding]:
    try:
        memory = available_memory()
        yield Finding("memory", f"{memory.available / 1e9:.1f} GB free, {memory.swap / 1e9:.1f} GB of swap free")
    except ResourceError as error:
        yield Finding("memory", f"no {error.expected}", "note", error.action)
    for folder in bundles or [Path()]:
        try:
            free = shutil.disk_usage(folder).free
        except (OSError, ValueError):  # not there: the bundle's own finding says so
            continue
        yield Finding("disk", f"{free / 1e9:.1f} GB free at {folder.resolve()}")


def _examine_bundle(
    folder: Path, engines: Sequence[TensorRt], gpu: GpuInfo | PaliEdgeError, onnxruntime: list[str] | PaliEdgeError
) -> Iterator[Finding]:
    topic = f"bundle {folder}"
    try:
        manifest = Bundle(folder, check_hashes=False).manifest
    except PaliEdgeError as error:
        yield Finding(topic, error.found, "problem", error.action)
        return
    targets = ", ".join(f"{name} {target.precision}" for name, target in manifest.targets.items())
    yield Finding(topic, f"{manifest.producer.checkpoint}, graphs for {targets}")
    for engine in manifest.engines:
        built_for = f"{engine.flavour} {engine.version}, compute capability {engine.compute_capability}"
        yield Finding("  engine", f"{built_for}, {engine.precision} from {engine.target}")
    if not manifest.engines and any(name != "cpu" for name in manifest.targets):
        command = f"`paliedge build {folder}` on the machine that will run them."
        yield Finding("  engine", "none yet", "note", command)
    findings = [_examine_engine(folder, manifest, trt, gpu) for trt in engines]
    usable = any(finding.value.startswith("an engine that fits") for finding in findings)
    for finding in findings:
        yield finding._replace(status="note") if usable and finding.status == "problem" else finding
    try:
        if isinstance(onnxruntime, PaliEdgeError):
            raise onnxruntime
        target = find_ort_target(folder, manifest)
    except PaliEdgeError as error:
        yield Finding("  on ONNX Runtime", error.found, "note" if usable else "problem", error.action)
    else:
        yield Finding("  on ONNX Runtime", f"can run {target}'s graphs")


def _examine_engine(folder: Path, manifest: Manifest, trt: TensorRt, gpu: GpuInfo | PaliEdgeError) -> Finding:
    topic = f"  on {describe(trt, ANY_GPU)}"
    if isinstance(gpu, PaliEdgeError):
        return Finding(topic, "no GPU to run on", "note", "Engines for TensorRT for RTX can be built here, not run.")
    try:
        engine = engine_for(manifest, trt)
        if engine is None:
            return _examine_missing_engine(topic, folder, manifest, trt)
        residency = check_run_memory(manifest, available_memory().available if gpu.integrated else gpu.free_memory)
    except ResourceError as error:
        return Finding(topic, f"{error.found}, where it takes {error.expected}", "problem", error.action)
    except PaliEdgeError as error:
        return Finding(topic, error.found, "note", error.action)
    value = f"an engine that fits, {engine.precision} from {engine.target}"
    if residency == "sequential":
        return Finding(topic, f"{value}, one part at a time", "note", "Run it with --sequential, or close programs.")
    return Finding(topic, value)


def _examine_missing_engine(topic: str, folder: Path, manifest: Manifest, trt: TensorRt) -> Finding:
    """A bundle without engines runs on ONNX Runtime; with engines for something else it is refused."""
    others = [
        engine.version + ("" if engine.compute_capability == ANY_GPU else f" on {engine.gpu}")
        for engine in manifest.engines
        if engine.flavour == trt.flavour
    ]
    found = f"only engines for {', '.join(others)}" if others else "no engine yet"
    status: Status = "problem" if others else "note"
    try:
        value = f"{found}; one can be built from {choose_target(manifest, trt)}"
    except EngineMismatchError as error:
        return Finding(topic, f"{found}; this is {error.found}", status, error.action)
    return Finding(topic, value, status, f"`paliedge build {folder} --flavour {trt.flavour}`")


def _starts(l4t: str, start: str) -> bool:
    return l4t == start or l4t.startswith(f"{start}.")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
