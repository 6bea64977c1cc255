"""The verb that measures."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paliedge.cli.help import command, option
from paliedge.cli.options import Verb, json_option, model_options
from paliedge.errors import UsageError

if TYPE_CHECKING:
    from paliedge.backends.select import BackendOptions
    from paliedge.bench.record import Record, Scenario
    from paliedge.bench.scenarios import ScenarioSettings, Trace

_JUDGED = ("latency", "ttft", "token")
_INTERRUPTED = 130
_SLOWER = 1


def _option(flag: str, *others: str, **rest: Any) -> Callable[[Verb], Verb]:
    """An option with its environment variable, PALIEDGE_BENCH_ and its name."""
    name = flag.split("/")[0].removeprefix("--").replace("-", "_").upper()
    return option(flag, *others, group="Measure", envvar=f"PALIEDGE_BENCH_{name}", **rest)


def _what(verb: Verb) -> Verb:
    """Options that say what is measured."""
    for add_option in (
        _option("--cold-start/--no-cold-start", default=True, help="Measure three fresh processes too."),
        _option("--max-new-tokens", type=click.IntRange(1), help="Of an answer; 32 unless given."),
        _option("--runs", type=click.IntRange(1), help="So many queries a scenario instead."),
        _option(
            "--duration",
            type=click.FloatRange(0),
            default=10.0,
            show_default=True,
            help="Seconds a scenario, and ten queries at least.",
        ),
        _option("--batch", default="1", show_default=True, help="For multi-stream and offline, such as 1,2,4,8."),
        _option(
            "--fps", type=click.FloatRange(min=0, min_open=True), help="Add a camera with so many frames a second."
        ),
        _option(
            "--scenario",
            "scenarios",
            multiple=True,
            type=click.Choice(["single-stream", "multi-stream", "offline"]),
            help="After MLPerf's; may be given several times. single-stream and offline unless given.",
        ),
        _option("--prompt", help="What to ask, in the model's own words; the bundle's stored prompts unless given."),
    ):
        verb = add_option(verb)
    return verb


def _where(verb: Verb) -> Verb:
    """Options that say where figures go, and what they are held against."""
    for add_option in (
        _option(
            "--threshold",
            type=click.FloatRange(0),
            default=5.0,
            show_default=True,
            help="Of --compare, in percent: what is slower by more than that ends it with 1; so do too few samples.",
        ),
        _option(
            "--compare",
            nargs=2,
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="Measure nothing: compare two JSON files, ratios of the second to the first.",
        ),
        _option(
            "--plot",
            "plots",
            type=click.Path(path_type=Path, file_okay=False),
            help='Folder for pictures; needs `pip install "paliedge[bench]"`.',
        ),
        _option(
            "--output",
            "-o",
            type=click.Path(path_type=Path, dir_okay=False),
            help="FILE.json keeps everything; .csv, .md and .jsonl the statistics.",
        ),
    ):
        verb = add_option(verb)
    return json_option("Print the record, or the comparison, as JSON.")(verb)


@command(
    "paliedge bench -m bundle",
    "paliedge bench photos/ -m bundle --scenario offline --batch 1,4 -o run.json",
    "paliedge bench --compare before.json after.json",
)
@click.argument("source", required=False)
@_what
@_where
@model_options
def bench(compare: tuple[Path, Path] | None, threshold: float, plots: Path | None, as_json: bool, **rest: Any) -> None:
    """Measure latency, throughput, memory and energy, and how near they come to what the machine can.

    SOURCE is a picture or a folder; without it the pictures that the bundle was exported with. Times are by stage, with
    percentiles; figures of a machine that is not quiet are marked. Ctrl-C keeps what was measured so far.
    """
    if compare:
        _compare(*compare, threshold / 100, plots, as_json)
    else:
        _measure(plots=plots, as_json=as_json, **rest)


def _measure(
    *,
    source: str | None,
    prompt: str | None,
    scenarios: tuple[Scenario, ...],
    fps: float | None,
    batch: str,
    duration: float,
    runs: int | None,
    max_new_tokens: int | None,
    cold_start: bool,
    output: Path | None,
    plots: Path | None,
    bundle: Path | None,
    options: BackendOptions,
    as_json: bool,
) -> None:
    from paliedge.bench.plots import import_matplotlib, plot
    from paliedge.bench.report import check_path, save, to_text
    from paliedge.bench.runner import Settings, bench
    from paliedge.bench.scenarios import RunLimits
    from paliedge.model import SHIPPED_BUNDLE

    if output:
        check_path(output)
    if plots:
        import_matplotlib()
    settings = Settings(
        _pictures(source),
        (prompt,) if prompt else (),
        max_new_tokens,
        tuple(_scenario_settings(scenarios or ("single-stream", "offline"), _batches(batch), fps)),
        RunLimits(seconds=duration, max_queries=runs),
        cold_start,
        options.threads,
    )
    progress = _Progress(shows=sys.stderr.isatty())
    record = bench(bundle or SHIPPED_BUNDLE, options, settings, report=_say, progress=progress)
    progress.end()
    click.echo(_to_json(record) if as_json else to_text(record))
    for warning in record.warnings if as_json else ():
        _say(f"warning: {warning}")
    if output:
        save(record, output)
        _say(f"saved {output}")
    for path in plot([record], plots) if plots else ():
        _say(f"saved {path}")
    if record.interrupted:
        click.get_current_context().exit(_INTERRUPTED)


def _compare(first: Path, second: Path, threshold: float, plots: Path | None, as_json: bool) -> None:
    from paliedge.bench.compare import compare_records, differences
    from paliedge.bench.plots import import_matplotlib, plot
    from paliedge.bench.record import read_record
    from paliedge.bench.report import compare_to_text

    if plots:
        import_matplotlib()
    records = read_record(first), read_record(second)
    found = compare_records(*records, threshold)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode({"threshold": threshold, "comparisons": found}).decode())
    else:
        click.echo(compare_to_text(found))
    for line in differences(*records):
        _say(f"differs: {line}")
    for path in plot(records, plots) if plots else ():
        _say(f"saved {path}")
    judged = [one for one in found if one.stage in _JUDGED]
    unsure = {one.run for one in judged} - {one.run for one in judged if one.verdict != "too few"}
    if unsure:
        _say(f"no verdict on {', '.join(sorted(unsure))}: too few samples, measure with more --runs or --duration")
    if unsure or any(one.verdict == "slower" for one in judged):
        click.get_current_context().exit(_SLOWER)


def _pictures(source: str | None) -> tuple[Path, ...]:
    """The files of SOURCE; none without one."""
    if source is None:
        return ()
    from paliedge.inputs.sources import Files, open_source
    from paliedge.inputs.video import FrameOptions

    found = open_source(source, FrameOptions(), _say)
    if not isinstance(found, Files) or found.num_items is None:
        raise UsageError(
            expected="a picture, a folder of pictures, a pattern or a list",
            found=f"'{source}'",
            action="For a camera's rate give --fps and some of its pictures.",
        )
    return tuple(found.paths)


def _scenario_settings(
    scenarios: tuple[Scenario, ...], batches: list[int], fps: float | None
) -> list[ScenarioSettings]:
    from paliedge.bench.scenarios import ScenarioSettings

    found = []
    for scenario in scenarios:
        found += [ScenarioSettings(scenario, size) for size in (batches if scenario != "single-stream" else [1])]
    return [*found, *([ScenarioSettings("camera", fps=fps)] if fps else [])]


def _batches(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UsageError(expected="batch sizes such as 1,2,4,8", found=f"'{text}'", action="Give numbers from 1 on.")
    return found


class _Progress:
    """A line on a terminal that is written over, at most ten times a second."""

    def __init__(self, *, shows: bool) -> None:
        self._shows = shows
        self._last = 0.0

    def __call__(self, settings: ScenarioSettings, trace: Trace) -> None:
        now = time.monotonic()
        if self._shows and now - self._last > 0.1:
            self._last = now
            latest = f", {trace.latencies_ms[-1]:.1f} ms" if trace.latencies_ms else ""
            click.echo(
                f"\r{settings.scenario} {settings.batch}: {len(trace.answers)} answers{latest}  ", err=True, nl=False
            )

    def end(self) -> None:
        if self._shows:
            click.echo(err=True)


def _to_json(record: Record) -> str:
    import msgspec

    return json.dumps(json.loads(msgspec.json.encode(record)))


def _say(line: str) -> None:
    click.echo(line, err=True)


VERBS = (bench,)
