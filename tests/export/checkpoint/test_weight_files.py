"""Which files are read of a folder that holds several, and what is said of what cannot be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.config import read_config
from paliedge_export.checkpoint.safetensors_reader import Array, Checkpoint
from paliedge_export.checkpoint.weight_files import INDEX, SINGLE, find_weight_files
from tests.export.conftest import Tiny

Tensors = dict[str, Array]
NAME = "language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(paligemma: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(paligemma.checkpoint, tmp_path / "checkpoint"))


def weights(folder: Path) -> Tensors:
    return dict(load_file(folder / SINGLE))


def write(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / SINGLE)


def shard(folder: Path, tensors: Tensors, count: int = 3, index: bool = True) -> list[Path]:
    names = list(tensors)
    placed: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / file)
        placed |= dict.fromkeys(part, file)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return sorted(folder / file for file in set(placed.values()))


def test_shards_without_an_index_are_whole_if_their_names_say_so(folder: Path) -> None:
    shards = shard(folder, weights(folder), index=False)
    (folder / SINGLE).unlink()
    assert find_weight_files(folder) == shards
    shards[1].unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        find_weight_files(folder)


def test_two_sets_that_differ_are_refused_and_both_named(folder: Path) -> None:
    """A fine-tune saved as one file beside the shards of its base: transformers takes the one file."""
    tensors = weights(folder)
    shard(folder, {name: tensor * 0.5 for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=rf"{SINGLE}.*model-00001-of-00003.*{INDEX}"):
        find_weight_files(folder)
    shard(folder, tensors)
    assert find_weight_files(folder) == [folder / SINGLE]


@pytest.mark.parametrize("index", [True, False])
def test_two_sets_differ_by_one_last_bit_too(index: bool, folder: Path) -> None:
    tensors = weights(folder)
    last = list(tensors)[-1]
    off = tensors | {last: np.nextafter(tensors[last], np.float32(9))}
    shard(folder, off, index=index)
    with pytest.raises(CheckpointError, match="two sets"):
        find_weight_files(folder)


def test_an_index_whose_shards_are_gone_does_not_hide_the_whole_file(folder: Path) -> None:
    for path in shard(folder, weights(folder)):
        path.unlink()
    assert find_weight_files(folder) == [folder / SINGLE]
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="Download the missing shards"):
        find_weight_files(folder)


@pytest.mark.parametrize("pointed", [SINGLE, INDEX])
def test_a_pointer_of_git_lfs_is_called_that(pointed: str, folder: Path) -> None:
    shard(folder, weights(folder))
    (folder / SINGLE).unlink()
    (folder / pointed).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for path in folder.glob("model-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="git lfs pull"):
        find_weight_files(folder)


def test_checkpoints_of_a_trainer_are_named(folder: Path) -> None:
    for number in (500, 90, 1000):
        (folder / f"checkpoint-{number}").mkdir()
        shutil.copy(folder / SINGLE, folder / f"checkpoint-{number}" / SINGLE)
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-90.*Name .*checkpoint-1000\."):
        find_weight_files(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.safetensors", "mine.safetensors", "model.gguf"])
def test_a_file_of_another_name_is_named(name: str, folder: Path) -> None:
    (folder / SINGLE).rename(folder / name)
    with pytest.raises(CheckpointError, match=name):
        find_weight_files(folder)


Wrap = Callable[[str], str]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
        lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda name: f"base_model.model.{name}",
        lambda name: f"model.{name}",
    ],
    ids=["compile", "ddp", "both", "fsdp", "fsdp-inside", "activation-checkpoints", "peft", "lightning"],
)
def test_what_a_wrapper_puts_before_names_is_taken_off(wrap: Wrap, folder: Path) -> None:
    tensors = weights(folder)
    plain = Checkpoint(folder, read_config(folder))[NAME]
    write(folder, {wrap(name): tensor for name, tensor in tensors.items()})
    assert np.array_equal(Checkpoint(folder, read_config(folder))[NAME], plain)


def test_a_prefix_that_only_some_have_is_no_wrapper(folder: Path) -> None:
    tensors = weights(folder)
    first = next(iter(tensors))
    write(folder, {f"ema.{name}" if name != first else name: tensor for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=r"ema\."):
        Checkpoint(folder, read_config(folder))


def test_the_table_of_a_tied_model_may_be_called_the_head(folder: Path) -> None:
    tensors = weights(folder)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    table = tensors.pop(name)
    write(folder, tensors | {"lm_head.weight": table})
    assert np.array_equal(Checkpoint(folder, read_config(folder))["language_model.embed_tokens.weight"], table)


def test_doubles_are_read_as_floats(folder: Path) -> None:
    tensors = weights(folder)
    write(folder, {name: tensor.astype(np.float64) for name, tensor in tensors.items()})
    found = Checkpoint(folder, read_config(folder))
    assert found[NAME].dtype == found.rows(NAME, 0, 2).dtype == np.float32


@pytest.mark.parametrize(
    ("endings", "named"),
    [
        ((".weight.absmax", ".weight.quant_map"), "bitsandbytes"),
        ((".SCB",), "bitsandbytes"),
        ((".qweight", ".qzeros", ".scales"), "AWQ or GPTQ"),
        ((".g_idx", ".qweight"), "GPTQ"),
        ((".weight_packed", ".weight_shape"), "compressed-tensors"),
        ((".weight_scale_inv",), "fp8"),
        ((".lora_A.weight", ".base_layer.weight"), "saved unmerged"),
    ],
)
def test_quantised_and_unmerged_weights_are_named_for_what_they_are(
    endings: tuple[str, ...], named: str, folder: Path
) -> None:
    extra = {f"model.language_model.layers.0.self_attn.q_proj{ending}": np.zeros(4, np.float32) for ending in endings}
    write(folder, weights(folder) | extra)
    with pytest.raises(CheckpointError, match=named) as caught:
        Checkpoint(folder, read_config(folder))
    assert "16-bit" in caught.value.action or "merge_and_unload" in caught.value.action


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["paligemma_with_expert.paligemma.lm_head.weight", "action_in_proj.weight"], "pi0"),
        (["blk.0.attn_q.weight", "token_embd.weight"], "GGUF"),
        (["layers/reversible_embedding/vars/0"], "KerasHub"),
        (["encoder.block.0.weight", "encoder.block.1.weight"], "begin with 'encoder.'"),
    ],
)
def test_another_model_is_told_by_its_names(names: list[str], named: str, folder: Path) -> None:
    write(folder, {name: np.zeros(4, np.float32) for name in names})
    with pytest.raises(CheckpointError, match=named):
        Checkpoint(folder, read_config(folder))


def test_a_shard_that_was_left_beside_a_whole_file_is_not_looked_at(folder: Path) -> None:
    shard(folder, weights(folder))
    for index in (False, True):
        if not index:
            (folder / INDEX).rename(folder / "kept")
        else:
            (folder / "kept").rename(folder / INDEX)
        for path in sorted(folder.glob("model-*"))[1:]:
            path.unlink()
        assert find_weight_files(folder) == [folder / SINGLE]


def test_without_a_config_at_the_top_the_newest_checkpoint_below_is_named(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (500, 90, 1000):
        shutil.copytree(folder, run / f"checkpoint-{number}")
    with pytest.raises(CheckpointError, match=r"Name .*checkpoint-1000\."):
        read_config(run)
