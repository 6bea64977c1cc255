"""What a TensorRT session holds: nothing new after its first request, nothing after its end, whatever fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path

import msgspec
import numpy as np
import pytest

from paliedge import GenerationOptions, PaliGemma
from paliedge.backends.trt.parts import DECODE, PREFILL
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.digests import describe_file
from paliedge.bundle.manifest import Manifest, write_manifest
from paliedge.diagnostics.selfcheck import check_run
from paliedge.errors import (
    BundleError,
    ClosedError,
    DeviceError,
    EngineMismatchError,
    PaliEdgeError,
    ResourceError,
)
from tests.backends.trt.test_session import IMAGES, ask_all, load
from tests.bundles import TWO_BOARDS, VERSIONS, copy_bundle
from tests.fakes.cuda_runtime import ALLOCATING, FakeCuda
from tests.fakes.cuda_types import cudaError_t
from tests.fakes.machine import Machine, fake_machine
from tests.fakes.tensorrt_engine import ExecutionContext

pytestmark = pytest.mark.opset24

OUT_OF_MEMORY, BROKEN = cudaError_t.cudaErrorMemoryAllocation, cudaError_t.cudaErrorLaunchFailure


@pytest.fixture
def model(machine: Machine, built: dict[str, Path]) -> Iterator[PaliGemma]:
    with closing(load(built["paligemma2"])) as loaded:
        yield loaded


def held(machine: Machine) -> dict[str, int]:
    """What there is on the GPU, and how often it was ever asked for."""
    calls = {name: machine.gpu.calls[name] for name in (*ALLOCATING, "cudaGraphInstantiate", "cudaStreamBeginCapture")}
    return calls | machine.gpu.ledger()


def test_nothing_is_allocated_after_the_first_request(model: PaliGemma, machine: Machine) -> None:
    first = model.generate(IMAGES[0], "caption en")
    assert len(first.token_ids) > 2, "too short for a graph"
    before = held(machine)
    addresses = {allocation.address for allocation in machine.gpu.memory.live}
    for index in range(50):
        image = IMAGES[index % 3]
        model.generate(image if index % 2 else model.encode(image), ("ocr", "detect circle", "caption en")[index % 3])
    assert held(machine) == before
    assert {allocation.address for allocation in machine.gpu.memory.live} == addresses


def test_activations_take_what_one_row_needs(model: PaliGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiles have room for more rows; one request does not pay for them."""
    given: dict[int, tuple[int, int]] = {}
    honest = ExecutionContext.set_device_memory

    def record(context: ExecutionContext, memory: int, size: int) -> None:
        given[context._profile] = size, context._core.scratch_bytes(context._profile)
        honest(context, memory, size)

    monkeypatch.setattr(ExecutionContext, "set_device_memory", record)
    model.generate(IMAGES[0], "caption en")
    assert set(given) == {DECODE, PREFILL}
    assert given[PREFILL][0] < 0.6 * max(largest for _, largest in given.values())


def test_a_step_copies_no_more_than_it_must(model: PaliGemma, machine: Machine, target: str) -> None:
    """In and out where the GPU has memory of its own; new rows of the cache where the graph leaves them to us."""
    gpu = machine.gpu
    model.caption(IMAGES[0], options=GenerationOptions(max_new_tokens=4))
    stream = model.stream(IMAGES[0], "caption en")
    for _ in range(3):
        next(stream)
    before = gpu.calls.copy()
    next(stream)
    made = gpu.calls - before
    assert made["cudaGraphLaunch"] == 1
    assert made["cudaMemcpyAsync"] == 0
    assert made["cudaMemcpy2DAsync"] == (target == "jetpack6")
    assert made["cudaStreamSynchronize"] == 1
    list(stream)
    captured = gpu.captured[-1]
    assert captured == (1 if gpu.integrated else 3), "the engine alone, or a copy before and one behind it"


@TWO_BOARDS
def test_memory_of_features_is_used_again_once_nobody_holds_them(model: PaliGemma, machine: Machine) -> None:
    kept = [model.encode(image) for image in IMAGES]
    before = held(machine)
    for _ in range(5):
        kept.pop()
        kept.append(model.encode(IMAGES[0]))
    assert held(machine) == before
    kept.append(model.encode(IMAGES[0]))
    assert machine.gpu.live["device"] == before["device"] + 1


