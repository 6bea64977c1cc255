"""What the fakes have is what the real modules have, by name and number."""

from __future__ import annotations

from pathlib import Path

import onnx

from tests.fakes import tensorrt as fake
from tests.fakes import tensorrt_engine as engine
from tests.fakes.cuda_runtime import FakeCuda
from tests.fakes.cuda_types import CONSTANTS, ENUMS
from tests.fakes.onnx_reader import read_onnx


def test_cudas_names_and_numbers_are_the_real_ones() -> None:
    from cuda.bindings import runtime

    fake = FakeCuda().module()
    for name in (name for name in dir(fake) if name.startswith("cuda")):
        assert hasattr(runtime, name), name
    for name, value in CONSTANTS.items():
        assert getattr(runtime, name) == value
    for kind in ENUMS:
        for member in kind:
            assert int(getattr(getattr(runtime, kind.__name__), member.name)) == member


def test_graphs_are_read_as_onnx_reads_them(bundles: dict[str, Path]) -> None:
    paths = sorted(bundles["paligemma2"].glob("*.onnx"))
    assert len(paths) == 4
    for path in paths:
        found, model = read_onnx(path), onnx.load(path, load_external_data=False)
        assert found.opset == next(opset.version for opset in model.opset_import if not opset.domain)
        assert found.operators == {node.op_type for node in model.graph.node}
        for tensors, infos in ((found.inputs, model.graph.input), (found.outputs, model.graph.output)):
            assert [tensor.name for tensor in tensors] == [info.name for info in infos]
            assert [tensor.shape for tensor in tensors] == [
                tuple(size.dim_param or size.dim_value for size in info.type.tensor_type.shape.dim) for info in infos
            ]
        assert bool(found.aliases) == (path.name == "decoder.opset24.onnx")
        assert found.weight_files == {f"{path.name.split('.')[0]}.fp16.weights"} | (
            {"embed_tokens.fp16.weights"} if "decoder" in path.name else set()
        )


def test_tensorrts_names_are_the_real_ones() -> None:
    """TensorRT for RTX is of TensorRT 11's generation and can be imported without a GPU."""
    import tensorrt_rtx as real

    classes: dict[str, type] = {
        "Builder": fake.Builder,
        "OnnxParser": fake.OnnxParser,
        "ParserError": fake.ParserError,
        "IBuilderConfig": fake.BuilderConfig,
        "IOptimizationProfile": fake.Profile,
        "ITimingCache": fake.TimingCache,
        "Runtime": engine.Runtime,
        "ICudaEngine": engine.RtxEngine,
        "IRuntimeConfig": engine.RuntimeConfig,
        "IExecutionContext": engine.ExecutionContext,
        "EngineInspector": fake.EngineInspector,
        "ILogger": fake.ILogger,
    }
    for name, kind in classes.items():
        public = {item for item in dir(kind) if not item.startswith("_")} - {"settings", "cuda"}
        assert public <= set(dir(getattr(real, name))), name
    inspected = {item for item in dir(fake.InspectedEngine({"profiles": []})) if not item.startswith("_")}
    assert inspected <= set(dir(real.ICudaEngine))
    for values in (
        fake.DataType,
        fake.TensorIOMode,
        fake.MemoryPoolType,
        fake.ExecutionContextAllocationStrategy,
        fake.DynamicShapesKernelSpecializationStrategy,
        fake.ProfilingVerbosity,
        fake.LayerInformationFormat,
    ):
        assert {value.name for value in values} <= set(dir(getattr(real, values.__name__)))
    assert int(real.NetworkDefinitionCreationFlag.STRONGLY_TYPED) == fake.RtxNetworkFlag.STRONGLY_TYPED
    assert hasattr(real.BuilderFlag, "REQUIRE_USER_ALLOCATION")
