"""big_vision's .npz gives the bundle that the same model gives in Hugging Face's format.

The arrays are made here, from transformers' model, by the definition of each einsum.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import PaliGemmaForConditionalGeneration

from paliedge.errors import CheckpointError, UsageError
from paliedge_export.checkpoint.big_vision import BigVisionCheckpoint
from paliedge_export.checkpoint.config import read_config
from paliedge_export.checkpoint.safetensors_reader import Checkpoint
from paliedge_export.exporter import export_bundle
from tests.tiny import make_tiny

Array = npt.NDArray[Any]
TINY: dict[str, dict[str, Any]] = {
    "paligemma": {"head_dim": 16, "num_heads": 4},
    "paligemma2": {"head_dim": 16, "num_heads": 4, "num_kv_heads": 2, "query_pre_attn_scalar": 16},
}


def arrays_from(model: PaliGemmaForConditionalGeneration) -> dict[str, Array]:
    """The model's weights as big_vision stacks them."""
    vision, text = model.model.vision_tower, model.model.language_model
    heads, width = vision.config.num_attention_heads, vision.config.hidden_size
    config = text.config
    blocks, layers = vision.encoder.layers, text.layers

    def stack(make: Any, modules: Any) -> Array:
        return np.stack([make(module).detach().numpy() for module in modules])

    found: dict[str, Array] = {
        "img/embedding/kernel": vision.embeddings.patch_embedding.weight.permute(2, 3, 1, 0).detach().numpy(),
        "img/embedding/bias": vision.embeddings.patch_embedding.bias.detach().numpy(),
        "img/pos_embedding": vision.embeddings.position_embedding.weight[None].detach().numpy(),
        "img/Transformer/encoder_norm/scale": vision.post_layernorm.weight.detach().numpy(),
        "img/Transformer/encoder_norm/bias": vision.post_layernorm.bias.detach().numpy(),
        "img/head/kernel": model.model.multi_modal_projector.linear.weight.T.detach().numpy(),
        "img/head/bias": model.model.multi_modal_projector.linear.bias.detach().numpy(),
        "llm/embedder/input_embedding": text.embed_tokens.weight.detach().numpy(),
        "llm/final_norm/scale": text.norm.weight.detach().numpy(),
    }
    block = "img/Transformer/encoderblock"
    for name, part in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        place = f"{block}/MultiHeadDotProductAttention_0/{name}"
        found[f"{place}/kernel"] = stack(
            lambda b, part=part: getattr(b.self_attn, part).weight.T.reshape(width, heads, -1), blocks
        )
        found[f"{place}/bias"] = stack(lambda b, part=part: getattr(b.self_attn, part).bias.reshape(heads, -1), blocks)
    place = f"{block}/MultiHeadDotProductAttention_0/out"
    found[f"{place}/kernel"] = stack(lambda b: b.self_attn.out_proj.weight.T.reshape(heads, -1, width), blocks)
    found[f"{place}/bias"] = stack(lambda b: b.self_attn.out_proj.bias, blocks)
    for number, (dense, norm) in enumerate((("fc1", "layer_norm1"), ("fc2", "layer_norm2"))):
        place = f"{block}/MlpBlock_0/Dense_{number}"
        found[f"{place}/kernel"] = stack(lambda b, dense=dense: getattr(b.mlp, dense).weight.T, blocks)
        found[f"{place}/bias"] = stack(lambda b, dense=dense: getattr(b.mlp, dense).bias, blocks)
        found[f"{block}/LayerNorm_{number}/scale"] = stack(lambda b, norm=norm: getattr(b, norm).weight, blocks)
        found[f"{block}/LayerNorm_{number}/bias"] = stack(lambda b, norm=norm: getattr(b, norm).bias, blocks)
    hidden, dim = config.hidden_size, config.head_dim

    def einsum(weight: torch.Tensor) -> torch.Tensor:
        """y[n, d] = sum over H of x[H] w[n, H, d]."""
        return weight.reshape(-1, dim, hidden).transpose(1, 2)

    attention = "llm/layers/attn"
    found[f"{attention}/q_einsum/w"] = stack(lambda layer: einsum(layer.self_attn.q_proj.weight), layers)
    found[f"{attention}/kv_einsum/w"] = stack(
        lambda layer: torch.stack([einsum(layer.self_attn.k_proj.weight), einsum(layer.self_attn.v_proj.weight)]),
        layers,
    )
    found[f"{attention}/attn_vec_einsum/w"] = stack(
        lambda layer: layer.self_attn.o_proj.weight.T.reshape(-1, dim, hidden), layers
    )
    found["llm/layers/mlp/gating_einsum"] = stack(
        lambda layer: torch.stack([layer.mlp.gate_proj.weight.T, layer.mlp.up_proj.weight.T]), layers
    )
    found["llm/layers/mlp/linear"] = stack(lambda layer: layer.mlp.down_proj.weight.T, layers)
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if config.model_type == "gemma2":
        norms = {
            "pre_attention_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    for theirs, ours in norms.items():
        found[f"llm/layers/{theirs}/scale"] = stack(lambda layer, ours=ours: getattr(layer, ours).weight, layers)
    return found


@pytest.fixture(scope="module", params=TINY)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint's folder, and the .npz of the same model beside a tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_tiny(folder / "hf", request.param, **TINY[request.param])
    (folder / "bv").mkdir()
    shutil.copy(folder / "hf" / "tokenizer.json", folder / "bv" / "tokenizer.json")
    np.savez(folder / "bv" / "model.npz", **arrays_from(model))  # type: ignore[arg-type]
    return folder / "hf", folder / "bv" / "model.npz"


def test_every_tensor_is_the_same(both: tuple[Path, Path]) -> None:
    folder, npz = both
    expected, found = Checkpoint(folder, read_config(folder)), BigVisionCheckpoint(npz)
    assert set(found) == set(expected)
    for name in expected:
        assert found.shape(name) == expected.shape(name)
        assert np.array_equal(found[name], expected[name]), name
    table = "language_model.embed_tokens.weight"
    assert np.array_equal(found.rows(table, 3, 9), expected.rows(table, 3, 9))
    assert found.config == expected.config


def test_the_bundles_weights_are_the_same(both: tuple[Path, Path], tmp_path: Path) -> None:
    folder, npz = both
    manifests = []
    for name, checkpoint in (("a", folder), ("b", npz)):
        manifests.append(export_bundle(str(checkpoint), tmp_path / name, compare=False))
    first, second = ({name: file for name, file in one.files.items() if "weights" in name} for one in manifests)
    assert first == second
    assert manifests[0].model == manifests[1].model
    assert manifests[1].preprocess.resample == "bilinear"
    assert manifests[1].producer.checkpoint == "model.npz"


def test_a_comparison_says_what_it_could_not_do_and_fp16_compares(both: tuple[Path, Path], tmp_path: Path) -> None:
    exact = export_bundle(str(both[1]), tmp_path / "fp32")
    assert "npz" in exact.not_compared["cpu"]
    half = export_bundle(str(both[1]), tmp_path / "fp16", precision="fp16")
    assert half.comparisons["cpu"].last_hidden.mean > 0.999


def write(path: Path, arrays: dict[str, Array], *, compressed: bool = False, prefix: str = "") -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    save = np.savez_compressed if compressed else np.savez
    save(path, **{prefix + name: value for name, value in arrays.items()})  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("form", ["bfloat16", "compressed", "prefix", "fortran"])
def test_other_forms_of_the_file_are_read(form: str, both: tuple[Path, Path], tmp_path: Path) -> None:
    with np.load(both[1]) as file:
        arrays = {name: file[name] for name in file.files}
    if form == "bfloat16":  # numpy writes it as two bytes without a meaning
        arrays = {name: value.astype(ml_dtypes.bfloat16) for name, value in arrays.items()}
    if form == "fortran":
        arrays = {name: np.asfortranarray(value) for name, value in arrays.items()}
    prefix = "params/" if form == "prefix" else ""
    found = BigVisionCheckpoint(write(tmp_path / "m.npz", arrays, compressed=form == "compressed", prefix=prefix))
    expected = BigVisionCheckpoint(both[1])
    for name in expected:
        wanted = expected[name].astype(ml_dtypes.bfloat16) if form == "bfloat16" else expected[name]
        assert np.array_equal(found[name], wanted), name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llm/layers/mlp/linear", None),
        ("img/pos_embedding", lambda a: a[:, :-1]),
        ("llm/layers/attn/kv_einsum/w", lambda a: a[..., :-1]),
        ("llm/layers/mlp/gating_einsum", lambda a: a[:1]),
        ("img/head/kernel", lambda a: a.astype(np.float64)),
        ("llm/final_norm/scale", lambda a: a[:-1]),
    ],
)
def test_what_is_no_paligemma_is_refused(name: str, change: Any, both: tuple[Path, Path], tmp_path: Path) -> None:
    with np.load(both[1]) as file:
        arrays = {key: file[key] for key in file.files}
    if change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays[name])
    with pytest.raises(CheckpointError, match=name.rsplit("/", 1)[0].rsplit("/", 1)[-1] + "|patches"):
        BigVisionCheckpoint(write(tmp_path / "m.npz", arrays))


def test_a_file_that_is_no_archive_and_an_adapter_for_it_are_errors(both: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "m.npz").write_text("nothing")
    with pytest.raises(CheckpointError, match=r"m\.npz"):
        export_bundle(str(tmp_path / "m.npz"), tmp_path / "b")
    with pytest.raises(UsageError, match="adapter"):
        export_bundle(str(both[1]), tmp_path / "b", adapters=[tmp_path])
    assert not (tmp_path / "b").exists()