@TWO_BOARDS
def test_as_many_caches_as_answers_at_once(model: PaliGemma, machine: Machine) -> None:
    model.caption(IMAGES[0])
    for _ in range(3):
        streams = [model.stream(IMAGES[0], "caption en") for _ in range(3)]
        for stream in streams:
            next(stream)
        for stream in streams:
            assert list(stream)
    assert machine.gpu.live["graph exec"] == 3
    assert machine.gpu.live["context"] == 1 + 2 * 3


def test_graphs_keep_the_addresses_of_their_capture(model: PaliGemma, machine: Machine) -> None:
    """The fake would refuse a launch; here its contexts are asked as well."""
    model.caption(IMAGES[0])
    cache = model._answerer._caches._single[0]
    bound = {index: dict(context._context._addresses) for index, context in cache.contexts.items()}
    for prompt in ("ocr", "detect red circle", "a"):
        model.generate(IMAGES[1], prompt)
        decode, prefill = (cache.contexts[index]._context._addresses for index in (0, 1))
        assert decode == bound[0]
        assert {name: prefill[name] for name in bound[1] if "present" not in name} == {
            name: address for name, address in bound[1].items() if "present" not in name
        }


@pytest.mark.parametrize("integrated", [False, True])
def test_one_engine_at_a_time(
    integrated: bool, target: str, built: dict[str, Path], tmp_path: Path, reference: Callable[[str, str], PaliGemma]
) -> None:
    gpu = FakeCuda(integrated=integrated)
    with fake_machine(tmp_path / "machine", tensorrt=VERSIONS[target], cuda=gpu):
        with closing(load(built["paligemma2"], sequential=True)) as model:
            wanted = reference("paligemma2", target)
            encoded = model.encode(IMAGES[0])
            for image in (encoded, IMAGES[1], encoded):
                expected = ask_all(wanted, IMAGES[0] if image is encoded else IMAGES[1])
                assert ask_all(model, image) == expected
            stream = model.stream(encoded, "caption en")
            pieces = [next(stream), next(stream)]
            model.encode(IMAGES[2])  # the decoder goes while its cache is in use
            pieces += stream
            assert tuple(piece.token_id for piece in pieces) == wanted.caption(IMAGES[0]).token_ids
        assert gpu.peak["engine"] == 1


def test_one_engine_at_a_time_fits_where_two_do_not(built: dict[str, Path], tmp_path: Path) -> None:
    """A board with a little less memory than both take."""
    with fake_machine(tmp_path / "machine", cuda=FakeCuda()) as machine, closing(load(built["shapes"])) as model:
        model.caption(IMAGES[0])
        taken = machine.gpu.total_memory - machine.gpu.free_memory
    gpu = FakeCuda(memory=taken - (1 << 20))
    with fake_machine(tmp_path / "machine", cuda=gpu):
        with pytest.raises(ResourceError, match="out of memory") as caught:
            load(built["shapes"])
        assert "--sequential" in caught.value.action
        with closing(load(built["shapes"], sequential=True)) as model:
            assert model.caption(IMAGES[0]).token_ids


def fail_each_call(
    machine: Machine, error: cudaError_t, names: Sequence[str], attempt: Callable[[], object]
) -> Iterator[PaliEdgeError]:
    """Attempt the same again and again, while the first call fails, then the second, until none does."""
    for number in count(1):
        machine.gpu.fail(number, error, names)
        try:
            attempt()
        except (DeviceError, ResourceError) as caught:
            yield caught
        if machine.gpu.forget_fault():
            return


@pytest.mark.parametrize("sequential", [False, True])
def test_a_failed_allocation_while_loading_leaves_nothing(
    machine: Machine, built: dict[str, Path], sequential: bool
) -> None:
    failures = 0

    def attempt() -> None:
        load(built["paligemma2"], sequential=sequential).close()

    for error in fail_each_call(machine, OUT_OF_MEMORY, ALLOCATING, attempt):
        assert error.exit_code == 4
        assert OUT_OF_MEMORY.name in error.found
        machine.gpu.assert_all_released()
        failures += 1
    assert failures >= 5


