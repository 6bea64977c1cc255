"""The whole benchmark: load, roofs, scenarios, the exporter's answers, cold starts, and what it rests on."""

# Tests: tests/cli/test_bench.py.
from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from paliedge.backends.select import BackendOptions, find_ort_target
from paliedge.bench import roofs as probes
from paliedge.bench.cold_start import measure_cold_start
from paliedge.bench.conditions import QuietWatch, describe_conditions, describe_state
from paliedge.bench.power import Meter, find_meter
from paliedge.bench.record import Accuracy, ColdStart, MemoryUse, Record, Roofs, Run, Subject
from paliedge.bench.scenarios import Query, RunLimits, ScenarioSettings, Trace, run
from paliedge.bench.shares import add_shares
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.golden import load_golden
from paliedge.bundle.manifest import Manifest
from paliedge.diagnostics.verify import verify_golden
from paliedge.errors import DeviceError, PaliEdgeError, UsageError
from paliedge.inputs.images import ImageSource
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge.model import PaliGemma

_NO_PROMPT = "caption en"
_DEFAULT_TOKENS = 32
_SPREAD_LIMIT = 1.5
"""p90 over p50 of steps that no answers share, beyond which figures are called doubtful."""
_NUM_COLD_STARTS = 3
_PROBE_LIMIT = 1.15
"""How much faster one probe of memory may be than the other, before and behind the scenarios."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        images, prompts: every prompt on every image; empty for those that the bundle was exported with.
        max_new_tokens: of an answer.
        scenarios: those to run, in this order.
        limits: of each.
        cold_start: measure fresh processes too.
        num_threads: as the engine is given; the probes take every core for 0.
    """

    images: tuple[ImageSource, ...]
    prompts: tuple[str, ...]
    max_new_tokens: int | None
    scenarios: tuple[ScenarioSettings, ...]
    limits: RunLimits
    cold_start: bool
    num_threads: int = 0


Progress = Callable[[ScenarioSettings, Trace], None]


def bench(
    folder: Path,
    options: BackendOptions,
    settings: Settings,
    *,
    report: Callable[[str], None],
    progress: Progress,
) -> Record:
    """Measure the bundle in `folder`. Ctrl-C ends it and keeps what was measured, the last scenario in part.

    Raises:
        PaliEdgeError: see `PaliGemma.load`; `UsageError` for a bundle without stored answers where no image is given.
    """
    bundle = Bundle(folder)
    queries = make_queries(bundle, settings)
    said: list[str] = []
    watch = QuietWatch()
    conditions = describe_conditions()
    free_before = _free_gpu_bytes()
    with PaliGemma.load(folder, options, report=said.append) as model:
        report(said[-1])
        doubts = _batch_warnings(model, settings.scenarios)
        if model.arithmetic:
            conditions["arithmetic"] = "; ".join(model.arithmetic)
        on_gpu = model.has_device_clock or "CUDA" in _backend(said[-1])
        num_threads = settings.num_threads or _num_cores()
        roofs = _measure_roofs(num_threads, on_gpu=on_gpu)
        runs, interrupted = _run_all(model, queries, settings, progress, find_meter(gpu=on_gpu), watch)
        accuracy = None
        if not interrupted:
            try:
                last = _measure_roofs(num_threads, on_gpu=on_gpu)
                doubts += _probe_warnings(roofs, last)
                roofs = probes.higher(roofs, last)
                accuracy = _check_answers(bundle, model)
            except KeyboardInterrupt:
                interrupted = True
        memory = _memory(free_before)
    del model
    gc.collect()  # a 3B model must not lie in memory twice
    cold_starts: list[ColdStart] = []
    if settings.cold_start and not interrupted:
        cold_starts, failed, interrupted = _measure_cold_starts(folder, options, queries[0])
        doubts += failed
    target_name = _target_of(bundle.manifest, said[-1])
    target = bundle.manifest.targets[target_name]
    tokenizer = PromptTokenizer(bundle.path(bundle.manifest.tokenizer), bundle.manifest.tokens)
    num_prompt = round(float(np.mean([len(tokenizer.encode_prefix(query.prompt)) for query in queries])))
    runs = [add_shares(one, bundle.manifest, target, roofs, num_prompt) for one in runs]
    return Record(
        subject=_subject(folder, bundle.manifest, target_name, said[-1], queries, settings.num_threads),
        conditions=conditions | {f"{name}, at the end": value for name, value in describe_state().items() if value},
        warnings=[*watch.warnings(), *doubts, *_answer_warnings(accuracy), *_spread_warnings(runs)],
        roofs=roofs,
        cold_starts=cold_starts,
        memory=memory,
        accuracy=accuracy,
        runs=runs,
        interrupted=interrupted,
    )


def make_queries(bundle: Bundle, settings: Settings) -> list[Query]:
    """What is asked, in turn.

    Raises:
        UsageError: no image was given and the bundle has none.
    """
    limits = bundle.manifest.limits
    limit = settings.max_new_tokens or min(_DEFAULT_TOKENS, limits.new_tokens)
    golden = load_golden(bundle)
    if settings.images:
        prompts = settings.prompts or (_NO_PROMPT,)
        return [Query(image, prompt, limit) for image in settings.images for prompt in prompts]
    if golden is None:
        raise UsageError(
            expected="a SOURCE of pictures, or a bundle with stored answers",
            found="neither",
            action="Name a picture or a folder of pictures.",
        )
    prompts = settings.prompts or tuple(golden.prompts)
    return [Query(image, prompt, limit) for image in golden.images for prompt in prompts]


