"""One tiny checkpoint and bundle of each family for all tests of the exporter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PaliGemmaForConditionalGeneration

from paliedge_export.exporter import export_bundle
from tests.tiny import make_tiny


@dataclass(frozen=True)
class Tiny:
    """A checkpoint, the model it holds and its fp32 bundle. Read only."""

    checkpoint: Path
    model: PaliGemmaForConditionalGeneration
    bundle: Path


def _make(folder: Path, family: str) -> Tiny:
    model = make_tiny(folder / "checkpoint", family)
    export_bundle(str(folder / "checkpoint"), folder / "bundle", compare=False)
    return Tiny(folder / "checkpoint", model, folder / "bundle")


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
