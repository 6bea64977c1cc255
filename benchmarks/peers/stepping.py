"""What the children of engines for text share: tokens go in, the last one's logits come out.

Our graphs choose the token themselves, so here the choice among the logits is part of a step's time, too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.peers.harness import Clock, measure

FloatArray = npt.NDArray[np.float32]


class Fed(NamedTuple):
    """What is fed to every engine.

    Attributes:
        prompt: the prefix, bos first.
        forced: the tokens fed in behind it, one a step.
        num_rows: ids below this are tokens; the table's rows behind them have no say.
    """

    prompt: list[int]
    forced: list[int]
    num_rows: int


class Stepper(Protocol):
    """An engine with a KV cache."""

    def reset(self) -> None:
        """Empty the cache."""

    def step(self, ids: Sequence[int]) -> FloatArray:
        """Feed tokens; returns the logits [vocabulary] behind the last one."""


def read_fed(path: Path) -> Fed:
    return Fed(**json.loads(path.read_text()))


def log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Log-probabilities, in float64: the engine's own rounding is what is asked for."""
    shifted = logits.astype(np.float64) - logits.max()
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return found


def take_answer(engine: Stepper, fed: Fed) -> dict[str, Any]:
    """An answer's times, and the tokens that it would have had."""
    engine.reset()
    clock = Clock()
    chosen = [int(engine.step(fed.prompt)[: fed.num_rows].argmax())]
    prefill, times = clock(), []
    for token in fed.forced:
        chosen.append(int(engine.step([token])[: fed.num_rows].argmax()))
        times.append(clock())
    return {"vision": 0.0, "prefill": prefill, "tokens": times, "answer": clock.total(), "chosen": chosen}


def forced_log_probs(engine: Stepper, fed: Fed) -> list[float]:
    """Log-probabilities of the forced tokens, each behind those before it."""
    engine.reset()
    found = []
    for ids, wanted in zip([fed.prompt, *([token] for token in fed.forced)], fed.forced, strict=False):
        found.append(float(log_softmax(engine.step(ids)[: fed.num_rows])[wanted]))
    return found


def run_stepper(load: Callable[[Path, int], Stepper], packages: Sequence[str], about: str = "") -> None:
    """The command line of a child: prints what `measure` gives, or with --agree what it says and who it is.

    Args:
        load: gives the engine from the model's path and a number of threads.
        packages: whose versions are told.
        about: what else there is to say of the engine, such as what it was compiled for.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--fed", type=Path, required=True, help="a Fed as JSON")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--answers", type=int, default=2)
    parser.add_argument("--agree", action="store_true", help="print log-probabilities of the forced tokens instead")
    arguments = parser.parse_args()
    fed = read_fed(arguments.fed)
    started = time.perf_counter()
    engine = load(arguments.model, arguments.threads)
    load_s = time.perf_counter() - started
    if not arguments.agree:
        print(json.dumps(measure(lambda: take_answer(engine, fed), load_s, arguments.answers)))
        return
    found = {"log_probs": forced_log_probs(engine, fed), "chosen": take_answer(engine, fed)["chosen"]}
    print(json.dumps(found | {"packages": {name: version(name) for name in packages}, "about": about}))
