"""Sums of products are exact or refused: the probes see what is wrong, and the session asks them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from benchmarks.signed_weights import sign_weights
from paliedge import PaliGemma
from paliedge.backends import ort
from paliedge.backends.arithmetic import FOLDER, Arithmetic, Kind, probe
from paliedge.backends.ort import examine_arithmetic, kinds_of, load_graph
from paliedge.bundle.bundle import Bundle
from paliedge.cli.demo import DEMO_SCENES
from paliedge.errors import EngineMismatchError
from paliedge.model import SHIPPED_BUNDLE
from paliedge_export.exporter import export_bundle
from tests.paths import SHAPES_CHECKPOINT
from tests.probes import PROBES


def load(path: Path) -> onnxruntime.InferenceSession:
    return load_graph(path, num_threads=1)


def test_the_probes_are_the_graphs_that_are_shipped() -> None:
    assert {path.stem for path in FOLDER.glob("*.onnx")} == set(PROBES)
    for name, make in PROBES.items():
        assert onnx.load(FOLDER / f"{name}.onnx") == make(), name


@pytest.mark.parametrize("kind", ["eight_bit", "blocks"] + ["signed"] * ort._CONVERTS_SIGNED)
def test_this_processors_products_are_exact(kind: Kind) -> None:
    """On x86 with and without VNNI, and on ARM. float16 sums on ARM are not: no graph for `cpu` has any."""
    assert examine_arithmetic(kind).wrong == {}


class Wrong:
    """A session whose products go through `spoil`."""

    def __init__(self, path: Path, name: str, spoil: Any) -> None:
        self._session = load(path)
        self._name, self._spoil = name, spoil

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def run(self, names: list[str], inputs: dict[str, Any]) -> list[Any]:
        found = dict(zip(names, self._session.run(names, inputs), strict=True))
        found[self._name] = self._spoil(inputs["x"], found["weights"], found[self._name])
        return [found[name] for name in names]


Floats = npt.NDArray[Any]


def saturate(x: Floats, weights: Floats, exact: Floats) -> Floats:
    """As AVX2 does: pairs of neighbours are added up in 16 bits. Activations below zero are shifted by 128."""
    zero = 128 if x.min() < 0 else 0
    pairs = (x + zero).reshape(len(x), -1, 2, 1) * weights.reshape(1, -1, 2, weights.shape[1])
    cut: Floats = pairs.sum(2).clip(-32768, 32767).sum(1) - zero * weights.sum(0)
    return cut


def sum_in_float16(x: Floats, weights: Floats, exact: Floats) -> Floats:
    total: Floats = np.zeros(exact.shape, np.float16)
    for row in range(len(weights)):
        total += (x[:, row : row + 1] * weights[row]).astype(np.float16)
    wide: Floats = total.astype(np.float32)
    return wide


def lose_a_row(x: Floats, weights: Floats, exact: Floats) -> Floats:
    spoilt: Floats = exact.copy()
    if len(x) > 1:
        spoilt[-1] = 0
    return spoilt


def lose_a_number(x: Floats, weights: Floats, exact: Floats) -> Floats:
    spoilt: Floats = exact.copy()
    spoilt[0, 0] = np.nan
    return spoilt


FAULTS: dict[str, tuple[Kind, str, Any]] = {
    "pairs that saturate": ("signed", "int8 weights", saturate),
    "the same without a sign": ("eight_bit", "uint8 weights", saturate),
    "4 bits": ("blocks", "4-bit weights", lose_a_row),
    "8 bits": ("blocks", "8-bit weights", lose_a_row),
    "float16": ("float16", "float16 MatMul", sum_in_float16),
    "no number": ("eight_bit", "uint8 weights", lose_a_number),
    "several rows": ("eight_bit", "uint8 weights", lose_a_row),
}


@pytest.mark.parametrize(("kind", "name", "spoil"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_product_is_seen(kind: Kind, name: str, spoil: Any) -> None:
    found = probe(kind, lambda path: Wrong(path, name, spoil))
    assert set(found.wrong) == {name}
    assert "wrong" in str(found)
    assert name in str(found)


def test_without_the_options_the_probe_says_what_the_processor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights without a sign need no option. Those with one saturate or not, which is what the option mends."""
    monkeypatch.setattr(ort, "_EXACT", ())
    assert probe("eight_bit", load).wrong == {}
    cut = probe("signed", load).wrong
    assert cut == {} or abs(cut["int8 weights"] - 1) > 0.01


