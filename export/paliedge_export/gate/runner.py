"""A bundle's graphs answer samples, and are watched while they do."""

# Tests: tests/export/weights/test_activations.py.
from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from paliedge.backends.session import FloatArray
from paliedge.bundle.bundle import Bundle
from paliedge.errors import UsageError
from paliedge.generation.embedding import EmbeddingTable
from paliedge.inputs.preprocess import Preprocessor
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge_export.gate.probe import ABSMAX, MEAN_SQUARE, ROWS, Outputs, ProbedGraphs, layer_names
from paliedge_export.graphs.builder import layer_output
from paliedge_export.graphs.decoder import LAST_HIDDEN
from paliedge_export.weights.activations import Statistics
from paliedge_export.weights.samples import Sample

MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class TeacherForcedAnswer:
    """To one prompt: T tokens up to end-of-sequence, their log-probabilities, the hidden states [T, H] before each."""

    tokens: list[int]
    log_probs: list[float]
    hidden: FloatArray


@dataclass
class ReferenceRun:
    """Of one set of graphs to all samples.

    Attributes:
        reference: whose they are.
        features: image_features [N, H] of each image.
        answers: for each image one a prompt.
        layers: what leaves each layer, for the last image and its first prompt: [N, H] of the vision encoder's, [1, H]
            of the decoder's, the prefix's last token; from transformers of all tokens.
        num_not_finite: activations that were infinite or no number.
    """

    reference: str
    features: list[FloatArray] = field(default_factory=list)
    answers: list[list[TeacherForcedAnswer]] = field(default_factory=list)
    layers: dict[str, FloatArray] = field(default_factory=dict)
    num_not_finite: int = 0


def ignore_outputs(outputs: Outputs) -> None:
    """A watcher that watches nothing."""


class Runner:
    """A bundle's graphs, a sample at a time. `folder` is a bundle that need not be published yet."""

    def __init__(self, folder: Path, target: str, *, statistics: bool = False, prepack: bool = True) -> None:
        bundle = Bundle(folder, check_hashes=False)
        manifest = bundle.manifest
        self._tokens = manifest.tokens
        self._limits = manifest.limits
        self._num_image_tokens = manifest.model.vision.num_image_tokens
        self._allowed = (0, manifest.tokens.vocab_size - 1)
        self._preprocess = Preprocessor(manifest.preprocess, manifest.model.vision.image_size)
        self._tokenizer = PromptTokenizer(bundle.path(manifest.tokenizer), manifest.tokens)
        self._embed = EmbeddingTable(bundle)
        self._graphs = ProbedGraphs(
            folder, manifest.targets[target], manifest.limits.capacity, statistics=statistics, prepack=prepack
        )

    def answer(
        self,
        samples: Sequence[Sample],
        reference: str,
        forced: ReferenceRun | None = None,
        watch: Callable[[Outputs], None] = ignore_outputs,
        report: Callable[[str], None] = lambda line: None,
    ) -> ReferenceRun:
        """Answer all prompts, greedily or led by the tokens of `forced`; `watch` sees the outputs of each run."""
        run = ReferenceRun(reference)
        last = len(samples) - 1
        for index, sample in enumerate(samples):
            seen = self._graphs.encode(self._preprocess(sample.image))
            features: FloatArray = seen["image_features"][0]
            watch(seen)
            run.features.append(features)
            self._note(run, seen, len(features) if index == last else 0)
            row = []
            for prompt_index, prompt in enumerate(sample.prompts):
                lead = forced.answers[index][prompt_index].tokens if forced else None
                row.append(self._answer(run, features, prompt, lead, watch, keep=index == last and not prompt_index))
            run.answers.append(row)
            report(f"image {index + 1} of {len(samples)}: {sample.name}")
        return run

    def text(self, tokens: Sequence[int]) -> str:
        """What the reference said, for people."""
        return self._tokenizer.decode(tokens)

    def _answer(
        self,
        run: ReferenceRun,
        features: FloatArray,
        prompt: str,
        lead: list[int] | None,
        watch: Callable[[Outputs], None],
        *,
        keep: bool,
    ) -> TeacherForcedAnswer:
        ids = self._tokenizer.encode_prefix(prompt)
        room = self._limits.prefix - self._num_image_tokens
        if len(ids) > room:
            raise UsageError(
                expected=f"sample prompts of at most {room} tokens, the bundle's limit",
                found=f"{len(ids)} tokens in '{prompt[:60]}'",
                action="Export with a larger --max-prompt-tokens, or calibrate with shorter prompts.",
            )
        prefix = np.concatenate([features, self._embed(ids)])
        seen = self._graphs.prefill(prefix, self._allowed)
        watch(seen)
        self._note(run, seen, int(keep))
        tokens: list[int] = []
        scores: list[float] = []
        hidden: list[FloatArray] = []
        for step in range(len(lead) if lead else min(MAX_NEW_TOKENS, self._limits.new_tokens)):
            if step:
                seen = self._graphs.decode(self._embed([lead[step - 1] if lead else tokens[-1]])[0], self._allowed)
                watch(seen)
                self._note(run, seen, 0)
            tokens.append(int(seen["next_token"][0]))
            scores.append(float(seen["log_prob"][0]))
            if LAST_HIDDEN in seen:
                hidden.append(seen[LAST_HIDDEN][0])
            if not lead and tokens[-1] in self._tokens.end_ids:
                break
        return TeacherForcedAnswer(tokens, scores, np.array(hidden, np.float32))

    @staticmethod
    def _note(run: ReferenceRun, seen: Outputs, num_kept: int) -> None:
        """Count what is no number, and keep the last tokens of what leaves each layer."""
        floats = [array for array in seen.values() if array.dtype == np.float32]
        run.num_not_finite += sum(int((~np.isfinite(array)).sum()) for array in floats)
        if num_kept:
            run.layers |= {name: seen[layer_output(name)][0, -num_kept:] for name in layer_names(seen)}


def collect_statistics(statistics: Statistics, linears: Container[str]) -> Callable[[Outputs], None]:
    """A watcher for the answers of a `Runner` with `statistics`; takes those of the named linear layers."""

    def watch(outputs: Outputs) -> None:
        for name, absmax in outputs.items():
            linear = name.removesuffix(ABSMAX)
            if name != linear and linear in linears:
                rows = int(outputs[linear + ROWS].prod())
                statistics.add(linear, absmax, outputs[linear + MEAN_SQUARE], rows)

    return watch
