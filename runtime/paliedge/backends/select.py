"""Which engine runs a bundle: TensorRT, TensorRT for RTX, ONNX Runtime with CUDA, ONNX Runtime on the CPU.

An engine is used only where flavour, version and GPU are those it was built for. Knows no model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from paliedge.backends.session import Session
from paliedge.backends.trt.flavours import TensorRt, load_flavour
from paliedge.backends.trt.match import describe, describe_gpu, find_engine
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Flavour, Manifest
from paliedge.errors import DeviceError, EngineMismatchError, MissingExtraError, UsageError

Backend = Literal["auto", "tensorrt", "rtx", "onnxruntime", "cuda", "cpu"]
OnMismatch = Literal["error", "rebuild", "fallback"]
_BEST_FIRST: tuple[Backend, ...] = ("tensorrt", "rtx", "cuda", "cpu")
_ORT_TARGETS = ("cpu", "jetpack6", "jetpack7", "rtx")
"""Whose graphs ONNX Runtime takes, best first."""


@dataclass(frozen=True)
class BackendOptions:
    """What a user may say about the engine.

    Attributes:
        backend: "auto" takes the best that works. "onnxruntime" takes its CUDA provider where that works, else its
            CPU provider. "cuda" and "cpu" are ONNX Runtime with this provider only.
        on_mismatch: where the bundle's engines were built for something else: "error", "rebuild" them,
            or "fallback" to ONNX Runtime.
        threads: of ONNX Runtime's operators; 0 takes every core this process may use.
        use_cuda_graph: replay each decode step as one CUDA graph.
        sequential: keep only one of the two engines in memory, for boards that cannot hold both.
    """

    backend: Backend = "auto"
    on_mismatch: OnMismatch = "error"
    threads: int = 0
    use_cuda_graph: bool = True
    sequential: bool = False

    def __post_init__(self) -> None:
        """Refuse names that there are not.

        Raises:
            UsageError: one of these.
        """
        for name, given, known in (
            ("backend", self.backend, get_args(Backend)),
            ("on_mismatch", self.on_mismatch, get_args(OnMismatch)),
        ):
            if given not in known:
                raise UsageError(
                    expected=f"a {name} of {', '.join(known)}", found=repr(given), action="Give one of these."
                )
        if not isinstance(self.threads, int) or self.threads < 0:
            raise UsageError(
                expected="threads from 0 on", found=repr(self.threads), action="Give 0 for every core there is."
            )


Report = Callable[[str], None]
_LOG = logging.getLogger(__name__)


def open_session(bundle: Bundle, options: BackendOptions, report: Report) -> Session[Any, Any]:
    """Load the bundle into the best engine that there is; `report` gets one line that says which, and why.

    Raises:
        EngineMismatchError: the bundle's engines are for another TensorRT or GPU, or it has no graphs
            for the backend.
        MissingExtraError, DeviceError: what the wanted backend needs is not there.
    """
    if options.backend not in ("auto", "onnxruntime") and options.on_mismatch != "fallback":
        session, name = _open(options.backend, bundle, options, report)
        report(f"using {name}")
        return session
    reasons: list[str] = []
    mismatch: EngineMismatchError | None = None
    if options.backend == "auto" and not bundle.manifest.engines and _is_for_gpu(bundle.manifest):
        reasons.append(f"no engines yet: `paliedge build {bundle.folder}` on the machine that will run them")
    for backend in _candidates(bundle.manifest, options):
        if backend in ("cuda", "cpu") and mismatch and options.on_mismatch == "error":
            raise mismatch
        try:
            session, name = _open(backend, bundle, options, report)
        except (MissingExtraError, DeviceError) as error:
            _LOG.info("not %s: %s", backend, error)
            reasons.append(f"not {backend}: {error.found}. {error.action}")
        except EngineMismatchError as error:
            _LOG.info("not %s: %s", backend, error)
            if backend == "cpu" and reasons:  # the better backend's reason is the one to mend
                raise EngineMismatchError(
                    expected=error.expected, found=f"{error.found}; {reasons[0]}", action=error.action
                ) from error
            if backend == "cpu":
                raise
            if isinstance(error, _OtherEngineError):
                mismatch = mismatch or error
            reasons.append(f"not {backend}: {error.found}. {error.action}")
        else:
            why = reasons[:1] if backend in ("cuda", "cpu") and _is_for_gpu(bundle.manifest) else []
            report(f"using {name}" + "".join(f" ({reason})" for reason in why))
            return session
    raise MissingExtraError(
        expected="an engine to run on: TensorRT or ONNX Runtime",
        found="none that works: " + " | ".join(reasons),
        action='Run `pip install "paliedge[cpu]"`, or see `paliedge doctor`.',
    )


def _candidates(manifest: Manifest, options: BackendOptions) -> list[Backend]:
    """Best first; a TensorRT only where the bundle has an engine for it, or may be given one."""
    if options.backend == "onnxruntime":
        return ["cuda", "cpu"]
    if options.backend != "auto":
        return [options.backend, *(name for name in ("cuda", "cpu") if name != options.backend)]
    flavours = {engine.flavour for engine in manifest.engines}
    rebuild = options.on_mismatch == "rebuild"
    return [name for name in _BEST_FIRST if name in ("cuda", "cpu") or name in flavours or rebuild]


class _OtherEngineError(EngineMismatchError):
    """There are engines of this flavour, for something else than this machine has."""


def _open(backend: Backend, bundle: Bundle, options: BackendOptions, report: Report) -> tuple[Session[Any, Any], str]:
    if backend == "tensorrt" or backend == "rtx":
        return _open_tensorrt(backend, bundle, options, report)
    provider: Literal["cpu", "cuda"] = "cuda" if backend == "cuda" else "cpu"
    from paliedge.backends.ort import OrtSession

    session = OrtSession(bundle, find_ort_target(bundle.folder, bundle.manifest), options.threads, provider)
    return session, "ONNX Runtime on the CPU" if provider == "cpu" else "ONNX Runtime with CUDA"


def _open_tensorrt(
    flavour: Flavour, bundle: Bundle, options: BackendOptions, report: Report
) -> tuple[Session[Any, Any], str]:
    if not any(engine.flavour == flavour for engine in bundle.manifest.engines) and options.on_mismatch != "rebuild":
        raise EngineMismatchError(
            expected=f"an engine of the flavour '{flavour}' in {bundle.folder}",
            found="none there",
            action=f"Build one on this machine: `paliedge build {bundle.folder} --flavour {flavour}`.",
        )
    trt = load_flavour(flavour)
    from paliedge.backends.cuda import gpu_info
    from paliedge.backends.trt.session import TrtSession

    gpu_info()
    capability = describe_gpu(trt)[0]
    engine = find_engine(bundle.manifest, trt, capability)
    if engine is None and options.on_mismatch == "rebuild":
        from paliedge.backends.trt.build import build_engine

        engine = build_engine(bundle.folder, flavour, report=report)
        bundle = Bundle(bundle.folder)
    if engine is None:
        raise _other_engine(bundle, trt, capability)
    session = TrtSession(bundle, engine, trt, use_cuda_graph=options.use_cuda_graph, sequential=options.sequential)
    return session, describe(trt, capability)


def _other_engine(bundle: Bundle, trt: TensorRt, capability: str) -> _OtherEngineError:
    there = [
        f"version {engine.version}, compute capability {engine.compute_capability} ({engine.gpu})"
        for engine in bundle.manifest.engines
        if engine.flavour == trt.flavour
    ]
    return _OtherEngineError(
        expected=f"an engine built for {describe(trt, capability)}",
        found=f"engines for {'; '.join(there)}",
        action=f"Build one: `paliedge build {bundle.folder} --flavour {trt.flavour}`; or use --on-mismatch fallback.",
    )


def find_ort_target(folder: Path, manifest: Manifest) -> str:
    """The target whose graphs ONNX Runtime is given.

    Raises:
        EngineMismatchError: there is none that it has kernels for.
    """
    for name in _ORT_TARGETS:
        target = manifest.targets.get(name)
        if target and target.precision != "bf16":
            return name
    raise EngineMismatchError(
        expected=f"fp32 or fp16 graphs in {folder}",
        found="bf16 ones only, for which ONNX Runtime's CPU provider has no matrix product",
        action="Export the checkpoint again with --target cpu, or run it with TensorRT.",
    )


def _is_for_gpu(manifest: Manifest) -> bool:
    return bool(manifest.engines) or any(name != "cpu" for name in manifest.targets)
