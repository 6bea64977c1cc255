"""Smoothing changes what a model's integers cost, not what the model computes.

The checkpoints have loud channels, as trained models do: some are 30 times as large as others, and
what reads them is as much smaller; one is never used. float32 graphs are written of the checkpoint
and of the smoothed one, and answer the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import PaliGemmaForConditionalGeneration

from paliedge.bundle.manifest import Limits, Precision, Prompts
from paliedge_export.checkpoint.config import ModelConfig, read_config
from paliedge_export.checkpoint.metadata import read_preprocess
from paliedge_export.checkpoint.safetensors_reader import Checkpoint
from paliedge_export.checkpoint.tokenizer import read_tokenizer
from paliedge_export.gate.runner import ReferenceRun, Runner, collect_statistics
from paliedge_export.weights.activations import InputStatistics, Statistics
from paliedge_export.weights.files import Encoding, Tensors, quantized_bits
from paliedge_export.weights.linears import linears
from paliedge_export.weights.samples import builtin_samples
from paliedge_export.weights.smoothing import Smoothing, smooth, unsmoothed
from paliedge_export.writer import ModelSource, write_all_weights, write_bundle
from tests.tiny import make_tiny

Array = npt.NDArray[Any]
LOUD = 30.0
NUM_HEADS, HEAD_DIM = 4, 16
LAYOUTS: dict[str, tuple[str, int]] = {
    "paligemma": ("paligemma", 1),
    "paligemma2": ("paligemma2", 1),
    "paligemma2-grouped-query": ("paligemma2", 2),
}


@dataclass(frozen=True)
class Loud:
    """A checkpoint with loud channels, what its fp32 graphs answer, and what enters their linear layers."""

    folder: Path
    config: ModelConfig
    checkpoint: Checkpoint
    answers: ReferenceRun
    statistics: Statistics
    smoothed: dict[Precision, Smooth] = field(default_factory=dict)


@dataclass(frozen=True)
class Smooth:
    """The same smoothed for `precision`."""

    before: Loud
    precision: Precision
    smoothing: Smoothing
    answers: ReferenceRun
    statistics: Statistics


def make_loud(model: PaliGemmaForConditionalGeneration) -> None:
    """Scale a tenth of the channels before each linear layer up and its weights down, so that nothing else changes."""
    generator = torch.Generator().manual_seed(0)

    def draw(size: int, readers: Sequence[torch.nn.Linear], shares: int = 1) -> torch.Tensor:
        """What to multiply `size` channels by; `readers` have each `shares` times, heads of a group side by side."""
        scales = torch.ones(size)
        scales[torch.randperm(size - 1, generator=generator)[: size // 10]] = LOUD
        for reader in readers:
            reader.weight /= scales.reshape(-1, 1, HEAD_DIM).expand(-1, shares, -1).reshape(-1)
        scales[-1] = 0
        return scales

    with torch.no_grad():
        for layer in model.model.vision_tower.encoder.layers:
            attention = layer.self_attn
            for made, readers in (
                (layer.layer_norm1, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.layer_norm2, (layer.mlp.fc1,)),
                (attention.v_proj, (attention.out_proj,)),
            ):
                scales = draw(len(made.bias), readers)
                made.bias *= scales
                made.weight *= scales.reshape(-1, *[1] * (made.weight.ndim - 1))
        for layer in model.model.language_model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            before = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
            for norm, fused in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (before, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight.copy_((1 + norm.weight) * draw(len(norm.weight), fused) - 1)
            shares = NUM_HEADS * HEAD_DIM // len(attention.v_proj.weight)
            attention.v_proj.weight *= draw(len(attention.v_proj.weight), (attention.o_proj,), shares)[:, None]
            mlp.up_proj.weight *= draw(len(mlp.up_proj.weight), (mlp.down_proj,))[:, None]


def answer(
    checkpoint: Path, tensors: Tensors, folder: Path, forced: ReferenceRun | None
) -> tuple[ReferenceRun, Statistics]:
    """Answers of fp32 graphs of `tensors`, written to `folder`, and the statistics of their layers."""
    config, limits = read_config(checkpoint), Limits(prefix=64, new_tokens=32)
    source = ModelSource(
        "loud",
        checkpoint,
        config,
        read_tokenizer([checkpoint]).tokens,
        limits,
        read_tokenizer([checkpoint]).content,
        None,
        None,
        Prompts(),
        read_preprocess(checkpoint, config.vision.image_size),
    )
    folder.mkdir()
    encoding = Encoding("fp32")
    stored = write_all_weights(folder, source, tensors, ("cpu",), encoding)
    write_bundle(folder, source, stored, ("cpu",), encoding)
    statistics = Statistics("here")
    watch = collect_statistics(statistics, {linear.name for linear in linears(config)})
    runner = Runner(folder, "cpu", statistics=True)
    samples = [replace(sample, prompts=sample.prompts[:2]) for sample in builtin_samples()]
    return runner.answer(samples, "these graphs", forced, watch), statistics


@pytest.fixture(scope="module", params=LAYOUTS)
def loud(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loud:
    family, num_kv_heads = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("loud")
    model = make_tiny(folder, family, num_heads=NUM_HEADS, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM)
    make_loud(model)
    model.save_pretrained(folder)
    config = read_config(folder)
    checkpoint = Checkpoint(folder, config)
    return Loud(folder, config, checkpoint, *answer(folder, checkpoint, folder / "bundle", None))


@pytest.fixture(params=["int8", "int4"])
def smoothed(loud: Loud, request: pytest.FixtureRequest) -> Smooth:
    """Made once for each checkpoint."""
    precision: Precision = request.param
    if precision not in loud.smoothed:
        smoothing = smooth(
            loud.checkpoint,
            loud.config,
            loud.statistics,
            lambda linear: quantized_bits(precision, linear.name, linear.width),
        )
        found = answer(loud.folder, smoothing.tensors, loud.folder / precision, loud.answers)
        loud.smoothed[precision] = Smooth(loud, precision, smoothing, *found)
    return loud.smoothed[precision]


def assert_near(found: Array, wanted: Array) -> None:
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_a_smoothed_checkpoint_computes_what_the_checkpoint_does(smoothed: Smooth) -> None:
    before, after = smoothed.before.answers, smoothed.answers
    assert len({tuple(one.tokens) for row in before.answers for one in row}) > 2
    for wanted, found in zip(before.features, after.features, strict=True):
        assert_near(found, wanted)
    for wanted_row, found_row in zip(before.answers, after.answers, strict=True):
        for a, b in zip(wanted_row, found_row, strict=True):
            assert_near(b.hidden, a.hidden)
            assert b.tokens == a.tokens


def test_the_inputs_of_smoothed_layers_are_known_without_calibrating_again(smoothed: Smooth) -> None:
    assert smoothed.smoothing.inputs.keys() == smoothed.statistics.inputs.keys()
    for name, found in smoothed.statistics.inputs.items():
        known = smoothed.smoothing.inputs[name]
        assert known.rows == found.rows
        for part in ("absmax", "mean_square"):
            np.testing.assert_allclose(getattr(known, part), getattr(found, part), rtol=1e-3, err_msg=name)


def test_layers_with_loud_channels_are_smoothed_but_for_those_behind_a_gelu(smoothed: Smooth) -> None:
    strengths = smoothed.smoothing.strengths
    assert strengths.keys() == smoothed.statistics.inputs.keys()
    scaled = [name for name, strength in strengths.items() if strength > 0]
    assert {name.split(".")[-1] for name in scaled} == {
        *("qkv_proj", "out_proj", "fc1"),
        *("o_proj", "gate_proj", "down_proj"),
    }
    assert len(scaled) >= len(strengths) / 2


def test_a_channel_that_is_never_used_is_left_alone(smoothed: Smooth) -> None:
    for linear in linears(smoothed.before.config):
        if linear.name.endswith(("fc1", "o_proj")):  # whose rows make no other layer's input
            (name,) = linear.weights
            before, after = smoothed.before.checkpoint[name], smoothed.smoothing.tensors[name]
            assert not np.array_equal(after[:, :-1], before[:, :-1])
            np.testing.assert_array_equal(after[:, -1], before[:, -1])


def integer_error(x: Array, weight: Array, bits: int) -> float:
    """Mean relative square of the error of x @ weight.T, the weight [N, K] plainly rounded; with 8 bits `x` too."""
    wanted = x @ weight.T
    blocks = weight.reshape(len(weight), 1 if bits == 8 else -1, weight.shape[1] if bits == 8 else 16)
    steps = np.abs(blocks).max(2, keepdims=True) / (2 ** (bits - 1) - 1)
    rounded = (np.rint(blocks / steps) * steps).reshape(weight.shape)
    if bits == 8:
        step = np.abs(x).max() / 127
        x = np.rint(x / step) * step
    return float((((x @ rounded.T - wanted) ** 2).mean(0) / (wanted**2).mean(0)).mean())


def test_integers_of_the_smoothed_layers_are_nearer_to_the_floats(smoothed: Smooth) -> None:
    """On inputs of the sizes that were measured; the change of their size says by what they were divided."""
    rng = np.random.default_rng(0)
    shares = []
    for linear in linears(smoothed.before.config):
        before = smoothed.before.statistics.inputs[linear.name].mean_square
        after = smoothed.smoothing.inputs[linear.name].mean_square
        divisors = np.sqrt(np.divide(before, after, where=before > 0, out=np.ones_like(before)))
        x = rng.normal(0, 1, (64, linear.width)) * np.sqrt(before)
        old, new = (
            np.concatenate([tensors[name] for name in linear.weights]).astype(np.float64)
            for tensors in (smoothed.before.checkpoint, smoothed.smoothing.tensors)
        )
        used = np.abs(old).max(1) > 0
        bits = quantized_bits(smoothed.precision, linear.name, linear.width)
        if linear.producers:
            shares.append(integer_error(x / divisors, new[used], bits) / integer_error(x, old[used], bits))
    assert max(shares) < {"int8": 0.05, "int4": 0.5}[smoothed.precision]


def test_4_bit_layers_whose_channels_are_nearly_alike_keep_the_grid_that_they_may_be_trained_in(loud: Loud) -> None:
    rng = np.random.default_rng(0)
    alike = Statistics("drawn")
    for linear in linears(loud.config):
        sizes = rng.uniform(0.98, 1.02, linear.width).astype(np.float32)
        alike.inputs[linear.name] = InputStatistics(3 * np.sqrt(sizes), sizes, 100)
    assert set(smooth(loud.checkpoint, loud.config, alike, lambda _: 4).strengths.values()) == {0}


def test_unsmoothed_leaves_everything_as_it_is(loud: Loud) -> None:
    smoothing = unsmoothed(loud.checkpoint, loud.statistics)
    assert smoothing.tensors is loud.checkpoint
    assert smoothing.inputs == loud.statistics.inputs
    assert smoothing.strengths == {linear.name: 0 for linear in linears(loud.config)}
