"""Two benchmarks side by side: ratios of medians with their spread, and a verdict for a CI."""

# Tests: tests/bench/test_record.py.
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from paliedge.bench.record import STAGES, Accuracy, Record, Run
from paliedge.bench.summaries import Ratio, compare_medians
from paliedge.errors import UsageError

Verdict = Literal["slower", "faster", "same", "too few"]
_MIN_SAMPLES = 6
"""And answers, of each record, for a verdict: the interval of fewer is narrower than what they know. (6 samples that do
not depend on one another all lie on one side of the true median once in 32 times.)"""


class RecordComparison(NamedTuple):
    """One stage of one scenario: times of the second record over those of the first."""

    run: str
    stage: str
    first_ms: float
    second_ms: float
    ratio: Ratio
    verdict: Verdict


def compare_records(first: Record, second: Record, threshold: float) -> list[RecordComparison]:
    """Every stage that both have. "slower" is a ratio whose whole interval lies over 1 + `threshold`; "too few" are
    samples that allow no verdict.

    Raises:
        UsageError: they have no scenario in common.
    """
    others = {run.name: run for run in second.runs}
    found = [one for run in first.runs if run.name in others for one in _compare_runs(run, others[run.name], threshold)]
    if not found:
        raise UsageError(
            expected="two benchmarks with a scenario in common",
            found=f"{', '.join(run.name for run in first.runs)} and {', '.join(others)}",
            action="Measure both with the same --scenario, --batch and --fps.",
        )
    return found


def differences(first: Record, second: Record) -> list[str]:
    """What else is different between the two, and may be the cause."""
    one, other = first.subject, second.subject
    pairs = [
        ("bundle", one.sha256[:12], other.sha256[:12]),
        ("checkpoint", one.checkpoint, other.checkpoint),
        ("precision", one.precision, other.precision),
        ("backend", one.backend, other.backend),
        ("prompts", "; ".join(one.prompts), "; ".join(other.prompts)),
        *(
            (name.replace("_", " "), getattr(one, name), getattr(other, name))
            for name in ("num_images", "max_new_tokens", "num_threads")
        ),
        *((name, figure(first), figure(second)) for name, figure in _FIGURES.items()),
        *(
            (name, first.conditions.get(name, "unknown"), second.conditions.get(name, "unknown"))
            for name in ("processor", "cores", "board", "gpu", "gpu driver", "power mode", "packages", "git")
        ),
    ]
    return [f"{name}: {before} | {after}" for name, before, after in pairs if before != after]


_FIGURES: dict[str, Callable[[Record], object]] = {
    "scenarios": lambda record: ", ".join(run.name for run in record.runs),
    "interrupted": lambda record: record.interrupted,
    "peak resident memory": lambda record: f"{record.memory.peak_rss / 1e9:.2g} GB",
    "answers as exported": lambda record: _told(record.accuracy),
    "answers that changed": lambda record: sum(run.num_changed for run in record.runs),
    "frames dropped or late": lambda record: sum(run.num_dropped + run.num_late for run in record.runs),
}
"""No latencies, but what makes them worth less."""


def _told(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "not asked"
    return f"{accuracy.num_equal} equal, {accuracy.num_ties} at a tie, of {accuracy.num_answers}"


def _compare_runs(first: Run, second: Run, threshold: float) -> Iterator[RecordComparison]:
    pairs = [("latency", first.latency_samples_ms, second.latency_samples_ms)]
    pairs += [
        (name, first.stages[name].samples_ms, second.stages[name].samples_ms)
        for name in STAGES
        if name in first.stages and name in second.stages and name != "answer"
    ]
    for stage, one, other in pairs:
        if min(one) > 0 and min(other) > 0:
            ratio = compare_medians(one, other)
            medians = first.latency.p50, second.latency.p50
            if stage != "latency":
                medians = first.stages[stage].wall.p50, second.stages[stage].wall.p50
            count = min(len(one), len(other), first.num_answers, second.num_answers)
            verdict = _judge(ratio, threshold) if count >= _MIN_SAMPLES else "too few"
            yield RecordComparison(first.name, stage, *medians, ratio, verdict)


def _judge(ratio: Ratio, threshold: float) -> Verdict:
    if ratio.low > 1 + threshold:
        return "slower"
    return "faster" if ratio.high < 1 / (1 + threshold) else "same"
