"""The verb `bench`, run as a user runs it: the shipped shapes bundle for a moment."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from paliedge.bench.record import Roofs, Stage, read_record, write_record
from paliedge.bench.runner import _backend, _spread_warnings
from paliedge.bench.scenarios import ScenarioSettings, TimedAnswer, Trace
from paliedge.bench.shares import add_shares, step_bytes
from paliedge.bench.summaries import summarise
from paliedge.bundle.bundle import Bundle
from paliedge.cli import main
from paliedge.cli.bench import _Progress
from paliedge.cli.demo import DEMO_SCENES
from paliedge.errors import MissingExtraError
from paliedge.model import SHIPPED_BUNDLE
from paliedge.planning.roofline import vision_flops
from paliedge.results.generation import Timings
from tests.bench.test_record import make_record, make_run


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "record.json"
    scenarios = ("--scenario", "single-stream", "--scenario", "multi-stream", "--scenario", "offline")
    result = run(*scenarios, "--runs", 8, "--batch", "1,4", "--fps", 4, "-o", path, "--plot", path.parent)
    assert result.exit_code == 0, result.stderr
    assert "tokens a second" in result.stdout
    return path


def test_a_run_measures_every_stage_scenario_and_the_machine(measured: Path) -> None:
    record = read_record(measured)
    names = ["single-stream", "multi-stream", "multi-stream batch 4", "offline", "offline batch 4", "camera 4 fps"]
    assert [one.name for one in record.runs] == names
    single = record.runs[0]
    assert single.num_answers == 8
    assert list(single.stages) == ["preprocess", "tokenize", "vision", "prefill", "ttft", "token", "parse", "answer"]
    assert all(stage.wall.min > 0 for stage in single.stages.values())
    parts = sum(single.stages[name].wall.mean for name in ("ttft", "parse"))
    decoding = sum(single.stages["token"].samples_ms) / 8
    assert single.stages["answer"].wall.mean == pytest.approx(parts + decoding, rel=0.2)
    assert len(record.cold_starts) == 3
    assert all(one.process > one.imports + one.engine for one in record.cold_starts)
    assert record.accuracy is not None
    assert record.accuracy.num_equal == record.accuracy.num_answers
    assert record.subject.sha256 == Bundle(SHIPPED_BUNDLE).manifest.sha256
    assert record.memory.peak_rss > 50e6
    assert {"processor", "load average", "packages"} <= set(record.conditions)
    assert not record.interrupted
    assert (measured.parent / "stages.png").exists()
    assert (measured.parent / "batches.png").exists()


def test_rates_are_bytes_and_operations_over_the_median(measured: Path) -> None:
    record, manifest = read_record(measured), Bundle(SHIPPED_BUNDLE).manifest
    stages, roofs = record.runs[0].stages, record.roofs
    token, vision = stages["token"], stages["vision"]
    num_bytes = step_bytes(manifest, manifest.targets["cpu"])
    weights = sum((SHIPPED_BUNDLE / name).stat().st_size for name in manifest.targets["cpu"].decoder.weights)
    assert weights < num_bytes < 1.5 * weights
    assert token.gigabytes_per_s == pytest.approx(num_bytes / token.wall.p50 / 1e6)
    assert vision.gigaflops_per_s == pytest.approx(vision_flops(manifest.model) / vision.wall.p50 / 1e6)
    assert roofs.read_bytes_per_s is not None
    assert token.mbu == pytest.approx(num_bytes / token.wall.p50 * 1e3 / roofs.read_bytes_per_s)
    assert roofs.flops_per_s is not None
    assert vision.mfu == pytest.approx(vision_flops(manifest.model) / vision.wall.p50 * 1e3 / roofs.flops_per_s)
    assert record.runs[2].stages["token"].gigabytes_per_s is None  # a step that four share


def test_integers_have_their_share_of_the_roof_of_integers(measured: Path) -> None:
    record, manifest = read_record(measured), Bundle(SHIPPED_BUNDLE).manifest
    integers = msgspec.structs.replace(manifest.targets["cpu"], precision="int8")
    vision = add_shares(record.runs[0], manifest, integers, record.roofs, 16).stages["vision"]
    assert vision.gigaflops_per_s is not None
    assert record.roofs.int8_ops_per_s is not None
    assert vision.mfu == pytest.approx(vision.gigaflops_per_s * 1e9 / record.roofs.int8_ops_per_s)
    assert vision.gigaflops_per_s == record.runs[0].stages["vision"].gigaflops_per_s


def test_a_folder_of_pictures_and_a_prompt_can_be_measured() -> None:
    result = run(
        DEMO_SCENES, "--prompt", "ocr", "--runs", 3, "--scenario", "single-stream", "--no-cold-start", "--json"
    )
    record = json.loads(result.stdout)
    assert record["subject"]["prompts"] == ["ocr"]
    assert record["runs"][0]["num_answers"] == 3
    assert record["cold_starts"] == []
    assert (record["subject"]["num_images"], record["subject"]["num_threads"]) == (3, 0)


def test_ctrl_c_writes_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(progress: object, settings: ScenarioSettings, trace: Trace) -> None:
        if len(trace.answers) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr("paliedge.cli.bench._Progress.__call__", stop)
    result = run("--runs", 100_000, "-o", tmp_path / "part.json")
    assert result.exit_code == 130
    record = read_record(tmp_path / "part.json")
    assert record.interrupted
    assert [one.scenario for one in record.runs] == ["single-stream"]
    assert record.runs[0].interrupted
    assert record.runs[0].num_answers == 7
    assert record.cold_starts == []


@pytest.mark.parametrize("late", ["_check_answers", "measure_cold_start"])
def test_ctrl_c_behind_the_scenarios_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"paliedge.bench.runner.{late}", stop)
    result = run("--runs", 3, "--scenario", "single-stream", "-o", tmp_path / "part.json")
    assert result.exit_code == 130
    record = read_record(tmp_path / "part.json")
    assert record.interrupted
    assert record.runs[0].num_answers == 3
    assert (record.accuracy is None) == (late == "_check_answers")
    assert record.cold_starts == []


def test_progress_is_shown_before_the_first_whole_batch(capsys: pytest.CaptureFixture[str]) -> None:
    trace = Trace()
    trace.answers.append(TimedAnswer(0, (1,), Timings(0.0, 0.0, 1.0, ())))
    progress = _Progress(shows=True)
    progress(ScenarioSettings("offline", 4), trace)
    progress.end()
    assert "offline 4: 1 answers" in capsys.readouterr().err


def test_other_answers_than_the_exporters_are_told_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paliedge.diagnostics.verify._until", lambda ends, tokens: [1, 2, 3])
    result = run("--runs", 3, "--scenario", "single-stream", "--no-cold-start", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["accuracy"]["num_equal"] == 0
    assert "not the exporting machine's" in result.stderr


def test_a_gpu_that_cannot_be_probed_has_no_roof_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MissingExtraError(expected="cuda-bindings", found="no such package", action="Install it.")

    monkeypatch.setattr("paliedge.bench.roofs.measure_gpu", fail)
    monkeypatch.setattr("paliedge.bench.runner._backend", lambda said: "using ONNX Runtime with CUDA")
    result = run("--runs", 3, "--scenario", "single-stream", "--no-cold-start", "--json")
    roofs = json.loads(result.stdout)["roofs"]
    assert roofs.pop("how") == "not measured: no such package"
    assert set(roofs.values()) == {None}


def test_a_reason_that_names_cuda_makes_no_gpu() -> None:
    assert "CUDA" not in _backend("using ONNX Runtime on the CPU (not rtx: driver for CUDA none)")


def test_a_cold_start_that_fails_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paliedge.bench.cold_start.sys.executable", "/bin/false")
    result = run("--runs", 3, "--scenario", "single-stream", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["runs"][0]["num_answers"] == 3
    assert "a cold start failed" in result.stderr


def test_memory_that_is_now_faster_now_slower_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = iter((20e9, 40e9))

    def probe(*_: object) -> Roofs:
        return Roofs(read_bytes_per_s=next(probes), flops_per_s=None, how="made up")

    monkeypatch.setattr("paliedge.bench.roofs.measure_cpu_apart", probe)
    result = run("--runs", 3, "--scenario", "single-stream", "--no-cold-start", "--json")
    assert json.loads(result.stdout)["roofs"]["read_bytes_per_s"] == 40e9
    assert "at 20.0 and at 40.0 GB/s" in result.stderr


def test_steps_of_very_different_length_are_told_where_none_are_shared() -> None:
    uneven = Stage(wall=summarise([1.0] * 8 + [2.0] * 2), samples_ms=[])
    runs = [msgspec.structs.replace(make_run(batch=batch), stages={"token": uneven}) for batch in (1, 4)]
    assert _spread_warnings([*runs, make_run()]) == ["single-stream: p90 of a decode step is 2.0 times its p50"]


@pytest.mark.parametrize(("token", "exit_code"), [(5.0, 0), (5.9, 1), (4.0, 0)])
def test_compare_ends_with_one_where_the_second_is_slower(tmp_path: Path, token: float, exit_code: int) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    write_record(make_record(), first)
    write_record(make_record(token, precision="int4"), second)
    result = run("--compare", first, second)
    assert result.exit_code == exit_code
    assert "single-stream" in result.stdout
    assert "precision: int8 | int4" in result.stderr
    assert run("--compare", first, second, "--threshold", "50").exit_code == 0
    found = json.loads(run("--compare", first, second, "--json").stdout)
    assert found["comparisons"][0][0] == "single-stream"


def test_compare_that_can_say_nothing_does_not_pass(tmp_path: Path) -> None:
    few = msgspec.structs.replace(make_record().runs[0], num_answers=3)
    write_record(make_record(runs=[few]), tmp_path / "few.json")
    write_record(make_record(), tmp_path / "many.json")
    result = run("--compare", tmp_path / "few.json", tmp_path / "many.json", "--plot", tmp_path)
    assert result.exit_code == 1
    assert "no verdict on single-stream: too few samples" in result.stderr
    assert (tmp_path / "stages.png").exists()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["-o", "record.txt"], 2, "ends in .json"),
        (["--batch", "1,x"], 2, "batch sizes"),
        (["--batch", "0"], 2, "batch sizes"),
        (["absent.png"], 5, "absent.png"),
        (["--compare", "absent.json", "absent.json"], 2, "absent.json"),
        (["rtsp://127.0.0.1:9/x"], 2, "folder of pictures"),
        (["-m", "absent"], 3, "no bundle.json"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    arguments: list[str], exit_code: int, words: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == exit_code, result.stderr
    assert words in result.stderr
