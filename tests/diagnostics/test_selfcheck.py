"""`verify --run` finds what it is there to find: wrong answers, a CUDA graph that changes them, memory that grows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from paliedge import model
from paliedge.backends.cuda import GpuInfo
from paliedge.backends.ort import OrtCache, OrtSession
from paliedge.backends.select import BackendOptions
from paliedge.backends.session import FloatArray, GeneratedToken, IdRange
from paliedge.backends.trt import build
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.digests import describe_file
from paliedge.bundle.manifest import write_manifest
from paliedge.diagnostics import selfcheck
from paliedge.diagnostics.selfcheck import RunReport, check_run
from paliedge.diagnostics.verify import GoldenReport
from paliedge.errors import BundleError, DeviceError, EngineMismatchError
from paliedge.model import SHIPPED_BUNDLE
from tests.cli.test_predict import run

NUM_DECODES = 60
MEGABYTE = 1 << 20


class FakeGpu(OrtSession):
    """Answers as ONNX Runtime does, with a clock of its own; what it does wrong is up to the test.

    Attributes:
        options: what it was opened with.
        leak: bytes that each decode keeps.
        leaks_until: the decode step after which it keeps nothing more.
        graph_error: nats that a CUDA graph adds to a token's log-probability.
        open_sessions: how many of them are open.
    """

    has_device_clock = True
    leak, leaks_until, graph_error = 0, 1 << 30, 0.0
    open_sessions = most_open = num_opened = 0

    def __init__(self, bundle: Bundle, options: BackendOptions) -> None:
        super().__init__(bundle, num_threads=1)
        self.options = options
        self.kept: list[npt.NDArray[np.uint8]] = []
        self.num_steps = 0
        FakeGpu.open_sessions += 1
        FakeGpu.num_opened += 1
        FakeGpu.most_open = max(FakeGpu.most_open, FakeGpu.open_sessions)

    def close(self) -> None:
        super().close()
        FakeGpu.open_sessions -= 1

    def prefill(
        self,
        cache: OrtCache,
        image_features: Sequence[FloatArray],
        prompt_embeds: FloatArray,
        allowed: IdRange,
        row: int = 0,
    ) -> GeneratedToken:
        return super().prefill(cache, image_features, prompt_embeds, allowed, row)._replace(device_ms=2.5)

    def decode(self, cache: OrtCache, inputs_embeds: FloatArray, allowed: Sequence[IdRange]) -> list[GeneratedToken]:
        self.num_steps += 1
        if self.leak and self.num_steps <= self.leaks_until:
            self.kept.append(np.ones(self.leak, np.uint8))
        (step,) = super().decode(cache, inputs_embeds, allowed)
        error = self.graph_error if self.options.use_cuda_graph else 0.0
        return [GeneratedToken(step.token_id, step.log_prob + error, 0.5)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeGpu]]:
    """Every session is a FakeGpu, in a class of its own for this test; all are closed at the end."""

    class Session(FakeGpu):
        pass

    def open_session(bundle: Bundle, options: BackendOptions, report: Any) -> FakeGpu:
        report("building something first")
        report(f"using a fake {'with' if options.use_cuda_graph else 'without'} a CUDA graph")
        return Session(bundle, options)

    monkeypatch.setattr(model, "open_session", open_session)
    for name in ("open_sessions", "most_open", "num_opened"):
        monkeypatch.setattr(FakeGpu, name, 0)
    yield Session
    assert FakeGpu.num_opened > 0
    assert FakeGpu.open_sessions == 0


@pytest.fixture
def gpu_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of GPU memory in use, one a question, the last for ever; without it no GPU answers."""
    in_use = [10**9]

    def probe() -> GpuInfo:
        used = in_use.pop(0) if len(in_use) > 1 else in_use[0]
        return GpuInfo("fake", "8.7", integrated=False, free_memory=8 * 10**9 - used, total_memory=8 * 10**9)

    monkeypatch.setattr(selfcheck, "probe_gpu", probe)
    return in_use


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu = DeviceError(expected="a GPU", found="none", action="Look.")
    for module in (selfcheck, build):
        monkeypatch.setattr(module, "probe_gpu", lambda: no_gpu)


