"""The ways in which a model is asked: one after the other, several at a time, all at once, at a camera's rate.

Each scenario yields after every query: a run can be shown while it goes on, and keeps what it has when it is
interrupted. Times come from the answers themselves; knows no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from paliedge.bench.power import Meter
from paliedge.bench.record import STAGES, Energy, Run, Scenario, Stage
from paliedge.bench.summaries import summarise
from paliedge.errors import PaliEdgeError
from paliedge.generation.request import GenerationOptions
from paliedge.inputs.images import ImageSource
from paliedge.model import PaliGemma
from paliedge.results.generation import Generation, Timings

_WARM_UP_S = 1.0
"""At least so long: clocks rise and pools fill."""
_IDLE_S = 1.0
_SAMPLES_A_STRETCH = 6


class Query(NamedTuple):
    """A picture and a prompt; the limit as `PaliGemma.generate` takes it."""

    image: ImageSource
    prompt: str
    max_new_tokens: int | None = None


class RunLimits(NamedTuple):
    """A run ends after so many seconds, but not before `min_queries`; or after `max_queries`."""

    seconds: float = 10.0
    min_queries: int = 10
    max_queries: int | None = None

    def reached(self, seconds: float, count: int) -> bool:
        if self.max_queries is not None:
            return count >= self.max_queries
        return seconds >= self.seconds and count >= self.min_queries


class TimedAnswer(NamedTuple):
    """What is kept of one: its picture, which a large run would fill the memory with, is not."""

    query_index: int
    token_ids: tuple[int, ...]
    timings: Timings


@dataclass
class Trace:
    """What a run leaves while it goes on."""

    latencies_ms: list[float] = field(default_factory=list)
    answers: list[TimedAnswer] = field(default_factory=list)
    walls_ms: list[float] = field(default_factory=list)
    num_dropped: int = 0
    num_late: int = 0

    def add(self, query_index: int, answer: Generation) -> None:
        self.answers.append(TimedAnswer(query_index, answer.token_ids, answer.timings))


@dataclass(frozen=True)
class ScenarioSettings:
    """One scenario to run, see `Run`."""

    scenario: Scenario
    batch: int = 1
    fps: float | None = None


def run(
    model: PaliGemma,
    queries: Sequence[Query],
    settings: ScenarioSettings,
    limits: RunLimits,
    *,
    meter: Meter | None = None,
    progress: Callable[[Trace], None] = lambda trace: None,
) -> Run:
    """Warm up, then run `settings` until `limits`; Ctrl-C ends it early and keeps what it has, if that is anything."""
    warm_up(model, queries)
    idle_watts = _idle_watts(meter)
    trace, interrupted = Trace(), False
    joules, started = meter.joules() if meter else 0.0, time.perf_counter()
    try:
        for _ in _STEPS[settings.scenario](model, queries, settings, limits, trace):
            progress(trace)
    except KeyboardInterrupt:
        if not trace.latencies_ms:
            raise
        interrupted = True
    seconds = time.perf_counter() - started
    energy = _energy(meter, joules, idle_watts, seconds, trace) if meter else None
    return _summary(settings, trace, seconds, energy, interrupted=interrupted)


def warm_up(model: PaliGemma, queries: Sequence[Query]) -> None:
    """Every query once, and again until a second is over."""
    started, count = time.perf_counter(), 0
    while count < len(queries) or time.perf_counter() - started < _WARM_UP_S:
        _ask(model, queries[count % len(queries)])
        count += 1
        if time.perf_counter() - started > 10 * _WARM_UP_S:  # a large model is warm after a single answer
            return


def _ask(model: PaliGemma, query: Query) -> Generation:
    return model.generate(query.image, query.prompt, options=GenerationOptions(max_new_tokens=query.max_new_tokens))


def _single_stream(
    model: PaliGemma, queries: Sequence[Query], settings: ScenarioSettings, limits: RunLimits, trace: Trace
) -> Iterator[None]:
    begin = time.perf_counter()
    for count in _until(limits, begin, trace):
        index = count % len(queries)
        started = time.perf_counter()
        answer = _ask(model, queries[index])
        wall_ms = (time.perf_counter() - started) * 1000
        trace.add(index, answer)
        trace.walls_ms.append(wall_ms)
        trace.latencies_ms.append(wall_ms)
        yield


def _multi_stream(
    model: PaliGemma, queries: Sequence[Query], settings: ScenarioSettings, limits: RunLimits, trace: Trace
) -> Iterator[None]:
    begin = time.perf_counter()
    for count in _until(limits, begin, trace):
        indices = [(count * settings.batch + offset) % len(queries) for offset in range(settings.batch)]
        started = time.perf_counter()
        answers = list(_ask_together(model, [queries[index] for index in indices], settings.batch))
        trace.latencies_ms.append((time.perf_counter() - started) * 1000)
        for index, answer in zip(indices, answers, strict=True):
            trace.add(index, answer)
        yield


def _offline(
    model: PaliGemma, queries: Sequence[Query], settings: ScenarioSettings, limits: RunLimits, trace: Trace
) -> Iterator[None]:
    begin, indices = time.perf_counter(), list[int]()

    def pour() -> Iterator[Query]:
        while len(indices) % settings.batch or not limits.reached(time.perf_counter() - begin, len(indices)):
            indices.append(len(indices) % len(queries))
            yield queries[indices[-1]]

    last = begin
    for number, answer in enumerate(_ask_together(model, pour(), settings.batch), 1):
        trace.add(indices[number - 1], answer)
        if number % settings.batch == 0:
            now = time.perf_counter()
            trace.latencies_ms.append((now - last) * 1000 / settings.batch)
            last = now
        yield


def _camera(
    model: PaliGemma, queries: Sequence[Query], settings: ScenarioSettings, limits: RunLimits, trace: Trace
) -> Iterator[None]:
    """The newest frame wins: what came meanwhile is dropped. A frame's latency counts from its own time."""
    assert settings.fps
    begin, period, last = time.perf_counter(), 1 / settings.fps, -1
    for _ in _until(limits, begin, trace):
        number = int((time.perf_counter() - begin) / period)
        if number == last:
            number += 1
            time.sleep(max(0.0, begin + number * period - time.perf_counter()))
        trace.num_dropped += number - last - 1
        index, last = number % len(queries), number
        started = time.perf_counter()
        answer = _ask(model, queries[index])
        now = time.perf_counter()
        age = now - (begin + number * period)
        trace.num_late += age > period
        trace.add(index, answer)
        trace.walls_ms.append((now - started) * 1000)
        trace.latencies_ms.append(age * 1000)
        yield


