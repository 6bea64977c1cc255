"""Token ids come from tokenizer.json, preprocessing from the processor's file in its old and new place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from benchmarks.make_checkpoint import make_tokenizer
from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.metadata import read_preprocess
from paliedge_export.checkpoint.tokenizer import read_tokenizer
from paliedge_export.exporter import export_bundle
from tests.export.conftest import Tiny

Json = dict[str, Any]
SIZE = {"height": 224, "width": 224}


def edit_tokenizer(source: Path, folder: Path, edit: Callable[[Json], object]) -> None:
    raw = json.loads((source / "tokenizer.json").read_text())
    edit(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def keep_added(raw: Json, keep: Callable[[str], bool]) -> None:
    raw["added_tokens"] = [token for token in raw["added_tokens"] if keep(token["content"])]


def test_ids_are_those_of_the_tokenizer_that_transformers_loads(paligemma: Tiny) -> None:
    tokens = read_tokenizer([paligemma.checkpoint]).tokens
    reference = AutoTokenizer.from_pretrained(paligemma.checkpoint)
    wanted = ["<bos>", "<eos>", "<pad>", "<image>", "<loc0000>", "<loc1023>", "<seg000>", "<seg127>"]
    last = (tokens.first_location + tokens.num_locations - 1, tokens.first_segmentation + tokens.num_segmentations - 1)
    assert reference.convert_tokens_to_ids(wanted) == [
        tokens.bos,
        tokens.eos,
        tokens.pad,
        tokens.image,
        tokens.first_location,
        last[0],
        tokens.first_segmentation,
        last[1],
    ]
    assert reference("\n", add_special_tokens=False).input_ids == [tokens.newline]


def test_the_vocabulary_ends_before_the_image_token_and_padded_rows(paligemma: Tiny) -> None:
    tokens = read_tokenizer([paligemma.checkpoint]).tokens
    rows = paligemma.model.get_input_embeddings().weight.shape[0]
    assert tokens.vocab_size == tokens.image == tokens.first_segmentation + 128 < rows


def test_the_full_size_tokenizer_has_the_ids_of_paligemma(tmp_path: Path) -> None:
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokens = read_tokenizer([tmp_path]).tokens
    assert (tokens.pad, tokens.eos, tokens.bos) == (0, 1, 2)
    assert (tokens.first_location, tokens.first_segmentation, tokens.image) == (256_000, 257_024, 257_152)
    assert tokens.vocab_size == 257_152


@pytest.mark.parametrize("index", [None, 256_000, 0])
def test_the_image_token_of_config_json_makes_no_difference(index: int | None, paligemma: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(paligemma.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["image_token_index"]
    (folder / "config.json").write_text(json.dumps(config | ({} if index is None else {"image_token_index": index})))
    export_bundle(str(folder), tmp_path / "bundle", compare=False)
    for path in paligemma.bundle.iterdir():
        assert (tmp_path / "bundle" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_plain_gemma_tokenizer_is_refused(paligemma: Tiny, tmp_path: Path) -> None:
    edit_tokenizer(
        paligemma.checkpoint, tmp_path, lambda raw: keep_added(raw, lambda name: name[1:4] not in ("loc", "seg"))
    )
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer([tmp_path])
    assert "<loc0000>" in caught.value.found
    assert "plain Gemma tokenizer" in caught.value.action


def test_a_tokenizer_without_an_image_token_is_refused(paligemma: Tiny, tmp_path: Path) -> None:
    edit_tokenizer(paligemma.checkpoint, tmp_path, lambda raw: keep_added(raw, lambda name: name != "<image>"))
    with pytest.raises(CheckpointError, match="<image>"):
        read_tokenizer([tmp_path])


def test_location_tokens_out_of_order_are_refused(paligemma: Tiny, tmp_path: Path) -> None:
    swap = {"<loc1023>": "<loc1022>", "<loc1022>": "<loc1023>"}

    def edit(raw: Json) -> None:
        for token in raw["added_tokens"]:
            token["content"] = swap.get(token["content"], token["content"])

    edit_tokenizer(paligemma.checkpoint, tmp_path, edit)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id("<loc1023>") is not None
    with pytest.raises(CheckpointError, match="other ids"):
        read_tokenizer([tmp_path])


@pytest.mark.parametrize(
    ("content", "found"), [(None, "no such file"), ("{", "does not load"), ("[]", "something else")]
)
def test_a_tokenizer_that_cannot_be_read_is_refused(content: str | None, found: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=found):
        read_tokenizer([tmp_path])


@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("preprocessor_config.json", lambda raw: raw),
        ("processor_config.json", lambda raw: {"image_processor": raw, "processor_class": "PaliGemmaProcessor"}),
    ],
)
def test_preprocessing_is_read_from_either_file(file: str, wrap: Callable[[Json], Json], tmp_path: Path) -> None:
    raw = {"size": SIZE, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / file).write_text(json.dumps(wrap(raw)))
    found = read_preprocess(tmp_path, 224)
    assert (found.resample, found.mean, found.std) == ("bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_preprocessing_without_a_file_is_paligemmas(tmp_path: Path) -> None:
    found = read_preprocess(tmp_path, 224)
    assert (found.resample, found.mean, found.std) == ("bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ({"size": {"height": 448, "width": 448}}, "448"),
        ({"size": {"shortest_edge": 224}}, "shortest_edge"),
        ({"size": SIZE, "resample": 6}, "resample 6"),
        ({"size": SIZE, "resample": "bicubic"}, "bicubic"),
        ({"do_resize": False}, "do_resize: false"),
        ({"do_center_crop": True, "crop_size": SIZE}, "do_center_crop: true"),
        ({"do_pad": True}, "do_pad: true"),
    ],
)
def test_preprocessing_that_the_runtime_does_not_do_is_refused(raw: Json, found: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=found):
        read_preprocess(tmp_path, 224)


@pytest.mark.parametrize("content", ["{", "[]", '{"image_processor": 3}'])
def test_a_processor_file_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"processor_config\.json"):
        read_preprocess(tmp_path, 224)


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "ViTImageProcessor", "ConvNextImageProcessor"])
def test_another_models_image_processor_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind}))
    with pytest.raises(CheckpointError, match=kind):
        read_preprocess(tmp_path, 56)


@pytest.mark.parametrize(
    "raw",
    [
        {"image_processor_type": "SiglipImageProcessorFast", "resample": None},
        {
            "feature_extractor_type": "SiglipFeatureExtractor",
            "size": {"height": 56, "width": 56, "shortest_edge": None},
        },
        {"image_mean": None, "rescale_factor": None, "do_resize": None},
    ],
)
def test_null_is_the_usual_value(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    assert read_preprocess(tmp_path, 56) == read_preprocess(tmp_path / "nothing", 56)
