"""The child process of our own bundles: `python -m benchmarks.peers.ours BUNDLE`.

It prints times and memory, with --agree what the engine says, with --overhead what our own code costs a decode step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime

from benchmarks.peers.harness import NUM_TOKENS, ROOT, Clock, Inputs, make_inputs, measure
from paliedge import GenerationOptions, PaliGemma
from paliedge.backends.ort import OrtSession, load_graph
from paliedge.backends.select import BackendOptions
from paliedge.backends.session import IdRange
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Manifest
from paliedge.generation.embedding import EmbeddingTable

SCENE = ROOT / "runtime" / "paliedge" / "scenes" / "scene-1.png"
PROMPT = "caption en"


class Ours:
    """A bundle's first target on ONNX Runtime, fed tokens.

    Args:
        folder: the bundle.
        num_threads: of the operators.
        num_tokens: in an answer.
        num_prefix: None for an image and the usual prompt; else that many tokens of text and no image, for peers
            that know no images: the vision encoder is not loaded then, as they have none.
    """

    def __init__(self, folder: Path, num_threads: int, num_tokens: int = NUM_TOKENS, num_prefix: int | None = None):
        bundle = Bundle(folder, check_hashes=False)
        manifest = bundle.manifest
        with _decoder_alone(bundle) if num_prefix else nullcontext():
            self._session = OrtSession(bundle, next(iter(manifest.targets)), num_threads)
        self._cache, self._embed = self._session.new_cache(), EmbeddingTable(bundle)
        self._inputs = inputs_for(manifest, num_tokens, num_prefix)
        self._has_image = num_prefix is None
        self._all = (0, manifest.tokens.vocab_size - 1)
        first = manifest.tokens.first_location
        self._locations = (first, first + manifest.tokens.num_locations - 1)

    def answer(self) -> dict[str, Any]:
        """An answer's times, and the tokens that it would have had."""
        clock = Clock()
        features = [self._session.encode_image(self._inputs.pixels)] if self._has_image else []
        vision = clock()
        step = self._session.prefill(self._cache, features, self._embed(self._inputs.prompt), self._all)
        prefill, chosen, times = clock(), [step.token_id], []
        for token in self._inputs.forced:
            (step,) = self._session.decode(self._cache, self._embed([token]), [self._all])
            chosen.append(step.token_id)
            times.append(clock())
        return {"vision": vision, "prefill": prefill, "tokens": times, "answer": clock.total(), "chosen": chosen}

    def log_probs(self, wanted: Sequence[int] = ()) -> list[float]:
        """Log-probabilities of the tokens `wanted` (the forced ones, unless given), each behind the forced ones."""
        wanted = wanted or self._inputs.forced
        return [log_prob for _, log_prob in self._feed([(token, token) for token in wanted])]

    def among_locations(self) -> dict[str, Any]:
        """What a reduced head leaves as it is: winners among location tokens, and by how much one beats the next."""
        first, last = self._locations
        tokens = range(first, last, max(1, (last - first) // len(self._inputs.forced)))[: len(self._inputs.forced)]
        one, next_one = self.log_probs(tokens), self.log_probs([token + 1 for token in tokens])
        winners = [token for token, _ in self._feed([self._locations] * len(tokens))]
        return {"log_probs": [a - b for a, b in zip(one, next_one, strict=True)], "chosen": winners}

    def _feed(self, allowed: Sequence[IdRange]) -> list[tuple[int, float]]:
        """The likeliest token of each range and its log-probability, each behind the forced tokens before it."""
        features = [self._session.encode_image(self._inputs.pixels)] if self._has_image else []
        found = [self._session.prefill(self._cache, features, self._embed(self._inputs.prompt), allowed[0])]
        for token, one in zip(self._inputs.forced, allowed[1:], strict=False):
            found += self._session.decode(self._cache, self._embed([token]), [one])
        return [(step.token_id, step.log_prob) for step in found]


@contextmanager
def _decoder_alone(bundle: Bundle) -> Iterator[None]:
    """Sessions that are made meanwhile have no vision encoder."""
    (target,) = bundle.manifest.targets.values()
    encoder = bundle.path(target.vision_encoder.file)

    def load(path: Path, *arguments: Any, **options: Any) -> onnxruntime.InferenceSession | None:
        return None if path == encoder else load_graph(path, *arguments, **options)

    with patch("paliedge.backends.ort.load_graph", load):
        yield


@contextmanager
def _watch_decode_steps() -> Iterator[list[tuple[float, float]]]:
    """When each of ONNX Runtime's own decode steps begins and ends."""
    spans: list[tuple[float, float]] = []
    run = onnxruntime.InferenceSession.run_with_iobinding

    def watched(*arguments: Any, **options: Any) -> None:
        started = time.perf_counter()
        run(*arguments, **options)
        spans.append((started, time.perf_counter()))

    with patch.object(onnxruntime.InferenceSession, "run_with_iobinding", watched):
        yield spans


def measure_overhead(folder: Path, num_threads: int, num_answers: int) -> dict[str, Any]:
    """What a decode step of `PaliGemma.generate` does beside ONNX Runtime's run: from one run's end to the next.

    Microseconds, medians over all steps but each answer's first, before which prefill is stored.
    """
    options = BackendOptions(backend="cpu", threads=num_threads)
    outside, steps = [], []
    with PaliGemma.load(folder, options) as model, _watch_decode_steps() as spans:
        image = model.encode(SCENE)
        for index in range(num_answers + 1):
            spans.clear()
            model.generate(image, PROMPT, options=GenerationOptions(max_new_tokens=NUM_TOKENS, free=True))
            for (_, before), (begin, end) in pairwise(spans if index else ()):  # the first answer warms up
                outside.append(begin - before)
                steps.append(end - before)
    found, step = (1e6 * statistics.median(seconds) for seconds in (outside, steps))
    return {
        "outside_us": round(found, 1), "step_us": round(step, 1), "share": round(found / step, 4), "steps": len(steps)
    }  # fmt: skip


def inputs_for(manifest: Manifest, num_tokens: int = NUM_TOKENS, num_prefix: int | None = None) -> Inputs:
    """The inputs for a model; with `num_prefix` the prompt is so many tokens long."""
    words = (1000, 200_000) if manifest.tokens.vocab_size > 200_000 else (4, manifest.tokens.first_location)
    found = make_inputs(manifest.model.vision.image_size, manifest.tokens.bos, words, num_tokens)
    if num_prefix is None:
        return found
    drawn = np.random.default_rng(1).integers(*words, num_prefix - 1).tolist()
    return found._replace(prompt=[manifest.tokens.bos, *drawn])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--prefix", type=int, help="so many tokens of text and no image")
    parser.add_argument("--answers", type=int, default=2)
    parser.add_argument("--agree", action="store_true", help="print log-probabilities of the forced tokens instead")
    parser.add_argument("--locations", action="store_true", help="the same among location tokens, for reduced heads")
    parser.add_argument("--overhead", type=int, help="print what our code costs a step of so many answers instead")
    arguments = parser.parse_args()
    if arguments.overhead:
        print(json.dumps(measure_overhead(arguments.bundle, arguments.threads, arguments.overhead)))
        return
    started = time.perf_counter()
    ours = Ours(arguments.bundle, arguments.threads, arguments.tokens, arguments.prefix)
    load_s = time.perf_counter() - started
    if arguments.locations:
        print(json.dumps(ours.among_locations()))
    elif arguments.agree:
        print(json.dumps({"log_probs": ours.log_probs(), "chosen": ours.answer()["chosen"]}))
    else:
        print(json.dumps(measure(ours.answer, load_s, arguments.answers)))


if __name__ == "__main__":
    main()
