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

from paliedge.backends.trt import build as building
from paliedge.backends.trt.build import build_engine
from paliedge.backends.trt.flavours import ANY_GPU, load_flavour
from paliedge.backends.trt.match import PARTS, parts_of
from paliedge.backends.trt.profiles import design_engine
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Engine
from paliedge.errors import BuildError
from paliedge_export.exporter import export_bundle
from paliedge_export.options import Quantization
from tests.export.conftest import Tiny
from tests.masks import PUBLISHED, random_mask_decoder
from tests.paths import SHAPES_CHECKPOINT

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
