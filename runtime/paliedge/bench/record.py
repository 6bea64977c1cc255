"""What a benchmark leaves behind: one JSON file with raw samples, conditions and roofs. Units are in the names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from paliedge.bench.summaries import Summary
from paliedge.errors import UsageError

Scenario = Literal["single-stream", "multi-stream", "offline", "camera"]
STAGES = ("preprocess", "tokenize", "vision", "prefill", "ttft", "token", "parse", "answer")
"""In the order of an answer's life. `ttft` is all up to the first token, `token` one decode step, `answer` the whole,
wall clock around the call."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """Times of one stage in milliseconds.

    Attributes:
        wall, samples_ms: by the clock on the wall.
        device, device_samples_ms: by the GPU's own events; None and empty where it has none.
        gigabytes_per_s, gigaflops_per_s: what the median makes of the bytes and operations that the stage needs.
        mbu, mfu: the same over the machine's measured roofs, MFU over that of the linear layers' products.
    """

    wall: Summary
    samples_ms: list[float]
    device: Summary | None = None
    device_samples_ms: list[float] = []
    gigabytes_per_s: float | None = None
    gigaflops_per_s: float | None = None
    mbu: float | None = None
    mfu: float | None = None


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Joules, and which sensor told them; `above_idle` without what the machine takes at rest."""

    sensor: str
    idle_watts: float
    watts: float
    joules_per_answer: float
    joules_per_answer_above_idle: float
    joules_per_token: float


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario.

    Attributes:
        scenario: after MLPerf's: "single-stream", one query after the other; "multi-stream", queries of `batch`
            pictures; "offline", all at once, `batch` decoded together; and "camera", frames at a fixed rate.
        batch: see there.
        fps: frames a second of the camera.
        seconds: what it took.
        num_answers, num_tokens: generated tokens, ends of sequence included.
        answers_per_s, tokens_per_s: over the whole run.
        latency, latency_samples_ms: of a query, in milliseconds. A camera's counts from the frame's own time. That
            of "offline" is the time an answer takes when all are there; with a batch, the mean of a stretch of the run.
        stages: by name.
        num_dropped, num_late: frames that were never looked at, and answers that came after the next frame.
        num_changed: answers that differ from the first one to the same query.
        energy: None where no sensor tells.
        interrupted: Ctrl-C ended it.
    """

    scenario: Scenario
    batch: int
    fps: float | None
    seconds: float
    num_answers: int
    num_tokens: int
    answers_per_s: float
    tokens_per_s: float
    latency: Summary
    latency_samples_ms: list[float]
    stages: dict[str, Stage]
    num_dropped: int = 0
    num_late: int = 0
    num_changed: int = 0
    energy: Energy | None = None
    interrupted: bool = False

    @property
    def name(self) -> str:
        """Scenario with its parameter."""
        rate = f" {self.fps:g} fps" if self.fps else ""
        return f"{self.scenario}{rate}{f' batch {self.batch}' if self.batch > 1 else ''}"


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """The exporting machine's stored answers, repeated in this run: equal, and different at a tie."""

    num_answers: int
    num_equal: int
    num_ties: int


class ColdStart(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one fresh process, files in the page cache.

    Attributes:
        imports: Python modules of runtime and engine.
        bundle: reading the manifest, checking sizes and remembered hashes.
        engine: loading graphs, or deserialising engines.
        first_answer: the first one; on a GPU it holds lazy work and the capture of the decode step.
        graph_capture: of the first answer, that capture alone; None where it captured nothing.
        second_answer: for comparison.
        process: all of it, interpreter included.
    """

    imports: float
    bundle: float
    engine: float
    first_answer: float
    second_answer: float
    process: float
    graph_capture: float | None = None


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of this process at the end: peak resident, proportional set, memory of its own; and of the GPU."""

    peak_rss: int
    pss: int | None
    anonymous: int
    device: int | None


class Roofs(msgspec.Struct, frozen=True, kw_only=True):
    """What this machine reached just before or just after, and with what: bytes and operations a second.

    `int8_ops_per_s` is of products of integers, which int8 and int4 linear layers are on a CPU. No GPU has it.
    """

    read_bytes_per_s: float | None
    flops_per_s: float | None
    how: str
    int8_ops_per_s: float | None = None

    def operations_per_s(self, precision: str) -> float | None:
        """Those of the linear layers of graphs of this precision."""
        return self.int8_ops_per_s if precision in ("int8", "int4") else self.flops_per_s


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured.

    Attributes:
        sha256: the bundle's.
        prompts, num_images, max_new_tokens: what was asked, of how many pictures, and how long an answer could be.
        num_threads: as asked for; 0 leaves it to the engine.
    """

    bundle: str
    sha256: str
    checkpoint: str
    family: str
    image_size: int
    target: str
    precision: str
    backend: str
    prompts: list[str]
    num_images: int | None = None
    max_new_tokens: int | None = None
    num_threads: int | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark; `interrupted` says that Ctrl-C ended it before all was measured."""

    format_version: Literal[1] = 1
    subject: Subject
    conditions: dict[str, str]
    warnings: list[str]
    roofs: Roofs
    cold_starts: list[ColdStart] = []
    memory: MemoryUse
    accuracy: Accuracy | None
    runs: list[Run]
    interrupted: bool


def write_record(record: Record, path: Path) -> None:
    """As JSON in one line: thousands of samples, a line each, are for nobody to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(record) + b"\n")


def read_record(path: Path) -> Record:
    """Read what `write_record` wrote.

    Raises:
        UsageError: there is no such file, or it is not of this form.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(
            expected=f"a JSON file of `paliedge bench -o` in {path}",
            found=str(error),
            action="Measure again with `paliedge bench -o FILE.json`.",
        ) from error
