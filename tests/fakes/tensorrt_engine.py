"""TensorRT without a GPU: plans loaded and run, by ONNX Runtime on the CPU, on a fake GPU's memory and streams."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tests.fakes.cuda_runtime import FakeCuda
from tests.fakes.cuda_types import Operation, StreamHandle
from tests.fakes.memory import GARBAGE
from tests.fakes.onnx_reader import OnnxGraph, Tensor, read_onnx
from tests.fakes.tensorrt import (
    MAGIC,
    DataType,
    DynamicShapesKernelSpecializationStrategy,
    ExecutionContextAllocationStrategy,
    ILogger,
    Settings,
    TensorIOMode,
)

if TYPE_CHECKING:
    import onnxruntime

ALIGNMENT = 256
_NUMPY: dict[str, Any] = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}


@dataclass
class _Core:
    """What engine and contexts share, so that neither keeps the other alive."""

    settings: Settings
    cuda: FakeCuda
    logger: ILogger
    plan: dict[str, Any]
    graph: OnnxGraph
    num_contexts: int = 0
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = {tensor.name: tensor for tensor in (*self.graph.inputs, *self.graph.outputs)}

    @property
    def aliases(self) -> dict[str, str]:
        found: dict[str, str] = self.plan["aliases"]
        return found

    def scratch_bytes(self, profile: int) -> int:
        """More for prefill than for decode, and no multiple of anything."""
        largest = self.plan["profiles"][profile]
        return scratch_of({name: shapes[2] for name, shapes in largest.items()})

    def error(self, text: str) -> None:
        self.logger.log(ILogger.ERROR, text)


def scratch_of(shapes: Mapping[str, Sequence[int]]) -> int:
    return 1001 + sum(int(prod(shape)) for shape in shapes.values())


class Runtime:
    settings: ClassVar[Settings]
    cuda: ClassVar[FakeCuda]

    def __init__(self, logger: ILogger) -> None:
        assert logger.is_made, "ILogger.__init__ was not called"
        self._logger = logger
        self.cuda.born("runtime")

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine | None:
        with memoryview(serialized_engine) as view:
            content = bytes(view)
        plan = json.loads(content[len(MAGIC) :]) if content.startswith(MAGIC) else {}
        mistake = self._find_mistake(plan)
        if mistake:
            self._logger.log(ILogger.ERROR, mistake)
            return None
        self.cuda.reserved += plan["weight_bytes"]
        core = _Core(self.settings, self.cuda, self._logger, plan, read_onnx(Path(plan["onnx"])))
        kind = ScatterEngine if self.settings.has_tensor_scatter else Engine
        kind = RtxEngine if self.settings.is_rtx else kind
        return kind(core, self)

    def _find_mistake(self, plan: dict[str, Any]) -> str:
        settings = self.settings
        if not plan:
            return "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed."
        if plan["version"] != settings.version:
            return f"The engine plan file expects library version {plan['version']} got {settings.version}"
        if plan["compute_capability"] not in ("any", self.cuda.compute_capability):
            return f"The engine plan file is of an incompatible device, compute {plan['compute_capability']}"
        if plan["weight_bytes"] > self.cuda.free_memory:
            return "[defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)"
        return ""

    def __del__(self) -> None:
        self.cuda.gone("runtime")


class Engine:
    def __init__(self, core: _Core, runtime: Runtime) -> None:
        self._core = core
        self._runtime = runtime  # which the real bindings keep alive too
        core.cuda.born("engine")

    def __del__(self) -> None:
        self._core.cuda.gone("engine")
        self._core.cuda.reserved -= self._core.plan["weight_bytes"]
        if self._core.num_contexts:
            self._core.cuda.rules.violations.append("an engine went before its contexts")

    @property
    def num_io_tensors(self) -> int:
        return len(self._core.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._core.tensors)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._core.tensors[name].dtype]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        is_input = self._core.tensors[name] in self._core.graph.inputs
        return TensorIOMode.INPUT if is_input else TensorIOMode.OUTPUT

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._core.scratch_bytes(profile_index)

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> ExecutionContext:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED, "TensorRT would allocate by itself"
        return ExecutionContext(self._core)


class ScatterEngine(Engine):
    """Of a TensorRT that has KVCacheUpdate."""

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._core.aliases.get(name)


class RuntimeConfig:
    """How a context of TensorRT for RTX shall work."""

    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy


class RtxEngine(ScatterEngine):
    """Of TensorRT for RTX, which compiles kernels when it runs."""

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, strategy: RuntimeConfig | ExecutionContextAllocationStrategy) -> Any:
        if not isinstance(strategy, RuntimeConfig):
            return super().create_execution_context(strategy)
        made = super().create_execution_context(strategy.strategy)
        made.compiles_at_once = (
            strategy.dynamic_shapes_kernel_specialization_strategy is DynamicShapesKernelSpecializationStrategy.EAGER
        )
        return made


class ExecutionContext:
    def __init__(self, core: _Core) -> None:
        self._core = core
        self._profile = 0
        self._scratch: tuple[int, int] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._laid_out_for: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._has_run = False
        self.compiles_at_once = not core.settings.is_rtx
        core.num_contexts += 1
        core.cuda.born("context")

    def __del__(self) -> None:
        self._core.num_contexts -= 1
        self._core.cuda.gone("context")

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._core.cuda.stream(stream_handle)
        if profile_index >= len(self._core.plan["profiles"]):
            self._core.error(f"Optimization profile {profile_index} is out of range")
            return False
        self._profile, self._shapes, self._has_run = profile_index, {}, False
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = (memory, size)

    def update_device_memory_size_for_shapes(self) -> int:
        if self._all_shapes() is None:
            return 0
        self._laid_out_for = dict(self._shapes)
        return scratch_of(self._shapes)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        profile = self._core.plan["profiles"][self._profile]
        if name not in profile:
            self._core.error(f"no input {name}")
            return False
        smallest, _, largest = profile[name]
        inside = len(shape) == len(smallest)
        if not inside or any(not a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True)):
            self._core.error(
                f"Set dimension {list(shape)} for tensor {name} does not satisfy any optimization profiles"
            )
            return False
        self._has_run = self._has_run and self._shapes.get(name) == tuple(shape)
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._core.tensors:
            self._core.error(f"no tensor {name}")
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda = self._core.cuda
        with cuda.lock:
            stream = cuda.stream(stream_handle)
            shapes = self._all_shapes()
            unbound = [name for name in self._core.tensors if not self._addresses.get(name)]
            if shapes is None or unbound:
                self._core.error(f"no address for {unbound}" if unbound else "input shapes are missing or differ")
                return False
            self._check_memory(shapes)
            if stream.captured is not None:
                self._check_capture()
            scratch = self._scratch or (0, 0)
            cuda.enqueue(stream, Operation(self._make_run(shapes, stream), scratch))
            self._has_run = True
        return True

    def _all_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Every tensor's shape; None where input shapes are missing or give one name two sizes."""
        sizes: dict[str, int] = {}
        for tensor in self._core.graph.inputs:
            if tensor.name not in self._shapes:
                return None
            for known, given in zip(tensor.shape, self._shapes[tensor.name], strict=True):
                if isinstance(known, str) and sizes.setdefault(known, given) != given:
                    return None
        return {
            tensor.name: tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
            for tensor in self._core.tensors.values()
        }

    def _check_memory(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Addresses reach live memory, are aligned, and only what must share memory does."""
        cuda, core = self._core.cuda, self._core
        is_laid_out = self._laid_out_for == self._shapes
        needed = scratch_of(self._shapes) if is_laid_out else core.scratch_bytes(self._profile)
        if self._scratch is None or self._scratch[1] < needed:
            raise cuda.rules.broken("an execution context without enough device memory")
        taken = {"scratch": self._scratch}
        for name, shape in shapes.items():
            taken[name] = (self._addresses[name], prod(shape) * np.dtype(_NUMPY[core.tensors[name].dtype]).itemsize)
        for name, (address, num_bytes) in taken.items():
            if address % ALIGNMENT:
                raise cuda.rules.broken(f"{name} lies at {address:#x}, no multiple of {ALIGNMENT}")
            cuda.memory.view(address, num_bytes, "kernel")
        for output in (*(tensor.name for tensor in core.graph.outputs), "scratch"):
            source = core.aliases.get(output)
            if source and self._addresses[output] != self._addresses[source]:
                raise cuda.rules.broken(f"{output} must lie where {source} lies")
            start, size = taken[output]
            for name, (other, other_size) in taken.items():
                if name not in (output, source) and start < other + other_size and other < start + size:
                    raise cuda.rules.broken(f"{output} and {name} share memory")

    def _check_capture(self) -> None:
        if not self._has_run:
            raise self._core.cuda.rules.broken("a first run with these shapes is captured; TensorRT is lazy in it")
        if not self.compiles_at_once:
            raise self._core.cuda.rules.broken("a captured context whose better kernels are still being compiled")
        if not self._core.plan["user_allocation"]:
            raise self._core.cuda.rules.broken("a captured engine that allocates by itself")

    def _make_run(self, shapes: dict[str, tuple[int, ...]], stream: StreamHandle) -> Callable[[], None]:
        """The work with what is bound now. The graph that it may go into needs the context as it is now."""
        weak, bound = weakref.ref(self), self._state()
        core, addresses, is_captured = self._core, dict(self._addresses), stream.captured is not None
        scratch = self._scratch

        def run() -> None:
            living = weak()
            if living is None:
                raise core.cuda.rules.broken("a context was destroyed while its work waited")
            if is_captured and living._state() != bound:
                raise core.cuda.rules.broken("a context was changed after it was captured")
            assert scratch is not None
            core.cuda.memory.view(*scratch, "kernel")[:] = GARBAGE
            _execute(core, shapes, addresses)

        return run

    def _state(self) -> tuple[Any, ...]:
        return self._profile, self._scratch, dict(self._shapes), dict(self._addresses)


def runtime_class(settings: Settings, cuda: FakeCuda) -> type[Runtime]:
    """The Runtime of one module."""
    return type("Runtime", (Runtime,), {"settings": settings, "cuda": cuda})


def _execute(core: _Core, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
    def view(name: str) -> Any:
        dtype = np.dtype(_NUMPY[core.tensors[name].dtype])
        content = core.cuda.memory.view(addresses[name], prod(shapes[name]) * dtype.itemsize, "kernel")
        return content.view(dtype).reshape(shapes[name])

    inputs = {tensor.name: view(tensor.name).copy() for tensor in core.graph.inputs}
    names = [tensor.name for tensor in core.graph.outputs]
    for name, array in zip(names, _load(core.plan["onnx"]).run(names, inputs), strict=True):
        view(name)[:] = array


@cache
def _load(path: str) -> onnxruntime.InferenceSession:
    import onnxruntime as ort  # slow, and nothing for a process that only builds

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
