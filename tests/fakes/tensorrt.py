"""TensorRT without a GPU: the builder's half, which is all that a building process sees.

A plan is a magic word and JSON that names the ONNX graph. What real TensorRT refuses with a message
is refused with a message; what it would take and do wrong raises a Violation.
"""

from __future__ import annotations

import enum
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from tests.fakes.onnx_reader import OnnxGraph, read_onnx

MAGIC = b"FAKEPLAN"
GO = "go"
FIRST_WITH_TENSOR_SCATTER = (10, 15)
_MAX_OPSET_BEFORE = 20
_Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Settings:
    """Which TensorRT this is, and what shall go wrong.

    Attributes:
        fault: "parser", "refuses", "no builder", "SIGKILL", "SIGSEGV", "exit", "says nothing" or "noise".
        part: the start of the names of the graphs that the fault is about.
        seconds: that a build takes, unless a file called `GO` appears beside the log.
        log: a file that gets a line of JSON a build.
    """

    flavour: str
    version: str
    compute_capability: str
    log: str
    fault: str = ""
    part: str = ""
    seconds: float = 0.0

    @property
    def is_rtx(self) -> bool:
        return self.flavour == "rtx"

    @property
    def has_tensor_scatter(self) -> bool:
        major, minor = self.version.split(".")[:2]
        return self.is_rtx or (int(major), int(minor)) >= FIRST_WITH_TENSOR_SCATTER

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Settings:
        return cls(**json.loads(path.read_text()))


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def __init__(self) -> None:
        self.is_made = True

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def __init__(self) -> None:
        self.is_made = True


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 8
    BF16 = 7


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY = 0
    NONE = 1
    DETAILED = 2


class LayerInformationFormat(enum.Enum):
    ONELINE = 0
    JSON = 1


class TensorRtNetworkFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class RtxNetworkFlag(enum.IntEnum):
    STRONGLY_TYPED = 0


class TensorRtBuilderFlag(enum.Enum):
    FP16 = 0


class RtxBuilderFlag(enum.Enum):
    REQUIRE_USER_ALLOCATION = 27


class Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.path: Path | None = None
        self.graph: OnnxGraph | None = None


class Profile:
    def __init__(self) -> None:
        self.shapes: _Shapes = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        self.shapes[input] = (tuple(min), tuple(opt), tuple(max))


class TimingCache:
    def __init__(self, made_for: list[str], entries: list[str]) -> None:
        self.made_for = made_for
        self.entries = entries

    def serialize(self) -> bytes:
        return json.dumps([self.made_for, self.entries]).encode()


class BuilderConfig:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.profiles: list[_Shapes] = []
        self.pools: dict[MemoryPoolType, int] = {}
        self.flags: set[Any] = set()
        self.progress_monitor: Any = None
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.timing_cache: TimingCache | None = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self.pools[pool] = pool_size

    def add_optimization_profile(self, profile: Profile) -> int:
        ranges = profile.shapes.values()
        ordered = all(all(a <= b <= c for a, b, c in zip(*shapes, strict=True)) for shapes in ranges)
        if not profile.shapes or not ordered:
            return -1
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        if self._settings.is_rtx:
            raise AssertionError("TensorRT for RTX measures nothing")
        if not serialized_timing_cache:
            return TimingCache(self._made_for(), [])
        return TimingCache(*json.loads(serialized_timing_cache))

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if cache.made_for != self._made_for() and not ignore_mismatch:
            return False
        self.timing_cache = cache
        return True

    def _made_for(self) -> list[str]:
        return [self._settings.version, self._settings.compute_capability]


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text

    def node_name(self) -> str:
        return "node_0"

    def node_operator(self) -> str:
        return "TensorScatter"


class _OfAModule:
    """A class of one module; each module has its own subclass."""

    settings: ClassVar[Settings]


class OnnxParser(_OfAModule):
    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network = network
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        path = Path(model)
        graph = read_onnx(path)
        missing = [name for name in graph.weight_files if not (path.parent / name).is_file()]
        too_new = not self.settings.has_tensor_scatter and (
            graph.opset > _MAX_OPSET_BEFORE or "TensorScatter" in graph.operators
        )
        if missing or too_new or (self.settings.fault == "parser" and path.name.startswith(self.settings.part)):
            self._errors.append(ParserError(f"no importer for opset {graph.opset}" if not missing else f"no {missing}"))
            return False
        self._network.path, self._network.graph = path, graph
        return True


