"""A bundle pushed to a hub comes back whole, under a card that says what it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard

from paliedge import PaliGemma
from paliedge.bundle.bundle import Bundle
from paliedge.cli import main
from paliedge.errors import BundleError, OutputError
from paliedge.model import SHIPPED_BUNDLE
from paliedge_export.sharing.finding import find_bundle
from paliedge_export.sharing.pushing import push_bundle, write_card
from tests.export.sharing.hub import FakeHub

SECRET = "hf_secretsecretsecret"


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub(tmp_path)
    hub.install(monkeypatch)
    return hub


def test_what_was_pushed_is_fetched_and_answers(fake_hub: FakeHub, tmp_path: Path) -> None:
    shutil.copytree(SHIPPED_BUNDLE, tmp_path / "bundle")
    (tmp_path / "bundle" / "notes.txt").write_text("mine")
    result = CliRunner().invoke(main, ["push", str(tmp_path / "bundle"), "me/shapes"])
    assert result.exit_code == 0
    assert result.stdout == "hub/me/shapes\n"
    assert not (fake_hub.folder / "me" / "shapes" / "notes.txt").exists()
    found = find_bundle("me/shapes", pytest.fail, lambda line: None)
    scene = SHIPPED_BUNDLE.parent / "scenes" / "scene-1.png"
    with PaliGemma.load(found) as model, PaliGemma.load() as shipped:
        assert model.caption(scene).token_ids == shipped.caption(scene).token_ids


def test_the_card_is_what_the_hub_reads_and_names_hashes_and_terms(fake_hub: FakeHub) -> None:
    push_bundle(SHIPPED_BUNDLE, "me/shapes")
    text = (fake_hub.folder / "me" / "shapes" / "README.md").read_text()
    card = ModelCard(text)
    found = {name: getattr(card.data, name) for name in ("license", "library_name", "pipeline_tag")}
    assert found == {"license": "gemma", "library_name": "paliedge", "pipeline_tag": "image-text-to-text"}
    manifest = Bundle(SHIPPED_BUNDLE).manifest
    for name, file in manifest.files.items():
        assert f"| `{name}` | {file.size} | `{file.sha256}` |" in card.text
    assert "ai.google.dev/gemma/terms" in card.text
    assert "-m me/shapes" in card.text
    assert "ai.google.dev/gemma/terms" in (fake_hub.folder / "me" / "shapes" / "NOTICE").read_text()


def test_another_licence_brings_no_notice_of_gemmas(fake_hub: FakeHub) -> None:
    push_bundle(SHIPPED_BUNDLE, "me/shapes", license="apache-2.0")
    assert not (fake_hub.folder / "me" / "shapes" / "NOTICE").exists()
    text = (fake_hub.folder / "me" / "shapes" / "README.md").read_text()
    assert "license: apache-2.0" in text
    assert "ai.google.dev" not in text


def test_a_damaged_bundle_is_not_pushed(fake_hub: FakeHub, tmp_path: Path) -> None:
    shutil.copytree(SHIPPED_BUNDLE, tmp_path / "bundle")
    path = tmp_path / "bundle" / "decoder.fp32.weights"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError):
        push_bundle(tmp_path / "bundle", "me/shapes")
    assert not fake_hub.folder.exists()


def test_a_hub_that_refuses_is_named_without_the_token(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise RuntimeError(f"401 for {SECRET}")

    monkeypatch.setattr(fake_hub, "upload_folder", refuse)
    with pytest.raises(OutputError, match="hf auth login") as caught:
        push_bundle(SHIPPED_BUNDLE, "me/shapes")
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("checkpoint", "named"), [("google/x", "google/x"), ("google/x@0f3a", "google/x"), ("mine", "")]
)
def test_the_card_names_the_base_model_where_that_is_on_the_hub(checkpoint: str, named: str) -> None:
    manifest = Bundle(SHIPPED_BUNDLE).manifest
    manifest = msgspec.structs.replace(
        manifest, producer=msgspec.structs.replace(manifest.producer, checkpoint=checkpoint)
    )
    card = ModelCard(write_card(manifest, "me/it", "gemma"))
    assert (getattr(card.data, "base_model", None) or "") == named
