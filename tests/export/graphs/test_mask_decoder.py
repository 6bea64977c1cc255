"""The mask decoder from its published layout to masks in an answer."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from benchmarks.shapes.codebook import Codebook, save_decoder
from paliedge.backends.ort import OrtSession
from paliedge.bundle.bundle import Bundle
from paliedge.errors import CheckpointError
from paliedge_export.exporter import export_bundle
from paliedge_export.graphs.mask_decoder import find_mask_decoder, load_mask_decoder
from tests.masks import PUBLISHED, decode_masks, random_mask_decoder
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny(folder, "paligemma")
    return folder


def export(checkpoint: Path, output: Path, file: Path | None = None) -> OrtSession:
    export_bundle(str(checkpoint), output, mask_decoder=file, compare=False)
    return OrtSession(Bundle(output), num_threads=1)


@pytest.mark.parametrize("layout", [{}, PUBLISHED], ids=["narrow", "published"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_the_graph_computes_what_the_layers_say(
    layout: dict[str, Any], suffix: str, checkpoint: Path, tmp_path: Path
) -> None:
    tensors = random_mask_decoder(3, **layout)
    others = {"encoder.0.weight": np.zeros((2, 2), np.float32)}  # the published file has its encoder, too
    file = tmp_path / f"masks{suffix}"
    if suffix == ".npz":
        np.savez(file, **tensors, **others)  # type: ignore[arg-type]
    else:
        save_file(tensors | others, file)
    session = export(checkpoint, tmp_path / "bundle", file)
    codes = np.random.default_rng(5).integers(0, 128, (3, 16))
    expected = decode_masks(tensors, codes)
    np.testing.assert_allclose(session.decode_masks(codes), expected, atol=1e-5 * np.abs(expected).max())


def test_the_reference_agrees_with_torch() -> None:
    torch.manual_seed(1)
    model = Codebook(width=16, dim=24)
    tensors = {name: value.numpy() for name, value in model.state_dict().items() if name.startswith("decoder.")}
    codes = torch.randint(0, 128, (2, 16))
    with torch.no_grad():
        expected = model.decode(codes)[:, 0].numpy()
    found = decode_masks(tensors | {"_vq_vae._embedding": model.embedding.numpy()}, codes.numpy())
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_training_saves_is_found_beside_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    save_decoder(Codebook(), checkpoint / "mask_decoder.safetensors")
    try:
        assert find_mask_decoder(checkpoint) == checkpoint / "mask_decoder.safetensors"
        session = export(checkpoint, tmp_path / "bundle")
        assert session.has_mask_decoder
        assert session.decode_masks(np.zeros((1, 16), np.int64)).shape == (1, 64, 64)
    finally:
        (checkpoint / "mask_decoder.safetensors").unlink()


def test_without_a_mask_decoder_a_bundle_has_none(checkpoint: Path, tmp_path: Path) -> None:
    assert not export(checkpoint, tmp_path / "bundle").has_mask_decoder


def broken(tensors: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    changed = dict(tensors)
    if value is None:
        del changed[name]
    else:
        changed[name] = value
    return changed


GOOD = random_mask_decoder()
BROKEN = {
    "no-codebook": broken(GOOD, "_vq_vae._embedding", None),
    "127-codes": broken(GOOD, "_vq_vae._embedding", GOOD["_vq_vae._embedding"][:127]),
    "no-last-layer": broken(GOOD, "decoder.12.weight", None),
    "another-kernel": broken(GOOD, "decoder.6.weight", np.zeros((16, 8, 3, 3), np.float32)),
    "channels-that-do-not-fit": broken(GOOD, "decoder.2.net.0.weight", np.zeros((8, 8, 3, 3), np.float32)),
    "no-number": broken(GOOD, "decoder.0.bias", np.full(16, np.nan, np.float32)),
}


@pytest.mark.parametrize("tensors", BROKEN.values(), ids=BROKEN)
def test_a_mask_decoder_that_cannot_be_one_is_refused(tensors: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "masks.npz", **tensors)
    with pytest.raises(CheckpointError, match="--mask-decoder"):
        load_mask_decoder(tmp_path / "masks.npz", 128)


def test_a_file_that_is_no_archive_or_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with (
        zipfile.ZipFile(tmp_path / "pickle.npz", "w") as archive,
        archive.open("_vq_vae._embedding.npy", "w") as stream,
    ):
        header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
        np.lib.format.write_array_header_1_0(stream, header)  # objects: whoever reads them runs code
    for name in ("text.npz", "text.safetensors", "pickle.npz", "absent.npz"):
        with pytest.raises(CheckpointError, match=name):
            load_mask_decoder(tmp_path / name, 128)
