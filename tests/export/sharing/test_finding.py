"""A name where a bundle is expected: a bundle on the hub is fetched, a checkpoint is exported, once."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.cache import list_cache
from paliedge.cli import main
from paliedge.errors import BundleError, CheckpointError
from paliedge.model import SHIPPED_BUNDLE
from paliedge_export.sharing import finding
from paliedge_export.sharing.finding import find_bundle
from tests.export.checkpoint.test_lora import adapt
from tests.export.sharing.hub import FakeHub
from tests.paths import SHAPES_CHECKPOINT
from tests.tiny import make_tiny

SCENE = Path(SHIPPED_BUNDLE).parent / "scenes" / "scene-1.png"


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    hub = FakeHub(tmp_path)
    hub.install(monkeypatch)
    return hub


class Asked:
    """Says yes, and remembers what was asked and reported."""

    def __init__(self) -> None:
        self.questions: list[str] = []
        self.lines: list[str] = []

    def find(self, name: object) -> Path:
        return find_bundle(str(name), self.questions.append, self.lines.append)


def test_a_bundle_on_the_hub_is_fetched_whole_and_nothing_else(fake_hub: FakeHub) -> None:
    fake_hub.add("me/bundle", SHIPPED_BUNDLE)
    (fake_hub.folder / "me" / "bundle" / "other.bin").write_bytes(b"not of the bundle")
    asked = Asked()
    found = asked.find("me/bundle")
    Bundle(found).verify_hashes()
    assert asked.questions == []
    assert "other.bin" not in fake_hub.downloads
    assert set(fake_hub.downloads.values()) == {1}
    assert asked.find(f"me/bundle@{found.name}") == found


def test_an_altered_file_of_such_a_bundle_is_found(fake_hub: FakeHub) -> None:
    fake_hub.add("me/bundle", SHIPPED_BUNDLE)
    weights = fake_hub.folder / "me" / "bundle" / "decoder.fp32.weights"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="other content"):
        Bundle(Asked().find("me/bundle"))


@pytest.mark.parametrize("place", ["hub", "folder"])
def test_a_checkpoint_is_exported_once_and_again_when_it_changes(place: str, fake_hub: FakeHub, tmp_path: Path) -> None:
    make_tiny(tmp_path / "first", "paligemma")
    make_tiny(tmp_path / "second", "paligemma", seed=1)
    if place == "hub":
        fake_hub.add("me/model", tmp_path / "first")
        name, folder = "me/model", fake_hub.folder / "me" / "model"
    else:
        name, folder = str(tmp_path / "model"), tmp_path / "model"
        shutil.copytree(tmp_path / "first", folder)
    asked = Asked()
    first = asked.find(name)
    assert asked.find(name) == first
    assert len(asked.questions) == 1
    assert "exported once, in fp32" in asked.questions[0]
    assert [entry.path for entry in list_cache() if entry.path == first]
    shutil.copy(tmp_path / "second" / "model.safetensors", folder)
    os.utime(folder / "model.safetensors", ns=(time.time_ns(), time.time_ns()))
    second = asked.find(name)
    assert second != first
    assert len(asked.questions) == 2
    assert (second / "decoder.fp32.weights").read_bytes() != (first / "decoder.fp32.weights").read_bytes()


def test_who_says_no_leaves_nothing_behind(fake_hub: FakeHub, tmp_path: Path) -> None:
    class NoError(Exception):
        pass

    def refuse(question: str) -> None:
        raise NoError

    with pytest.raises(NoError):
        find_bundle(str(SHAPES_CHECKPOINT), refuse, lambda line: None)
    assert list_cache() == []


def test_a_repository_that_is_not_there_is_named(fake_hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="me/nothing"):
        Asked().find("me/nothing")


def ask(*arguments: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(main, ["detect", str(SCENE), "yellow star", *map(str, arguments)], input=answer)


def test_the_command_takes_a_checkpoint_where_a_bundle_is_expected(fake_hub: FakeHub) -> None:
    refused = ask("-m", SHAPES_CHECKPOINT)
    assert refused.exit_code == 2
    assert "Add --yes" in refused.stderr
    plain = ask("--json")
    result = ask("-m", SHAPES_CHECKPOINT, "--yes", "--json")
    assert result.exit_code == 0
    assert "exported once, in fp32" in result.stderr
    again = ask("-m", SHAPES_CHECKPOINT, "--json")
    assert "exported" not in again.stderr
    for said in (result, again):
        assert json.loads(said.stdout)["detections"] == json.loads(plain.stdout)["detections"]


def test_verbs_with_an_argument_take_a_hub_id_too(fake_hub: FakeHub) -> None:
    fake_hub.add("me/bundle", SHIPPED_BUNDLE)
    result = CliRunner().invoke(main, ["info", "me/bundle", "--json"])
    assert json.loads(result.stdout) == json.loads((SHIPPED_BUNDLE / "bundle.json").read_text())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for a name that goes
def test_the_size_of_an_adapter_is_that_of_its_base_too(fake_hub: FakeHub, tmp_path: Path) -> None:
    make_tiny(tmp_path / "base", "paligemma")
    adapter = tmp_path / "adapter"
    adapt(tmp_path / "base", adapter, {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]})
    path = adapter / "adapter_config.json"
    for place in (str(tmp_path / "base"), "me/base"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": place}))
        if place == "me/base":
            fake_hub.add(place, tmp_path / "base")
        wanted = sum(
            one.stat().st_size for folder in ("base", "adapter") for one in (tmp_path / folder).glob("*.safetensors")
        )
        assert finding._size_of(adapter) == wanted
