"""Scenarios on a scripted model and a clock that only the model moves: every figure is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from paliedge import Generation, GenerationOptions, Timings
from paliedge.bench import scenarios
from paliedge.bench.power import CountingMeter
from paliedge.bench.record import Run
from paliedge.bench.scenarios import Query, RunLimits, ScenarioSettings, Trace, _stretches, run
from paliedge.results.generation import DeviceTimings


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


class ScriptedModel:
    """Takes `seconds` an answer alone, and half as long for each of a batch."""

    max_batch = 8

    def __init__(self, clock: Clock, seconds: float, tokens: Callable[[int], tuple[int, ...]] = lambda count: (7, 8)):
        self.clock, self.seconds, self.tokens = clock, seconds, tokens
        self.count = 0
        self.batches: list[int] = []

    def generate(self, image: Any, prompt: str, **rest: Any) -> Generation:
        return self._answer(self.seconds)

    def generate_batch(
        self, requests: Iterable[Any], options: GenerationOptions, *, batch_size: int
    ) -> Iterator[tuple[Any, Generation]]:
        self.batches.append(batch_size)
        for key, _, _ in requests:
            yield key, self._answer(self.seconds / 2)

    def _answer(self, seconds: float) -> Generation:
        self.clock.now += seconds
        self.count += 1
        device = DeviceTimings(2.0, 3.0, (0.5,))
        times = Timings(1.0, 2.5, 3.5, (0.75,), device, tokenize_ms=0.25, parse_ms=0.125)
        return Generation("", self.tokens(self.count), (), (), 0, (1, 1), "stop", times)


QUERIES = [Query(b"", prompt) for prompt in ("one", "two", "three")]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(scenarios, "time", clock)
    return clock


def measure(model: ScriptedModel, settings: ScenarioSettings, limits: RunLimits, **rest: Any) -> Run:
    return run(model, QUERIES, settings, limits, **rest)  # type: ignore[arg-type]


def test_a_single_stream_lasts_as_long_as_asked_and_every_stage_is_told(clock: Clock) -> None:
    found = measure(ScriptedModel(clock, 0.1), ScenarioSettings("single-stream"), RunLimits(seconds=4.95))
    assert found.num_answers == 50
    assert found.seconds == pytest.approx(5.0)
    assert found.answers_per_s == pytest.approx(10.0)
    assert found.num_tokens == 100  # prefill gave one each, a step the other
    assert found.latency.p50 == pytest.approx(100.0)
    medians = {name: stage.wall.p50 for name, stage in found.stages.items()}
    expected = {"preprocess": 1.0, "tokenize": 0.25, "vision": 2.5, "prefill": 3.5, "ttft": 7.25, "token": 0.75}
    assert medians == pytest.approx({**expected, "parse": 0.125, "answer": 100.0})
    assert {name: stage.device.p50 for name, stage in found.stages.items() if stage.device} == {
        "vision": 2.0,
        "prefill": 3.0,
        "token": 0.5,
    }
    assert found.num_changed == 0


def test_few_but_slow_answers_are_still_ten_and_runs_are_counted(clock: Clock) -> None:
    assert measure(ScriptedModel(clock, 3.0), ScenarioSettings("single-stream"), RunLimits(seconds=4)).num_answers == 10
    assert (
        measure(ScriptedModel(clock, 0.1), ScenarioSettings("single-stream"), RunLimits(max_queries=3)).num_answers == 3
    )


def test_multi_stream_times_whole_queries(clock: Clock) -> None:
    model = ScriptedModel(clock, 0.1)
    found = measure(model, ScenarioSettings("multi-stream", 8), RunLimits(max_queries=5))
    assert (found.num_answers, found.latency.n) == (40, 5)
    assert found.latency.p50 == pytest.approx(400.0)
    assert set(model.batches) == {8}
    assert "answer" not in found.stages


def test_offline_gives_all_at_once_in_whole_batches(clock: Clock) -> None:
    model = ScriptedModel(clock, 0.1)
    found = measure(model, ScenarioSettings("offline", 4), RunLimits(seconds=1.0))
    assert model.batches == [4]
    assert found.num_answers % 4 == 0
    assert found.answers_per_s == pytest.approx(20.0)
    assert found.latency.p50 == pytest.approx(50.0)


def test_bursts_of_an_offline_run_are_evened_out() -> None:
    found = _stretches([18.0, 9.0, 0.0] * 40)
    assert len(found) == 20
    assert found == pytest.approx([9.0] * 20)
    for length in (1, 2, 7, 13, 35):
        assert _stretches([4.0] * length) == [4.0] * max(1, length // 6)


def test_a_fast_model_waits_for_the_camera(clock: Clock) -> None:
    found = measure(ScriptedModel(clock, 0.04), ScenarioSettings("camera", fps=10), RunLimits(seconds=4.9))
    assert (found.num_dropped, found.num_late) == (0, 0)
    assert found.num_answers == 50
    assert found.latency.p50 == pytest.approx(40.0)
    assert clock.slept > 2.5


def test_a_slow_model_drops_what_it_cannot_look_at_and_answers_late(clock: Clock) -> None:
    found = measure(ScriptedModel(clock, 0.25), ScenarioSettings("camera", fps=10), RunLimits(seconds=9.9))
    assert found.num_answers == 40
    assert found.num_late == 40
    assert found.num_dropped == 97 - 39  # the last answer was to the frame that came at 9.7 s
    assert found.latency.min == pytest.approx(250.0)
    assert found.latency.max == pytest.approx(300.0)  # a frame had waited half a period


def test_answers_that_change_are_counted(clock: Clock) -> None:
    model = ScriptedModel(clock, 0.1, tokens=lambda count: (7, count) if count == 40 else (7, 8))
    assert measure(model, ScenarioSettings("single-stream"), RunLimits(seconds=5)).num_changed == 1


def test_ctrl_c_keeps_what_was_measured(clock: Clock) -> None:
    def stop_at_seven(trace: Trace) -> None:
        if len(trace.answers) == 7:
            raise KeyboardInterrupt

    found = measure(ScriptedModel(clock, 0.1), ScenarioSettings("single-stream"), RunLimits(), progress=stop_at_seven)
    assert found.interrupted
    assert found.num_answers == 7


def test_energy_is_what_the_meter_counts_with_and_without_what_idling_takes(clock: Clock) -> None:
    meter = CountingMeter("scripted", lambda: 20.0 * clock.now)
    found = measure(ScriptedModel(clock, 0.1), ScenarioSettings("single-stream"), RunLimits(seconds=4.95), meter=meter)
    assert found.energy is not None
    assert found.energy.watts == pytest.approx(20.0)
    assert found.energy.idle_watts == pytest.approx(20.0)
    assert found.energy.joules_per_answer == pytest.approx(2.0)
    assert found.energy.joules_per_token == pytest.approx(1.0)
    assert found.energy.joules_per_answer_above_idle == pytest.approx(0.0)
    broken = CountingMeter("a counter that begins anew", lambda: -clock.now)
    assert (
        measure(ScriptedModel(clock, 0.1), ScenarioSettings("single-stream"), RunLimits(), meter=broken).energy is None
    )


def test_nothing_is_measured_before_the_model_is_warm(clock: Clock) -> None:
    model = ScriptedModel(clock, 0.1)
    found = measure(model, ScenarioSettings("single-stream"), RunLimits(max_queries=5))
    assert model.count - found.num_answers >= 10  # a second of answers
    slow = ScriptedModel(clock, 6.0)
    assert measure(slow, ScenarioSettings("single-stream"), RunLimits(max_queries=1)).num_answers == 1
    assert slow.count <= 1 + len(QUERIES)


def test_a_run_keeps_no_pictures(clock: Clock) -> None:
    kept: list[Trace] = []
    measure(ScriptedModel(clock, 0.1), ScenarioSettings("offline", 4), RunLimits(max_queries=8), progress=kept.append)
    assert len(kept[-1].answers) == 8
    assert not any(isinstance(part, Generation) for answer in kept[-1].answers for part in answer)