_STEPS = {"single-stream": _single_stream, "multi-stream": _multi_stream, "offline": _offline, "camera": _camera}


def _until(limits: RunLimits, begin: float, trace: Trace) -> Iterator[int]:
    count = 0
    while not limits.reached(time.perf_counter() - begin, count):
        yield count
        count += 1


def _ask_together(model: PaliGemma, queries: Sequence[Query] | Iterator[Query], batch: int) -> Iterator[Generation]:
    """By `generate_batch`, whose options are those of the first query: all queries of a benchmark share them."""
    queries = iter(queries)
    first = next(queries, None)
    if first is None:
        return
    options = GenerationOptions(max_new_tokens=first.max_new_tokens)
    keyed = ((None, query.image, query.prompt) for query in chain([first], queries))
    for _, answer in model.generate_batch(keyed, options, batch_size=batch):
        if isinstance(answer, PaliEdgeError):
            raise answer
        yield answer


def _idle_watts(meter: Meter | None) -> float:
    if meter is None:
        return 0.0
    joules, started = meter.joules(), time.perf_counter()
    time.sleep(_IDLE_S)
    return (meter.joules() - joules) / (time.perf_counter() - started)


def _energy(meter: Meter, joules: float, idle_watts: float, seconds: float, trace: Trace) -> Energy | None:
    used = meter.joules() - joules
    if used <= 0:  # a counter that began anew
        return None
    num_answers, num_tokens = len(trace.answers), _num_tokens(trace)
    return Energy(
        sensor=meter.sensor,
        idle_watts=idle_watts,
        watts=used / seconds,
        joules_per_answer=used / num_answers,
        joules_per_answer_above_idle=(used - idle_watts * seconds) / num_answers,
        joules_per_token=used / num_tokens,
    )


def _num_tokens(trace: Trace) -> int:
    """Those that were decoded: the first one of an answer, and one a step."""
    return sum(1 + len(answer.timings.decode_ms) for answer in trace.answers)


def _summary(
    settings: ScenarioSettings, trace: Trace, seconds: float, energy: Energy | None, *, interrupted: bool
) -> Run:
    first: dict[int, tuple[int, ...]] = {}
    changed = sum(first.setdefault(one.query_index, one.token_ids) != one.token_ids for one in trace.answers)
    num_tokens = _num_tokens(trace)
    in_bursts = settings.scenario == "offline" and settings.batch > 1
    latencies = _stretches(trace.latencies_ms) if in_bursts else trace.latencies_ms
    return Run(
        scenario=settings.scenario,
        batch=settings.batch,
        fps=settings.fps,
        seconds=seconds,
        num_answers=len(trace.answers),
        num_tokens=num_tokens,
        answers_per_s=len(trace.answers) / seconds,
        tokens_per_s=num_tokens / seconds,
        latency=summarise(latencies),
        latency_samples_ms=latencies,
        stages=_stages([answer.timings for answer in trace.answers], trace.walls_ms),
        num_dropped=trace.num_dropped,
        num_late=trace.num_late,
        num_changed=changed,
        energy=energy,
        interrupted=interrupted,
    )


def _stretches(samples: list[float]) -> list[float]:
    """Means of stretches of some samples: answers that are decoded together come in bursts."""
    stretches = np.array_split(samples, max(1, len(samples) // _SAMPLES_A_STRETCH))
    return [float(stretch.mean()) for stretch in stretches]


def _stages(times: Sequence[Timings], walls_ms: list[float]) -> dict[str, Stage]:
    """By name, in the order of `STAGES`; those that no answer had are left out."""
    wall = {
        "preprocess": [one.preprocess_ms for one in times],
        "tokenize": [one.tokenize_ms for one in times],
        "vision": [one.vision_ms for one in times],
        "prefill": [one.prefill_ms for one in times],
        "ttft": [one.ttft_ms for one in times],
        "token": [ms for one in times for ms in one.decode_ms],
        "parse": [one.parse_ms for one in times],
        "answer": walls_ms,
    }
    device = [one.device for one in times if one.device]
    by_gpu: dict[str, list[float]] = {
        "vision": [one.vision_ms for one in device],
        "prefill": [one.prefill_ms for one in device],
        "token": [ms for one in device for ms in one.decode_ms],
    }
    return {name: _stage(wall[name], by_gpu.get(name, [])) for name in STAGES if wall[name]}


def _stage(wall: list[float], device: list[float]) -> Stage:
    return Stage(
        wall=summarise(wall),
        samples_ms=wall,
        device=summarise(device) if device else None,
        device_samples_ms=device,
    )