def check(bundle: Path = SHIPPED_BUNDLE, num_decodes: int = NUM_DECODES, **options: Any) -> RunReport:
    return check_run(Bundle(bundle), BackendOptions(threads=1, **options), num_decodes)


def test_the_shipped_bundle_passes_on_the_cpu() -> None:
    report = check(num_decodes=300)
    assert report.backend == "using ONNX Runtime on the CPU"
    assert report.golden is not None
    assert report.golden.num_answers == 6
    assert 300 <= report.num_decodes < 600
    assert (report.graph_equal, report.gpu_growth, report.decode_device_ms) == (None, None, None)
    assert report.host_growth < 4 * MEGABYTE
    assert report.decode_ms is not None
    assert min(report.decode_ms, report.prefill_ms, report.vision_ms) > 0


def test_a_report_can_be_written_as_json(gpu: type[FakeGpu], gpu_memory: list[int]) -> None:
    report = check()
    assert report.golden == GoldenReport(6, 6, 0)
    found = json.loads(json.dumps(report.to_dict()))
    assert found == asdict(report) | {"golden": {"num_answers": 6, "num_equal": 6, "num_ties": 0}}
    assert set(found) == set(RunReport.__dataclass_fields__)


def test_a_gpu_runs_with_its_graph_after_a_run_without(gpu: type[FakeGpu], gpu_memory: list[int]) -> None:
    report = check()
    assert report.backend == "using a fake with a CUDA graph"
    assert report.graph_equal is True
    assert report.gpu_growth == 0
    assert report.decode_device_ms == 0.5
    assert (FakeGpu.num_opened, FakeGpu.most_open) == (2, 1)


def test_without_a_graph_there_is_nothing_to_compare(gpu: type[FakeGpu]) -> None:
    gpu.graph_error = 9.0
    report = check(use_cuda_graph=False)
    assert report.backend == "using a fake without a CUDA graph"
    assert report.graph_equal is None
    assert FakeGpu.num_opened == 1


@pytest.mark.parametrize("error", [0.003, -0.01, 5.0])
def test_a_graph_that_changes_a_score_is_found(error: float, gpu: type[FakeGpu]) -> None:
    gpu.graph_error = error
    with pytest.raises(DeviceError, match=r"without; found other answers.*--no-cuda-graph"):
        check()


def test_a_graph_is_compared_where_no_golden_answers_are(gpu: type[FakeGpu], tmp_path: Path) -> None:
    folder = copy_without_golden(tmp_path)
    report = check(folder)
    assert (report.golden, report.graph_equal) == (None, True)
    assert report.to_dict()["golden"] is None
    gpu.graph_error = 0.1
    with pytest.raises(DeviceError, match="CUDA graph"):
        check(folder)


def copy_without_golden(folder: Path) -> Path:
    bundle = folder / "bundle"
    shutil.copytree(SHIPPED_BUNDLE, bundle)
    manifest = Bundle(bundle).manifest
    files = {name: file for name, file in manifest.files.items() if name != manifest.golden}
    write_manifest(bundle, msgspec.structs.replace(manifest, golden=None, files=files))
    return bundle


