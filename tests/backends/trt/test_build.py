"""Engines are built in child processes, by a fake TensorRT, and added to the bundle whole or not at all."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from paliedge.backends.trt import build
from paliedge.backends.trt.build import build_engine
from paliedge.backends.trt.profiles import MAX_ROWS
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.layer_list import read_layer_list
from paliedge.bundle.manifest import Engine
from paliedge.errors import BuildError, DeviceError, EngineMismatchError, MissingExtraError, OutputError, ResourceError
from paliedge.planning.memory import FreeMemory
from tests.bundles import MAX_NEW_TOKENS, MAX_PROMPT_TOKENS, RTX_VERSION, copy_bundle
from tests.fakes.cuda_runtime import FakeCuda
from tests.fakes.cuda_types import cudaError_t
from tests.fakes.machine import Machine, fake_machine

NUM_IMAGE_TOKENS = 16
PREFIX = NUM_IMAGE_TOKENS + MAX_PROMPT_TOKENS
CAPACITY = PREFIX + MAX_NEW_TOKENS


def machine_with(folder: Path, tensorrt: str | None = "10.3.0", rtx: str | None = None, **options: Any) -> Any:
    return fake_machine(folder / "machine", tensorrt=tensorrt, rtx=rtx, cuda=FakeCuda(**options))


@pytest.fixture
def bundle(bundles: dict[str, Path], tmp_path: Path) -> Path:
    return copy_bundle(bundles["paligemma2"], tmp_path)


def assert_whole(bundle: Path, exported: Path, engines: list[Engine]) -> None:
    """The bundle is valid, has these engines, and no file that the manifest does not name."""
    opened = Bundle(bundle)
    opened.verify_hashes()
    assert list(opened.manifest.engines) == engines
    named = {name for engine in engines for name in engine.files}
    lists = opened.manifest.layer_lists
    assert set(lists) == {name for name in named if name.endswith(".plan")}
    named |= set(lists.values())
    assert {path.name for path in bundle.iterdir()} == {path.name for path in exported.iterdir()} | named
    assert set(opened.manifest.files) == set(Bundle(exported).manifest.files) | named


@pytest.mark.parametrize(
    ("tensorrt", "rtx", "target"),
    [
        ("10.3.0", None, "jetpack6"),
        ("10.14.2", None, "jetpack6"),
        ("10.15.1", None, "jetpack7"),
        ("10.16.2", RTX_VERSION, "jetpack7"),
        ("11.4.1", None, "jetpack7"),
        (None, RTX_VERSION, "jetpack7"),
    ],
)
def test_the_version_decides_about_the_graphs(
    tensorrt: str | None, rtx: str | None, target: str, bundle: Path, bundles: dict[str, Path], tmp_path: Path
) -> None:
    lines: list[str] = []
    with machine_with(tmp_path, tensorrt, rtx) as machine:
        engine = build_engine(bundle, report=lines.append)
    opset = {"jetpack6": "opset20", "jetpack7": "opset24"}[target]
    assert [build["graph"] for build in machine.builds()] == [f"vision_encoder.{opset}.onnx", f"decoder.{opset}.onnx"]
    assert (engine.target, engine.version, engine.precision) == (target, tensorrt or RTX_VERSION, "fp16")
    assert (engine.compute_capability, engine.gpu) == (("8.7", "Orin") if tensorrt else ("any", "any"))
    assert (engine.timing_cache is None) == (tensorrt is None)
    assert [line.split()[0] for line in lines] == [*["building", "built"] * 2, "a"]
    assert_whole(bundle, bundles["paligemma2"], [engine])
    opened = Bundle(bundle)
    listed = read_layer_list(opened.path(opened.manifest.layer_lists[engine.decoder.file]))
    assert [(layer.kind, layer.profile, layer.nodes) for layer in listed.layers] == [
        ("gemm", profile, ("MatMul_0",)) for profile in (0, 1)
    ]
    megabytes = sum(opened.manifest.files[name].size for name in opened.manifest.targets[target].decoder.weights) / 1e6
    assert lines[-1] == f"a token moves {megabytes:.1f} MB, 1.00 times the {megabytes:.1f} MB that it must"


def test_an_old_tensorrt_is_refused(bundle: Path, tmp_path: Path) -> None:
    with machine_with(tmp_path, "9.3.0") as machine:
        with pytest.raises(EngineMismatchError, match=r"TensorRT 9\.3\.0") as caught:
            build_engine(bundle, "tensorrt")
        assert machine.builds() == []
    assert caught.value.exit_code == 4


def test_a_bundle_without_graphs_for_this_tensorrt_is_refused(bundle: Path, tmp_path: Path) -> None:
    import msgspec

    from paliedge.bundle.manifest import write_manifest

    manifest = Bundle(bundle).manifest
    targets = {"jetpack7": manifest.targets["jetpack7"]}
    write_manifest(bundle, msgspec.structs.replace(manifest, targets=targets, not_compared={}))
    machine = machine_with(tmp_path, "10.3.0")
    with machine, pytest.raises(EngineMismatchError, match="--target jetpack6") as caught:
        build_engine(bundle)
    assert caught.value.exit_code == 4


def test_workspace_is_a_gigabyte_or_twice_the_activations(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine_with(tmp_path) as machine:
        build_engine(bundle)
        monkeypatch.setattr(build, "estimate_decoder_workspace", lambda manifest: 800 << 20)
        build_engine(bundle, force=True)
    assert [build["workspace"] >> 20 for build in machine.builds()] == [1024, 1024, 1600, 1600]


@pytest.mark.parametrize("tensorrt", ["10.3.0", "10.16.2"])
def test_profiles_span_what_requests_need(tensorrt: str, bundle: Path, tmp_path: Path) -> None:
    with machine_with(tmp_path, tensorrt) as machine:
        engine = build_engine(bundle, workspace=123)
    vision, decoder = machine.builds()
    assert vision["workspace"] == decoder["workspace"] == 123
    assert vision["profiles"] == [{"pixel_values": [[1, 3, 56, 56]] * 3}]
    decode, prefill = decoder["profiles"]
    typical = min(NUM_IMAGE_TOKENS + 16, PREFIX)
    assert decode["position_ids"] == [[1, 1], [1, 1], [MAX_ROWS, 1]]
    assert prefill["position_ids"] == [[1, NUM_IMAGE_TOKENS + 1], [1, typical], [2, PREFIX]]
    assert decode["inputs_embeds"] == [[1, 1, 48], [1, 1, 48], [MAX_ROWS, 1, 48]]
    assert prefill["inputs_embeds"][2] == [2, PREFIX, 48]
    hidden_row = CAPACITY if tensorrt == "10.16.2" else 1
    for layer in range(3):
        for part in ("key", "value"):
            name = f"past_key_values.{layer}.{part}"
            assert decode[name] == [[rows, 2, CAPACITY, 16] for rows in (1, 1, MAX_ROWS)]
            assert prefill[name] == [[rows, 2, hidden_row, 16] for rows in (1, 1, 2)]
    for profile, most in ((decode, MAX_ROWS), (prefill, 2)):
        assert profile["prefix_length"] == [[1], [1], [most]]
        assert profile["allowed_ids"] == [[1, 2], [1, 2], [most, 2]]
        assert len(profile) == 4 + 2 * 3
    recorded = [
        {name: [list(shape.min), list(shape.opt), list(shape.max)] for name, shape in profile.items()}
        for profile in engine.decoder.profiles
    ]
    assert recorded == decoder["profiles"]


def test_progress_goes_from_little_to_all_of_each_part(bundle: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    with machine_with(tmp_path):
        build_engine(bundle, on_progress=lambda part, progress: seen.append((part, progress)))
    assert seen == [(part, step / 4) for part in ("vision_encoder", "decoder") for step in (1, 2, 3, 4)]


def test_an_engine_that_is_there_is_not_built_again(bundle: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    lines: list[str] = []
    with machine_with(tmp_path) as machine:
        first = build_engine(bundle)
        assert build_engine(bundle, report=lines.append) == first
    assert len(machine.builds()) == 2
    assert lines == ["the bundle has an engine for TensorRT 10.3.0 on compute capability 8.7 already"]
    assert_whole(bundle, bundles["paligemma2"], [first])


def test_force_replaces_an_engine_and_leaves_no_strays(bundle: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    with machine_with(tmp_path) as machine:
        first = build_engine(bundle)
        (bundle / "decoder.of-a-killed-build.plan").write_text("half a plan")
        (bundle / ".engines.new-abc").mkdir()
        second = build_engine(bundle, force=True)
    assert not set(first.files[:2]) & set(second.files)
    assert len(machine.builds()) == 4
    assert_whole(bundle, bundles["paligemma2"], [second])


def test_engines_of_other_versions_and_gpus_are_kept(bundle: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    made = []
    for version, capability in (("10.3.0", "8.7"), ("10.3.0", "8.6"), ("10.7.0", "8.7")):
        with machine_with(tmp_path, version, compute_capability=capability):
            made.append(build_engine(bundle))
        assert_whole(bundle, bundles["paligemma2"], made)
    with machine_with(tmp_path, None, RTX_VERSION):
        made.append(build_engine(bundle))
    with machine_with(tmp_path, "10.3.0"):
        made.append(build_engine(bundle, "tensorrt", force=True))
    assert_whole(bundle, bundles["paligemma2"], made[1:])


def test_what_was_timed_once_is_known_later(bundle: Path, tmp_path: Path) -> None:
    graphs = ["vision_encoder.opset20.onnx", "decoder.opset20.onnx"]
    with machine_with(tmp_path) as machine:
        build_engine(bundle)
        build_engine(bundle, force=True)
        assert [build["known_timings"] for build in machine.builds()] == [[], graphs[:1], graphs, [*graphs, graphs[0]]]
    with machine_with(tmp_path, "10.7.0") as machine:
        build_engine(bundle)
        assert [build["known_timings"] for build in machine.builds()[4:]] == [[], graphs[:1]], "another version's times"


BUILDER_FAULTS = [
    ("parser", "decoder", "plan of the decoder", "a graph that its parser refuses, decoder.opset20.onnx"),
    ("refuses", "vision", "plan of the vision_encoder", "Could not find any implementation for node"),
    ("refuses", "decoder", "plan of the decoder", "failure to build decoder.opset20.onnx"),
    ("no builder", "", "plan of the vision_encoder", "no builder"),
    ("SIGKILL", "decoder", "plan of the decoder", "memory runs out"),
    ("SIGSEGV", "decoder", "plan of the decoder", "crash with SIGSEGV"),
    ("exit", "vision", "plan of the vision_encoder", "without a word: a library says something"),
    ("says nothing", "decoder", "plan of the decoder", "without a word"),
]


@pytest.mark.parametrize(("fault", "part", "expected", "found"), BUILDER_FAULTS)
def test_a_builder_that_fails_is_an_error_that_says_why(
    fault: str,
    part: str,
    expected: str,
    found: str,
    built: dict[str, Path],
    bundles: dict[str, Path],
    tmp_path: Path,
) -> None:
    bundle = copy_bundle(built["paligemma2"], tmp_path)
    before = list(Bundle(bundle).manifest.engines)
    with machine_with(tmp_path) as machine:
        machine.break_builder(fault, part)
        with pytest.raises(BuildError) as caught:
            build_engine(bundle, force=True)
        assert expected in caught.value.expected
        assert found in caught.value.found
        assert "something else that is no reason" not in caught.value.found, "a warning is no reason"
        assert "paliedge" in caught.value.action
        assert_whole(bundle, bundles["paligemma2"], before)


def test_after_a_failure_the_next_build_is_as_any(bundle: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    with machine_with(tmp_path) as machine:
        machine.break_builder("SIGSEGV", "decoder")
        with pytest.raises(BuildError):
            build_engine(bundle)
        machine.break_builder("")
        assert_whole(bundle, bundles["paligemma2"], [build_engine(bundle)])


def test_what_a_library_prints_disturbs_nothing(bundle: Path, tmp_path: Path) -> None:
    with machine_with(tmp_path) as machine:
        machine.break_builder("noise")
        assert build_engine(bundle) == Bundle(bundle).manifest.engines[0]


def test_a_builder_killed_before_it_began_is_an_error(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    original = subprocess.Popen.__init__

    def kill_at_once(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.kill()
        self.wait()

    monkeypatch.setattr(subprocess.Popen, "__init__", kill_at_once)
    with machine_with(tmp_path), pytest.raises(BuildError, match="memory runs out"):
        build_engine(bundle)


def test_a_build_that_does_not_fit_is_refused_before_it_begins(
    bundle: Path, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paliedge.backends.trt.build.available_memory", lambda: FreeMemory(100_000_000, 50_000_000))
    with machine_with(tmp_path) as machine, pytest.raises(ResourceError, match=r"found 0\.1 GB free") as caught:
        build_engine(bundle)
    assert caught.value.exit_code == 4
    assert machine.builds() == []
    assert_whole(bundle, bundles["paligemma2"], [])


def test_a_bundle_that_cannot_be_written_to_is_an_error(
    bundle: Path, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: object) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system")

    with machine_with(tmp_path) as machine:
        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
        with pytest.raises(OutputError, match="Read-only file system"):
            build_engine(bundle)
    assert machine.builds() == []
    assert_whole(bundle, bundles["paligemma2"], [])


def without_tensorrt(folder: Path) -> Any:
    return machine_with(folder, None)


def without_bindings(folder: Path) -> Any:
    return fake_machine(folder / "machine", cuda=None)


def without_gpu(folder: Path) -> Any:
    return machine_with(folder, absent=cudaError_t.cudaErrorNoDevice)


@pytest.mark.parametrize(
    ("machine", "kind", "fix"),
    [
        (without_tensorrt, MissingExtraError, "python3-libnvinfer"),
        (without_bindings, MissingExtraError, "paliedge[tensorrt]"),
        (without_gpu, DeviceError, "paliedge doctor"),
    ],
)
def test_what_a_build_lacks_is_said_with_its_fix(
    machine: Any, kind: type[Exception], fix: str, bundle: Path, tmp_path: Path
) -> None:
    with machine(tmp_path), pytest.raises(kind) as caught:
        build_engine(bundle)
    assert fix in str(caught.value)


def test_tensorrt_for_rtx_builds_without_a_gpu(bundle: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    with fake_machine(tmp_path / "machine", tensorrt=None, rtx=RTX_VERSION, cuda=None):
        engine = build_engine(bundle)
    assert_whole(bundle, bundles["paligemma2"], [engine])
    assert isinstance(engine, Engine)


def test_the_machine_is_not_asked_for_more_than_it_must(bundle: Path, tmp_path: Path) -> None:
    """Building on the GPU holds nothing of it in this process."""
    with machine_with(tmp_path) as machine:
        assert isinstance(machine, Machine)
        build_engine(bundle)
        assert machine.gpu.ledger() == {}
        assert not machine.gpu.calls["cudaMalloc"]
