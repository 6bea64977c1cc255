"""TensorRT for RTX parses and builds every TensorRT-bound graph, on this machine, without a GPU.

Its parser and compiler are of TensorRT 11's generation: what it takes is legal ONNX for TensorRT,
strongly typed, with caches that it can update in place. Whether an older TensorRT takes the same is
the operator lists' matter.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from paliedge.backends.trt import build as building
from paliedge.backends.trt.build import build_engine
from paliedge.backends.trt.flavours import ANY_GPU, load_flavour
from paliedge.backends.trt.match import PARTS, parts_of
from paliedge.backends.trt.profiles import design_engine
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Engine
from paliedge.errors import BuildError
from paliedge_export.checkpoint.config import read_config
from paliedge_export.exporter import export_bundle
from paliedge_export.options import Quantization
from paliedge_export.weights.activations import Statistics
from paliedge_export.weights.files import QUANTIZED
from paliedge_export.weights.linears import linears
from tests.export.conftest import Tiny
from tests.masks import PUBLISHED, random_mask_decoder
from tests.paths import SHAPES_CHECKPOINT
from tests.tiny import make_tiny

TARGETS = ("jetpack6", "jetpack7")
"""rtx has jetpack7's graphs, which test_parity holds."""


def build(
    checkpoint: Path, folder: Path, target: str, precision: str, quantization: Quantization | None = None
) -> tuple[Bundle, Engine]:
    export_bundle(
        str(checkpoint),
        folder,
        targets=[target],
        precision=precision,  # type: ignore[arg-type]
        quantization=quantization or Quantization(),
        compare=False,
    )
    engine = build_engine(folder, "rtx")
    return Bundle(folder), engine


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("target", TARGETS)
def test_tiny_graphs_are_built(target: str, precision: str, tiny: Tiny, tmp_path: Path) -> None:
    bundle, engine = build(tiny.checkpoint, tmp_path / "bundle", target, precision, tiny.calibrated(precision))
    assert bundle.manifest.engines == (engine,)
    assert (engine.target, engine.precision) == (target, precision)
    for plan in (engine.vision_encoder, engine.decoder):
        assert bundle.path(plan.file).read_bytes()[:1] != b""


@pytest.mark.parametrize("target", TARGETS)
def test_shapes_graphs_are_built(target: str, tmp_path: Path) -> None:
    bundle, engine = build(SHAPES_CHECKPOINT, tmp_path / "bundle", target, "fp16")
    assert bundle.manifest.files[engine.decoder.file].size > 1_000_000
    assert engine.mask_decoder is not None


def test_a_mask_decoder_of_the_published_size_is_built(tiny: Tiny, tmp_path: Path) -> None:
    np.savez(tmp_path / "vae-oid.npz", **random_mask_decoder(**PUBLISHED))  # type: ignore[arg-type]
    export_bundle(
        str(tiny.checkpoint),
        tmp_path / "bundle",
        targets=["jetpack6"],
        mask_decoder=tmp_path / "vae-oid.npz",
        compare=False,
    )
    bundle = Bundle(tmp_path / "bundle")
    trt = load_flavour("rtx")
    engine = design_engine(bundle.manifest, trt, "jetpack6", ANY_GPU, "any")
    assert parts_of(engine) == list(PARTS)
    building.run_order(
        "mask_decoder",
        building.make_order(bundle, engine, "mask_decoder", tmp_path, building.SMALLEST_WORKSPACE),
        lambda part, progress: None,
    )
    assert (tmp_path / "mask_decoder.plan").stat().st_size > 2_000_000


@pytest.fixture(scope="module")
def gemma_2b_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of Gemma-2B's shape, in bfloat16, and statistics of inputs that are all alike."""
    folder = tmp_path_factory.mktemp("gemma_2b_layer")
    shape = {"hidden_size": 2048, "intermediate_size": 16384, "num_heads": 8, "head_dim": 256, "num_layers": 1}
    make_tiny(folder, "paligemma", dtype=torch.bfloat16, **shape)  # type: ignore[arg-type]
    statistics = Statistics("inputs that are all alike")
    for linear in linears(read_config(folder)):
        ones = np.ones(linear.width, np.float32)
        statistics.add(linear.name, 4 * ones, ones, 1)
    statistics.save(folder / "calibration.safetensors")
    return folder


@pytest.fixture(scope="module")
def fp16_engine_size(gemma_2b_layer: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    return decoder_size(gemma_2b_layer, tmp_path_factory.mktemp("fp16"), "jetpack6", "fp16")


def decoder_size(checkpoint: Path, work: Path, target: str, precision: str) -> int:
    statistics = checkpoint / "calibration.safetensors" if precision in QUANTIZED else None
    quantization = Quantization(statistics, smooth=False)
    bundle, engine = build(checkpoint, work / "bundle", target, precision, quantization)
    return bundle.manifest.files[engine.decoder.file].size


@pytest.mark.parametrize(
    ("precision", "target", "largest"),
    [("int8", "jetpack6", 0.55), ("int4", "jetpack6", 0.32), ("int4", "jetpack7", 0.32)],
)
def test_weights_stay_integers_in_the_engine(
    precision: str, target: str, largest: float, gemma_2b_layer: Path, fp16_engine_size: int, tmp_path: Path
) -> None:
    """A builder that multiplied them out would give fp16's size."""
    assert decoder_size(gemma_2b_layer, tmp_path, target, precision) <= largest * fp16_engine_size


def test_a_graph_with_a_contrib_operator_is_refused_by_name(
    paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    export_bundle(str(paligemma.checkpoint), bundle, targets=["jetpack6"], compare=False)
    path = bundle / "vision_encoder.opset20.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type, node.domain = "QuickGelu", "com.microsoft"
    del node.attribute[:]
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    monkeypatch.setattr(Bundle, "verify_hashes", lambda *arguments, **options: None)
    monkeypatch.setattr(Bundle, "_check_files", lambda *arguments: None)
    with pytest.raises(BuildError, match="QuickGelu"):
        build_engine(bundle, "rtx")
    assert list(bundle.glob("*.plan")) == []
    assert not list(bundle.glob(".engines*"))
