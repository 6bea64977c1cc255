"""What `paliedge export` is told on the command line is what the exporter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Manifest
from paliedge.cli import main
from paliedge_export.exporter import export_bundle
from tests.export.checkpoint.test_lora import adapt
from tests.masks import random_mask_decoder
from tests.tiny import make_tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for a name that goes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, an adapter and a mask decoder."""
    folder = tmp_path_factory.mktemp("options")
    make_tiny(folder / "checkpoint", "paligemma")
    adapt(folder / "checkpoint", folder / "adapter", {"r": 2, "target_modules": ["q_proj"]})
    np.savez(folder / "masks.npz", **random_mask_decoder())  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Manifest:
    return export_bundle(str(folder / "checkpoint"), folder / "plain", compare=False)


@pytest.mark.parametrize(
    ("option", "value", "keyword"),
    [
        ("--lora", "adapter", {"adapters": ("adapter",)}),
        ("--prompts", "docvqa", {"prompts": "docvqa"}),
        ("--max-images", "3", {"max_images": 3}),
        ("--mask-decoder", "masks.npz", {"mask_decoder": Path("masks.npz")}),
    ],
    ids=["lora", "prompts", "max-images", "mask-decoder"],
)
def test_an_option_makes_the_bundle_that_its_keyword_makes(
    option: str,
    value: str,
    keyword: dict[str, Any],
    folder: Path,
    plain: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    expected = export_bundle("checkpoint", tmp_path / "expected", compare=False, **keyword)
    command = ["export", "checkpoint", "-o", str(tmp_path / "found"), "--no-compare", option, value]
    assert CliRunner().invoke(main, command).exit_code == 0
    assert Bundle(tmp_path / "found").manifest == expected != plain
