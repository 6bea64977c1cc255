"""What engines of Gemma-2B's width really do, by the lists of their layers that TensorRT for RTX prints.

Each rule is held for the profiles that are built, and broken by the ones that were built once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from paliedge.backends.trt import profiles
from paliedge.backends.trt.build import build_engine
from paliedge.backends.trt.profiles import MAX_ROWS, decoder_profiles
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.layer_list import LayerList, read_layer_list
from paliedge.bundle.manifest import Manifest, Range
from paliedge.planning.traffic import (
    Step,
    cache_copies,
    expanded_weights,
    moved_bytes,
    needed_bytes,
    num_attentions,
    padding_copies,
)
from paliedge_export.checkpoint.config import read_config
from paliedge_export.exporter import export_bundle
from paliedge_export.options import Quantization
from paliedge_export.weights.activations import Statistics
from paliedge_export.weights.files import QUANTIZED
from paliedge_export.weights.linears import linears
from tests.tiny import make_tiny

NUM_LAYERS = 2
SHAPE = {"hidden_size": 2048, "intermediate_size": 16384, "num_heads": 8, "head_dim": 256, "num_layers": NUM_LAYERS}
LARGEST = {"fp16": 1.02, "int8": 0.55, "int4": 0.32}
"""A plan's size over fp16's weights: a builder that multiplied integers out would give 1."""
Profiles = tuple[dict[str, Range], ...]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of Gemma-2B's shape, in bfloat16, and statistics of inputs that are all alike."""
    folder = tmp_path_factory.mktemp("gemma_2b_layers")
    make_tiny(folder, "paligemma", dtype=torch.bfloat16, **SHAPE)  # type: ignore[arg-type]
    statistics = Statistics("inputs that are all alike")
    for linear in linears(read_config(folder)):
        ones = np.ones(linear.width, np.float32)
        statistics.add(linear.name, 4 * ones, ones, 1)
    statistics.save(folder / "calibration.safetensors")
    return folder


@pytest.fixture(scope="module")
def bundle_of(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    made: dict[tuple[str, str], Bundle] = {}

    def find(target: str, precision: str) -> Bundle:
        if (target, precision) not in made:
            folder = tmp_path_factory.mktemp("bundle") / "b"
            statistics = checkpoint / "calibration.safetensors" if precision in QUANTIZED else None
            export_bundle(
                str(checkpoint),
                folder,
                targets=[target],
                precision=precision,  # type: ignore[arg-type]
                quantization=Quantization(statistics, smooth=False),
                compare=False,
            )
            made[target, precision] = Bundle(folder, check_hashes=False)
        return made[target, precision]

    return find


def list_layers(bundle: Bundle) -> tuple[LayerList, int]:
    """Of the decoder, as TensorRT for RTX builds it, and the plan's size."""
    engine = build_engine(bundle.folder, "rtx", force=True)
    built = Bundle(bundle.folder, check_hashes=False)
    plan = engine.decoder.file
    return read_layer_list(built.path(built.manifest.layer_lists[plan])), built.manifest.files[plan].size


def file_bytes(bundle: Bundle, target: str) -> int:
    """Of the decoder's weights on disk."""
    return sum(bundle.manifest.files[name].size for name in bundle.manifest.targets[target].decoder.weights)


def step(bundle: Bundle, rows: int) -> Step:
    return Step(rows=rows, tokens=1, capacity=bundle.manifest.limits.capacity, heads=SHAPE["num_heads"])


@pytest.mark.parametrize(
    ("target", "precision"),
    [("jetpack6", "fp16"), ("jetpack6", "int8"), ("jetpack7", "int8"), ("jetpack7", "int4")],
)
def test_a_token_moves_little_more_than_it_must(
    target: str, precision: str, bundle_of: Callable[[str, str], Bundle]
) -> None:
    bundle = bundle_of(target, precision)
    found, plan_size = list_layers(bundle)
    layers = found.of(0)
    assert expanded_weights(layers, step(bundle, 1)) == []
    assert padding_copies(layers) == []
    assert num_attentions(layers) == NUM_LAYERS
    # without an operator that writes into the cache, a layer's keys and values are copied behind one another
    assert len(cache_copies(layers, step(bundle, 1))) == (NUM_LAYERS if target == "jetpack6" else 0)
    for rows in (1, MAX_ROWS):
        assert moved_bytes(layers, step(bundle, rows)) < 1.05 * needed_bytes(layers, step(bundle, rows))
    assert found.weight_bytes < 1.02 * file_bytes(bundle, target), "both profiles share them"
    assert found.scratch_bytes[0] < 20e6
    assert plan_size <= LARGEST[precision] * file_bytes(bundle_of("jetpack6", "fp16"), "jetpack6")


def with_one_row(manifest: Manifest, target: str) -> Profiles:
    """As they were: one row everywhere, and room for a second token where one is decoded."""
    decode, prefill = (
        {name: Range(*((1, *shape[1:]) for shape in (one.min, one.opt, one.max))) for name, one in profile.items()}
        for profile in decoder_profiles(manifest, target)
    )
    for name in ("inputs_embeds", "position_ids"):
        largest = decode[name].max
        decode[name] = Range(decode[name].min, decode[name].opt, (1, 2, *largest[2:]))
    return decode, prefill


def of_single_points(manifest: Manifest, target: str) -> Profiles:
    decode, prefill = decoder_profiles(manifest, target)
    return {name: Range(shape.min, shape.min, shape.min) for name, shape in decode.items()}, prefill


def test_profiles_of_one_row_break_the_rules(
    bundle_of: Callable[[str, str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is multiplied out and the caches are copied for every head: what the rules are there for."""
    monkeypatch.setattr(profiles, "decoder_profiles", with_one_row)
    bundle = bundle_of("jetpack7", "int8")
    layers = list_layers(bundle)[0].of(0)
    (expanded,) = expanded_weights(layers, step(bundle, 1))
    assert "Int8" in {tensor.dtype for tensor in expanded.constants}
    assert len(cache_copies(layers, step(bundle, 1))) == 2 * NUM_LAYERS
    assert moved_bytes(layers, step(bundle, 1)) > 1.1 * needed_bytes(layers, step(bundle, 1))


def test_and_those_of_jetpack6_pad_and_write_attention_out(
    bundle_of: Callable[[str, str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "decoder_profiles", with_one_row)
    layers = list_layers(bundle_of("jetpack6", "fp16"))[0].of(0)
    assert len(padding_copies(layers)) >= NUM_LAYERS
    assert num_attentions(layers) == 0


def test_a_profile_of_single_points_doubles_the_weights(
    bundle_of: Callable[[str, str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "decoder_profiles", of_single_points)
    bundle = bundle_of("jetpack7", "int8")
    found, plan_size = list_layers(bundle)
    assert found.weight_bytes > 1.5 * file_bytes(bundle, "jetpack7")
    assert plan_size > 1.5 * file_bytes(bundle, "jetpack7")
