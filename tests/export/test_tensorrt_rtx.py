"""TensorRT for RTX parses and builds every TensorRT-bound graph, on this machine, without a GPU.

Its parser and compiler are of TensorRT 11's generation: what it takes is legal ONNX for TensorRT,
strongly typed, with caches that it can update in place. Whether an older TensorRT takes the same is
the operator lists' matter.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from paliedge import building
from paliedge.building import build_engine
from paliedge.bundle import Bundle
from paliedge.errors import BuildError
from paliedge.manifest import Engine, Range
from paliedge_export.exporter import export_bundle
from tests.export.conftest import Tiny
from tests.paths import SHAPES_CHECKPOINT
from tests.tiny import make_tiny

TARGETS = ("jetpack6", "jetpack7")
"""rtx has jetpack7's graphs, which test_parity holds."""


def build(checkpoint: Path, folder: Path, target: str, precision: str) -> tuple[Bundle, Engine]:
    export_bundle(str(checkpoint), folder, targets=[target], precision=precision, compare=False)  # type: ignore[arg-type]
    engine = build_engine(folder, "rtx")
    return Bundle(folder), engine


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("target", TARGETS)
def test_tiny_graphs_are_built(target: str, precision: str, tiny: Tiny, tmp_path: Path) -> None:
    bundle, engine = build(tiny.checkpoint, tmp_path / "bundle", target, precision)
    assert bundle.manifest.engines == (engine,)
    assert (engine.target, engine.precision) == (target, precision)
    for plan in (engine.vision_encoder, engine.decoder):
        assert bundle.path(plan.file).read_bytes()[:1] != b""


@pytest.mark.parametrize("target", TARGETS)
def test_shapes_graphs_are_built(target: str, tmp_path: Path) -> None:
    bundle, engine = build(SHAPES_CHECKPOINT, tmp_path / "bundle", target, "fp16")
    assert bundle.manifest.files[engine.decoder.file].size > 1_000_000


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose weights outweigh its kernels: two layers, 170 MB in fp16."""
    folder = tmp_path_factory.mktemp("wide")
    make_tiny(folder, "paligemma", hidden_size=1024, intermediate_size=12288, num_heads=4, head_dim=256, num_layers=2)
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_both_profiles_share_the_weights(target: str, wide: Path, tmp_path: Path) -> None:
    bundle, engine = build(wide, tmp_path / "bundle", target, "fp16")
    files = bundle.manifest.files
    weights = sum(files[name].size for name in bundle.manifest.targets[target].decoder.weights)
    assert weights > 150e6
    assert len(engine.decoder.profiles) == 2
    assert files[engine.decoder.file].size < 1.05 * weights


def test_a_decode_profile_of_single_points_would_double_them(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why decode's profile has room for a second token; and the test above can fail."""
    honest = building.decoder_profiles

    def with_single_points(*arguments: object) -> tuple[dict[str, Range], ...]:
        decode, prefill = honest(*arguments)  # type: ignore[arg-type]
        return {name: Range(shapes.min, shapes.min, shapes.min) for name, shapes in decode.items()}, prefill

    monkeypatch.setattr(building, "decoder_profiles", with_single_points)
    bundle, engine = build(wide, tmp_path / "bundle", "jetpack7", "fp16")
    files = bundle.manifest.files
    weights = sum(files[name].size for name in bundle.manifest.targets["jetpack7"].decoder.weights)
    assert files[engine.decoder.file].size > 1.5 * weights


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