def test_a_wrong_answer_is_found(gpu: type[FakeGpu], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(SHIPPED_BUNDLE, bundle)
    with np.load(bundle / "golden.npz") as golden:
        arrays = {name: golden[name] for name in golden.files}
    arrays["token_ids"][-1, -1, 0] += 1
    arrays["log_probs"][-1, -1, 0] -= 1
    np.savez_compressed(bundle / "golden.npz", **arrays)
    manifest = Bundle(SHIPPED_BUNDLE).manifest
    files = manifest.files | {"golden.npz": describe_file(bundle / "golden.npz")}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    with pytest.raises(BundleError, match="instead of"):
        check(bundle)


def test_memory_that_grows_with_each_step_is_found(gpu: type[FakeGpu]) -> None:
    gpu.leak = MEGABYTE // 4
    with pytest.raises(DeviceError, match=r"over 6\d decode steps; found growth of 1\d{7} bytes on the host"):
        check(use_cuda_graph=False)


def test_memory_that_is_taken_once_is_no_growth(gpu: type[FakeGpu], tmp_path: Path) -> None:
    """Pools fill in the first steps: here 40 MB, before a fifth of the decodes is done."""
    gpu.leak, gpu.leaks_until = 8 * MEGABYTE, 5
    folder = copy_without_golden(tmp_path)  # whose steps would come before
    assert check(folder, use_cuda_graph=False).host_growth < MEGABYTE


def test_a_few_bytes_are_no_growth_and_are_told(gpu: type[FakeGpu]) -> None:
    gpu.leak = MEGABYTE // 32
    assert MEGABYTE < check(use_cuda_graph=False).host_growth < 4 * MEGABYTE


def test_growth_is_looked_for_if_one_answer_has_all_steps(gpu: type[FakeGpu]) -> None:
    """An answer may be longer than the steps that were asked for; then a second one is measured."""
    gpu.leak = MEGABYTE
    with pytest.raises(DeviceError, match="growth"):
        check(num_decodes=2, use_cuda_graph=False)


@pytest.mark.parametrize(
    ("in_use", "growth"), [([10**9, 10**9 + 4 * MEGABYTE], 4 * MEGABYTE), ([10**9, 9 * 10**8], -(10**8))]
)
def test_gpu_memory_may_shrink_and_move_a_little(
    in_use: list[int], growth: int, gpu: type[FakeGpu], gpu_memory: list[int]
) -> None:
    gpu_memory[:] = in_use
    assert check(use_cuda_graph=False).gpu_growth == growth


def test_gpu_memory_that_grows_is_found(gpu: type[FakeGpu], gpu_memory: list[int]) -> None:
    gpu_memory[:] = [10**9, 10**9 + 4 * MEGABYTE + 1]
    with pytest.raises(DeviceError, match=rf"and {4 * MEGABYTE + 1} on the GPU.*paliedge doctor --json"):
        check(use_cuda_graph=False)


def test_verify_run_says_what_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_decodes(monkeypatch)
    result = run("verify", "--run", "--threads", "1")
    assert result.exit_code == 0
    *_, golden, backend, growth, times = result.stdout.splitlines()
    assert golden.startswith("6 of 6 golden answers equal")
    assert backend == "using ONNX Runtime on the CPU"
    assert growth.startswith("6")
    assert growth.endswith(" bytes on the host")
    assert times.startswith("ms: vision ")
    assert "CUDA graph" not in result.stdout


def test_verify_run_says_what_a_gpu_did(
    gpu: type[FakeGpu], gpu_memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_decodes(monkeypatch)
    lines = run("verify", "--run").stdout.splitlines()
    assert "using a fake with a CUDA graph" in lines
    assert "the same answers with a CUDA graph as without" in lines
    assert sum(line.endswith(" bytes on the host, 0 on the GPU") for line in lines) == 1
    assert "using a fake without a CUDA graph" in run("verify", "--run", "--no-cuda-graph").stdout


def test_verify_run_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_decodes(monkeypatch)
    report = json.loads(run("verify", "--json", env={"PALIEDGE_RUN": "1"}).stdout)
    assert report["golden"] == report["run"]["golden"]
    assert report["run"]["num_decodes"] >= NUM_DECODES
    assert json.loads(run("verify", "--json").stdout)["run"] is None


def test_verify_run_ends_with_the_errors_exit_code(gpu: type[FakeGpu], monkeypatch: pytest.MonkeyPatch) -> None:
    limit_decodes(monkeypatch)
    gpu.leak = MEGABYTE
    result = run("verify", "--run", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: expected memory that grows by at most 4 MB" in result.stderr


def limit_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the verb does it, with fewer steps."""
    honest = check_run

    def check_briefly(bundle: Bundle, options: BackendOptions) -> RunReport:
        return honest(bundle, options, NUM_DECODES)

    monkeypatch.setattr(selfcheck, "check_run", check_briefly)


def test_an_engine_that_does_not_run_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a board whose driver is broken ONNX Runtime's answers say nothing of the engine."""
    bundle = Bundle(SHIPPED_BUNDLE)
    monkeypatch.setattr(bundle, "manifest", msgspec.structs.replace(bundle.manifest, engines=("an engine",)))
    with pytest.raises(EngineMismatchError, match="an engine of the bundle that runs here"):
        check_run(bundle, BackendOptions(use_cuda_graph=False), 1)
    assert check_run(bundle, BackendOptions("cpu", use_cuda_graph=False), 1).golden is not None
