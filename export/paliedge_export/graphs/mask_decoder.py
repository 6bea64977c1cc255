"""The mask decoder's graph: 16 segmentation codes -> a map of 64 x 64 values, positive inside the object.

PaliGemma's is published by big_vision as vae-oid.npz: the codebook `_vq_vae._embedding` [128, D] and a
decoder of convolutions in PyTorch's layout, whose numbers of channels are read from the file.

| tensors | layer |
|---|---|
| decoder.0 | 1x1 convolution of the 4x4 grid of codewords, then ReLU |
| decoder.2.net, decoder.3.net | residual blocks: convolutions .0 (3x3), .2 (3x3), .4 (1x1) with ReLU between |
| decoder.4, .6, .8, .10 | transposed convolutions, 4x4, stride 2, each with ReLU behind it |
| decoder.12 | 1x1 convolution to one channel |
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from paliedge.bundle.manifest import CODES_PER_MASK, MASK_SIZE
from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.safetensors_reader import Array
from paliedge_export.graphs.builder import GraphBuilder
from paliedge_export.weights.files import WeightFile

NAMES = ("mask_decoder.safetensors", "vae-oid.safetensors", "vae-oid.npz")
"""What a mask decoder is called beside a checkpoint."""
CODEBOOK = "_vq_vae._embedding"
GRID = 4
_RESIDUALS = ("decoder.2.net", "decoder.3.net")
_TRANSPOSED = ("decoder.4", "decoder.6", "decoder.8", "decoder.10")
_LAST = "decoder.12"
_ACTION = "Name big_vision's vae-oid.npz, or a .safetensors with the same tensors, with --mask-decoder."


def find_mask_decoder(folder: Path) -> Path | None:
    """The mask decoder that lies beside a checkpoint."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def load_mask_decoder(path: Path, num_codes: int) -> dict[str, Array]:
    """Its tensors in float32; the file's others, such as an encoder's, are left alone.

    Raises:
        CheckpointError: the file cannot be read, a tensor is missing or has a shape that fits no other.
    """
    try:
        tensors = _read(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise CheckpointError(
            expected=f"a mask decoder in {path}",
            found=(str(error) or type(error).__name__).splitlines()[0],
            action=_ACTION,
        ) from error
    if CODEBOOK not in tensors or tensors[CODEBOOK].ndim != 2 or len(tensors[CODEBOOK]) != num_codes:
        found = tensors[CODEBOOK].shape if CODEBOOK in tensors else "none"
        raise CheckpointError(
            expected=f"a codebook '{CODEBOOK}' of {num_codes} rows in {path}", found=f"{found}", action=_ACTION
        )
    for name, shape in _shapes(tensors).items():
        if name not in tensors or tensors[name].shape != shape:
            raise CheckpointError(
                expected=f"'{name}' of shape {list(shape)} in {path}",
                found=f"{list(tensors[name].shape)}" if name in tensors else "no such tensor",
                action=_ACTION,
            )
        if not np.isfinite(tensors[name]).all():
            raise CheckpointError(
                expected=f"finite numbers in '{name}' of {path}", found="infinities or NaN", action=_ACTION
            )
    return tensors


def _read(path: Path) -> dict[str, Array]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            tensors = {name: archive[name] for name in archive.files if _is_ours(name)}
    else:
        tensors = {name: array for name, array in load_file(path).items() if _is_ours(name)}
    return {name: np.asarray(array, np.float32) for name, array in tensors.items()}


def _is_ours(name: str) -> bool:
    return name == CODEBOOK or name.startswith("decoder.")


def _shapes(tensors: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """What each tensor's shape must be, where a layer's width is that of its own bias."""

    def width(name: str) -> int:
        return tensors[f"{name}.bias"].size if f"{name}.bias" in tensors else 0

    shapes: dict[str, tuple[int, ...]] = {CODEBOOK: tensors[CODEBOOK].shape}

    def expect(name: str, weight: tuple[int, ...], wide: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, (wide,)

    channels = width("decoder.0")
    expect("decoder.0", (channels, tensors[CODEBOOK].shape[1], 1, 1), channels)
    for block in _RESIDUALS:
        for index, kernel in ((0, 3), (2, 3), (4, 1)):
            expect(f"{block}.{index}", (channels, channels, kernel, kernel), channels)
    for name in _TRANSPOSED:
        wide = width(name)
        expect(name, (channels, wide, 4, 4), wide)
        channels = wide
    expect(_LAST, (1, channels, 1, 1), 1)
    return shapes


def write_mask_weights(file: WeightFile, tensors: Mapping[str, Array]) -> None:
    """All tensors as they are, in float32: the whole decoder is a few megabytes."""
    for name in _shapes(tensors):
        file.add(name, tensors[name])


def add_mask_decoder(graph: GraphBuilder, dim: int) -> None:
    """mask_codes [B, 16] int64, row by row -> masks [B, 64, 64] float32; `dim` is that of a codeword."""

    def convolve(x: str, name: str, kernel: int) -> str:
        pads = [kernel // 2] * 4
        weights = graph.weight(f"{name}.weight"), graph.weight(f"{name}.bias")
        return graph.op("Conv", x, *weights, kernel_shape=[kernel, kernel], pads=pads)

    codes = graph.input("mask_codes", np.int64, ("batch", CODES_PER_MASK))
    words = graph.op("Gather", graph.weight(CODEBOOK), codes, axis=0)
    x = graph.op("Reshape", graph.op("Transpose", words, perm=[0, 2, 1]), graph.ints(-1, dim, GRID, GRID))
    x = graph.op("Relu", convolve(x, "decoder.0", 1))
    for block in _RESIDUALS:
        inner = graph.op("Relu", convolve(x, f"{block}.0", 3))
        inner = graph.op("Relu", convolve(inner, f"{block}.2", 3))
        x = graph.op("Add", x, convolve(inner, f"{block}.4", 1))
    for name in _TRANSPOSED:
        weights = graph.weight(f"{name}.weight"), graph.weight(f"{name}.bias")
        x = graph.op("ConvTranspose", x, *weights, kernel_shape=[4, 4], strides=[2, 2], pads=[1, 1, 1, 1])
        x = graph.op("Relu", x)
    x = graph.op("Reshape", convolve(x, _LAST, 1), graph.ints(-1, MASK_SIZE, MASK_SIZE))
    graph.output(x, "masks", np.float32, ("batch", MASK_SIZE, MASK_SIZE))
