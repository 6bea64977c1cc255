"""A record as people and spreadsheets read it: a table, Markdown, CSV, a JSON object a run."""

# Tests: tests/bench/test_record.py.
from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from paliedge.bench.compare import RecordComparison
from paliedge.bench.record import ColdStart, Record, Run, Stage, write_record
from paliedge.bench.summaries import Summary
from paliedge.errors import UsageError

_COLUMNS = ("stage", "p50", "p90", "p99", "mean", "std", "n", "rate", "of the machine's")


def to_text(record: Record) -> str:
    """Tables for a terminal."""
    return "\n".join(_render(record, _align, lambda name: f"\n{name}"))


def to_markdown(record: Record) -> str:
    """The same tables in Markdown."""
    return "\n".join(_render(record, _pipes, lambda name: f"\n### {name}\n")) + "\n"


def to_csv(record: Record) -> str:
    """A line a stage, with the machine and the bundle in each."""
    out = io.StringIO()
    rows = list(_rows(record))
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def to_jsonl(record: Record) -> str:
    """An object a stage, as the CSV's lines."""
    return "".join(json.dumps(row) + "\n" for row in _rows(record))


def save(record: Record, path: Path) -> None:
    """Write in the format that the name ends in: .json (everything), .csv, .md or .jsonl.

    Raises:
        UsageError: another ending.
    """
    check_path(path)
    if path.suffix == ".json":
        write_record(record, path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_WRITERS[path.suffix](record))


def check_path(path: Path) -> None:
    """Raises:
    UsageError: nothing can be written to a file of that name.
    """
    if path.suffix != ".json" and path.suffix not in _WRITERS:
        raise UsageError(
            expected=f"a file that ends in .json, {', '.join(sorted(_WRITERS))}",
            found=f"'{path.name}'",
            action="Name it otherwise; .json keeps everything.",
        )


def compare_to_text(comparisons: Sequence[RecordComparison]) -> str:
    """A table of ratios."""
    rows = [("run", "stage", "first, ms", "second, ms", "ratio", "95 %", "verdict")]
    for one in comparisons:
        spread = f"{one.ratio.low:.3f} to {one.ratio.high:.3f}"
        times = (f"{one.first_ms:.3f}", f"{one.second_ms:.3f}", f"{one.ratio.ratio:.3f}")
        rows.append((one.run, one.stage, *times, spread, one.verdict))
    return "\n".join(_align(rows))


_WRITERS: dict[str, Callable[[Record], str]] = {".csv": to_csv, ".md": to_markdown, ".jsonl": to_jsonl}


def _render(
    record: Record, table: Callable[[Sequence[Sequence[str]]], Iterator[str]], heading: Callable[[str], str]
) -> Iterator[str]:
    subject = record.subject
    yield f"{subject.checkpoint}, {subject.family}, {subject.image_size} pixels, {subject.precision}: {subject.backend}"
    for run in record.runs:
        yield heading(_title(run))
        yield from table(
            [_COLUMNS, *(_stage_row(name, stage) for name, stage in run.stages.items()), _latency_row(run)]
        )
    yield heading("the rest")
    yield from table([("what", "figure"), *_facts(record)])


def _title(run: Run) -> str:
    words = [f"{run.name}: {run.answers_per_s:.2f} answers a second, {run.tokens_per_s:.1f} tokens a second"]
    if run.scenario == "camera":
        words.append(f"{run.num_dropped} frames dropped, {run.num_late} of {run.num_answers} answers late")
    if run.num_changed:
        words.append(f"{run.num_changed} answers CHANGED from one time to the next")
    if run.interrupted:
        words.append("interrupted")
    return "; ".join(words)


def _stage_row(name: str, stage: Stage) -> tuple[str, ...]:
    rates = [
        f"{value:.1f} {unit}"
        for value, unit in ((stage.gigabytes_per_s, "GB/s"), (stage.gigaflops_per_s, "GFLOP/s"))
        if value is not None
    ]
    shares = [f"{share:.0%} {roof}" for share, roof in ((stage.mbu, "MBU"), (stage.mfu, "MFU")) if share is not None]
    clock = " (GPU)" if stage.device else ""
    return (f"{name}{clock}", *_numbers(stage.device or stage.wall), ", ".join(rates), ", ".join(shares))


def _latency_row(run: Run) -> tuple[str, ...]:
    return ("latency of a query", *_numbers(run.latency), "", "")


def _numbers(found: Summary) -> tuple[str, ...]:
    values = (found.p50, found.p90, found.p99, found.mean, found.std)
    return (*("-" if value is None else f"{value:.3f}" for value in values), str(found.n))


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    memory, roofs = record.memory, record.roofs
    yield "peak resident memory", _gigabytes(memory.peak_rss)
    if memory.pss is not None:
        yield "proportional set", _gigabytes(memory.pss)
    if memory.device is not None:
        yield "GPU memory", _gigabytes(memory.device)
    for name in ColdStart.__struct_fields__:
        seconds = [found for one in record.cold_starts if (found := getattr(one, name)) is not None]
        if seconds:
            spread = f"{median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
            yield f"cold start: {name.replace('_', ' ')}", spread
    if roofs.read_bytes_per_s:
        yield "this machine reads", f"{roofs.read_bytes_per_s / 1e9:.1f} GB/s"
    if roofs.flops_per_s:
        yield "this machine multiplies", f"{roofs.flops_per_s / 1e9:.1f} GFLOP/s"
    if roofs.int8_ops_per_s:
        yield "this machine multiplies 8-bit integers", f"{roofs.int8_ops_per_s / 1e9:.1f} GOP/s"
    yield "measured by", roofs.how
    if record.accuracy:
        found = record.accuracy
        yield "answers as the exporter's", f"{found.num_equal} of {found.num_answers}, {found.num_ties} at a tie"
    for run in record.runs:
        if run.energy:
            yield f"energy, {run.name}", f"{run.energy.joules_per_answer:.2f} J an answer ({run.energy.sensor})"
    if not any(run.energy for run in record.runs):
        yield "energy", "n/a: no sensor that this user may read"
    for warning in record.warnings:
        yield "warning", warning


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f} GB"


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    subject = record.subject
    machine = record.conditions.get("board") or record.conditions.get("processor", "")
    common = {"machine": machine, "precision": subject.precision, "backend": subject.backend, "bundle": subject.sha256}
    for run in record.runs:
        about = {"scenario": run.scenario, "batch": run.batch, "fps": run.fps or ""}
        rates = {"answers_per_s": run.answers_per_s, "tokens_per_s": run.tokens_per_s}
        for name, stage in (*run.stages.items(), ("latency", None)):
            found = msgspec.structs.asdict(run.latency if stage is None else stage.device or stage.wall)
            yield {
                **common,
                **about,
                "stage": name,
                "clock": "gpu" if stage and stage.device else "wall",
                **{f"{key}_ms" if key != "n" else key: value for key, value in found.items()},
                **{key: getattr(stage, key, None) for key in ("gigabytes_per_s", "mbu", "gigaflops_per_s", "mfu")},
                **rates,
                "peak_rss_bytes": record.memory.peak_rss,
                "joules_per_answer": run.energy.joules_per_answer if run.energy else None,
            }


def _align(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _pipes(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for index, row in enumerate(rows):
        yield f"| {' | '.join(row)} |"
        if index == 0:
            yield f"|{'---|' * len(row)}"
    yield ""
