"""The gate: run a bundle's graphs and compare them with a reference, token by token and layer by layer.

The reference's tokens are fed in (teacher forcing), so that one early difference does not hide what
comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import msgspec
import numpy as np

from paliedge.backends.session import FloatArray
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Comparison, Cosine, Manifest, Precision, Target, Tokens
from paliedge.errors import PrecisionError, UsageError
from paliedge.generation.embedding import EmbeddingTable
from paliedge.inputs.preprocess import Preprocessor
from paliedge.inputs.prompt import PromptTokenizer
from paliedge_export.gate.probe import ABSMAX, MEAN_SQUARE, ROWS, Outputs, ProbedGraphs, layer_names
from paliedge_export.graphs.builder import layer_output
from paliedge_export.graphs.decoder import LAST_HIDDEN
from paliedge_export.weights.activations import Statistics
from paliedge_export.weights.samples import Sample

MAX_IMAGES = 16
"""The gate's share of the samples: the last ones, from which no statistics are taken where there are enough others."""
MAX_NEW_TOKENS = 16
_FIRST_WITH_TENSOR_SCATTER = (1, 25)
_SURE = math.log(0.5)
_MEANT = math.log(0.01)
"""Mean log-probability of a box's four tokens. Neighbouring bins share what a model is sure of; one that only
guesses gives each of 1024 bins a thousandth."""
_NUM_WORST = 3


class Gate(msgspec.Struct, frozen=True):
    """What a precision must reach; where something cannot be measured it is not asked for.

    Attributes:
        error: largest of image features (relative to the largest) and of log-probabilities (nats); None, any.
        features_mean, features_min: cosines of image features.
        hidden_mean, hidden_min: cosines of last-position hidden states.
        sure_tokens: share of equal tokens among those that the reference was sure of.
        box_iou: mean.
    """

    error: float | None
    features_mean: float
    features_min: float
    hidden_mean: float
    hidden_min: float
    sure_tokens: float
    box_iou: float


GATES: dict[Precision, Gate] = {
    "fp32": Gate(1e-3, 0.9999, 0.9999, 0.9999, 0.9999, 1.0, 0.99),
    "fp16": Gate(5e-2, 0.9999, 0.999, 0.9995, 0.99, 0.99, 0.98),
    "bf16": Gate(2e-1, 0.9995, 0.99, 0.999, 0.99, 0.98, 0.95),
    "int8": Gate(None, 0.99, 0.9, 0.98, 0.9, 0.95, 0.9),
    "int4": Gate(None, 0.98, 0.85, 0.95, 0.8, 0.9, 0.8),
}


@dataclass(frozen=True)
class Answer:
    """To one prompt: T tokens up to end-of-sequence, their log-probabilities, the hidden states [T, H] before each."""

    tokens: list[int]
    log_probs: list[float]
    hidden: FloatArray


@dataclass
class Answers:
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
    answers: list[list[Answer]] = field(default_factory=list)
    layers: dict[str, FloatArray] = field(default_factory=dict)
    num_not_finite: int = 0


class AnswerRow(msgspec.Struct):
    """One answer of the report."""

    image: str
    prompt: str
    reference: str
    token_match: float
    first_difference: int | None
    hidden_cosine: float


