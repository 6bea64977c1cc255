"""What an export measured, in the bundle's precision_report.json."""

# Tests: tests/export/test_quantized_export.py and tests/cli/test_bundles.py.
from __future__ import annotations

from itertools import groupby
from pathlib import Path

import msgspec

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Comparison, Precision

_NUM_WORST = 3
PRECISION_REPORT = "precision_report.json"


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


class LayerError(msgspec.Struct):
    """What it costs to quantise one linear layer alone, and what it weighs.

    Attributes:
        name: of the linear layer; `gate_proj` stands for `up_proj`, too, see `paliedge_export.weights.linears`.
        bits: of its weight, quantised.
        error: 1 less the mean cosine of the last hidden states.
        num_weights: how many it has.
        kept: whether it stays in 16 bits.
    """

    name: str
    bits: int
    error: float
    num_weights: int
    kept: bool = False


class PrecisionReport(msgspec.Struct):
    """What the bundle keeps of its export's measurements.

    Attributes:
        targets: those that were compared.
        calibrated_with: source of the statistics, "" without any.
        strengths: how strongly each linear layer's input was smoothed, 0 to 1.
        sensitivity: the linear layers by the error that each causes, the worst first, if that was asked.
    """

    targets: dict[str, TargetReport]
    calibrated_with: str = ""
    strengths: dict[str, float] = {}
    sensitivity: list[LayerError] = []


def load_precision_report(bundle: Bundle) -> PrecisionReport | None:
    """The bundle's report; None for a bundle that was exported without a comparison."""
    if bundle.manifest.precision_report is None:
        return None
    return msgspec.json.decode(bundle.path(bundle.manifest.precision_report).read_bytes(), type=PrecisionReport)


def encode_precision_report(report: PrecisionReport) -> str:
    """The report as JSON, as the bundle holds it."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1).decode() + "\n"


def write_precision_report(path: Path, report: PrecisionReport) -> None:
    """Write what `load_precision_report` reads."""
    path.write_text(encode_precision_report(report))
