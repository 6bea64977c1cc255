"""bf16 graphs are checked by emulation: float32 kernels with every rounding of bfloat16 in between."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from paliedge.bundle.bundle import Bundle
from paliedge.errors import PrecisionError
from paliedge_export.exporter import export_bundle
from paliedge_export.gate.bfloat16 import emulate
from paliedge_export.weights import files
from tests.export.conftest import Tiny

FloatArray = npt.NDArray[np.float32]


def rounded(array: FloatArray) -> FloatArray:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def test_the_emulation_rounds_operands_and_product() -> None:
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 64), (64, 5)))
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
            helper.make_node("MatMul", ["narrow", "weight"], ["product"]),
            helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
        ],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 5])],
        [numpy_helper.from_array(weight.astype(ml_dtypes.bfloat16), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(emulate(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(["y"], {"x": x})[0]
    exact = rounded(x) @ rounded(weight)
    assert np.array_equal(found, rounded(found))
    assert np.abs(found - exact).max() <= np.abs(exact).max() * 2.0**-8
    assert np.abs(found - x @ weight).max() > np.abs(found - exact).max()


@pytest.mark.opset24
@pytest.mark.parametrize("target", ["jetpack6", "jetpack7"])
def test_bf16_is_compared_and_leaves_no_emulation_behind(target: str, tiny: Tiny, tmp_path: Path) -> None:
    manifest = export_bundle(str(tiny.checkpoint), tmp_path / "bundle", targets=[target], precision="bf16")
    assert 1e-4 < manifest.comparisons[target].log_prob_error < 0.2
    assert manifest.comparisons[target].token_match > 0.9
    assert Bundle(tmp_path / "bundle").manifest == manifest
    assert not list((tmp_path / "bundle").glob("emulated*"))
    model = onnx.load(tmp_path / "bundle" / manifest.targets[target].decoder.file, load_external_data=False)
    assert TensorProto.BFLOAT16 in {tensor.data_type for tensor in model.graph.initializer}


def test_a_bf16_export_with_a_wrong_weight_is_not_published(
    paligemma: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kind of matrix upside down, in the bf16 files alone."""
    honest = files.WeightFile.add

    def spoil(
        self: files.WeightFile, name: str, array: npt.NDArray[np.float32], dtype: npt.DTypeLike = np.float32
    ) -> None:
        wrong = np.dtype(dtype) == ml_dtypes.bfloat16 and name.endswith("down_proj.weight")
        honest(self, name, -array if wrong else array, dtype)

    monkeypatch.setattr(files.WeightFile, "add", spoil)
    with pytest.raises(PrecisionError, match=r"bf16 graphs for (rtx|jetpack6) as good as"):
        export_bundle(str(paligemma.checkpoint), tmp_path / "bundle", targets=["rtx"], precision="bf16")
    assert list(tmp_path.iterdir()) == []
