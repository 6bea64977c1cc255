"""What every comparison with a peer shares: the same inputs, a process an engine, turns, statistics, environments.

An engine answers in a process of its own that prints one JSON object as its last line (`Child`), so that peak memory
is its own and packages do not meet. Engines take turns, round after round: a machine that changes its speed
changes it for all. The same tokens are fed to every engine and none stops early, so answers are equally long.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent.parent
TORCH = os.environ.get("TORCH", "torch==2.13.0")
"""As in the Makefile: what brings torch without CUDA on this machine."""
NUM_TOKENS = 10
NUM_PROMPT_TOKENS = 16
_MESSAGE = 400
"""Characters of a failure that are kept."""


class Inputs(NamedTuple):
    """Pixels [1, 3, S, S] in -1..1, the prompt's ids (bos first), and the tokens that are fed in behind them."""

    pixels: np.ndarray[Any, np.dtype[np.float32]]
    prompt: list[int]
    forced: list[int]


def make_inputs(image_size: int, bos: int, words: tuple[int, int], num_tokens: int = NUM_TOKENS) -> Inputs:
    """The same for every engine: `num_tokens` - 1 forced tokens, drawn from the ids `words` (first, past the last)."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (1, 3, image_size, image_size)).astype(np.float32)
    drawn = rng.integers(*words, NUM_PROMPT_TOKENS - 1 + num_tokens - 1).tolist()
    return Inputs(pixels, [bos, *drawn[: NUM_PROMPT_TOKENS - 1]], drawn[NUM_PROMPT_TOKENS - 1 :])


def save_inputs(path: Path, inputs: Inputs) -> None:
    """For peers whose environment has nothing of ours."""
    np.savez(path, pixels=inputs.pixels, prompt=inputs.prompt, forced=inputs.forced)


def load_inputs(path: Path) -> Inputs:
    """What `save_inputs` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return Inputs(file["pixels"], file["prompt"].tolist(), file["forced"].tolist())


class Clock:
    """Seconds since it was last asked, and in all."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()

    def __call__(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    def total(self) -> float:
        return self._last - self._started


def measure(answer: Callable[[], dict[str, Any]], load_s: float, num_answers: int = 2) -> dict[str, Any]:
    """What a child prints: `num_answers` answers behind one that warms up, and this process's memory in bytes.

    The first one's seconds are told apart: what an engine compiles when it is first used is in them.

    Args:
        answer: gives seconds `vision`, `prefill`, `tokens` (one a decode step) and `answer`; and `chosen`, the
            tokens that the engine would have said.
        load_s: seconds that loading took.
        num_answers: how many are measured.
    """
    started = time.perf_counter()
    answer()
    first = time.perf_counter() - started
    answers = [answer() for _ in range(num_answers)]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    memory = {
        name: int(status[key].split()[0]) * 1024 for name, key in (("peak_rss", "VmHWM"), ("anonymous", "RssAnon"))
    }
    return {"load": load_s, "first_answer": first, "answers": answers, **memory}


def summarise(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over all answers and rounds, and the range of whole answers; seconds and bytes."""
    answers = [answer for one in rounds for answer in one["answers"]]
    tokens = [seconds for answer in answers for seconds in answer["tokens"]]
    whole = [answer["answer"] for answer in answers]
    return {
        **{name: round(statistics.median(answer[name] for answer in answers), 6) for name in ("vision", "prefill")},
        "token": round(statistics.median(tokens), 6),
        "token_range": [round(min(tokens), 6), round(max(tokens), 6)],
        "answer": round(statistics.median(whole), 5),
        "answer_range": [round(min(whole), 5), round(max(whole), 5)],
        "load": round(statistics.median(one["load"] for one in rounds), 3),
        "peak_rss": max(one["peak_rss"] for one in rounds),
        "anonymous": max(one["anonymous"] for one in rounds),
        "num_answers": len(answers),
    }


@dataclass(frozen=True)
class Engine:
    """One contender: its command prints what `measure` gives as its last line on stdout.

    Attributes:
        name: such as `transformers bfloat16`.
        precision: the class it is compared in: "fp32", "16-bit", "int8" or "int4".
        command: the whole command line, interpreter first.
        environment: variables beside this process's own.
    """

    name: str
    precision: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def run_child(engine: Engine) -> dict[str, Any]:
    """One turn of an engine; what it prints on stderr is shown when it fails."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "runtime"), str(ROOT / "export")])
    environment = {**os.environ, "PYTHONPATH": path, **engine.environment}
    done = subprocess.run(engine.command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode < 0:  # it had no time to say why; the system does so to the largest when memory runs short
        raise RuntimeError(f"{engine.name}: killed by signal {-done.returncode}")
    if done.returncode:
        raise RuntimeError(f"{engine.name}: {' '.join(engine.command)} ended with {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def take_turns(
    engines: Sequence[Engine],
    num_rounds: int,
    between: Callable[[], None] = lambda: None,
    failures: dict[str, str] | None = None,
    settle_s: float = 0.0,
) -> dict[str, list[dict[str, Any]]]:
    """Every engine in turn, `num_rounds` times; `between` runs after each, and each round begins after `settle_s`.

    With `failures` an engine whose child ends with an error is named there and has no more turns; else it is raised.
    """
    rounds: dict[str, list[dict[str, Any]]] = {engine.name: [] for engine in engines}
    for index in range(num_rounds):
        time.sleep(settle_s)
        for engine in engines:
            if failures is not None and engine.name in failures:
                continue
            try:
                rounds[engine.name].append(run_child(engine))
            except RuntimeError as error:
                if failures is None:
                    raise
                failures[engine.name] = first_error(str(error))
                print(index + 1, engine.name, failures[engine.name], file=sys.stderr, flush=True)
                continue
            print(index + 1, engine.name, json.dumps(summarise(rounds[engine.name][-1:])), file=sys.stderr, flush=True)
            between()
    return rounds


def first_error(text: str) -> str:
    """The message of the last traceback in what a child printed, or its last line; in one line."""
    lines = [line for line in text.splitlines() if line.strip()]
    begins = [place for place, line in enumerate(lines) if line.startswith("Traceback")]
    message = [line.strip() for line in lines[begins[-1] + 1 :] if not line.startswith("  ")] if begins else lines[-1:]
    return " ".join(message)[:_MESSAGE]


def environment(name: str, requirements: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """The interpreter of build/peers/NAME, made anew when its requirements change.

    Args:
        name: of the peer.
        requirements: as pip takes them, pinned.
        variables: for pip, such as CMAKE_ARGS.
    """
    folder = ROOT / "build" / "peers" / name
    python, stamp = folder / "bin" / "python", folder / "requirements.sha256"
    digest = hashlib.sha256(json.dumps([list(requirements), variables]).encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *requirements], check=True, env={**os.environ, **(variables or {})})
        stamp.write_text(digest)
    return str(python)


def probe_bandwidth(num_threads: int) -> float:
    """Bytes a second that the machine reads just now, see `paliedge.bench.roofs`."""
    from paliedge.bench.roofs import measure_cpu_apart  # children of other environments import this module, too

    roofs = measure_cpu_apart(num_threads)
    if roofs.read_bytes_per_s is None:
        raise RuntimeError(roofs.how)
    return roofs.read_bytes_per_s
