"""Pictures of records: where an answer's time goes, what batches cost, how near the machine's roofs decoding comes.

Needs matplotlib: `pip install "paliedge[bench]"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from paliedge.benching.record import Record, Run
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
    except ImportError:
        raise MissingExtraError(
            expected="matplotlib, to plot", found="no such package", action='Run `pip install "paliedge[bench]"`.'
        ) from None


def plot(records: Sequence[Record], folder: Path) -> list[Path]:
    """stages.png, batches.png and roofline.png, those for which the records have figures; returns what was written."""
    pyplot = import_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in (("stages", _draw_stages), ("batches", _draw_batches), ("roofline", _draw_roofline)):
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
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
    axes.legend()
    return bool(pairs)


def _part_ms(run: Run, part: str) -> float:
    if part != "decode":
        return run.stages[part].wall.p50 if part in run.stages else 0.0
    steps = run.num_tokens / run.num_answers - 1
    return run.stages["token"].wall.p50 * steps if "token" in run.stages else 0.0


def _draw_batches(axes: Any, records: Sequence[Record]) -> bool:
    """Answers a second against batch, a line a record."""
    any_drawn = False
    for record in records:
        runs = sorted((run for run in record.runs if run.scenario == "offline"), key=lambda run: run.batch)
        if len(runs) > 1:
            any_drawn = True
            batches = [run.batch for run in runs]
            axes.plot(batches, [run.answers_per_s for run in runs], marker="o", label=_label(record))
            axes.set_xticks(batches)
    axes.set(xlabel="answers decoded together", ylabel="answers a second", title="Throughput", ylim=(0, None))
    if any_drawn:
        axes.legend()
    return any_drawn


def _draw_roofline(axes: Any, records: Sequence[Record]) -> bool:
    """Decode's GB/s beside what the machine reads."""
    found = [
        (_label(record), run.stages["token"].gigabytes_per_s, record.roofs.read_bytes_per_s)
        for record in records
        for run in record.runs[:1]
        if "token" in run.stages and run.stages["token"].gigabytes_per_s and record.roofs.read_bytes_per_s
    ]
    labels = [label for label, _, _ in found]
    axes.barh(labels, [roof / 1e9 for _, _, roof in found], color="#dddddd", label="the machine's roof, measured")
    axes.barh(labels, [reached for _, reached, _ in found], height=0.5, color=_COLOURS[0], label="decode")
    axes.set(xlabel="GB/s", title="How near decoding comes to the memory's roof")
    axes.invert_yaxis()
    axes.legend()
    return bool(found)


def _label(record: Record) -> str:
    return f"{record.subject.precision}, {record.subject.target}"
