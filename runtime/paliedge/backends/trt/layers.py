"""Layer lists of engines: from the log of a build, or from an engine that is loaded.

TensorRT for RTX prints an engine's layers while it builds, which needs no GPU. TensorRT has an inspector. Both tell
kernels, tensors and types with DETAILED verbosity alone.
"""

# Tests: tests/backends/trt/test_layers.py.
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from paliedge.backends.trt.flavours import TensorRt, make_logger, quiet_deprecations
from paliedge.bundle.layer_list import ITEM_BYTES, Layer, LayerList, LayerTensor

_LAYER = re.compile(
    r"^Name: (?P<name>.+?), LayerType: (?P<kind>[^,]+), Inputs: \[(?P<inputs>.*?)\]"
    r"(?:, Constants: \[(?P<constants>.*?)\])?, Outputs: \[(?P<outputs>.*?)\], (?:TacticName|ParameterType|StreamId)"
)
_TENSOR = re.compile(r"\{ Name: ([^,]+)(?:, Location: \w+)?, Dimensions: \[([^\]]*)\].*?, Datatype: (\w+)")
_NODE = re.compile(r"ONNX Layer: ([^\]]+)\]")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_MYELIN = re.compile(r"_myl(\d+)(?:_\d+)*$")
"""Kernels are numbered by the builds that they come from, and each profile has one."""
_WAITING = frozenset(("wait", "signal", "shape_call", "ShapeHostToDevice"))
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
_SCRATCH = re.compile(r"Total Activation Memory: (\d+) bytes")
_INSPECTED_TYPES = {
    "FP32": "Float",
    "FP16": "Half",
    "INT8": "Int8",
    "INT32": "Int32",
    "INT64": "Int64",
    "BF16": "BFloat16",
}


def layers_from_log(messages: Iterable[str]) -> LayerList:
    """What a build says of its engine, its messages kept from VERBOSE on."""
    found: list[Layer] = []
    weights, scratch = 0, list[int]()
    for message in messages:
        if match := _WEIGHTS.search(message):
            weights = max(weights, int(match[1]))
        elif match := _SCRATCH.search(message):
            scratch.append(int(match[1]))
        for line in message.splitlines():
            if (match := _LAYER.match(line)) and match["kind"] not in _WAITING:
                found.append(_layer_from_line(match, line))
    return LayerList(layers=tuple(_with_profiles(found)), weight_bytes=weights, scratch_bytes=tuple(scratch))


def layers_from_inspector(content: str, scratch_bytes: tuple[int, ...]) -> LayerList:
    """What `IEngineInspector.get_engine_information` says in JSON."""
    layers = msgspec.json.decode(content, type=dict[str, Any])["Layers"]
    found = [
        Layer(
            name=layer["Name"],
            kind=layer["LayerType"],
            profile=0,
            inputs=tuple(map(_inspected, layer.get("Inputs", ()))),
            constants=tuple(map(_inspected, layer.get("Constants", ()))),
            outputs=tuple(map(_inspected, layer.get("Outputs", ()))),
            nodes=tuple(_NODE.findall(layer.get("Metadata", ""))),
        )
        for layer in layers
        if layer["LayerType"] not in _WAITING
    ]
    return LayerList(layers=tuple(_with_profiles(found)), weight_bytes=0, scratch_bytes=scratch_bytes)


def list_layers(trt: TensorRt, plan: Any, log: list[str] | None) -> LayerList | None:
    """The layers of a plan: by the log of its build if there is one, else by the plan itself, which is loaded for it.

    None where this TensorRT tells them in another way, or tells no weights; nothing rests on them.
    """
    try:
        found = layers_from_log(log) if log is not None else _inspect(trt, plan)
    except (KeyError, TypeError, msgspec.DecodeError):
        return None
    return found if found and any(layer.constants for layer in found.layers) else None


def _inspect(trt: TensorRt, plan: Any) -> LayerList | None:
    with quiet_deprecations():
        engine = trt.module.Runtime(make_logger(trt, [])).deserialize_cuda_engine(plan)
        if engine is None:
            return None
        scratch = map(engine.get_device_memory_size_for_profile_v2, range(engine.num_optimization_profiles))
        content = engine.create_engine_inspector().get_engine_information(trt.module.LayerInformationFormat.JSON)
        return layers_from_inspector(content, tuple(scratch))


def _layer_from_line(match: re.Match[str], line: str) -> Layer:
    inputs, constants, outputs = (tuple(_tensors(match[part] or "")) for part in ("inputs", "constants", "outputs"))
    return Layer(
        name=match["name"],
        kind=match["kind"],
        profile=0,
        inputs=inputs,
        constants=constants,
        outputs=outputs,
        nodes=tuple(_NODE.findall(line)),
    )


def _tensors(text: str) -> Iterator[LayerTensor]:
    for name, sizes, dtype in _TENSOR.findall(text):
        yield _tensor(name, dtype, [int(size) for size in sizes.split(",") if size])


def _inspected(tensor: dict[str, Any]) -> LayerTensor:
    described = str(tensor.get("Datatype") or tensor.get("Format/Datatype", ""))
    words = [_INSPECTED_TYPES.get(word, word) for word in described.replace("(", " ").replace(")", " ").split()]
    dtype = next((word for word in words if word in ITEM_BYTES), described)
    return _tensor(tensor["Name"], dtype, tensor["Dimensions"])


def _tensor(name: str, dtype: str, shape: Sequence[int]) -> LayerTensor:
    if dtype not in ITEM_BYTES:
        raise KeyError(dtype)
    return LayerTensor(_PROFILE.sub("", name).strip(), dtype, tuple(shape))


def _with_profiles(layers: Sequence[Layer]) -> Iterator[Layer]:
    """`layers` with their profiles: they stand profile by profile, and only some have its number in their names."""
    builds: list[str] = []
    for layer in layers:
        if named := _PROFILE.search(layer.name):
            profile = int(named[1])
        elif numbered := _MYELIN.search(layer.name):
            if numbered[1] not in builds:
                builds.append(numbered[1])
            profile = builds.index(numbered[1])
        else:
            profile = 0
        yield msgspec.structs.replace(layer, profile=profile)