def test_a_probe_takes_about_a_millisecond() -> None:
    times = []
    for _ in range(20):
        started = time.perf_counter()
        probe("eight_bit", load)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.005


def test_products_are_asked_for_by_what_graphs_have() -> None:
    model = PaliGemma.load(SHIPPED_BUNDLE)
    assert model.arithmetic == ()  # float32


def test_a_session_with_wrong_products_is_refused(int8_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(kind: Kind) -> Arithmetic:
        return Arithmetic(kind, {"uint8 weights": 0.506} if kind == "eight_bit" else {})

    assert PaliGemma.load(int8_bundle).arithmetic == ("8-bit products: exact", "products of 4- and 8-bit blocks: exact")
    monkeypatch.setattr(ort, "examine_arithmetic", cut)
    with pytest.raises(EngineMismatchError, match=r"0\.506 of the right sum with uint8 weights"):
        PaliGemma.load(int8_bundle)


@pytest.mark.parametrize("kind", ["eight_bit", "signed", "blocks"])
def test_a_probe_is_as_wide_as_a_kernels_longest_step(kind: Kind) -> None:
    assert load(FOLDER / f"{kind}.onnx").get_inputs()[0].shape[1] >= 1024


def test_float16_graphs_are_refused_where_sums_are_float16(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on ARM with ONNX Runtime from 1.29 on: graphs for TensorRT, and those for `cpu` of earlier exports."""
    monkeypatch.setattr(ort, "examine_arithmetic", lambda kind: Arithmetic(kind, {"float16 MatMul": 0.125}))
    with pytest.raises(EngineMismatchError, match="--target cpu"):
        PaliGemma.load(bundles["shapes"])


def test_fp16_for_cpu_needs_no_float16_sums(tmp_path: Path) -> None:
    """Half of fp32's bytes; every product is of float32."""
    export_bundle(str(SHAPES_CHECKPOINT), tmp_path / "fp16", precision="fp16", compare=False)
    bundle = Bundle(tmp_path / "fp16")
    target = bundle.target("cpu")
    assert kinds_of(bundle.manifest, "cpu") == ()
    for graph in (target.decoder, target.vision_encoder):
        model = onnx.load(bundle.path(graph.file), load_external_data=False)
        stored = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
        readers = {node.op_type for node in model.graph.node if stored & {*node.input}}
        assert readers == {"Cast"}
    size = sum(bundle.manifest.files[name].size for name in target.weights)
    whole = Bundle(SHIPPED_BUNDLE)
    assert size < 0.55 * sum(whole.manifest.files[name].size for name in whole.target("cpu").weights)


def test_a_bundle_of_weights_with_a_sign_answers_as_one_without_or_is_refused(
    int8_bundle: Path, tmp_path: Path
) -> None:
    """What was exported before; where this ONNX Runtime cannot make its products exact, it says so."""
    sign_weights(int8_bundle, tmp_path / "signed")
    assert kinds_of(Bundle(tmp_path / "signed").manifest, "cpu") == ("signed", "blocks")
    if examine_arithmetic("signed").wrong:
        with pytest.raises(EngineMismatchError, match="Export the checkpoint again"):
            PaliGemma.load(tmp_path / "signed")
        return
    answers = []
    for folder in (int8_bundle, tmp_path / "signed"):
        with PaliGemma.load(folder) as model:
            seen = model.encode(DEMO_SCENES / "scene-1.png")
            answers.append([model.caption(seen), model.detect(seen, ["green circle"]), model.ocr(seen)])
    assert [answer.token_ids for answer in answers[0]] == [answer.token_ids for answer in answers[1]]
    for new, old in zip(*answers, strict=True):
        assert new.log_probs == pytest.approx(old.log_probs, abs=1e-5)
