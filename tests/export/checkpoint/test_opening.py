"""Adapters meet the base model that they name, or are told apart from it; what changes nothing is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paliedge.errors import CheckpointError, UsageError
from paliedge_export.checkpoint import opening
from paliedge_export.checkpoint.lora import Adapted
from paliedge_export.checkpoint.opening import open_checkpoint
from tests.export.checkpoint.test_lora import adapt
from tests.tiny import make_tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for a name that goes
NAME = "language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "paligemma-3b-pt-224"
    make_tiny(folder, "paligemma")
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    adapt(base, tmp_path / "adapter", {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]})
    return tmp_path / "adapter"


def rename_base(adapter: Path, name: str | None) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


@pytest.mark.parametrize("name", [None, "", "google/paligemma-3b-pt-224", "/content/paligemma-3b-pt-224", "{base}"])
def test_an_adapter_is_merged_into_the_model_that_it_names(name: str | None, base: Path, adapter: Path) -> None:
    rename_base(adapter, name and name.format(base=base))
    assert open_checkpoint(str(base), [adapter]).changed


@pytest.mark.parametrize("name", ["google/paligemma-3b-pt-448", "somebody/other", "/content/base"])
def test_an_adapter_of_another_base_is_refused_unless_told(name: str, base: Path, adapter: Path) -> None:
    rename_base(adapter, name)
    with pytest.raises(CheckpointError, match=rf"{name}.*--force-base"):
        open_checkpoint(str(base), [adapter])
    assert open_checkpoint(str(base), [adapter], force_base=True).changed


def test_a_copy_in_the_hubs_cache_is_known_by_its_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--google--paligemma-3b-mix-448" / "snapshots" / "abc"
    shutil.copytree(base, snapshot)
    rename_base(adapter, "google/paligemma-3b-mix-448")
    assert open_checkpoint(str(snapshot), [adapter]).changed


def test_an_adapter_alone_brings_its_base_model(base: Path, adapter: Path) -> None:
    alone, named = open_checkpoint(str(adapter)), open_checkpoint(str(base), [adapter])
    assert np.array_equal(alone[NAME], named[NAME])
    assert alone.folders == named.folders == [adapter, base]


def test_an_adapter_that_changes_nothing_is_told(base: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    zeros = {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in load_file(file).items()}
    for tensors, lines in ((load_file(file), 0), (zeros, 1)):
        save_file(tensors, file)
        told: list[str] = []
        open_checkpoint(str(base), [adapter], report=told.append)
        assert len(told) == lines
    assert "changes no weight" in told[0]


def test_ids_revisions_and_weights_are_taken_apart(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def find(name: str, revision: str | None = None) -> Path:
        asked.append((name, revision))
        return adapter if "adapter" in name else base

    monkeypatch.setattr(opening, "find_checkpoint", find)
    found = open_checkpoint("google/paligemma-3b-pt-224", ["me/adapter:0.5", "me/adapter"], revision="bfloat16")
    assert asked == [("google/paligemma-3b-pt-224", "bfloat16"), ("me/adapter", None), ("me/adapter", None)]
    assert isinstance(found, Adapted)
    assert [one.weight for one in found._adapters] == [0.5, 1.0]
    with pytest.raises(UsageError, match=r"0\.5\.5"):
        open_checkpoint("google/paligemma-3b-pt-224", ["me/adapter:0.5.5"])


def test_what_config_says_of_its_origin_makes_no_base_of_a_fine_tune(base: Path, adapter: Path, tmp_path: Path) -> None:
    fine_tune = tmp_path / "my_finetune"
    shutil.copytree(base, fine_tune)
    config = json.loads((fine_tune / "config.json").read_text())
    (fine_tune / "config.json").write_text(json.dumps(config | {"_name_or_path": "google/paligemma-3b-pt-224"}))
    rename_base(adapter, "google/paligemma-3b-pt-224")
    with pytest.raises(CheckpointError, match="--force-base"):
        open_checkpoint(str(fine_tune), [adapter])


def test_folders_of_a_common_name_are_not_the_same_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "run2" / "checkpoint-500"
    shutil.copytree(base, other)
    rename_base(adapter, "/home/me/run1/checkpoint-500")
    with pytest.raises(CheckpointError, match="--force-base"):
        open_checkpoint(str(other), [adapter])


def test_weights_and_an_adapter_in_one_folder_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(base, both)
    for path in adapter.iterdir():
        shutil.copy(path, both)
    with pytest.raises(CheckpointError, match="If the adapter is merged"):
        open_checkpoint(str(both))


@pytest.mark.parametrize("wrap", ["base_model.model._orig_mod.", "module.base_model.model."])
def test_an_adapters_names_behind_wrappers_are_found(wrap: str, base: Path, adapter: Path) -> None:
    plain = open_checkpoint(str(base), [adapter])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({wrap + name.removeprefix("base_model.model."): value for name, value in tensors.items()}, path)
    assert np.array_equal(open_checkpoint(str(base), [adapter])[NAME], plain[NAME])


def test_the_processor_beside_an_adapter_goes_before_the_bases(base: Path, adapter: Path) -> None:
    (adapter / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    assert open_checkpoint(str(base), [adapter]).read_preprocess().std == (1.0,) * 3


def test_an_adapter_that_git_left_out_is_called_that(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(str(base), [adapter])


def test_an_adapter_alone_fetches_the_revision_of_its_base_that_it_names(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = adapter / "adapter_config.json"
    named = {"base_model_name_or_path": "google/paligemma-3b-pt-224", "revision": "bfloat16"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    asked = []

    def find(name: str, revision: str | None = None) -> Path:
        asked.append((name, revision))
        return base if name.startswith("google/") else Path(name)

    monkeypatch.setattr(opening, "find_checkpoint", find)
    open_checkpoint(str(adapter))
    assert asked[-1] == ("google/paligemma-3b-pt-224", "bfloat16")
