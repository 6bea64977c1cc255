"""What this machine has, which engines of a bundle fit it, and what to do about what is missing.

Reads and asks, changes nothing; as useful without a GPU as with one.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from paliedge.backends import find_ort_target
from paliedge.building import choose_target, describe, engine_for, probe_gpu
from paliedge.bundle import Bundle
from paliedge.errors import PaliEdgeError, ResourceError
from paliedge.flavours import ANY_GPU, TensorRt, find_flavours
from paliedge.manifest import Manifest
from paliedge.planning import available_memory, check_run_memory

Status = Literal["ok", "note", "problem"]
_RELEASE = re.compile(r"# R(\d+) \(release\), REVISION: ([\d.]+)")
_JETPACK = {"36.3": "6.0", "36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "38": "7.0 or 7.1", "39.2": "7.2"}
"""JetPack by the longest matching start of its L4T version."""
_PACKAGES = ("paliedge", "numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu", "cuda-bindings")
_PYTHON_OF_JETPACK_6 = (3, 10)
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
    gpu = probe_gpu()
    flavours = list(find_flavours())
    engines = [trt for trt in flavours if isinstance(trt, TensorRt)]
    return [
        *_examine_system(root),
        *_examine_packages(),
        *(_examine_flavour(trt) for trt in flavours),
        _examine_gpu(gpu),
        *_examine_resources(bundles),
        *(finding for folder in bundles for finding in _examine_bundle(folder, engines, gpu)),
    ]


def _examine_system(root: Path) -> Iterator[Finding]:
    yield Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    yield Finding("python", platform.python_version())
    model = _read(root / "proc/device-tree/model").strip("\0\n ")
    release = _RELEASE.search(_read(root / "etc/nv_tegra_release"))
    if not release:
        yield Finding("jetson", "no" + (f", {model}" if model else ""))
        return
    l4t = f"{release[1]}.{release[2]}"
    jetpack = next((name for start, name in sorted(_JETPACK.items(), reverse=True) if _starts(l4t, start)), None)
    yield Finding("jetson", model or "unknown model")
    if jetpack:
        yield Finding("jetpack", f"{jetpack} (L4T {l4t})")
    else:
        yield Finding("jetpack", f"unknown (L4T {l4t})", "note", "paliedge knows JetPack 6.1 to 6.2.1 and 7.2.")
    yield _examine_power_mode()


def _examine_power_mode() -> Finding:
    try:
        answer = subprocess.run(
            ["nvpmodel", "-q"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("power mode", "unknown", "note", f"`nvpmodel -q` did not answer: {type(error).__name__}.")
    mode = re.search(r"NV Power Mode: *(\S+)", answer)
    if not mode:
        return Finding("power mode", "unknown", "note", "Ask `sudo nvpmodel -q`.")
    fastest = mode[1].startswith("MAXN")
    action = "" if fastest else "`sudo nvpmodel -m 0` is the fastest on most boards; then `sudo jetson_clocks`."
    return Finding("power mode", mode[1], "ok" if fastest else "note", action)


def _examine_packages() -> Iterator[Finding]:
    for name in _PACKAGES:
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            if name in ("onnxruntime-gpu", "cuda-bindings"):
                yield Finding(name, "not installed", "note", "Only needed to run on a GPU.")
            elif name != "onnxruntime":  # its finding comes with its providers
                yield Finding(name, "not installed", "problem", "Install paliedge again.")
    try:
        from paliedge.ort_session import available_providers
    except PaliEdgeError as error:
        yield Finding("onnxruntime", error.found, "note", error.action)
    else:
        yield Finding("providers", ", ".join(available_providers()))


def _examine_flavour(found: TensorRt | PaliEdgeError) -> Finding:
    if isinstance(found, PaliEdgeError):
        return Finding(found.expected, found.found, "note", found.action)
    return Finding(describe(found, ANY_GPU).rsplit(" ", 1)[0], found.version)


def _examine_gpu(gpu: object) -> Finding:
    if isinstance(gpu, PaliEdgeError):
        return Finding("gpu", gpu.found, "note", "Bundles run on the CPU; engines need an NVIDIA GPU and its driver.")
    return Finding("gpu", str(gpu))


def _examine_resources(bundles: Sequence[Path]) -> Iterator[Finding]:
    memory = available_memory()
    yield Finding("memory", f"{memory.available / 1e9:.1f} GB free, {memory.swap / 1e9:.1f} GB of swap free")
    for folder in bundles or [Path()]:
        if folder.exists():
            yield Finding("disk", f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free at {folder.resolve()}")


def _examine_bundle(folder: Path, engines: Sequence[TensorRt], gpu: object) -> Iterator[Finding]:
    topic = f"bundle {folder}"
    try:
        manifest = Bundle(folder, check_hashes=False).manifest
    except PaliEdgeError as error:
        yield Finding(topic, error.found, "problem", error.action)
        return
    targets = ", ".join(f"{name} {target.precision}" for name, target in manifest.targets.items())
    yield Finding(topic, f"{manifest.producer.checkpoint}, graphs for {targets}")
    usable = False
    for trt in engines:
        finding = _examine_engine(folder, manifest, trt, gpu)
        usable |= finding.status == "ok"
        yield finding
    try:
        target = find_ort_target(folder, manifest)
    except PaliEdgeError as error:
        yield Finding("  on ONNX Runtime", error.found, "note" if usable else "problem", error.action)
    else:
        yield Finding("  on ONNX Runtime", f"can run {target}'s graphs")


def _examine_engine(folder: Path, manifest: Manifest, trt: TensorRt, gpu: object) -> Finding:
    topic = f"  on {describe(trt, ANY_GPU)}"
    if isinstance(gpu, PaliEdgeError):
        return Finding(topic, "no GPU to run on", "note", "Engines for TensorRT for RTX can be built here, not run.")
    command = f"`paliedge build {folder} --flavour {trt.flavour}`"
    try:
        engine = engine_for(manifest, trt)
        if engine is None:
            return Finding(
                topic, f"no engine yet; it can be built from {choose_target(manifest, trt)}", "note", command
            )
        check_run_memory(manifest, available_memory().available)
    except ResourceError as error:
        return Finding(topic, f"{error.found}, where it takes {error.expected}", "problem", error.action)
    except PaliEdgeError as error:
        return Finding(topic, error.found, "note", error.action)
    return Finding(topic, f"an engine that fits, {engine.precision} from {engine.target}")


def _starts(l4t: str, start: str) -> bool:
    return l4t == start or l4t.startswith(f"{start}.")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