class TargetReport(msgspec.Struct):
    """The report of one target: the summary, cosines of what leaves each layer, every answer."""

    precision: Precision
    gate: Gate
    comparison: Comparison
    layers: dict[str, float]
    answers: list[AnswerRow]

    def worst_layers(self) -> list[str]:
        """Those that turn the state furthest from the reference's."""
        drops: dict[str, float] = {}
        for _, names in groupby(self.layers, lambda name: name.split(".")[0]):
            before = 1.0
            for name in names:
                drops[name] = before - self.layers[name]
                before = self.layers[name]
        return sorted(drops, key=lambda name: -drops[name])[:_NUM_WORST]


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
        forced: Answers | None = None,
        watch: Callable[[Outputs], None] = ignore_outputs,
        report: Callable[[str], None] = lambda line: None,
    ) -> Answers:
        """Answer all prompts, greedily or led by the tokens of `forced`; `watch` sees the outputs of each run."""
        found = Answers(reference)
        last = len(samples) - 1
        for index, sample in enumerate(samples):
            seen = self._graphs.encode(self._preprocess(sample.image))
            features: FloatArray = seen["image_features"][0]
            watch(seen)
            found.features.append(features)
            self._note(found, seen, len(features) if index == last else 0)
            row = []
            for place, prompt in enumerate(sample.prompts):
                lead = forced.answers[index][place].tokens if forced else None
                row.append(self._answer(found, features, prompt, lead, watch, keep=index == last and not place))
            found.answers.append(row)
            report(f"image {index + 1} of {len(samples)}: {sample.name}")
        return found

    def text(self, tokens: Sequence[int]) -> str:
        """What the reference said, for people."""
        return self._tokenizer.decode(tokens)

    def _answer(
        self,
        found: Answers,
        features: FloatArray,
        prompt: str,
        lead: list[int] | None,
        watch: Callable[[Outputs], None],
        *,
        keep: bool,
    ) -> Answer:
        ids = self._tokenizer.encode_prefix(prompt)
        room = self._limits.prefix - self._num_image_tokens
        if len(ids) > room:
            raise UsageError(
                expected=f"sample prompts of at most {room} tokens, the bundle's limit",
                found=f"{len(ids)} in '{prompt[:60]}'",
                action="Export with a larger --max-prompt-tokens, or calibrate with shorter prompts.",
            )
        prefix = np.concatenate([features, self._embed(ids)])
        seen = self._graphs.prefill(prefix, self._allowed)
        watch(seen)
        self._note(found, seen, int(keep))
        tokens: list[int] = []
        scores: list[float] = []
        hidden: list[FloatArray] = []
        for place in range(len(lead) if lead else min(MAX_NEW_TOKENS, self._limits.new_tokens)):
            if place:
                seen = self._graphs.decode(self._embed([lead[place - 1] if lead else tokens[-1]])[0], self._allowed)
                watch(seen)
                self._note(found, seen, 0)
            tokens.append(int(seen["next_token"][0]))
            scores.append(float(seen["log_prob"][0]))
            if LAST_HIDDEN in seen:
                hidden.append(seen[LAST_HIDDEN][0])
            if not lead and tokens[-1] == self._tokens.eos:
                break
        return Answer(tokens, scores, np.array(hidden, np.float32))

    @staticmethod
    def _note(found: Answers, seen: Outputs, num_kept: int) -> None:
        """Count what is no number, and keep the last tokens of what leaves each layer."""
        floats = [array for array in seen.values() if array.dtype == np.float32]
        found.num_not_finite += sum(int((~np.isfinite(array)).sum()) for array in floats)
        if num_kept:
            found.layers |= {name: seen[layer_output(name)][0, -num_kept:] for name in layer_names(seen)}


def collect_statistics(statistics: Statistics, linears: Container[str]) -> Callable[[Outputs], None]:
    """A watcher for the answers of a `Runner` with `statistics`; takes those of the named linear layers."""

    def watch(outputs: Outputs) -> None:
        for name, absmax in outputs.items():
            linear = name.removesuffix(ABSMAX)
            if name != linear and linear in linears:
                rows = int(outputs[linear + ROWS].prod())
                statistics.add(linear, absmax, outputs[linear + MEAN_SQUARE], rows)

    return watch


def compare(
    runner: Runner, samples: Sequence[Sample], reference: Answers, tokens: Tokens, precision: Precision
) -> TargetReport:
    """Run a target's graphs on the samples and the reference's tokens."""
    found = runner.answer(samples, "this target", reference)
    expected = [answer for row in reference.answers for answer in row]
    given = [answer for row in found.answers for answer in row]
    features = np.concatenate(found.features)
    wanted = np.concatenate(reference.features)
    hidden = [_cosines(b.hidden, a.hidden) for a, b in zip(expected, given, strict=True)]
    pairs = [(a, b) for a, b in zip(expected, given, strict=True)]
    equal = np.concatenate([np.equal(a.tokens, b.tokens) for a, b in pairs])
    sure = np.concatenate([np.array(a.log_probs) > _SURE for a in expected])
    score_errors = np.concatenate([np.subtract(b.log_probs, a.log_probs) for a, b in pairs])
    differences = [place for a, b in pairs if (place := _first_difference(a, b)) is not None]
    ious = [iou for a, b in pairs for iou in _box_ious(a, b.tokens, tokens)]
    summary = Comparison(
        reference=reference.reference,
        num_images=len(samples),
        num_answers=len(expected),
        image_features_error=float(np.abs(features - wanted).max() / np.abs(wanted).max()),
        log_prob_error=float(np.abs(score_errors).max()),
        image_features=_summarise(_cosines(features, wanted)),
        last_hidden=_summarise(np.concatenate(hidden)),
        num_not_finite=found.num_not_finite,
        token_match=float(equal.mean()),
        sure_token_match=float(equal[sure].mean()) if sure.any() else None,
        first_difference=min(differences, default=None),
        box_iou=float(np.mean(ious)) if ious else None,
    )
    names = [(sample.name, prompt) for sample in samples for prompt in sample.prompts]
    rows = [
        AnswerRow(
            image=name,
            prompt=prompt,
            reference=runner.text(a.tokens),
            token_match=float(np.equal(a.tokens, b.tokens).mean()),
            first_difference=_first_difference(a, b),
            hidden_cosine=float(cosines.min()),
        )
        for (name, prompt), (a, b), cosines in zip(names, pairs, hidden, strict=True)
    ]
    layers = {
        name: float(_cosines(found.layers[name], layer[-len(found.layers[name]) :]).mean())
        for name, layer in reference.layers.items()
    }
    return TargetReport(precision, GATES[precision], summary, layers, rows)


