"""The fake TensorRT refuses what real TensorRT refuses, and finds what real TensorRT would do wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import RTX_VERSION, VERSIONS
from tests.fakes import tensorrt as fake
from tests.fakes.cuda_runtime import FakeCuda
from tests.fakes.cuda_types import StreamHandle, cudaStreamCaptureMode
from tests.fakes.machine import Machine, fake_machine
from tests.fakes.memory import Violation
from tests.fakes.onnx_reader import read_onnx

SCRATCH = 1 << 16
Graphs = dict[str, Path]


class Logger(fake.ILogger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, severity: fake.Severity, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def logger() -> Logger:
    return Logger()


@pytest.fixture
def graphs(bundles: dict[str, Path]) -> Graphs:
    """The decoders of a tiny bundle."""
    return {
        "rows": bundles["paligemma"] / "decoder.opset20.onnx",
        "in place": bundles["paligemma"] / "decoder.opset24.onnx",
    }


def sizes(graph: Path, sequence: int, capacity: int) -> dict[str, tuple[int, ...]]:
    named = {"batch": 1, "sequence": sequence, "capacity": capacity}
    return {
        tensor.name: tuple(named[size] if isinstance(size, str) else size for size in tensor.shape)
        for tensor in read_onnx(graph).inputs
    }


def build(module: Any, graph: Path, logger: Logger, *, leave_out: str = "", flags: int | None = None) -> bytes | None:
    """A plan with one profile, for steps of one or two tokens on a cache of eight rows."""
    builder = module.Builder(logger)
    typed = 1 << module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(typed if flags is None else flags)
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        logger.lines += [parser.get_error(index).desc() for index in range(parser.num_errors)]
        return None
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, 1)
    config.progress_monitor = Monitor()
    for name, shape in sizes(graph, 1, 8).items():
        if name != leave_out:
            profile.set_shape(name, shape, shape, sizes(graph, 2, 8)[name])
    config.add_optimization_profile(profile)
    plan: bytes | None = builder.build_serialized_network(network, config)
    return plan


class Monitor(fake.IProgressMonitor):
    def phase_start(self, name: str, parent: str | None, num_steps: int) -> None: ...

    def step_complete(self, name: str, step: int) -> bool:
        return True

    def phase_finish(self, name: str) -> None: ...


class Bench:
    """A context with everything that it needs, for a test to take something away."""

    def __init__(self, machine: Machine, flavour: str, graph: Path, logger: Logger) -> None:
        self.gpu = machine.gpu
        self.cuda = self.gpu.module()
        module: Any = machine.modules[flavour]
        self.stream: StreamHandle = self.cuda.cudaStreamCreateWithFlags(1)[1]
        self.engine = module.Runtime(logger).deserialize_cuda_engine(build(module, graph, logger))
        self.strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
        if flavour == "rtx":
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(self.strategy)
            config.dynamic_shapes_kernel_specialization_strategy = (
                module.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            self.strategy = config
        self.shapes = sizes(graph, 1, 8)
        self.addresses = {tensor: self.malloc() for tensor in map(self.engine.get_tensor_name, self._indices())}
        for output, source in read_onnx(graph).aliases.items():
            self.addresses[output] = self.addresses[source]
        self.scratch = self.malloc()
        self.cuda.cudaStreamSynchronize(self.stream)
        self.gpu.memory.view(self.addresses["position_ids"], 8, "copy")[0] = 1
        self.context = self.new_context()

    def _indices(self) -> range:
        return range(self.engine.num_io_tensors)

    def malloc(self) -> int:
        address: int = self.cuda.cudaMalloc(SCRATCH)[1]
        self.cuda.cudaMemsetAsync(address, 0, SCRATCH, self.stream)
        return address

    def new_context(self, **addresses: int) -> Any:
        context = self.engine.create_execution_context(self.strategy)
        assert context.set_optimization_profile_async(0, int(self.stream))
        context.set_device_memory(self.scratch, SCRATCH)
        for name, shape in self.shapes.items():
            assert context.set_input_shape(name, shape)
        for name, address in (self.addresses | addresses).items():
            assert context.set_tensor_address(name, address)
        return context

    def run(self) -> bool:
        started: bool = self.context.execute_async_v3(int(self.stream))
        self.cuda.cudaStreamSynchronize(self.stream)
        return started

    def capture(self) -> Any:
        self.cuda.cudaStreamBeginCapture(self.stream, cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        assert self.context.execute_async_v3(int(self.stream))
        return self.cuda.cudaGraphInstantiate(self.cuda.cudaStreamEndCapture(self.stream)[1], 0)[1]

    def launch(self, graph: Any) -> None:
        self.cuda.cudaGraphLaunch(graph, self.stream)
        self.cuda.cudaStreamSynchronize(self.stream)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machine]:
    """Both flavours; nothing need be given back."""
    gpu = FakeCuda()
    with fake_machine(
        tmp_path / "machine", tensorrt=VERSIONS["jetpack7"], rtx=RTX_VERSION, cuda=gpu, must_release=False
    ) as machine:
        yield machine


@pytest.fixture
def bench(machines: Machine, graphs: Graphs, logger: Logger) -> Bench:
    return Bench(machines, "tensorrt", graphs["in place"], logger)


@pytest.mark.opset24(always=True)
def test_the_bench_runs_with_and_without_a_graph(bench: Bench) -> None:
    assert bench.run()
    bench.launch(bench.capture())
    assert not bench.gpu.rules.violations


@pytest.mark.opset24(always=True)
def test_scratch_that_is_laid_out_for_the_shapes_at_hand_may_be_smaller(bench: Bench) -> None:
    needed = bench.context.update_device_memory_size_for_shapes()
    assert needed < bench.engine.get_device_memory_size_for_profile_v2(0)
    bench.context.set_device_memory(bench.scratch, needed)
    assert bench.run()
    assert not bench.gpu.rules.violations


@pytest.mark.parametrize("name", ["next_token", "inputs_embeds", "present.0.key"])
def test_a_missing_address_is_refused(bench: Bench, name: str, logger: Logger) -> None:
    bench.context = bench.new_context(**{name: 0})
    assert not bench.run()
    assert name in logger.lines[-1]


def test_shapes_outside_the_profile_or_missing_or_at_odds_are_refused(bench: Bench, logger: Logger) -> None:
    name, (_, _, hidden) = "inputs_embeds", bench.shapes["inputs_embeds"]
    assert not bench.context.set_input_shape(name, (1, 3, hidden))
    assert not bench.context.set_input_shape("no_input", (1,))
    assert "does not satisfy any optimization profiles" in logger.lines[-2]
    assert bench.context.set_input_shape(name, (1, 2, hidden))
    assert not bench.run(), "position_ids has one token, inputs_embeds two"
    bench.context.set_optimization_profile_async(0, int(bench.stream))
    assert not bench.run(), "another profile forgets the shapes"
    assert not bench.context.set_optimization_profile_async(1, int(bench.stream))


def no_scratch(bench: Bench) -> None:
    bench.context.set_device_memory(bench.scratch, 1000)
    bench.run()


def scratch_laid_out_for_fewer_tokens(bench: Bench) -> None:
    bench.context.set_device_memory(bench.scratch, bench.context.update_device_memory_size_for_shapes())
    _, _, hidden = bench.shapes["inputs_embeds"]
    bench.context.set_input_shape("inputs_embeds", (1, 2, hidden))
    bench.context.set_input_shape("position_ids", (1, 2))
    bench.run()


def freed_scratch(bench: Bench) -> None:
    bench.cuda.cudaFree(bench.scratch)
    bench.run()


def an_address_off_the_alignment(bench: Bench) -> None:
    bench.context = bench.new_context(inputs_embeds=bench.addresses["inputs_embeds"] + 4)
    bench.run()


def an_output_beside_its_cache(bench: Bench) -> None:
    bench.context = bench.new_context(**{"present.0.key": bench.malloc()})
    bench.run()


def an_output_over_an_input(bench: Bench) -> None:
    bench.context = bench.new_context(next_token=bench.addresses["position_ids"])
    bench.run()


def an_output_in_the_scratch(bench: Bench) -> None:
    bench.context = bench.new_context(next_token=bench.scratch + 512)
    bench.run()


def a_host_address_on_a_discrete_gpu(bench: Bench) -> None:
    bench.context = bench.new_context(next_token=bench.cuda.cudaHostAlloc(256, 2)[1])
    bench.run()


def freeing_a_cache_while_work_waits(bench: Bench) -> None:
    bench.context.execute_async_v3(int(bench.stream))
    bench.gpu.memory.free("device", bench.addresses["present.0.key"])
    bench.cuda.cudaStreamSynchronize(bench.stream)


def two_streams_in_one_scratch(bench: Bench) -> None:
    bench.cuda.cudaStreamSynchronize(bench.stream)
    bench.context.execute_async_v3(int(bench.stream))
    bench.new_context().execute_async_v3(int(bench.cuda.cudaStreamCreateWithFlags(1)[1]))


def a_first_run_in_a_capture(bench: Bench) -> None:
    bench.capture()


def an_address_changed_after_the_capture(bench: Bench) -> None:
    bench.run()
    graph = bench.capture()
    bench.context.set_tensor_address("next_token", bench.malloc())
    bench.launch(graph)


def a_shape_changed_after_the_capture(bench: Bench) -> None:
    bench.run()
    graph = bench.capture()
    bench.context.set_input_shape("position_ids", (1, 2))
    bench.launch(graph)


def a_context_gone_before_its_graph(bench: Bench) -> None:
    bench.run()
    graph = bench.capture()
    bench.context = None
    bench.launch(graph)


def memory_gone_before_its_graph(bench: Bench) -> None:
    bench.run()
    graph = bench.capture()
    bench.cuda.cudaFree(bench.addresses["inputs_embeds"])
    bench.launch(graph)


def a_stream_that_is_none(bench: Bench) -> None:
    bench.context.execute_async_v3(12345)


MISTAKES = (
    no_scratch,
    scratch_laid_out_for_fewer_tokens,
    freed_scratch,
    an_address_off_the_alignment,
    an_output_beside_its_cache,
    an_output_over_an_input,
    an_output_in_the_scratch,
    a_host_address_on_a_discrete_gpu,
    freeing_a_cache_while_work_waits,
    two_streams_in_one_scratch,
    a_first_run_in_a_capture,
    an_address_changed_after_the_capture,
    a_shape_changed_after_the_capture,
    a_context_gone_before_its_graph,
    memory_gone_before_its_graph,
    a_stream_that_is_none,
)


@pytest.mark.opset24(always=True)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_found(mistake: Callable[[Bench], None], bench: Bench) -> None:
    with pytest.raises(Violation):
        mistake(bench)


@pytest.mark.opset24(always=True)
def test_an_engine_gone_before_its_context_is_found(bench: Bench) -> None:
    bench.engine = None
    assert bench.gpu.rules.violations == ["an engine went before its contexts"]


@pytest.mark.opset24(always=True)
def test_an_rtx_engine_that_allocates_by_itself_cannot_be_captured(
    machines: Machine, graphs: Graphs, logger: Logger
) -> None:
    bench = Bench(machines, "rtx", graphs["in place"], logger)
    assert bench.run()
    with pytest.raises(Violation, match="allocates by itself"):
        bench.capture()


@pytest.mark.opset24(always=True)
def test_an_rtx_context_that_compiles_in_the_background_cannot_be_captured(
    machines: Machine, graphs: Graphs, logger: Logger
) -> None:
    bench = Bench(machines, "rtx", graphs["in place"], logger)
    bench.strategy = fake.ExecutionContextAllocationStrategy.USER_MANAGED
    bench.context = bench.new_context()
    assert bench.run()
    with pytest.raises(Violation, match="still being compiled"):
        bench.capture()


def test_a_plan_is_good_for_its_version_and_gpu_only(machines: Machine, graphs: Graphs, logger: Logger) -> None:
    module: Any = machines.modules["tensorrt"]
    plan = build(module, graphs["in place"], logger)
    assert plan is not None
    for other, words in (
        (plan.replace(b"10.16.2", b"10.15.1"), "expects library version 10.15.1 got 10.16.2"),
        (plan.replace(b'"8.7"', b'"8.6"'), "incompatible device"),
        (b"x" + plan, "magicTag"),
        (b"", "magicTag"),
    ):
        assert module.Runtime(logger).deserialize_cuda_engine(other) is None
        assert words in logger.lines[-1]
    assert module.Runtime(logger).deserialize_cuda_engine(plan) is not None


def test_an_older_tensorrt_has_neither_the_operator_nor_its_question(
    tmp_path: Path, graphs: Graphs, logger: Logger
) -> None:
    with fake_machine(tmp_path / "machine", cuda=FakeCuda(), must_release=False) as machine:
        module: Any = machine.modules["tensorrt"]
        assert build(module, graphs["in place"], logger) is None
        assert "no importer for opset 24" in logger.lines[-1]
        engine = module.Runtime(logger).deserialize_cuda_engine(build(module, graphs["rows"], logger))
        assert not hasattr(engine, "get_aliased_input_tensor")


def test_the_builder_wants_strong_types_whole_profiles_and_the_weights(
    machines: Machine, graphs: Graphs, logger: Logger, tmp_path: Path
) -> None:
    for flavour, wrong in (("tensorrt", 1), ("rtx", 0)):
        with pytest.raises(AssertionError, match="strongly typed"):
            build(machines.modules[flavour], graphs["rows"], logger, flags=wrong)
    assert build(machines.modules["tensorrt"], graphs["rows"], logger, leave_out="allowed_ids") is None
    assert logger.lines[-1] == "Input tensor: allowed_ids has no profile"
    alone = tmp_path / "decoder.onnx"
    alone.write_bytes(graphs["rows"].read_bytes())
    assert build(machines.modules["tensorrt"], alone, logger) is None


def test_profiles_and_timing_caches_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    settings = fake.Settings("tensorrt", "10.3.0", "8.7", str(tmp_path / "log"))
    config, profile = fake.BuilderConfig(settings), fake.Profile()
    assert config.add_optimization_profile(profile) == -1
    profile.set_shape("x", (1,), (3,), (2,))
    assert config.add_optimization_profile(profile) == -1
    profile.set_shape("x", (1,), (2,), (3,))
    assert config.add_optimization_profile(profile) == 0
    older = fake.BuilderConfig(replace(settings, version="10.2.0")).create_timing_cache(b"").serialize()
    assert not config.set_timing_cache(config.create_timing_cache(older), False)
    assert config.set_timing_cache(config.create_timing_cache(b""), False)
