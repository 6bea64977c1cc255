"""TensorRT and TensorRT for RTX behind one name. The only module that imports either.

The two modules have one API, of the generation that is installed: TensorRT 10.3 (JetPack 6) to 11.x,
or TensorRT for RTX. Where they differ stands in this file and nowhere else. Knows no bundle.
"""

# Tests: tests/backends/trt/test_build.py.
from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from paliedge.bundle.manifest import Flavour
from paliedge.errors import EngineMismatchError, MissingExtraError, PaliEdgeError

ANY_GPU = "any"
"""The compute capability of a plan that is compiled for its device when it is loaded."""
_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
_OLDEST = (10, 3)
TARGETS: dict[Flavour, tuple[str, ...]] = {
    "tensorrt": ("jetpack7", "rtx", "jetpack6"),
    "rtx": ("rtx", "jetpack7", "jetpack6"),
}
_FIRST_WITH_TENSOR_SCATTER = (10, 15)


@dataclass(frozen=True)
class TensorRt:
    """An imported TensorRT.

    Attributes:
        flavour: which of the two.
        module: the imported module, `trt` by custom.
        version: such as "10.3.0"; engines are good for this version only.
    """

    flavour: Flavour
    module: Any
    version: str

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets whose graphs it can build, best first."""
        if self.flavour == "tensorrt" and _parse(self.version) < _FIRST_WITH_TENSOR_SCATTER:
            return ("jetpack6",)
        return TARGETS[self.flavour]

    @property
    def compiles_on_device(self) -> bool:
        """Whether plans are portable between GPUs, and can be built without one."""
        return self.flavour == "rtx"

    def network_flags(self) -> int:
        """Strongly typed: precision is in the graph. TensorRT 11 has no other networks, and may drop the flag."""
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    def set_builder_flags(self, config: Any) -> None:
        """TensorRT for RTX has to be told that we own all memory, or its engines cannot be captured."""
        flag = getattr(self.module.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        if flag is not None:
            config.set_flag(flag)

    def new_context(self, engine: Any) -> Any:
        """An execution context whose memory we own; None where TensorRT cannot make one.

        TensorRT for RTX compiles kernels for the shapes at hand in the background, unless it is told to do
        so at once: a CUDA graph would hold the slower ones that it uses meanwhile for ever.
        """
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        kinds = getattr(self.module, "DynamicShapesKernelSpecializationStrategy", None)
        if kinds is None:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
        return engine.create_execution_context(config)

    def attach_timing_cache(self, config: Any, content: bytes) -> Any:
        """A timing cache for the builder; None in TensorRT for RTX, which measures nothing."""
        if self.compiles_on_device:
            return None
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, False):  # made by another version or on another GPU
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return cache


def load_flavour(flavour: Flavour) -> TensorRt:
    """Import a TensorRT.

    Raises:
        MissingExtraError: it is not installed, or one of its libraries cannot be loaded.
        EngineMismatchError: it is older than 10.3.
    """
    try:
        module = importlib.import_module(_MODULES[flavour])
        found = TensorRt(flavour, module, module.__version__)
    except (ImportError, OSError, AttributeError) as error:  # a library is missing; a stray folder of that name
        raise _missing(flavour, (str(error) or type(error).__name__).splitlines()[0]) from error
    if flavour == "tensorrt" and _parse(found.version) < _OLDEST:
        raise EngineMismatchError(
            expected="TensorRT 10.3 (JetPack 6.2) or later",
            found=f"TensorRT {found.version}",
            action="Update JetPack, or use `--backend cpu`.",
        )
    return found


def find_flavours() -> Iterator[TensorRt | PaliEdgeError]:
    """Both flavours, best first: the import, or why there is none."""
    for flavour in _MODULES:
        try:
            yield load_flavour(flavour)
        except PaliEdgeError as error:
            yield error


def make_logger(trt: TensorRt, messages: list[str], details: list[str] | None = None) -> Any:
    """A TensorRT logger that keeps errors in `messages`, and what is no error in `details` if there is such a list."""
    ILogger = trt.module.ILogger
    severities = (ILogger.ERROR, ILogger.INTERNAL_ERROR)

    class Logger(ILogger):  # type: ignore[misc, valid-type]  # of the module at hand
        def __init__(self) -> None:
            ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in severities:
                messages.append(message)
            elif details is not None:
                details.append(message)

    return Logger()


@contextmanager
def quiet_deprecations() -> Iterator[None]:
    """TensorRT's bindings warn of names that are still the only ones on JetPack 6."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _missing(flavour: Flavour, found: str) -> MissingExtraError:
    if flavour == "rtx":
        return MissingExtraError(
            expected="TensorRT for RTX",
            found=found,
            action='Run `pip install "paliedge[rtx]"`.',
        )
    return MissingExtraError(
        expected="TensorRT's Python module",
        found=found,
        action="On a Jetson run `sudo apt install python3-libnvinfer` and make the environment with "
        "`python3 -m venv --system-site-packages`; elsewhere `pip install tensorrt`.",
    )


def _parse(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
