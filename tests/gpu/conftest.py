"""Checkpoints and bundles for the tests that need an NVIDIA GPU, and the JSON of what ran."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import describe_machine
from paliedge.backends.cuda import GpuInfo, gpu_info
from tests.paths import ROOT, SHAPES_CHECKPOINT
from tests.tiny import make_tiny

RESULTS = ROOT / "benchmarks" / "results"
Record = dict[str, Any]


@pytest.fixture(scope="session")
def gpu() -> GpuInfo:
    """The GPU; without one every test here fails, as it must: `make test-gpu` was asked for."""
    return gpu_info()


@pytest.fixture(scope="session", params=["shapes", "paligemma", "paligemma2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "shapes":
        return SHAPES_CHECKPOINT
    folder: Path = tmp_path_factory.mktemp(request.param) / request.param
    make_tiny(folder, request.param, num_kv_heads=2 if request.param == "paligemma2" else 1)
    return folder


@pytest.fixture(scope="session")
def record(gpu: GpuInfo) -> Iterator[list[Record]]:
    """Each test adds what it ran; all of it is written at the end, a file a GPU."""
    runs: list[Record] = []
    yield runs
    machine = describe_machine() | {"gpu": gpu.name, "compute_capability": gpu.compute_capability}
    path = RESULTS / f"gpu_{gpu.name.lower().replace(' ', '_')}.json"
    path.write_text(json.dumps({"machine": machine, "runs": runs}, indent=2) + "\n")
    assert any("check" in run for run in runs), "no backend ran here"