class Builder(_OfAModule):
    def __init__(self, logger: ILogger) -> None:
        assert logger.is_made, "ILogger.__init__ was not called"
        if self.settings.fault == "no builder":
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig(self.settings)

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes | None:
        settings, graph, path = self.settings, network.graph, network.path
        assert graph is not None
        assert path is not None
        assert network.flags == 1 << (0 if settings.is_rtx else 1), "the network is not strongly typed"
        assert config.progress_monitor.is_made, "IProgressMonitor.__init__ was not called"
        self._write_log(path, config)
        found = self._find_mistake(graph, config)
        if path.name.startswith(settings.part):
            found = found or self._go_wrong(settings.fault)
        if found:
            self._logger.log(ILogger.WARNING, "something else that is no reason")
            self._logger.log(ILogger.ERROR, found)
            return None
        _report_progress(config.progress_monitor, settings.seconds, Path(settings.log).with_name(GO))
        if config.timing_cache:
            config.timing_cache.entries.append(path.name)
        plan = {
            "process": os.getpid(),  # as no two plans of real TensorRT are the same
            "version": settings.version,
            "compute_capability": "any" if settings.is_rtx else settings.compute_capability,
            "onnx": str(path),
            "profiles": config.profiles,
            "aliases": graph.aliases,
            "weight_bytes": sum((path.parent / name).stat().st_size for name in graph.weight_files),
            "user_allocation": not settings.is_rtx or RtxBuilderFlag.REQUIRE_USER_ALLOCATION in config.flags,
            "is_detailed": config.profiling_verbosity is ProfilingVerbosity.DETAILED,
        }
        if settings.is_rtx and plan["is_detailed"]:
            self._logger.log(ILogger.VERBOSE, _layers_in_lines(plan))
        return MAGIC + json.dumps(plan).encode()

    def _find_mistake(self, graph: OnnxGraph, config: BuilderConfig) -> str:
        """What TensorRT would say about the profiles."""
        if not config.profiles:
            return "Network has dynamic or shape inputs, but no optimization profile has been defined."
        for profile in config.profiles:
            for tensor in graph.inputs:
                if tensor.name not in profile:
                    return f"Input tensor: {tensor.name} has no profile"
                for shape in profile[tensor.name]:
                    fixed = [size for size in tensor.shape if isinstance(size, int)]
                    given = [size for size, known in zip(shape, tensor.shape, strict=True) if isinstance(known, int)]
                    if given != fixed:
                        return f"{tensor.name}: the profile's {shape} is not within {tensor.shape}"
        return ""

    def _write_log(self, path: Path, config: BuilderConfig) -> None:
        event = {
            "graph": path.name,
            "process": os.getpid(),
            "workspace": config.pools[MemoryPoolType.WORKSPACE],
            "profiles": config.profiles,
            "known_timings": list(config.timing_cache.entries) if config.timing_cache else [],
        }
        with Path(self.settings.log).open("a") as stream:
            stream.write(json.dumps(event) + "\n")

    def _go_wrong(self, fault: str) -> str:
        if fault.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[fault])
        elif fault == "exit":
            os.write(2, b"a library says something\n")
            os._exit(3)
        elif fault == "says nothing":
            os._exit(0)
        elif fault == "noise":
            os.write(1, b"[TRT] a library prints to stdout\n")
        return "Error Code 10: Could not find any implementation for node" if fault == "refuses" else ""


class EngineInspector:
    """One product a profile, which reads all weights."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        assert format is LayerInformationFormat.JSON
        weights = {"Name": "w", "Dimensions": [self._plan["weight_bytes"]], "Format/Datatype": "Int8"}
        layers: list[Any] = ["gemm"] * len(self._plan["profiles"])  # without details there are names alone
        if self._plan["is_detailed"]:
            layers = [
                {"Name": f"gemm [profile {index}]", "LayerType": "gemm", "Inputs": [], "Outputs": []}
                | {"Constants": [weights], "Metadata": "[ONNX Layer: MatMul_0]"}
                for index in range(len(self._plan["profiles"]))
            ]
        return json.dumps({"Layers": layers})


class InspectedEngine:
    """What a building process can see of an engine."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self.num_optimization_profiles = len(plan["profiles"])

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return 1001 + profile_index

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self._plan)


class InspectingRuntime:
    """Of a building process, which loads plans to look at them."""

    def __init__(self, logger: ILogger) -> None:
        assert logger.is_made, "ILogger.__init__ was not called"

    def deserialize_cuda_engine(self, serialized_engine: Any) -> InspectedEngine:
        return InspectedEngine(json.loads(bytes(serialized_engine)[len(MAGIC) :]))


def _layers_in_lines(plan: dict[str, Any]) -> str:
    """As TensorRT for RTX logs them."""
    weights = f"{{ Name: w, Dimensions: [{plan['weight_bytes']}], Strides: [1], StrideOrder: [0], Datatype: Int8, F }}"
    return "Engine Layer Information:\n" + "\n".join(
        f"Name: gemm [profile {index}], LayerType: gemm, Inputs: [], Constants: [ {weights}], Outputs: [], "
        "TacticName: , StreamId: 0, Metadata: [ONNX Layer: MatMul_0]"
        for index in range(len(plan["profiles"]))
    )


def make_module(settings: Settings, runtime: Mapping[str, type] | None = None) -> ModuleType:
    """The module; `runtime` holds the classes that only a process with a GPU needs."""
    made = ModuleType("tensorrt_rtx" if settings.is_rtx else "tensorrt")
    vars(made).update(
        {
            "__version__": settings.version,
            "NetworkDefinitionCreationFlag": RtxNetworkFlag if settings.is_rtx else TensorRtNetworkFlag,
            "BuilderFlag": RtxBuilderFlag if settings.is_rtx else TensorRtBuilderFlag,
            **{kind.__name__: kind for kind in (ILogger, IProgressMonitor, DataType, TensorIOMode, MemoryPoolType)},
            **{kind.__name__: kind for kind in (ProfilingVerbosity, LayerInformationFormat)},
            "Runtime": InspectingRuntime,
            "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
            **({kind.__name__: kind for kind in (DynamicShapesKernelSpecializationStrategy,) if settings.is_rtx}),
            **{kind.__name__: type(kind.__name__, (kind,), {"settings": settings}) for kind in (Builder, OnnxParser)},
            **(runtime or {}),
        }
    )
    return made


def _report_progress(monitor: Any, seconds: float, go: Path) -> None:
    """One phase of four steps, a step having phases of its own, as TensorRT has."""
    num_steps = 4
    monitor.phase_start("Building", None, num_steps)
    for step in range(num_steps):
        monitor.phase_start("Tactics", "Building", 2)
        monitor.step_complete("Tactics", 0)
        monitor.phase_finish("Tactics")
        assert monitor.step_complete("Building", step)
        end = time.monotonic() + seconds / num_steps
        while time.monotonic() < end and not go.exists():
            time.sleep(0.01)
    monitor.phase_finish("Building")
