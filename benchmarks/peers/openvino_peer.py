"""The child process of OpenVINO on our own graphs: `python -m benchmarks.peers.openvino_peer BUNDLE INPUTS`.

The same graphs and weights as ours, so that what differs is the runtime. Needs no onnxruntime: it loads the graphs
itself, stores the KV rows that they return as `paliedge.backends.ort` does, and binds what a step reads once.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino  # type: ignore[import-not-found]  # in an environment of its own

from benchmarks.peers.harness import Clock, Inputs, load_inputs, measure
from paliedge.backends.session import FloatArray, IdRange, present_name
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Tensor
from paliedge.generation.embedding import EmbeddingTable

HINTS = ("f32", "bf16")
Cache = dict[str, npt.NDArray[Any]]


class _Steps:
    """One graph's request for steps on `count` tokens, which read `past` and write their rows into `cache`.

    OpenVINO reads the arrays where they lie and keeps none of them alive: this object does.
    """

    def __init__(self, model: Any, count: int, hidden_size: int, past: Cache, cache: Cache) -> None:
        self._request, self._cache = model.create_infer_request(), cache
        self._embeds = np.zeros((1, count, hidden_size), np.float32)
        self._positions = np.zeros((1, count), np.int64)
        self._prefix_length, self._allowed_ids = np.zeros(1, np.int64), np.zeros((1, 2), np.int64)
        self._inputs = past | {
            "inputs_embeds": self._embeds,
            "position_ids": self._positions,
            "prefix_length": self._prefix_length,
            "allowed_ids": self._allowed_ids,
        }
        for name, array in self._inputs.items():
            self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def run(self, embeds: FloatArray, begin: int, prefix_length: int, allowed: IdRange) -> tuple[int, float]:
        """The tokens of `embeds` [S, H] behind `begin` others: the next one and its log-probability."""
        end = begin + len(embeds)
        self._embeds[0] = embeds
        self._positions[0] = np.arange(begin + 1, end + 1)
        self._prefix_length[0], self._allowed_ids[0] = prefix_length, allowed
        self._request.infer()
        for name, buffer in self._cache.items():
            buffer[:, :, begin:end] = self._request.get_tensor(present_name(name)).data
        token, log_prob = (self._request.get_tensor(name).data[0] for name in ("next_token", "log_prob"))
        return int(token), float(log_prob)


class OpenVino:
    """The graphs of a bundle's first target on OpenVINO's CPU plugin, fed tokens.

    Args:
        folder: the bundle.
        inputs: what it is fed.
        hint: INFERENCE_PRECISION_HINT, one of `HINTS`.
        num_threads: of the operators.
    """

    def __init__(self, folder: Path, inputs: Inputs, hint: str, num_threads: int) -> None:
        bundle = Bundle(folder, check_hashes=False)
        manifest = bundle.manifest
        target = next(iter(manifest.targets.values()))
        assert target.cache_update == "rows", "OpenVINO knows no TensorScatter"
        self._inputs, self._embed = inputs, EmbeddingTable(bundle)
        self._all = (0, manifest.tokens.vocab_size - 1)
        self._num_prefix = manifest.model.vision.num_image_tokens + len(inputs.prompt)
        options = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": num_threads,
        }
        core = openvino.Core()
        vision, decoder = (
            core.compile_model(str(bundle.path(graph.file)), "CPU", options)
            for graph in (target.vision_encoder, target.decoder)
        )
        self._vision = vision.create_infer_request()
        self._vision.set_tensor("pixel_values", openvino.Tensor(inputs.pixels, shared_memory=True))
        past = [tensor for tensor in target.decoder.inputs if tensor.name.startswith("past_key_values.")]
        cache = {tensor.name: _zeros(tensor, manifest.limits.capacity) for tensor in past}
        nothing = {tensor.name: _zeros(tensor, 0) for tensor in past}
        hidden_size = manifest.model.text.hidden_size
        self._prefill = _Steps(decoder, self._num_prefix, hidden_size, nothing, cache)
        self._decode = _Steps(decoder, 1, hidden_size, cache, cache)

    def _encode(self) -> FloatArray:
        self._vision.infer()
        features: FloatArray = self._vision.get_tensor("image_features").data[0]
        return features

    def _start(self, features: FloatArray, allowed: IdRange) -> tuple[int, float]:
        embeds = np.concatenate([features, self._embed(self._inputs.prompt)])
        return self._prefill.run(embeds, 0, self._num_prefix, allowed)

    def _continue(self, place: int, token: int, allowed: IdRange) -> tuple[int, float]:
        return self._decode.run(self._embed([token]), self._num_prefix + place, self._num_prefix, allowed)

    def answer(self) -> dict[str, Any]:
        """An answer's times, and the tokens that it would have had."""
        clock = Clock()
        features = self._encode()
        vision = clock()
        chosen = [self._start(features, self._all)[0]]
        prefill, times = clock(), []
        for place, token in enumerate(self._inputs.forced):
            chosen.append(self._continue(place, token, self._all)[0])
            times.append(clock())
        return {"vision": vision, "prefill": prefill, "tokens": times, "answer": clock.total(), "chosen": chosen}

    def log_probs(self, wanted: Sequence[int]) -> list[float]:
        """Log-probabilities of the tokens `wanted`, each behind the forced ones before it."""
        found = [self._start(self._encode(), (wanted[0],) * 2)]
        for place, token in enumerate(self._inputs.forced[: len(wanted) - 1]):
            found.append(self._continue(place, token, (wanted[place + 1],) * 2))
        return [log_prob for _, log_prob in found]


def _zeros(tensor: Tensor, length: int) -> npt.NDArray[Any]:
    _, heads, _, dim = tensor.shape
    assert isinstance(heads, int)
    assert isinstance(dim, int)
    return np.zeros((1, heads, length, dim), tensor.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--hint", choices=HINTS, default="f32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--answers", type=int, default=2)
    parser.add_argument("--agree", action="store_true", help="print log-probabilities of the forced tokens instead")
    arguments = parser.parse_args()
    started = time.perf_counter()
    inputs = load_inputs(arguments.inputs)
    peer = OpenVino(arguments.bundle, inputs, arguments.hint, arguments.threads)
    load_s = time.perf_counter() - started
    if arguments.agree:
        print(json.dumps({"log_probs": peer.log_probs(inputs.forced), "chosen": peer.answer()["chosen"]}))
    else:
        print(json.dumps(measure(peer.answer, load_s, arguments.answers)))


if __name__ == "__main__":
    main()
