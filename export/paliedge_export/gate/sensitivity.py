"""Which layers suffer: quantise one linear layer at a time and see what becomes of the last hidden state.

The others stay in float32, so that the figure is that layer's alone. Layers are ranked by it, and the
worst are kept in 16 bits as long as the weights do not outgrow a budget.
"""

# Tests: tests/export/test_quantized_export.py.
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.digests import describe_file
from paliedge.bundle.manifest import write_manifest
from paliedge.bundle.precision_report import LayerError
from paliedge_export.gate.runner import ReferenceRun, Runner
from paliedge_export.targets import TARGETS
from paliedge_export.weights.files import Encoding, Stored, StoredGraphs, Tensors, write_linear
from paliedge_export.weights.linears import linears
from paliedge_export.weights.samples import Sample
from paliedge_export.writer import ModelSource, StoredByLayout, write_target

NUM_SAMPLES = 2
"""Images that each layer is tried on, one prompt each."""


class Trial:
    """Float32 graphs in a folder of their own, of which one tensor after another is replaced.

    Args:
        folder: a bundle of such graphs for `cpu`; written over.
        source: what they were made from.
        target: whose lowering multiplies the integers.
        stored: where their weights lie.
        samples: what they answer, the first prompt of each.
    """

    def __init__(
        self, folder: Path, source: ModelSource, target: str, stored: StoredByLayout, samples: Sequence[Sample]
    ) -> None:
        self.folder = folder
        self.config = source.config
        self._source = source
        self._target = target
        (self._stored,) = stored.values()
        self._manifest = Bundle(folder, check_hashes=False).manifest
        self._samples = [dataclasses.replace(one, prompts=one.prompts[:1]) for one in samples]
        self._reference = self._answer({})

    def error(self, replaced: Stored) -> float:
        """1 less the mean cosine of the last hidden states, the reference's tokens being fed in."""
        found = self._answer(replaced, self._reference)
        wanted, given = (
            np.concatenate([answer.hidden for row in one.answers for answer in row]).astype(np.float64)
            for one in (self._reference, found)
        )
        norms = np.linalg.norm(wanted, axis=1) * np.linalg.norm(given, axis=1)
        return float(np.nan_to_num(1 - (wanted * given).sum(1) / norms, nan=1.0).mean())

    def _answer(self, replaced: Stored, forced: ReferenceRun | None = None) -> ReferenceRun:
        encoding = Encoding("fp32", kept_tokens=self._source.kept_tokens)
        layout = TARGETS[self._target].lowering.layout
        stored = {layout: StoredGraphs(self._stored.vision_encoder | replaced, self._stored.decoder | replaced)}
        target = write_target(self.folder, self._source, self._target, stored, encoding)
        changed = {target.vision_encoder.file, target.decoder.file, *(one.file for one in replaced.values())}
        files = self._manifest.files | {name: describe_file(self.folder / name) for name in changed}
        write_manifest(
            self.folder, msgspec.structs.replace(self._manifest, targets={self._target: target}, files=files)
        )
        runner = Runner(self.folder, self._target, prepack=False)
        return runner.answer(self._samples, "itself", forced)


def rank_layers(trial: Trial, tensors: Tensors, encoding: Encoding, report: Callable[[str], None]) -> list[LayerError]:
    """Errors of all linear layers, the worst first.

    Args:
        trial: float32 graphs of the same `tensors`.
        tensors: the smoothed checkpoint.
        encoding: how the weights are to be quantised, in the layout of the trial's target.
        report: gets a line a layer.
    """
    found = []
    everything = list(linears(trial.config))
    for index, linear in enumerate(everything, 1):
        error = trial.error(write_linear(trial.folder, "one_layer.weights", tensors, linear, encoding))
        size = sum(math.prod(tensors.shape(name)) for name in linear.weights)
        bits = encoding.bits(linear.name)
        found.append(LayerError(name=linear.name, bits=bits, error=error, num_weights=size))
        report(f"layer {index} of {len(everything)}: {linear.name} alone costs {error:.2e}")
    return sorted(found, key=lambda one: -one.error)


def keep_worst(ranking: Sequence[LayerError], budget: float) -> frozenset[str]:
    """Mark those to keep in 16 bits: from the worst on, each that still fits.

    Args:
        ranking: the worst first.
        budget: share by which the weights of all linear layers may grow.
    """
    left = budget * sum(one.num_weights * one.bits for one in ranking)
    for one in ranking:
        cost = one.num_weights * (16 - one.bits)
        if cost <= left:
            one.kept = True
            left -= cost
    return frozenset(one.name for one in ranking if one.kept)
