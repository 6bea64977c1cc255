"""The child process of our own bundles: `python -m benchmarks.peers.ours BUNDLE`."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.harness import NUM_TOKENS, Clock, Inputs, make_inputs, measure
from paliedge.bundle import Bundle
from paliedge.embedding import EmbeddingTable
from paliedge.manifest import Manifest
from paliedge.ort_session import OrtSession


class Ours:
    """A bundle's first target on ONNX Runtime, fed tokens.

    Args:
        folder: the bundle.
        num_threads: of the operators.
        num_tokens: in an answer.
        num_prefix: None for an image and the usual prompt; else that many tokens of text and no image, for peers
            that know no images.
    """

    def __init__(self, folder: Path, num_threads: int, num_tokens: int = NUM_TOKENS, num_prefix: int | None = None):
        bundle = Bundle(folder, check_hashes=False)
        manifest = bundle.manifest
        self._session = OrtSession(bundle, next(iter(manifest.targets)), num_threads)
        self._cache, self._embed = self._session.new_cache(), EmbeddingTable(bundle)
        self._inputs = inputs_for(manifest, num_tokens, num_prefix)
        self._has_image = num_prefix is None
        self._all = (0, manifest.tokens.vocab_size - 1)

    def answer(self) -> dict[str, Any]:
        """An answer's times, and the tokens that it would have had."""
        clock = Clock()
        features = [self._session.encode_image(self._inputs.pixels)] if self._has_image else []
        vision = clock()
        step = self._session.prefill(self._cache, features, self._embed(self._inputs.prompt), self._all)
        prefill, chosen, times = clock(), [step.token], []
        for token in self._inputs.forced:
            (step,) = self._session.decode(self._cache, self._embed([token]), [self._all])
            chosen.append(step.token)
            times.append(clock())
        return {"vision": vision, "prefill": prefill, "tokens": times, "answer": clock.total(), "chosen": chosen}

    def log_probs(self) -> list[float]:
        """Log-probabilities of the forced tokens, each behind those before it."""
        forced = self._inputs.forced
        features = [self._session.encode_image(self._inputs.pixels)] if self._has_image else []
        found = [self._session.prefill(self._cache, features, self._embed(self._inputs.prompt), (forced[0],) * 2)]
        for token, wanted in zip(forced, forced[1:], strict=False):
            found += self._session.decode(self._cache, self._embed([token]), [(wanted, wanted)])
        return [step.log_prob for step in found]


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
    arguments = parser.parse_args()
    started = time.perf_counter()
    ours = Ours(arguments.bundle, arguments.threads, arguments.tokens, arguments.prefix)
    load_s = time.perf_counter() - started
    if arguments.agree:
        print(json.dumps({"log_probs": ours.log_probs(), "chosen": ours.answer()["chosen"]}))
    else:
        print(json.dumps(measure(ours.answer, load_s, arguments.answers)))


if __name__ == "__main__":
    main()
