"""Records: written and read, compared with a verdict, and rendered."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from paliedge.bench.compare import compare_records, differences
from paliedge.bench.plots import import_matplotlib, plot
from paliedge.bench.record import (
    Accuracy,
    ColdStart,
    MemoryUse,
    Record,
    Roofs,
    Run,
    Scenario,
    Stage,
    Subject,
    read_record,
    write_record,
)
from paliedge.bench.report import save, to_markdown, to_text
from paliedge.bench.summaries import summarise
from paliedge.errors import UsageError


def stage(median: float, seed: int, n: int = 200) -> Stage:
    samples = np.random.default_rng(seed).normal(median, median / 50, n).tolist()
    return Stage(wall=summarise(samples), samples_ms=samples)


def make_run(token: float = 5.0, scenario: Scenario = "single-stream", batch: int = 1) -> Run:
    stages = {"preprocess": stage(1, 1), "vision": stage(20, 2), "prefill": stage(40, 3), "ttft": stage(61, 4)}
    stages |= {"token": stage(token, 5), "answer": stage(61 + 9 * token, 6)}
    samples = stages["answer"].samples_ms
    return Run(
        scenario=scenario,
        batch=batch,
        fps=None,
        seconds=20.0,
        num_answers=200,
        num_tokens=2000,
        answers_per_s=10.0 * batch**0.5,
        tokens_per_s=100.0,
        latency=summarise(samples),
        latency_samples_ms=samples,
        stages=stages,
    )


def cold_start(engine: float) -> ColdStart:
    return ColdStart(imports=0.1, bundle=0.1, engine=engine, first_answer=0.5, second_answer=0.1, process=1 + engine)


def make_record(token: float = 5.0, precision: str = "int8", **changes: object) -> Record:
    subject = Subject(
        bundle="bundle",
        sha256="0" * 64,
        checkpoint="paligemma",
        family="paligemma",
        image_size=224,
        target="cpu",
        precision=precision,
        backend="using ONNX Runtime on the CPU",
        prompts=["caption en"],
    )
    record = Record(
        subject=subject,
        conditions={"processor": "a board's", "git": "abc"},
        warnings=["not quiet"],
        roofs=Roofs(read_bytes_per_s=30e9, flops_per_s=100e9, int8_ops_per_s=200e9, how="numpy"),
        cold_starts=[cold_start(engine) for engine in (1.0, 1.2, 2.0)],
        memory=MemoryUse(peak_rss=10**9, pss=None, anonymous=10**8, device=None),
        accuracy=Accuracy(num_answers=6, num_equal=5, num_ties=1),
        runs=[make_run(token)],
        interrupted=False,
    )
    return msgspec.structs.replace(record, **changes)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    record = make_record()
    write_record(record, tmp_path / "new" / "record.json")
    assert read_record(tmp_path / "new" / "record.json") == record


@pytest.mark.parametrize("content", ["", "{}", '{"format_version": 2}', "[]"])
def test_other_files_are_refused_with_their_reason(tmp_path: Path, content: str) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(UsageError, match="bench -o"):
        read_record(tmp_path / "other.json")
    with pytest.raises(UsageError):
        read_record(tmp_path / "absent.json")


@pytest.mark.parametrize(("token", "verdict"), [(5.0, "same"), (5.1, "same"), (5.9, "slower"), (4.2, "faster")])
def test_a_stage_is_slower_only_beyond_the_threshold_and_the_spread(token: float, verdict: str) -> None:
    found = {one.stage: one for one in compare_records(make_record(), make_record(token), 0.05)}
    assert found["token"].verdict == verdict
    assert found["token"].ratio.ratio == pytest.approx(token / 5, rel=0.01)
    assert found["prefill"].verdict == "same"
    assert found["prefill"].ratio.ratio == 1


def test_a_few_wild_samples_are_no_verdict() -> None:
    rng = np.random.default_rng(1)
    noisy = [float(value) for value in rng.lognormal(2, 1, 8)]
    runs = [
        msgspec.structs.replace(make_run(), stages={"token": Stage(wall=summarise(samples), samples_ms=samples)})
        for samples in (noisy, [1.3 * value for value in reversed(noisy)])
    ]
    found = compare_records(make_record(runs=runs[:1]), make_record(runs=runs[1:]), 0.05)
    assert {one.verdict for one in found if one.stage == "token"} == {"same"}


def test_only_scenarios_of_both_are_compared() -> None:
    first = make_record(runs=[make_run(), make_run(scenario="offline", batch=4)])
    second = make_record(runs=[make_run(scenario="offline", batch=4), make_run(scenario="offline", batch=8)])
    assert {one.run for one in compare_records(first, second, 0.05)} == {"offline batch 4"}
    with pytest.raises(UsageError, match="in common"):
        compare_records(make_record(), make_record(runs=[make_run(scenario="offline")]), 0.05)


@pytest.mark.parametrize(("n", "verdict"), [(1, "too few"), (5, "too few"), (6, "slower")])
def test_a_handful_of_samples_is_no_verdict(n: int, verdict: str) -> None:
    """However far apart they are: a single one has an interval of no width, and steps of one answer are no more."""
    first, second = (
        msgspec.structs.replace(make_run(), stages={"token": stage(median, seed)}, num_answers=n)
        for median, seed in ((5, 1), (10, 2))
    )
    found = compare_records(make_record(runs=[first]), make_record(runs=[second]), 0.05)
    assert {one.stage: one.verdict for one in found}["token"] == verdict


def test_what_lies_behind_a_latency_is_told_where_it_differs() -> None:
    second = make_record(
        runs=[msgspec.structs.replace(make_run(), num_changed=2), make_run(scenario="offline")],
        memory=MemoryUse(peak_rss=2 * 10**9, pss=None, anonymous=10**8, device=None),
        accuracy=Accuracy(num_answers=6, num_equal=3, num_ties=1),
        interrupted=True,
    )
    assert differences(make_record(), second) == [
        "scenarios: single-stream | single-stream, offline",
        "interrupted: False | True",
        "peak resident memory: 1 GB | 2 GB",
        "answers as exported: 5 equal, 1 at a tie, of 6 | 3 equal, 1 at a tie, of 6",
        "answers that changed: 0 | 2",
    ]


def test_what_else_differs_is_told() -> None:
    second = make_record(precision="int4", conditions={"processor": "another", "git": "abc"})
    assert differences(make_record(), second) == ["precision: int8 | int4", "processor: a board's | another"]
    assert differences(make_record(), make_record()) == []


def test_tables_hold_the_figures(tmp_path: Path) -> None:
    record = make_record()
    token = record.runs[0].stages["token"].wall
    for text in (to_text(record), to_markdown(record)):
        line = next(line for line in text.splitlines() if line.lstrip("| ").startswith("token"))
        assert f"{token.p50:.3f}" in line
        assert f"{token.p99:.3f}" in line
        assert "5 of 6" in text
        assert "not quiet" in text
        assert "n/a" in text  # no power sensor
        assert "1.20 s (1.00 to 2.00)" in text
    for suffix in (".md", ".csv", ".jsonl", ".json"):
        save(record, tmp_path / f"record{suffix}")
    assert (tmp_path / "record.md").read_text() == to_markdown(record)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "record.csv").read_text())))
    assert [row["stage"] for row in rows] == [*record.runs[0].stages, "latency"]
    assert float(rows[4]["p50_ms"]) == token.p50
    assert {"mbu", "mfu", "gigaflops_per_s", "peak_rss_bytes"} <= set(rows[0])
    lines = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [row["stage"] for row in rows]
    with pytest.raises(UsageError, match=r"\.json"):
        save(record, tmp_path / "record.txt")


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(import_matplotlib(), "close", kept.append)
    token = msgspec.structs.replace(stage(5, 5), gigabytes_per_s=20.0, gigaflops_per_s=40.0)
    single = make_run()
    single = msgspec.structs.replace(single, stages=single.stages | {"token": token})
    sweep = [make_run(scenario="offline", batch=batch) for batch in (1, 2, 4)]
    together = [make_run(token=5 + batch, scenario="multi-stream", batch=batch) for batch in (1, 4)]
    records = [make_record(runs=[single, *sweep, *together]), make_record(precision="fp16", runs=[single])]
    assert {path.name for path in plot(records, tmp_path)} == {"stages.png", "batches.png", "roofline.png"}
    assert all(path.stat().st_size > 5_000 for path in tmp_path.iterdir())
    stages, batches, roofline = kept
    assert [bar.get_width() for bar in stages.axes[0].containers[2]] == [single.stages["vision"].wall.p50] * 2
    throughput, latency = ([float(value) for value in axes.lines[0].get_ydata()] for axes in batches.axes)
    assert throughput == [run.answers_per_s for run in sweep]
    assert latency == [run.latency.p50 for run in together]
    assert [tuple(map(float, point)) for point in roofline.axes[0].collections[2].get_offsets()] == [(2.0, 40.0)]
    assert max(roofline.axes[0].lines[0].get_ydata()) == pytest.approx(200.0)  # as high as the machine multiplies
    assert {path.name for path in plot([make_record()], tmp_path / "few")} == {"stages.png"}
