"""Which engine is chosen, and what is said where a better one is not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from paliedge import PaliGemma
from paliedge.backends.select import Backend, BackendOptions, open_session
from paliedge.backends.trt.build import build_engine
from paliedge.bundle.bundle import Bundle
from paliedge.cli import main
from paliedge.cli.demo import DEMO_SCENES
from paliedge.errors import DeviceError, EngineMismatchError, MissingExtraError, PaliEdgeError, ResourceError
from paliedge.model import DEFAULT_BACKEND, SHIPPED_BUNDLE
from paliedge.planning.memory import FreeMemory
from tests.bundles import RTX_VERSION, copy_bundle
from tests.fakes.cuda_runtime import ALLOCATING, FakeCuda
from tests.fakes.cuda_types import cudaError_t
from tests.fakes.machine import fake_machine
from tests.paths import SHAPES_CHECKPOINT

TENSORRT, OTHER_TENSORRT = "10.3.0", "10.7.0"
Versions = dict[str, Path]


class OpenedOrt:
    """Stands for a loaded ONNX Runtime."""

    def __init__(self, bundle: Bundle, target: str, num_threads: int, provider: str) -> None:
        self.chosen = (target, num_threads, provider)
        if provider == "cuda":
            raise EngineMismatchError(expected="CUDAExecutionProvider", found="no CUDA provider", action="Install it.")

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def with_engine(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one engine: TensorRT 10.3.0 on compute capability 8.7."""
    bundle = copy_bundle(bundles["paligemma"], tmp_path_factory.mktemp("one"))
    with fake_machine(tmp_path_factory.mktemp("machine"), tensorrt=TENSORRT, cuda=FakeCuda()):
        build_engine(bundle)
    return bundle