def check(report: TargetReport, target: str) -> None:
    """Refuse graphs that are further off than their precision explains.

    Raises:
        PrecisionError: something below its gate, an error over its limit, or a value that is no number.
    """
    found, gate = report.comparison, report.gate
    at_least = {
        "mean cosine of image features": (found.image_features.mean, gate.features_mean),
        "smallest cosine of image features": (found.image_features.min, gate.features_min),
        "mean cosine of last hidden states": (found.last_hidden.mean, gate.hidden_mean),
        "smallest cosine of last hidden states": (found.last_hidden.min, gate.hidden_min),
        "share of sure tokens that are equal": (found.sure_token_match, gate.sure_tokens),
        "mean IoU of boxes": (found.box_iou, gate.box_iou),
    }
    at_most = {
        "error of image features": (found.image_features_error, math.inf if gate.error is None else gate.error),
        "error of log-probabilities": (found.log_prob_error, math.inf if gate.error is None else gate.error),
        "activations that are no finite number": (found.num_not_finite, 0),
    }
    failed = [
        f"{name} {value:.4g}, not {limit:g}"
        for name, (value, limit) in at_least.items()
        if value is not None and not value >= limit
    ]
    failed += [f"{name} {value:.4g}, over {limit:g}" for name, (value, limit) in at_most.items() if not value <= limit]
    if not failed:
        return
    worst = ", ".join(f"{name} ({report.layers[name]:.4f})" for name in report.worst_layers())
    raise PrecisionError(
        expected=f"{report.precision} graphs for {target} as good as {found.reference}",
        found="; ".join(failed) + (f". The worst layers, with the cosine behind them: {worst}" if worst else ""),
        action=_ADVICE.get(report.precision, "Nothing was published. Export with --precision fp32, and report this."),
    )


_ADVICE = {
    "int8": "Nothing was published. Calibrate with more images like those to come, keep the layers that hurt in 16 "
    "bits with --sensitivity, or take --precision fp16.",
    "int4": "Nothing was published. Calibrate with more images like those to come, keep the layers that hurt in 16 "
    "bits with --sensitivity, or take --precision int8.",
}


def find_obstacle(target: Target) -> str:
    """Why the installed ONNX Runtime cannot run the target's graphs; empty where it can."""
    from paliedge.backends.ort import VERSION

    if target.cache_update == "in_place" and tuple(map(int, VERSION.split(".")[:2])) < _FIRST_WITH_TENSOR_SCATTER:
        needed = ".".join(map(str, _FIRST_WITH_TENSOR_SCATTER))
        return f"onnxruntime {VERSION} has no kernel for its TensorScatter, as {needed} has, for Python 3.11 and later"
    return ""


def find_wrong_sums(manifest: Manifest, target: str) -> str:
    """Why what a target's graphs say here would be no measure of them; empty where it is one."""
    from paliedge.backends.ort import VERSION, find_wrong_products

    wrong = find_wrong_products(manifest, target)
    return f"onnxruntime {VERSION} adds up otherwise on this processor than the graphs say ({wrong})" if wrong else ""


def _cosines(first: FloatArray, second: FloatArray) -> FloatArray:
    """Of each row's vectors; no number counts as none alike."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosines: FloatArray = np.nan_to_num((a * b).sum(-1) / np.maximum(norms, 1e-30)).astype(np.float32)
    return cosines


def _summarise(cosines: FloatArray) -> Cosine:
    return Cosine(min=float(cosines.min()), mean=float(cosines.mean()))


def _first_difference(a: Answer, b: Answer) -> int | None:
    return next((place for place, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), None)


def _box_ious(expected: Answer, found: Sequence[int], tokens: Tokens) -> list[float]:
    """IoU of each box that the reference means with the four tokens at its place."""

    def bins(ids: Sequence[int]) -> list[int]:
        return [token - tokens.first_location for token in ids]

    ious = []
    is_location_at = [0 <= edge < tokens.num_locations for edge in bins(expected.tokens)]
    places = groupby(range(len(is_location_at)), is_location_at.__getitem__)
    for is_location, group in places:
        run = list(group)
        for start in range(0, len(run) - 3, 4) if is_location else ():
            at = run[start : start + 4]
            a, b = (bins([ids[place] for place in at]) for ids in (expected.tokens, found))
            meant = np.mean([expected.log_probs[place] for place in at]) >= _MEANT
            if meant and a[0] < a[2] and a[1] < a[3]:
                ious.append(_iou(a, b) if all(0 <= edge < tokens.num_locations for edge in b) else 0.0)
    return ious


def _iou(a: list[int], b: list[int]) -> float:
    def area(y1: int, x1: int, y2: int, x2: int) -> int:
        return max(0, y2 - y1) * max(0, x2 - x1)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return common / (area(*a) + area(*b) - common) if common else 0.0
