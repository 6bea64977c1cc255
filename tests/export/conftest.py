"""One tiny checkpoint and bundle of each family for all tests of the exporter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from paliedge_export.checkpoint.config import read_config
from paliedge_export.exporter import export_bundle
from paliedge_export.gate.runner import Runner, collect_statistics
from paliedge_export.options import Quantization
from paliedge_export.weights.activations import Statistics
from paliedge_export.weights.files import QUANTIZED
from paliedge_export.weights.linears import linears
from paliedge_export.weights.samples import builtin_samples

if TYPE_CHECKING:
    from transformers import PaliGemmaForConditionalGeneration


@dataclass(frozen=True)
class Tiny:
    """A checkpoint, the model it holds, its fp32 bundle and what its layers' inputs are like. Read only."""

    checkpoint: Path
    model: PaliGemmaForConditionalGeneration
    bundle: Path
    statistics: Path

    def calibrated(self, precision: str) -> Quantization:
        """What an export in this precision wants."""
        return Quantization(self.statistics if precision in QUANTIZED else None)


def _make(folder: Path, family: str) -> Tiny:
    from tests.tiny import make_tiny

    model = make_tiny(folder / "checkpoint", family)
    export_bundle(str(folder / "checkpoint"), folder / "bundle", compare=False)
    statistics = Statistics("drawn pictures")
    runner = Runner(folder / "bundle", "cpu", statistics=True)
    names = {linear.name for linear in linears(read_config(folder / "checkpoint"))}
    runner.answer(builtin_samples(), "fp32", watch=collect_statistics(statistics, names))
    statistics.save(folder / "calibration.safetensors")
    return Tiny(folder / "checkpoint", model, folder / "bundle", folder / "calibration.safetensors")


@pytest.fixture(scope="session")
def paligemma(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return _make(tmp_path_factory.mktemp("paligemma"), "paligemma")


@pytest.fixture(scope="session")
def paligemma2(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return _make(tmp_path_factory.mktemp("paligemma2"), "paligemma2")


@pytest.fixture(params=["paligemma", "paligemma2"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    chosen: Tiny = request.getfixturevalue(request.param)
    return chosen