def _run_all(
    model: PaliGemma,
    queries: Sequence[Query],
    settings: Settings,
    progress: Progress,
    meter: Meter | None,
    watch: QuietWatch,
) -> tuple[list[Run], bool]:
    """Every scenario, and whether Ctrl-C came before all were done. Closes `meter`."""
    runs: list[Run] = []
    try:
        for scenario in settings.scenarios:
            runs.append(
                run(model, queries, scenario, settings.limits, meter=meter, progress=partial(progress, scenario))
            )
            watch.look()
            if runs[-1].interrupted:
                return runs, True
    except KeyboardInterrupt:
        if not runs:
            raise
        return runs, True
    finally:
        if meter:
            meter.close()
    return runs, False


def _measure_cold_starts(
    folder: Path, options: BackendOptions, query: Query
) -> tuple[list[ColdStart], list[str], bool]:
    """Those that could be measured, what failed, and whether Ctrl-C ended them: no reason to lose what was measured."""
    found: list[ColdStart] = []
    try:
        for _ in range(_NUM_COLD_STARTS):
            found.append(measure_cold_start(folder, options, query.image, query.prompt))
    except DeviceError as error:
        return found, [f"a cold start failed: {error.found}"], False
    except KeyboardInterrupt:
        return found, [], True
    return found, [], False


def _measure_roofs(num_threads: int, *, on_gpu: bool) -> Roofs:
    """Of what the model runs on; a GPU that cannot be probed, as without cuda-bindings, has none."""
    if not on_gpu:
        return probes.measure_cpu_apart(num_threads)
    try:
        return probes.measure_gpu()
    except PaliEdgeError as error:
        return probes.no_roofs(error.found)


def _backend(said: str) -> str:
    """What runs the model, of the line that says so, without the reason in brackets."""
    return said.split(" (")[0]


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _check_answers(bundle: Bundle, model: PaliGemma) -> Accuracy | None:
    """The exporter's answers, asked again; one that differs is counted and no reason to lose what was measured."""
    found = verify_golden(bundle, model, strict=False)
    return Accuracy(**found._asdict()) if found else None


def _memory(free_before: int | None) -> MemoryUse:
    status = _fields(Path("/proc/self/status"))
    free = _free_gpu_bytes()
    return MemoryUse(
        peak_rss=status["VmHWM"],
        pss=_fields(Path("/proc/self/smaps_rollup")).get("Pss"),
        anonymous=status["RssAnon"],
        device=None if free is None or free_before is None else max(0, free_before - free),
    )


def _fields(path: Path) -> dict[str, int]:
    """Sizes in bytes from a file of `Name: 123 kB` lines; empty where there is none."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


def _free_gpu_bytes() -> int | None:
    from paliedge.backends.trt.match import probe_gpu

    gpu = probe_gpu()
    return None if isinstance(gpu, Exception) else gpu.free_memory


def _target_of(manifest: Manifest, said: str) -> str:
    """The target whose graphs ran: an engine's own, or the one that ONNX Runtime is given."""
    if "ONNX Runtime" in _backend(said):
        return find_ort_target(Path(), manifest)
    return next(engine.target for engine in manifest.engines)


def _subject(
    folder: Path, manifest: Manifest, target: str, backend: str, queries: Sequence[Query], num_threads: int
) -> Subject:
    return Subject(
        bundle=folder.name,
        sha256=manifest.sha256,
        checkpoint=manifest.producer.checkpoint,
        family=manifest.model.family,
        image_size=manifest.model.vision.image_size,
        target=target,
        precision=manifest.targets[target].precision,
        backend=backend,
        prompts=list(dict.fromkeys(query.prompt for query in queries)),
        num_images=len({id(query.image) for query in queries}),
        max_new_tokens=queries[0].max_new_tokens,
        num_threads=num_threads,
    )


def _batch_warnings(model: PaliGemma, scenarios: Sequence[ScenarioSettings]) -> list[str]:
    largest = max(scenario.batch for scenario in scenarios)
    if largest <= model.max_batch:
        return []
    return [f"batch {largest}: this engine answers at most {model.max_batch} at a time, the others wait"]


def _probe_warnings(first: Roofs, last: Roofs) -> list[str]:
    """Memory that is now faster, now slower: what is behind it may be in no process list, as neighbours in a cloud."""
    rates = sorted(one.read_bytes_per_s / 1e9 for one in (first, last) if one.read_bytes_per_s)
    if len(rates) < 2 or rates[1] <= _PROBE_LIMIT * rates[0]:
        return []
    return [f"this machine's memory was read at {rates[0]:.1f} and at {rates[1]:.1f} GB/s: neighbours, clocks or heat"]


def _answer_warnings(accuracy: Accuracy | None) -> list[str]:
    wrong = accuracy.num_answers - accuracy.num_equal - accuracy.num_ties if accuracy else 0
    return [f"{wrong} answers are not the exporting machine's: see `paliedge verify`"] if wrong else []


def _spread_warnings(runs: Sequence[Run]) -> list[str]:
    tokens = [(run.name, run.stages["token"].wall) for run in runs if run.batch == 1 and "token" in run.stages]
    return [
        f"{name}: p90 of a decode step is {found.p90 / found.p50:.1f} times its p50"
        for name, found in tokens
        if found.p90 is not None and found.p90 > _SPREAD_LIMIT * found.p50
    ]
