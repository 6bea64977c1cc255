"""The gate: run a bundle's graphs and compare them with a reference, token by token and layer by layer.

The reference's tokens are fed in (teacher forcing), so that one early difference does not hide what
comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from paliedge.backends.session import FloatArray
from paliedge.bundle.manifest import Comparison, Cosine, Manifest, Precision, Target, Tokens
from paliedge.bundle.precision_report import AnswerRow, Gate, TargetReport
from paliedge.errors import PrecisionError
from paliedge.results.locations import box_iou
from paliedge_export.gate.runner import ReferenceRun, Runner, TeacherForcedAnswer
from paliedge_export.weights.samples import Sample

MAX_IMAGES = 16
"""The gate's share of the samples: the last ones, from which no statistics are taken where there are enough others."""
_FIRST_WITH_TENSOR_SCATTER = (1, 25)
_SURE = math.log(0.5)
_MEANT = math.log(0.01)
"""Mean log-probability of a box's four tokens. Neighbouring bins share what a model is sure of; one that only
guesses gives each of 1024 bins a thousandth."""


GATES: dict[Precision, Gate] = {
    "fp32": Gate(
        error=1e-3,
        features_mean=0.9999,
        features_min=0.9999,
        hidden_mean=0.9999,
        hidden_min=0.9999,
        sure_tokens=1.0,
        box_iou=0.99,
    ),
    "fp16": Gate(
        error=5e-2,
        features_mean=0.9999,
        features_min=0.999,
        hidden_mean=0.9995,
        hidden_min=0.99,
        sure_tokens=0.99,
        box_iou=0.98,
    ),
    "bf16": Gate(
        error=2e-1,
        features_mean=0.9995,
        features_min=0.99,
        hidden_mean=0.999,
        hidden_min=0.99,
        sure_tokens=0.98,
        box_iou=0.95,
    ),
    "int8": Gate(
        error=None,
        features_mean=0.99,
        features_min=0.9,
        hidden_mean=0.98,
        hidden_min=0.9,
        sure_tokens=0.95,
        box_iou=0.9,
    ),
    "int4": Gate(
        error=None,
        features_mean=0.98,
        features_min=0.85,
        hidden_mean=0.95,
        hidden_min=0.8,
        sure_tokens=0.9,
        box_iou=0.8,
    ),
}


def compare(
    runner: Runner, samples: Sequence[Sample], reference: ReferenceRun, tokens: Tokens, precision: Precision
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
    differences = [index for a, b in pairs if (index := _first_difference(a, b)) is not None]
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
        action=_ADVICE.get(report.precision, "Report this with the checkpoint's small files. Nothing was published."),
    )


_ADVICE = {
    "int8": "Calibrate with more images like those to come, keep the layers that hurt in 16 bits with --sensitivity, "
    "or take --precision fp16. Nothing was published.",
    "int4": "Calibrate with more images like those to come, keep the layers that hurt in 16 bits with --sensitivity, "
    "or take --precision int8. Nothing was published.",
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


def _first_difference(a: TeacherForcedAnswer, b: TeacherForcedAnswer) -> int | None:
    return next((index for index, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), None)


def _box_ious(expected: TeacherForcedAnswer, found: Sequence[int], tokens: Tokens) -> list[float]:
    """IoU of each box that the reference means with the four tokens at its position."""

    def bins(ids: Sequence[int]) -> list[int]:
        return [token - tokens.first_location for token in ids]

    ious = []
    is_location_at = [0 <= edge < tokens.num_locations for edge in bins(expected.tokens)]
    groups = groupby(range(len(is_location_at)), is_location_at.__getitem__)
    for is_location, group in groups:
        run = list(group)
        for start in range(0, len(run) - 3, 4) if is_location else ():
            at = run[start : start + 4]
            a, b = (bins([ids[index] for index in at]) for ids in (expected.tokens, found))
            meant = np.mean([expected.log_probs[index] for index in at]) >= _MEANT
            if meant and a[0] < a[2] and a[1] < a[3]:
                ious.append(box_iou(a, b) if all(0 <= edge < tokens.num_locations for edge in b) else 0.0)
    return ious