@TWO_BOARDS
def test_any_failed_call_while_loading_leaves_nothing(machine: Machine, built: dict[str, Path]) -> None:
    failures = 0
    for _ in fail_each_call(machine, BROKEN, (), lambda: load(built["paligemma2"]).close()):
        machine.gpu.assert_all_released()
        failures += 1
    assert failures >= 30


@TWO_BOARDS
@pytest.mark.parametrize("options", [{}, {"use_cuda_graph": False}, {"sequential": True}], ids=str)
def test_after_any_failed_call_in_a_request_the_next_is_right_or_all_is_given_back(
    machine: Machine, built: dict[str, Path], target: str, options: dict[str, bool], reference: Callable[..., PaliGemma]
) -> None:
    """As where memory was short for a moment; most other failures of a real GPU are for good."""
    wanted = reference("paligemma2", target).caption(IMAGES[0], options=GenerationOptions(max_new_tokens=3))
    loaded = [load(built["paligemma2"], **options)]
    failures = 0
    for _ in fail_each_call(
        machine, BROKEN, (), lambda: loaded[0].caption(IMAGES[1], options=GenerationOptions(max_new_tokens=3))
    ):
        if failures % 2:  # else what the failed request began is still on the stream
            assert (
                loaded[0].caption(IMAGES[0], options=GenerationOptions(max_new_tokens=3)).token_ids == wanted.token_ids
            )
        loaded[0].close()
        machine.gpu.assert_all_released()
        loaded[0] = load(built["paligemma2"], **options)
        failures += 1
    loaded[0].close()
    assert failures >= 20


def rewrite(bundle: Path, manifest: Manifest, **changes: object) -> None:
    write_manifest(bundle, msgspec.structs.replace(manifest, **changes))


