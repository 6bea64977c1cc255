"""Checkpoints in every spelling give the same tensors; broken ones give an error that names the tensor."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration

from paliedge.bundle.bundle import Bundle
from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.config import read_config
from paliedge_export.checkpoint.safetensors_reader import EMBED_TOKENS, LM_HEAD, Checkpoint
from paliedge_export.exporter import export_bundle
from paliedge_export.gate.transformers_model import reference_logits
from tests.export.conftest import Tiny
from tests.export.graph_reader import Graphs
from tests.tiny import make_tiny

Tensors = dict[str, torch.Tensor]

PREFIXES = {
    "transformers-4-hub": {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
    "transformers-4.52": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "transformers-5": {},
    "transformers-5-saves-old-names": {
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
}
A_LAYER = "model.language_model.layers.1.self_attn.k_proj.weight"
A_NORM = "model.vision_tower.post_layernorm.bias"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A checkpoint with a head of its own and its tensors by the names that transformers 5 gives them."""
    folder = tmp_path_factory.mktemp("untied")
    model = make_tiny(folder, "paligemma", tied=False)
    return folder, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def respell(tensors: Tensors, spelling: str) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        old = next((prefix for prefix in PREFIXES[spelling] if name.startswith(prefix)), "")
        renamed[PREFIXES[spelling].get(old, "") + name.removeprefix(old)] = tensor
    return renamed