@pytest.fixture(scope="module")
def with_both_flavours(with_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = copy_bundle(with_engine, tmp_path_factory.mktemp("both"))
    with fake_machine(tmp_path_factory.mktemp("machine"), tensorrt=None, rtx=RTX_VERSION, cuda=FakeCuda()):
        build_engine(bundle)
    return bundle


def open_and_close(bundle: Path, options: BackendOptions = DEFAULT_BACKEND) -> str:
    """What is said; exactly one line is."""
    lines: list[str] = []
    with closing(open_session(Bundle(bundle), options, lines.append)):
        (line,) = lines
    return line


@pytest.mark.parametrize(
    ("tensorrt", "rtx", "cuda_provider", "expected"),
    [
        (TENSORRT, RTX_VERSION, True, "using TensorRT 10.3.0 on compute capability 8.7"),
        (None, RTX_VERSION, True, "using TensorRT for RTX 1.7.1.116"),
        (None, None, True, "using ONNX Runtime with CUDA"),
        (None, None, False, "using ONNX Runtime on the CPU"),
    ],
    ids=["tensorrt", "rtx", "cuda", "cpu"],
)
def test_the_best_that_works_is_chosen(
    tensorrt: str | None,
    rtx: str | None,
    cuda_provider: bool,
    expected: str,
    with_both_flavours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paliedge.backends.ort.OrtSession", opens_anything if cuda_provider else OpenedOrt)
    with fake_machine(tmp_path / "machine", tensorrt=tensorrt, rtx=rtx, cuda=FakeCuda()):
        line = open_and_close(with_both_flavours)
    assert line.split(" (")[0] == expected
    assert ("not tensorrt" in line) == (tensorrt is None and rtx is None), "a reason only for what falls short"
    assert "not rtx" not in line, "one reason is enough"


def opens_anything(bundle: Bundle, target: str, num_threads: int, provider: str) -> OpenedOrt:
    return OpenedOrt(bundle, target, num_threads, provider if provider != "cuda" else "a cuda that works")


def test_the_chosen_one_gets_its_options(with_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paliedge.backends.ort.OrtSession", OpenedOrt)
    session: Any = open_session(Bundle(with_engine), BackendOptions("cpu", threads=3), lambda line: None)
    assert session.chosen == ("jetpack6", 3, "cpu")
    for options in (BackendOptions(use_cuda_graph=False), BackendOptions(sequential=True)):
        with fake_machine(tmp_path / "machine", tensorrt=TENSORRT, cuda=FakeCuda()) as machine:
            with closing(PaliGemma.load(with_engine, options)) as model:
                model.generate(np.zeros((56, 56, 3), np.uint8), "caption en")
            assert (machine.gpu.calls["cudaGraphLaunch"] == 0) == (not options.use_cuda_graph)
            assert (machine.gpu.peak["engine"] == 1) == options.sequential


def other_version(folder: Path) -> Any:
    return fake_machine(folder, tensorrt=OTHER_TENSORRT, cuda=FakeCuda())


def other_gpu(folder: Path) -> Any:
    return fake_machine(folder, tensorrt=TENSORRT, cuda=FakeCuda(compute_capability="8.6"))


OTHERS = pytest.mark.parametrize(
    ("machine", "here"),
    [
        (other_version, "TensorRT 10.7.0 on compute capability 8.7"),
        (other_gpu, "TensorRT 10.3.0 on compute capability 8.6"),
    ],
    ids=["version", "gpu"],
)
Machines = Callable[[Path], Any]


@OTHERS
@pytest.mark.parametrize("backend", ["auto", "tensorrt"])
def test_an_engine_for_something_else_is_an_error_that_names_both_and_the_command(
    machine: Machines, here: str, backend: Any, with_engine: Path, tmp_path: Path
) -> None:
    with machine(tmp_path / "machine"), pytest.raises(EngineMismatchError) as caught:
        open_session(Bundle(with_engine), BackendOptions(backend), pytest.fail)
    assert caught.value.exit_code == 4
    assert here in caught.value.expected
    assert "version 10.3.0, compute capability 8.7 (Orin)" in caught.value.found
    assert f"paliedge build {with_engine} --flavour tensorrt" in caught.value.action
    assert "--on-mismatch fallback" in caught.value.action


@OTHERS
def test_the_command_line_ends_with_code_4(machine: Machines, here: str, with_engine: Path, tmp_path: Path) -> None:
    with machine(tmp_path / "machine"):
        result = CliRunner().invoke(main, ["caption", str(DEMO_SCENES), "-m", str(with_engine)])
    assert result.exit_code == 4
    assert result.stdout == ""
    assert here in result.stderr
    assert "paliedge build" in result.stderr


@OTHERS
def test_fallback_says_once_why_it_is_slow(machine: Machines, here: str, with_engine: Path, tmp_path: Path) -> None:
    with machine(tmp_path / "machine"):
        line = open_and_close(with_engine, BackendOptions(on_mismatch="fallback"))
    assert line.startswith("using ONNX Runtime on the CPU (not tensorrt: engines for version 10.3.0")
    assert "paliedge build" in line


@OTHERS
@pytest.mark.parametrize("backend", ["auto", "tensorrt"])
def test_rebuild_builds_and_uses_the_engine_of_this_machine(
    machine: Machines, here: str, backend: Any, with_engine: Path, tmp_path: Path
) -> None:
    bundle = copy_bundle(with_engine, tmp_path)
    lines: list[str] = []
    with machine(tmp_path / "machine") as made:
        with closing(open_session(Bundle(bundle), BackendOptions(backend, "rebuild"), lines.append)):
            assert lines[-1] == f"using {here}"
            assert [build["graph"] for build in made.builds()] == [
                "vision_encoder.opset20.onnx",
                "decoder.opset20.onnx",
            ]
        assert open_and_close(bundle) == f"using {here}"
        assert len(made.builds()) == 2, "a second start builds nothing"
    assert len(Bundle(bundle).manifest.engines) == 2


def test_rebuild_gives_a_bundle_without_engines_its_first(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = copy_bundle(bundles["paligemma"], tmp_path)
    lines: list[str] = []
    with fake_machine(tmp_path / "machine", tensorrt=TENSORRT, cuda=FakeCuda()):
        open_session(Bundle(bundle), BackendOptions(on_mismatch="rebuild"), lines.append).close()
    assert lines[-1] == "using TensorRT 10.3.0 on compute capability 8.7"


def test_a_rebuild_that_does_not_fit_is_an_error_and_no_slow_answer(
    with_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paliedge.backends.trt.build.available_memory", lambda: FreeMemory(10, 0))
    with other_gpu(tmp_path / "machine"), pytest.raises(ResourceError):
        open_session(Bundle(with_engine), BackendOptions(on_mismatch="rebuild"), lambda line: None)


def test_the_right_engine_of_several_is_taken(built: dict[str, Path], tmp_path: Path) -> None:
    for version in ("10.3.0", "10.16.2"):
        with fake_machine(tmp_path / "machine", tensorrt=version, cuda=FakeCuda()):
            assert version in open_and_close(built["paligemma"])


def no_module(folder: Path) -> Any:
    return fake_machine(folder, tensorrt=None, cuda=FakeCuda())


def too_old(folder: Path) -> Any:
    return fake_machine(folder, tensorrt="9.3.0", cuda=FakeCuda())


def no_bindings(folder: Path) -> Any:
    return fake_machine(folder, tensorrt=TENSORRT, cuda=None)


def no_driver(folder: Path) -> Any:
    return fake_machine(folder, tensorrt=TENSORRT, cuda=FakeCuda(absent=cudaError_t.cudaErrorInsufficientDriver))


def no_gpu(folder: Path) -> Any:
    return fake_machine(folder, tensorrt=TENSORRT, cuda=FakeCuda(absent=cudaError_t.cudaErrorNoDevice))


def no_room(folder: Path) -> Any:
    gpu = FakeCuda()
    gpu.fail(3, cudaError_t.cudaErrorMemoryAllocation, ALLOCATING)
    return fake_machine(folder, tensorrt=TENSORRT, cuda=gpu)


MISSING = pytest.mark.parametrize(
    ("machine", "kind", "words", "fix"),
    [
        (no_module, MissingExtraError, "tensorrt", "sudo apt install python3-libnvinfer"),
        (too_old, EngineMismatchError, "TensorRT 9.3.0", "Update JetPack"),
        (no_bindings, MissingExtraError, "no package cuda-bindings", 'pip install "paliedge[tensorrt]"'),
        (no_driver, DeviceError, "cudaErrorInsufficientDriver", "paliedge doctor"),
        (no_gpu, DeviceError, "cudaErrorNoDevice", "paliedge doctor"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else None,
)


@MISSING
def test_what_is_missing_is_said_once_with_its_fix_and_the_cpu_answers(
    machine: Machines, kind: type[PaliEdgeError], words: str, fix: str, with_engine: Path, tmp_path: Path
) -> None:
    with machine(tmp_path / "machine"):
        line = open_and_close(with_engine)
    assert line.startswith("using ONNX Runtime on the CPU (not tensorrt: ")
    assert words in line
    assert fix in line


@pytest.mark.parametrize("backend", ["auto", "tensorrt"])
def test_a_gpu_without_room_is_an_error_that_names_the_way_out(
    backend: Backend, with_engine: Path, tmp_path: Path
) -> None:
    """ONNX Runtime would want the same memory."""
    with no_room(tmp_path / "machine"), pytest.raises(ResourceError, match="cudaErrorMemoryAllocation") as caught:
        open_session(Bundle(with_engine), BackendOptions(backend), pytest.fail)
    assert caught.value.exit_code == 4
    assert "--sequential" in caught.value.action


@MISSING
def test_what_is_missing_is_an_error_where_it_was_asked_for(
    machine: Machines, kind: type[PaliEdgeError], words: str, fix: str, with_engine: Path, tmp_path: Path
) -> None:
    with machine(tmp_path / "machine"), pytest.raises(kind) as caught:
        open_session(Bundle(with_engine), BackendOptions("tensorrt"), pytest.fail)
    assert words in caught.value.found
    assert fix in caught.value.action


def test_a_bundle_without_engines_says_how_to_get_them(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = bundles["paligemma"]
    with fake_machine(tmp_path / "machine", tensorrt=TENSORRT, rtx=RTX_VERSION, cuda=FakeCuda()):
        line = open_and_close(bundle)
        assert line.startswith("using ONNX Runtime on the CPU (no engines yet: `paliedge build ")
        for flavour in ("tensorrt", "rtx"):
            with pytest.raises(EngineMismatchError, match=f"paliedge build {bundle} --flavour {flavour}"):
                open_session(Bundle(bundle), BackendOptions(flavour), pytest.fail)


def test_a_bundle_for_the_cpu_has_nothing_to_explain(tmp_path: Path) -> None:
    with fake_machine(tmp_path / "machine", tensorrt=TENSORRT, cuda=FakeCuda()):
        for on_mismatch in ("error", "fallback", "rebuild"):
            options = BackendOptions(on_mismatch=on_mismatch)
            assert open_and_close(SHIPPED_BUNDLE, options) == "using ONNX Runtime on the CPU"
        assert not list(SHIPPED_BUNDLE.glob("*.plan"))


def test_the_shipped_bundle_asked_for_tensorrt_says_what_it_lacks(tmp_path: Path) -> None:
    machine = fake_machine(tmp_path / "machine", tensorrt=TENSORRT, cuda=FakeCuda())
    with machine, pytest.raises(EngineMismatchError, match="paliedge export CHECKPOINT -o BUNDLE --target"):
        open_session(Bundle(SHIPPED_BUNDLE), BackendOptions("tensorrt", "rebuild"), pytest.fail)


def test_cuda_asked_for_without_its_provider_is_an_error(bundles: dict[str, Path]) -> None:
    with pytest.raises(EngineMismatchError, match="CUDAExecutionProvider"):
        open_session(Bundle(bundles["paligemma"]), BackendOptions("cuda"), pytest.fail)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from paliedge_export.exporter import export_bundle

    folder = tmp_path_factory.mktemp("bf16") / "bundle"
    export_bundle(str(SHAPES_CHECKPOINT), folder, targets=["jetpack6"], precision="bf16", compare=False)
    return folder


@pytest.mark.parametrize("backend", ["auto", "cuda", "cpu"])
def test_bf16_graphs_are_not_for_onnx_runtime(backend: Any, bf16: Path, tmp_path: Path) -> None:
    machine = fake_machine(tmp_path / "machine", tensorrt=TENSORRT, cuda=FakeCuda())
    with machine, pytest.raises(EngineMismatchError, match="bf16 ones only") as caught:
        open_session(Bundle(bf16), BackendOptions(backend), pytest.fail)
    assert caught.value.exit_code == 4


def test_bf16_graphs_are_for_tensorrt(bf16: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(bf16, tmp_path)
    with fake_machine(tmp_path / "machine", tensorrt=TENSORRT, cuda=FakeCuda()):
        assert build_engine(bundle).precision == "bf16"
        assert open_and_close(bundle) == "using TensorRT 10.3.0 on compute capability 8.7"


def test_where_nothing_works_every_reason_is_told(
    with_both_flavours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "paliedge.backends.ort")
    with fake_machine(tmp_path / "machine", tensorrt=None, cuda=None), pytest.raises(MissingExtraError) as caught:
        open_session(Bundle(with_both_flavours), BackendOptions(), pytest.fail)
    for backend in ("tensorrt", "rtx", "cuda", "cpu"):
        assert f"not {backend}: " in caught.value.found
    assert 'pip install "paliedge[cpu]"' in caught.value.action