@pytest.fixture
def deserialized(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every plan that reached TensorRT."""
    seen: list[bytes] = []
    runtime = machine.modules["tensorrt"].Runtime
    original = runtime.deserialize_cuda_engine

    def spy(self: object, plan: bytes) -> object:
        seen.append(bytes(plan))
        return original(self, plan)

    monkeypatch.setattr(runtime, "deserialize_cuda_engine", spy)
    return seen


@TWO_BOARDS
@pytest.mark.parametrize("part", ["vision_encoder", "decoder"])
def test_no_plan_is_loaded_where_one_has_a_changed_byte(
    part: str, machine: Machine, built: dict[str, Path], tmp_path: Path, target: str, deserialized: list[bytes]
) -> None:
    bundle = copy_bundle(built["paligemma"], tmp_path)
    with closing(load(bundle)):
        assert len(deserialized) == 2
    engine = next(engine for engine in Bundle(bundle).manifest.engines if engine.target == target)
    plan = bundle / getattr(engine, part).file
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    deserialized.clear()
    with pytest.raises(BundleError, match=plan.name) as caught:
        load(bundle)
    assert caught.value.exit_code == 3
    assert deserialized == []


@TWO_BOARDS
@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_one_engine_at_a_time_is_checked_at_every_load(
    harm: str, machine: Machine, built: dict[str, Path], tmp_path: Path, target: str, deserialized: list[bytes]
) -> None:
    bundle = copy_bundle(built["paligemma"], tmp_path)
    with closing(load(bundle, sequential=True)) as model:
        model.caption(IMAGES[0], options=GenerationOptions(max_new_tokens=2))
        engine = next(engine for engine in Bundle(bundle).manifest.engines if engine.target == target)
        plan = bundle / engine.vision_encoder.file
        content = bytearray(plan.read_bytes())
        content[len(content) // 2] ^= 1
        plan.unlink()
        if harm == "changed":
            plan.write_bytes(content)
        deserialized.clear()
        with pytest.raises(BundleError, match=plan.name):
            model.caption(IMAGES[0], options=GenerationOptions(max_new_tokens=2))
        assert deserialized == []


@TWO_BOARDS
def test_a_plan_that_tensorrt_refuses_is_a_mismatch_with_its_own_words(
    machine: Machine, built: dict[str, Path], tmp_path: Path, target: str
) -> None:
    bundle = copy_bundle(built["paligemma"], tmp_path)
    manifest = Bundle(bundle).manifest
    engine = next(engine for engine in manifest.engines if engine.target == target)
    (bundle / engine.decoder.file).write_bytes(b"no plan at all")
    files = manifest.files | {engine.decoder.file: describe_file(bundle / engine.decoder.file)}
    rewrite(bundle, manifest, files=files)
    with pytest.raises(EngineMismatchError, match="magicTag") as caught:
        load(bundle)
    assert caught.value.exit_code == 4
    assert "paliedge build" in caught.value.action
    assert VERSIONS[target] in caught.value.expected


@TWO_BOARDS
def test_a_plan_with_other_inputs_is_a_mismatch(
    machine: Machine, built: dict[str, Path], tmp_path: Path, target: str
) -> None:
    bundle = copy_bundle(built["paligemma"], tmp_path)
    manifest = Bundle(bundle).manifest
    engines = tuple(
        msgspec.structs.replace(engine, vision_encoder=engine.decoder, decoder=engine.vision_encoder)
        for engine in manifest.engines
    )
    rewrite(bundle, manifest, engines=engines)
    with pytest.raises(EngineMismatchError, match="inputs and outputs of decoder"):
        load(bundle)


@pytest.mark.parametrize("gpu", [True], indirect=True, ids=["integrated"])
@pytest.mark.parametrize("target", ["jetpack7"], indirect=True)
def test_an_engine_that_updates_no_cache_in_place_is_a_mismatch(
    machine: Machine, built: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.fakes.tensorrt_engine import ScatterEngine

    monkeypatch.setattr(ScatterEngine, "get_aliased_input_tensor", lambda self, name: None)
    with pytest.raises(EngineMismatchError, match="6 cache tensors in place; found one that updates 0"):
        load(built["paligemma"])


@TWO_BOARDS
@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ("set_optimization_profile_async", "an execution context"),
        ("set_input_shape", "of shape"),
        ("set_tensor_address", "an address for"),
        ("execute_async_v3", "a run"),
    ],
)
def test_what_tensorrt_refuses_is_an_error_with_its_own_words(
    refusal: str, words: str, machine: Machine, built: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.fakes.tensorrt_engine import ExecutionContext

    def refuse(self: ExecutionContext, *arguments: object) -> bool:
        self._core.error("the reason that TensorRT gives")
        return False

    monkeypatch.setattr(ExecutionContext, refusal, refuse)
    with (
        pytest.raises(DeviceError, match="the reason that TensorRT gives") as caught,
        closing(load(built["paligemma"])) as model,
    ):
        model.caption(IMAGES[0])
    assert words in caught.value.expected


@TWO_BOARDS
def test_features_of_a_closed_model_are_gone(machine: Machine, built: dict[str, Path]) -> None:
    """What else a closed model says: tests/backends/test_life_cycle.py."""
    with closing(load(built["paligemma"])) as model:
        encoded = model.encode(IMAGES[0])
    with pytest.raises(ClosedError):
        np.asarray(encoded.features)


@TWO_BOARDS
def test_features_outlive_a_closed_model_for_nobody(machine: Machine, built: dict[str, Path]) -> None:
    """Their memory is gone, and another model must not read it."""
    with closing(load(built["paligemma"])) as model:
        encoded = model.encode(IMAGES[0])
    with closing(load(built["paligemma"])) as other, pytest.raises(ClosedError):
        other.caption(encoded)


@TWO_BOARDS
def test_the_self_check_passes(machine: Machine, built: dict[str, Path], target: str) -> None:
    from paliedge.backends.select import BackendOptions

    report = check_run(Bundle(built["paligemma"]), BackendOptions(), 100)
    assert report.backend == f"using TensorRT {VERSIONS[target]} on compute capability 8.7"
    assert report.graph_equal is True
    assert report.gpu_growth == 0
    assert report.decode_device_ms is not None
