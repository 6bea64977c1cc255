"""A plan loaded into TensorRT, and its execution contexts. Knows tensors by name, not what they mean."""

# Tests: tests/backends/trt/test_session.py.
from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paliedge.backends.cuda import DeviceBuffer, Stream, out_of_memory
from paliedge.backends.trt.flavours import TensorRt, make_logger, quiet_deprecations
from paliedge.bundle.manifest import Graph
from paliedge.errors import DeviceError, EngineMismatchError, ResourceError

_OUT_OF_MEMORY = re.compile("out of memory|OutOfMemory|cudaErrorMemoryAllocation", re.IGNORECASE)
_DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}


class LoadedEngine:
    """A deserialised plan. Its file's hash is checked before: a plan is executable code.

    Args:
        trt: the TensorRT that built it.
        path: the plan.
        graph: the graph it was built from, whose inputs and outputs it must have.

    Raises:
        EngineMismatchError: TensorRT refuses the plan, or it has other inputs and outputs.
        ResourceError: it does not fit in the GPU's memory.
    """

    def __init__(self, trt: TensorRt, path: Path, graph: Graph) -> None:
        self._trt = trt
        self._path = path
        self._messages: list[str] = []
        self._logger = make_logger(trt, self._messages)
        with quiet_deprecations():
            self._runtime = trt.module.Runtime(self._logger)
            with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                self._engine = self._runtime.deserialize_cuda_engine(content)
        try:
            if self._engine is None:
                raise self._refusal("; ".join(self._messages))
            self._check_tensors(graph)
        except BaseException:
            self.close()  # or the exception's traceback would keep the runtime
            raise

    def close(self) -> None:
        """Give its memory back; its contexts must be gone."""
        self._engine = self._runtime = self._logger = None

    @property
    def aliases(self) -> dict[str, str] | None:
        """Outputs that must lie where an input lies, by that input's name; None where TensorRT does not say."""
        if not hasattr(self._engine, "get_aliased_input_tensor"):
            return None
        output = self._trt.module.TensorIOMode.OUTPUT
        names = [name for name in self._tensor_names() if self._engine.get_tensor_mode(name) == output]
        found = {name: self._engine.get_aliased_input_tensor(name) for name in names}
        return {name: source for name, source in found.items() if source}

    def new_context(self, profile: int, stream: Stream) -> Context:
        """A context, which has no memory for its activations yet."""
        with quiet_deprecations():
            context = self._trt.new_context(self._engine)
        if context is None or not context.set_optimization_profile_async(profile, int(stream.handle)):
            context = None  # or the exception would keep it, and it the engine
            raise self._failed("an execution context")
        largest = int(self._engine.get_device_memory_size_for_profile_v2(profile))
        return Context(context, largest, self._path.name, self._messages)

    def _tensor_names(self) -> list[str]:
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def _check_tensors(self, graph: Graph) -> None:
        wanted = {tensor.name: _DTYPES[tensor.dtype] for tensor in (*graph.inputs, *graph.outputs)}
        found = {name: self._engine.get_tensor_dtype(name).name for name in self._tensor_names()}
        if wanted != found:
            odd = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
            raise self._mismatch(f"the inputs and outputs of {graph.file}", f"a difference at '{odd}'")

    def _refusal(self, found: str) -> EngineMismatchError | ResourceError:
        """What to say where TensorRT gives no engine, and `found` as its reason."""
        if _OUT_OF_MEMORY.search(found):
            return out_of_memory(found)
        return self._mismatch(f"an engine that {self._trt.module.__name__} {self._trt.version} loads", found)

    def _mismatch(self, expected: str, found: str) -> EngineMismatchError:
        return EngineMismatchError(
            expected=f"{self._path.name}: {expected}",
            found=found,
            action=f"Build it again: `paliedge build {self._path.parent} --force`.",
        )

    def _failed(self, expected: str) -> DeviceError:
        return _failure(self._path.name, expected, self._messages)


class Context:
    """An execution context: shapes and addresses that stay, and a launch.

    Args:
        context: TensorRT's.
        largest: bytes that its activations take with the largest shapes of its profile.
        name: the plan's, for messages.
        messages: where TensorRT's errors arrive.
    """

    def __init__(self, context: Any, largest: int, name: str, messages: list[str]) -> None:
        self._context = context
        self._largest = largest
        self._name = name
        self._messages = messages

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Shapes of inputs; they must lie in the context's profile."""
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise _failure(self._name, f"input '{name}' of shape {list(shape)}", self._messages)

    def lay_out(self) -> int:
        """Bytes that activations take with the shapes at hand, for which they are now laid out; all must be set."""
        return int(self._context.update_device_memory_size_for_shapes()) or self._largest

    def take_memory(self, scratch: DeviceBuffer) -> None:
        """Put activations into `scratch`, which other contexts may share, laid out for the shapes at hand."""
        if self.lay_out() > scratch.num_bytes:
            raise _failure(self._name, f"activations within {scratch.num_bytes} bytes", self._messages)
        self._context.set_device_memory(scratch.address, scratch.num_bytes)

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Addresses of inputs and outputs."""
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise _failure(self._name, f"an address for '{name}'", self._messages)

    def enqueue(self, stream: Stream) -> None:
        """Put the work on the stream; returns at once."""
        if not self._context.execute_async_v3(int(stream.handle)):
            raise _failure(self._name, "a run", self._messages)

    def close(self) -> None:
        self._context = None


def _failure(name: str, expected: str, messages: list[str]) -> DeviceError:
    return DeviceError(
        expected=f"{name}: {expected}",
        found="; ".join(messages[-3:]) or "a refusal of TensorRT, without a word",
        action="Run `paliedge doctor`; build the engine again with `paliedge build BUNDLE --force`.",
    )
