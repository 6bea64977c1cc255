"""What an export is told, and what is refused before it begins."""

# Tests: tests/export/test_exporter.py and tests/export/test_quantized_export.py.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paliedge.bundle.manifest import Precision
from paliedge.errors import UsageError
from paliedge_export.checkpoint.big_vision import GEMMA2_27B_WIDTH
from paliedge_export.checkpoint.config import ModelConfig
from paliedge_export.targets import TARGETS
from paliedge_export.weights.activations import STATISTICS
from paliedge_export.weights.files import QUANTIZED
from paliedge_export.weights.samples import FOLDER, SampleFolder, open_samples

DEFAULT_MAX_PROMPT_TOKENS, DEFAULT_MAX_NEW_TOKENS = 128, 256
"""Of a request without its image tokens, and of an answer. The manifest's `Limits.prefix` counts image tokens too."""


@dataclass(frozen=True)
class Quantization:
    """How a quantised bundle is made.

    Attributes:
        calibrate: a folder of images, with JSONL files of prompts if there are any, or a bundle (or its
            calibration.safetensors) whose statistics are taken again. Without it the checkpoint's own folder
            `calibration`, if it has one. Other precisions are compared on these samples.
        sensitivity: rank the layers. The worst stay in 16 bits while the weights of the linear layers grow by
            no more than this share; None leaves it out.
        head_vocabulary: "detect" or a file of labels: the head keeps only what such answers need.
        fast_prefill: of int4 for `cpu`: a second graph with 8-bit weights for the prefix, which ONNX Runtime
            multiplies at twice the rate. The bundle and its memory are about twice as large.
        smooth: scale activations into the weights.
    """

    calibrate: Path | None = None
    sensitivity: float | None = None
    head_vocabulary: str | None = None
    fast_prefill: bool = False
    smooth: bool = True


DEFAULT_QUANTIZATION = Quantization()


def check_quantization(precision: Precision, targets: Sequence[str], quantization: Quantization) -> None:
    """Raise a UsageError for what only a quantised bundle can be asked."""
    if quantization.fast_prefill and (precision != "int4" or "cpu" not in targets):
        raise UsageError(
            expected="int4 for the target 'cpu', whose 4-bit products are slow for many tokens at once",
            found=f"--fast-prefill with {precision} for {', '.join(targets)}",
            action="Add --precision int4 --target cpu, or leave out --fast-prefill.",
        )
    if quantization.sensitivity is not None and precision not in QUANTIZED:
        raise UsageError(
            expected="int8 or int4, whose layers can be ranked by their error",
            found=precision,
            action="Add --precision int8 or int4, or leave out --sensitivity.",
        )
    if precision not in QUANTIZED and statistics_file(quantization):
        raise UsageError(
            expected=f"a folder of images for --calibrate with {precision}, which needs no statistics",
            found=f"{quantization.calibrate}",
            action="Name a folder of images, add --precision int8 or int4, or leave it out.",
        )


def statistics_file(quantization: Quantization) -> Path | None:
    """The statistics that `calibrate` names: the file itself, or a bundle's."""
    path = quantization.calibrate
    if path is None:
        return None
    if path.suffix == Path(STATISTICS).suffix:
        return path
    return path / STATISTICS if (path / STATISTICS).is_file() else None


def find_samples(folders: Sequence[Path], quantization: Quantization) -> SampleFolder | None:
    if quantization.calibrate is not None and statistics_file(quantization) is None:
        return open_samples(quantization.calibrate)
    found = (folder / FOLDER for folder in folders if (folder / FOLDER).is_dir())
    return next(map(open_samples, found), None)


def check_precision(config: ModelConfig, targets: Sequence[str], precision: Precision) -> None:
    """Raise a UsageError for a precision that a target has no kernels for, or the model no range."""
    for name in targets:
        if precision not in TARGETS[name].precisions:
            raise UsageError(
                expected=f"{' or '.join(TARGETS[name].precisions)} for the target '{name}'",
                found=precision,
                action="Name another --precision, or export this target into a bundle of its own.",
            )
    has_fp16 = precision == "fp16" or (precision in QUANTIZED and set(targets) != {"cpu"})
    if has_fp16 and config.text.hidden_size >= GEMMA2_27B_WIDTH:
        raise UsageError(
            expected="a precision with the range of float32 for PaliGemma 2 28B",
            found=f"{precision}, which multiplies in fp16, in which Gemma 2 27B is known to go wrong",
            action="Export it with --precision fp32, or bf16 for TensorRT.",
        )
