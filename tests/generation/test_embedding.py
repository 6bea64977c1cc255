"""Rows of an integer table are what their scales make of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Embedding, File, write_manifest
from paliedge.errors import BundleError
from paliedge.generation.embedding import EmbeddingTable
from paliedge.model import SHIPPED_BUNDLE

pytestmark = pytest.mark.bare

ROWS_AT = [0, 7, 7, 1500]


def with_table(folder: Path, codes: npt.NDArray[Any], scales: npt.NDArray[Any] | None, **changes: object) -> Path:
    """The shipped bundle with another embedding table."""
    shutil.copytree(SHIPPED_BUNDLE, folder)
    files = {"table.weights": codes.tobytes()} | ({"table.scales": scales.tobytes()} if scales is not None else {})
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest = Bundle(SHIPPED_BUNDLE, check_hashes=False).manifest
    embedding = Embedding(
        file="table.weights",
        dtype=codes.dtype.name,
        rows=manifest.embedding.rows,
        scale=manifest.embedding.scale,
        row_scales="table.scales" if scales is not None else None,
    )
    embedding = msgspec.structs.replace(embedding, **changes)
    sizes = {name: File(size=len(content), sha256="0" * 64) for name, content in files.items()}
    write_manifest(folder, msgspec.structs.replace(manifest, embedding=embedding, files=manifest.files | sizes))
    return folder


@pytest.fixture
def codes() -> npt.NDArray[Any]:
    manifest = Bundle(SHIPPED_BUNDLE, check_hashes=False).manifest
    shape = (manifest.embedding.rows, manifest.model.text.hidden_size)
    return np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)


@pytest.mark.parametrize("zero", [0, 128])
def test_codes_are_multiples_of_their_rows_scale(zero: int, codes: npt.NDArray[Any], tmp_path: Path) -> None:
    """uint8 has its zero at 128."""
    scales = np.random.default_rng(1).uniform(1e-4, 1e-2, len(codes)).astype(np.float32)
    stored = (codes.astype(np.int16) + zero).astype(np.uint8 if zero else np.int8)
    bundle = Bundle(with_table(tmp_path / "b", stored, scales), check_hashes=False)
    found = EmbeddingTable(bundle)(ROWS_AT)
    wanted = codes[ROWS_AT].astype(np.float64) * scales[ROWS_AT, None] * bundle.manifest.embedding.scale
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("length", "changes", "words"),
    [
        (0, {}, "scales that do not go with it"),
        (-1, {}, "too small for"),
        (None, {"dtype": "float16"}, "scales that do not go with it"),
    ],
)
def test_a_table_without_its_scales_is_refused(
    length: int | None,
    changes: dict[str, object],
    words: str,
    codes: npt.NDArray[Any],
    tmp_path: Path,
) -> None:
    scales = np.ones(len(codes), np.float32)[: len(codes) if length is None else length]
    folder = with_table(tmp_path / "b", np.repeat(codes, 2, axis=1), scales if length != 0 else None, **changes)
    with pytest.raises(BundleError, match=words):
        Bundle(folder, check_hashes=False)
