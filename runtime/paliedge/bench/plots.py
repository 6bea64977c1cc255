"""Pictures of records: where an answer's time goes, what batches cost, how near stages come to the machine's roofs.

Needs matplotlib: `pip install "paliedge[bench]"`.
"""

# Tests: tests/bench/test_record.py.
from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from paliedge.bench.record import Record, Run
from paliedge.errors import MissingExtraError

_PARTS = ("preprocess", "tokenize", "vision", "prefill", "decode", "parse")
_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7")
"""Of M. Okabe and K. Ito, told apart by colour-blind eyes."""


def import_matplotlib() -> Any:
    """matplotlib's pyplot, drawing to files.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import_module("matplotlib").use("agg")
        return import_module("matplotlib.pyplot")
    except ImportError as error:
        raise MissingExtraError(
            expected="matplotlib, to plot", found="no such package", action='Run `pip install "paliedge[bench]"`.'
        ) from error


def plot(records: Sequence[Record], folder: Path) -> list[Path]:
    """stages.png, batches.png and roofline.png, those for which the records have figures; returns what was written."""
    pyplot = import_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw, columns in (
        ("stages", _draw_stages, 1),
        ("batches", _draw_batches, 2),
        ("roofline", _draw_roofline, 1),
    ):
        figure, axes = pyplot.subplots(1, columns, figsize=(4 + 3.5 * columns, 4), layout="constrained")
        if draw(axes, records):
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], dpi=120)
        pyplot.close(figure)
    return drawn


def _draw_stages(axes: Any, records: Sequence[Record]) -> bool:
    """A bar a record: medians of the stages of one answer, stacked."""
    pairs = [(record, run) for record in records for run in record.runs if run.scenario == "single-stream"]
    left = [0.0] * len(pairs)
    for part, colour in zip(_PARTS, _COLOURS, strict=True):
        widths = [_part_ms(run, part) for _, run in pairs]
        axes.barh([_label(record) for record, _ in pairs], widths, left=left, label=part, color=colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set(xlabel="milliseconds an answer, medians", title="Where an answer's time goes")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(_PARTS), fontsize="small")
    return bool(pairs)


def _part_ms(run: Run, part: str) -> float:
    if part != "decode":
        return run.stages[part].wall.p50 if part in run.stages else 0.0
    steps = run.num_tokens / run.num_answers - 1
    return run.stages["token"].wall.p50 * steps if "token" in run.stages else 0.0


def _draw_batches(both: Any, records: Sequence[Record]) -> bool:
    """Answers a second of "offline", and what a query of "multi-stream" takes, against the batch: a line a record."""
    throughput, latency = both
    any_drawn = False
    for axes, scenario, unit in (
        (throughput, "offline", "answers a second"),
        (latency, "multi-stream", "milliseconds a query, median"),
    ):
        for record in records:
            runs = sorted((run for run in record.runs if run.scenario == scenario), key=lambda run: run.batch)
            if len(runs) > 1:
                any_drawn = True
                figures = [run.answers_per_s if scenario == "offline" else run.latency.p50 for run in runs]
                axes.plot([run.batch for run in runs], figures, marker="o", label=_label(record))
                axes.legend()
        drawn = {run.batch for record in records for run in record.runs if run.scenario == scenario}
        axes.set_xticks(sorted(drawn))
        axes.set_visible(bool(axes.lines))
        axes.set(xlabel="pictures a batch", ylabel=unit, title=scenario, ylim=(0, None))
    return any_drawn


def _draw_roofline(axes: Any, records: Sequence[Record]) -> bool:
    """Operations a second over operations a byte, and the roof of each record's machine, measured before it."""
    any_drawn = False
    for record, colour in zip(records, cycle(_COLOURS)):
        points = _roofline_points(record)
        if not points or not record.roofs.read_bytes_per_s:
            continue
        any_drawn = True
        bandwidth, highest = record.roofs.read_bytes_per_s / 1e9, _highest(record)
        edges = [min(one.intensity for one in points) / 2, max(one.intensity for one in points) * 2]
        if highest:
            edges = sorted([*edges, highest / bandwidth])
        roof = [min(bandwidth * edge, highest or bandwidth * edge) for edge in edges]
        axes.plot(edges, roof, color=colour, linewidth=1, linestyle="--")
        for stage, marker in zip(("vision", "prefill", "token"), ("s", "^", "o"), strict=True):
            found = [one for one in points if one.stage == stage]
            axes.scatter(
                [one.intensity for one in found],
                [one.gigaflops_per_s for one in found],
                color=colour,
                marker=marker,
                label=f"{stage}, {_label(record)}",
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte of weights and cache",
        ylabel="10^9 operations a second",
        title="Roofs: memory (slope) and products of floats or integers (flat), as measured",
    )
    if any_drawn:
        axes.legend(fontsize="small")
    return any_drawn


def _highest(record: Record) -> float:
    """10^9 operations a second of the roof, 0 where there is none."""
    return (record.roofs.operations_per_s(record.subject.precision) or 0) / 1e9


class _Point(NamedTuple):
    stage: str
    intensity: float
    gigaflops_per_s: float


def _roofline_points(record: Record) -> list[_Point]:
    """Stages of the first run for which both rates are known."""
    return [
        _Point(name, stage.gigaflops_per_s / stage.gigabytes_per_s, stage.gigaflops_per_s)
        for run in record.runs[:1]
        for name, stage in run.stages.items()
        if stage.gigaflops_per_s and stage.gigabytes_per_s
    ]


def _label(record: Record) -> str:
    return f"{record.subject.bundle}, {record.subject.precision}, {record.subject.target}"