def copy_with(source: Path, folder: Path, tensors: Tensors, num_shards: int = 1) -> Path:
    """The checkpoint `source` with other weights."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {name: f"model-{index % num_shards + 1}.safetensors" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def open_checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, read_config(folder))


def assert_same(checkpoint: Checkpoint, tensors: Tensors) -> None:
    assert set(checkpoint) == {name.removeprefix("model.") for name in tensors}
    for name, tensor in tensors.items():
        read: npt.NDArray[np.float32] = checkpoint[name.removeprefix("model.")].astype(np.float32)
        assert np.array_equal(read, tensor.float().numpy()), name


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("spelling", PREFIXES)
def test_every_spelling_gives_the_same_tensors(
    spelling: str, num_shards: int, untied: tuple[Path, Tensors], tmp_path: Path
) -> None:
    source, tensors = untied
    folder = copy_with(source, tmp_path, respell(tensors, spelling), num_shards)
    assert_same(open_checkpoint(folder), tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read_exactly(
    dtype: torch.dtype, untied: tuple[Path, Tensors], tmp_path: Path
) -> None:
    source, tensors = untied
    half = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    assert_same(open_checkpoint(copy_with(source, tmp_path, respell(half, "transformers-4-hub"))), half)


def test_buffers_that_old_versions_saved_are_ignored(untied: tuple[Path, Tensors], tmp_path: Path) -> None:
    source, tensors = untied
    buffers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(16)[None],
    }
    folder = copy_with(source, tmp_path, respell(tensors, "transformers-4-hub") | buffers)
    assert_same(open_checkpoint(folder), tensors)


@pytest.mark.parametrize(
    ("edit", "name", "reason"),
    [
        pytest.param(lambda t: t.pop(A_LAYER), A_LAYER, "no tensor", id="missing"),
        pytest.param(lambda t: t.pop("lm_head.weight"), "model.lm_head.weight", "no tensor", id="missing-untied-head"),
        pytest.param(
            lambda t: t.update({A_LAYER + ".lora_A": torch.ones(1)}),
            A_LAYER + ".lora_A",
            "saved unmerged",
            id="adapter",
        ),
        pytest.param(lambda t: t.update({"score.weight": torch.ones(1)}), "score.weight", "left over", id="left"),
        pytest.param(lambda t: t.update({A_LAYER: t[A_LAYER][:-1].clone()}), A_LAYER, "of shape [15, 48]", id="shape"),
        pytest.param(lambda t: t.update({"lm_head.weight": torch.ones(())}), "model.lm_head.weight", "[]", id="scalar"),
        pytest.param(lambda t: t.update({A_NORM: t[A_NORM].to(torch.int8)}), A_NORM, "of type I8", id="dtype"),
        pytest.param(
            lambda t: t.update({A_LAYER.replace("model.language_model", "language_model.model"): t[A_LAYER].clone()}),
            A_LAYER,
            "twice",
            id="duplicate",
        ),
    ],
)
def test_a_wrong_tensor_is_named(
    edit: Callable[[Tensors], object], name: str, reason: str, untied: tuple[Path, Tensors], tmp_path: Path
) -> None:
    source, tensors = untied
    edited = dict(tensors)
    edit(edited)
    folder = copy_with(source, tmp_path, edited)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert f"'{name.removeprefix('model.')}'" in caught.value.found
    assert reason in caught.value.found


def test_shards_that_transformers_writes_are_exported_as_the_one_file_is(paligemma: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(paligemma.checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    paligemma.model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    manifest = export_bundle(str(folder), tmp_path / "bundle", compare=False)
    assert manifest.files == Bundle(paligemma.bundle).manifest.files


def test_a_missing_shard_is_named(untied: tuple[Path, Tensors], tmp_path: Path) -> None:
    source, tensors = untied
    folder = copy_with(source, tmp_path, tensors, num_shards=3)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no 'model-2\.safetensors'"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": []}}']
)
def test_a_broken_index_is_named(index: str, untied: tuple[Path, Tensors], tmp_path: Path) -> None:
    source, tensors = untied
    folder = copy_with(source, tmp_path, tensors, num_shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(folder)


def test_a_truncated_file_is_named(untied: tuple[Path, Tensors], tmp_path: Path) -> None:
    source, tensors = untied
    folder = copy_with(source, tmp_path, tensors)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        open_checkpoint(folder)


def test_a_folder_without_weights_says_so(paligemma: Tiny, tmp_path: Path) -> None:
    shutil.copyfile(paligemma.checkpoint / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        open_checkpoint(tmp_path)


def test_rows_are_read_without_the_rest_of_their_matrix(paligemma: Tiny) -> None:
    checkpoint = open_checkpoint(paligemma.checkpoint)
    whole = checkpoint[EMBED_TOKENS]
    tracemalloc.start()
    try:
        rows = checkpoint.rows(EMBED_TOKENS, 3, 7)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(rows, whole[3:7])
    assert peak < whole.nbytes / 2


def test_no_file_stays_mapped_between_reads(paligemma: Tiny) -> None:
    checkpoint = open_checkpoint(paligemma.checkpoint)
    tensor = checkpoint[EMBED_TOKENS]
    assert tensor.any()
    assert str(paligemma.checkpoint / "model.safetensors") not in Path("/proc/self/maps").read_text()


def test_a_stored_copy_of_the_table_is_written_once(paligemma: Tiny, tmp_path: Path) -> None:
    tensors = load_file(paligemma.checkpoint / "model.safetensors")
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    folder = copy_with(paligemma.checkpoint, tmp_path / "checkpoint", tensors)
    export_bundle(str(folder), tmp_path / "bundle", compare=False)
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {p.name for p in paligemma.bundle.iterdir()}
    for name in ("decoder.fp32.weights", "decoder.cpu.onnx"):
        assert (tmp_path / "bundle" / name).read_bytes() == (paligemma.bundle / name).read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_differs_from_the_table_is_used_as_transformers_does(
    tied: bool, paligemma: Tiny, tmp_path: Path
) -> None:
    """transformers 5.23 unties them when the file holds both, whatever config.json says."""
    tensors = load_file(paligemma.checkpoint / "model.safetensors")
    table = tensors["language_model.model.embed_tokens.weight"]
    tensors["language_model.lm_head.weight"] = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    folder = copy_with(paligemma.checkpoint, tmp_path / "checkpoint", tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    export_bundle(str(folder), tmp_path / "bundle", compare=False)

    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    graphs = Graphs(tmp_path / "bundle")
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 56, 56)).astype(np.float32)
    prefix = [2, 300, 301, 4]
    tokens = graphs.manifest.tokens
    with torch.no_grad():
        logits = reference_logits(model, torch.from_numpy(pixels), prefix, tokens.image, tokens.vocab_size, 1)[0]
    answer = graphs.run(np.concatenate([graphs.encode(pixels), graphs.embed([prefix])], axis=1), [20])
    assert answer["next_token"][0] == logits.argmax()
    best = torch.from_numpy(logits).log_softmax(-1).max()
    assert answer["log_prob"][0] == pytest.approx(best.item(), abs=1e-4)
    assert LM_HEAD in {tensor.name for tensor in graphs.decoder_model.graph.initializer}
    assert (tmp_path / "bundle" / "lm_head.fp32.weights").is_file()


def test_a_tokenizer_with_more_tokens_than_the_table_has_rows_is_refused(paligemma: Tiny, tmp_path: Path) -> None:
    tensors = load_file(paligemma.checkpoint / "model.safetensors")
    name = "language_model.model.embed_tokens.weight"
    tensors[name] = tensors[name][:1500].clone()
    folder = copy_with(paligemma.checkpoint, tmp_path / "checkpoint", tensors)
    with pytest.raises(CheckpointError, match="1500 rows"):
        export_bundle(str(folder), tmp_path / "bundle", compare=False)
    assert not (tmp_path / "bundle").exists()
