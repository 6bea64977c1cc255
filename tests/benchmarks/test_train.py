"""Training runs, goes on where it stopped, and leaves a checkpoint that transformers loads."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration

from benchmarks.shapes.average_weights import average
from benchmarks.shapes.batches import IGNORE, Encoder, make_batch, misplace, misread, move_masks
from benchmarks.shapes.codebook import (
    CODES,
    NUM_CODES,
    Codebook,
    load_decoder,
    load_masks,
    round_trip,
    save_decoder,
    unpack,
    write_codes,
)
from benchmarks.shapes.codebook import train as train_codebook
from benchmarks.shapes.muon import Muon
from benchmarks.shapes.network import NUM_LAYERS, deepen, make_model
from benchmarks.shapes.pool import GRID, PATCH, Pool, crop_mask, draw_pool
from benchmarks.shapes.refine_masks import collect_answers, mean_iou, refine
from benchmarks.shapes.scenes import CLASSES, JUDGED_PHOTOGRAPHS, PHOTOGRAPHS, TRAINED_PHOTOGRAPHS, make_scene
from benchmarks.shapes.train import rounded, train
from benchmarks.shapes.trainee import Trainee, prefix_lm_mask
from benchmarks.shapes.vocabulary import SEGMENTATIONS, build_tokenizer
from paliedge import PaliGemma
from tests.paths import SHAPES_CHECKPOINT

MASK_DECODER = Path("benchmarks/shapes/checkpoint/mask_decoder.safetensors")


@pytest.fixture(scope="module")
def codebook() -> Codebook:
    torch.manual_seed(0)
    model = Codebook()
    model.eval()
    return model


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, codebook: Codebook) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    draw_pool(folder, 40, workers=1)
    packed, places = load_masks(folder)
    write_codes(codebook, packed, places, folder)
    return folder


def test_the_pool_keeps_scenes_as_they_are_drawn(pool: Path) -> None:
    loaded = Pool.load(pool)
    for index in range(40):
        drawn, kept = make_scene(index), loaded.scene(index)
        assert (kept.image == drawn.image).all()
        assert [(item.label, item.box) for item in kept.objects] == [(item.label, item.box) for item in drawn.objects]
        assert (kept.text.text if kept.text else "") == (drawn.text.text if drawn.text else "")
        for place, item in enumerate(drawn.objects):
            patches = loaded.patch_object[index].reshape(8, 8) == place
            covered = item.mask.reshape(8, 14, 8, 14).any(axis=(1, 3))
            assert not (patches & ~covered).any()
            assert CLASSES[loaded.classes[index, place]] == item.label


def test_the_prefix_sees_itself_and_the_suffix_sees_back() -> None:
    mask = prefix_lm_mask(torch.tensor([2, 3]), torch.tensor([4, 3]), 5)[:, 0].int().tolist()
    assert mask[0] == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],  # padding: sees something, is seen by nothing
    ]
    assert [row[3] for row in mask[1][:3]] == [0, 0, 0]


def test_training_resumes_and_ends_with_a_checkpoint(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.shapes.train.LOG_EVERY", 2)
    monkeypatch.setattr("benchmarks.shapes.train.VALIDATION_SCENES", 1)
    monkeypatch.setattr("benchmarks.shapes.batches.VALIDATION_SCENES", 1)
    monkeypatch.setattr("benchmarks.shapes.train.build_tokenizer", lambda: build_tokenizer(50))
    arguments = argparse.Namespace(
        pool=pool,
        run=tmp_path,
        steps=2,
        vision_steps=1,
        images=4,
        prompts=2,
        rate=1e-3,
        device="cpu",
        bf16=False,
        every=2,
        start=None,
        mask_decoder=MASK_DECODER,
        seed=1,
        round_every=3,
    )
    train(arguments)
    first = (tmp_path / "state.pt").stat().st_mtime_ns
    arguments.steps = 4
    train(arguments)
    assert (tmp_path / "state.pt").stat().st_mtime_ns > first
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4]
    model = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    assert model.dtype == torch.bfloat16
    assert len(model.model.language_model.layers) == NUM_LAYERS
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 4


def test_new_layers_change_nothing_at_first() -> None:
    model = PaliGemmaForConditionalGeneration.from_pretrained(SHAPES_CHECKPOINT).float()
    before = list(model.model.language_model.layers)
    inputs = {
        "input_ids": torch.tensor([[model.config.image_token_id] * 64 + [2, 10, 11, 4]]),
        "pixel_values": torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0)),
    }
    with torch.no_grad():
        logits = model(**inputs).logits
        deepen(model, len(before) + 3)
        assert torch.equal(model(**inputs).logits, logits)
    after = list(model.model.language_model.layers)
    assert len(after) == len(before) + 3
    assert [layer for layer in after if layer in before] == before
    assert [layer.self_attn.layer_idx for layer in after] == list(range(len(after)))


def test_muon_is_torchs() -> None:
    """torch's works in bfloat16: equal to the third digit of an update."""
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(size)) for size in ((12, 40), (40, 12), (16, 16))] for _ in "ab")
    optimizers = [Muon(ours, 0.02, 0.1), torch.optim.Muon(theirs, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        moved = (other - 1).norm()
        assert (one - other).norm() < 0.02 * moved


def test_some_characters_are_shown_as_misread_and_the_end_is_not() -> None:
    answer, characters = np.array([5, 6, 7, 8, 1]), np.arange(20, 56)
    shown = np.stack([misread(answer, characters, np.random.default_rng(seed)) for seed in range(400)])
    wrong = shown != answer
    assert 0.07 < wrong[:, :-1].mean() < 0.13
    assert not wrong[:, -1].any()
    assert set(shown[wrong].tolist()) <= set(characters.tolist())


def test_what_was_read_is_shown_misread_and_asked_right(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.shapes.batches.VALIDATION_SCENES", 1)
    monkeypatch.setattr("benchmarks.shapes.batches._READ_ERROR", 1.0)
    encoder = Encoder(build_tokenizer(50))
    batch = make_batch(Pool.load(pool), encoder, np.random.default_rng(0), 16, 4, "cpu")
    read = batch.points[:, :-1] != IGNORE
    asked, shown = batch.labels[:, :-1][read], batch.input_ids[:, 1:][read]
    assert len(asked) > 5
    assert (asked != shown).float().mean() > 0.8
    assert set(asked.tolist()) | set(shown.tolist()) <= set(encoder.characters.tolist())


def test_a_codebook_learns_to_bring_masks_back(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.shapes.codebook._HELD_OUT", 20)
    packed, places = load_masks(pool)
    assert packed.shape == (len(places), 512)
    model = train_codebook(packed[:44], 250, tmp_path / "log.jsonl", None, batch=12)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 250
    assert rows[-1]["loss"] < 0.5  # an untrained one is at 1
    assert round_trip(model, packed[:24]) > 0.72  # the whole box would be 0.66
    assert len(set(model.encode(unpack(packed[:24])).flatten().tolist())) > 1
    save_decoder(model, tmp_path / "decoder.safetensors")
    other = train_codebook(packed[:44], 60, tmp_path / "log.jsonl", tmp_path / "decoder.safetensors", batch=12)
    kept, trained = model.state_dict(), other.state_dict()
    fixed = [name for name in kept if name == "embedding" or name.startswith("decoder.")]
    assert all(torch.equal(trained[name], kept[name]) for name in fixed)
    assert round_trip(other, packed[:24]) > 0.66, "an encoder learns to say masks in codewords that stay"


def test_an_answer_points_at_the_patches_of_its_characters(pool: Path) -> None:
    loaded = Pool.load(pool)
    texts = [index for index in range(len(loaded)) if loaded.scene(index).text]
    assert texts
    for index in texts:
        drawn = make_scene(index).text
        assert drawn is not None
        patches = [int(y // PATCH) * GRID + int(x // PATCH) for x, y in drawn.centres]
        assert loaded.patches_of_text(index) == patches


def test_scenes_on_photographs_keep_some_for_judging_and_are_otherwise_alike() -> None:
    seen = [make_scene(seed, photographs=True) for seed in range(12)]
    assert all(np.array_equal(one.image, make_scene(seed, photographs=True).image) for seed, one in enumerate(seen))
    assert any(not np.array_equal(one.image, make_scene(seed).image) for seed, one in enumerate(seen))
    assert not set(TRAINED_PHOTOGRAPHS) & set(JUDGED_PHOTOGRAPHS)
    listed = (PHOTOGRAPHS / "README.md").read_text()
    for name in (*TRAINED_PHOTOGRAPHS, *JUDGED_PHOTOGRAPHS):
        assert (PHOTOGRAPHS / f"{name}.jpg").is_file()
        assert f"{name}.jpg" in listed, "its licence is told"


def test_masks_stand_where_their_codes_are_said(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.shapes.batches.VALIDATION_SCENES", 1)
    tokenizer = build_tokenizer(50)
    batch = make_batch(Pool.load(pool), Encoder(tokenizer), np.random.default_rng(0), 8, 4, "cpu")
    order = batch.length.argsort()
    codes = batch.labels[order] - tokenizer.token_to_id(SEGMENTATIONS[0])
    said = ((codes >= 0) & (codes < NUM_CODES)).sum(1) // CODES
    rows = order.repeat_interleave(said)
    assert batch.mask_row.tolist() == sorted(rows.tolist()) != rows.tolist()
    numbered = dataclasses.replace(batch, masks=batch.mask_row)
    assert numbered.masks_of(order).tolist() == rows.tolist()


def test_a_mask_follows_the_box_that_was_said() -> None:
    rng = np.random.default_rng(0)
    objects = [item for seed in range(20) for item in make_scene(seed).objects]
    boxes = np.array([(box.y1, box.x1, box.y2, box.x2) for box in (item.box for item in objects)]) * 1023 // 112
    moved = misplace(boxes, rng)
    assert 2 < np.abs(moved - boxes).mean() < 8
    assert (moved[:, 2:] > moved[:, :2]).all()
    assert moved.min() >= 0
    assert moved.max() <= 1023
    masks = torch.from_numpy(np.stack([crop_mask(item.mask, item.box) for item in objects])[:, None]).float() * 2 - 1
    edges = (moved * 112 / 1023)[:, [1, 0, 3, 2]]
    expected = np.stack([crop_mask(item.mask, tuple(box)) for item, box in zip(objects, edges, strict=True)])
    assert move_masks(masks[:0], boxes[:0], moved[:0]).shape == (0, 1, 64, 64)
    found = (move_masks(masks, boxes, moved) > 0)[:, 0].numpy()
    kept = (masks > 0)[:, 0].numpy()
    overlaps = [((one & expected).sum((1, 2)) / (one | expected).sum((1, 2))).mean() for one in (found, kept)]
    assert overlaps[0] > 0.95 > 0.9 > overlaps[1]


def test_a_step_in_4_bits_leaves_the_weights_as_they_were(codebook: Codebook) -> None:
    tokenizer = build_tokenizer(50)
    trainee = Trainee(make_model(tokenizer), tokenizer, codebook)
    before = {name: value.clone() for name, value in trainee.state_dict().items()}
    with rounded(trainee):
        inside = trainee.state_dict()
        changed = {name for name, value in inside.items() if not torch.equal(value, before[name])}
        layer = inside["model.model.language_model.layers.0.mlp.down_proj.weight"]
        assert layer.unflatten(1, (-1, 64))[0, 0].unique().numel() <= 15
    with pytest.raises(KeyboardInterrupt), rounded(trainee):
        raise KeyboardInterrupt
    assert len(changed) == NUM_LAYERS * 7
    assert all(".layers." in name and "language_model" in name for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in trainee.state_dict().items())


def test_the_mask_loss_asks_for_codes_that_show_the_mask(codebook: Codebook) -> None:
    decoder = load_decoder(MASK_DECODER)
    tokenizer = build_tokenizer(50)
    trainee = Trainee(make_model(tokenizer), tokenizer, decoder)
    said, other = torch.randint(NUM_CODES, (2, 5, CODES), generator=torch.Generator().manual_seed(0))
    masks = (decoder.decode(said) > 0).float() * 2 - 1
    log_probs = torch.nn.functional.one_hot(other.flatten(), NUM_CODES).float().mul(5).log_softmax(-1).requires_grad_()
    wrong = trainee.mask_loss(log_probs, masks)
    wrong.backward()
    right = trainee.mask_loss(torch.nn.functional.one_hot(said.flatten(), NUM_CODES).float().log_softmax(-1), masks)
    assert float(right) < 0.5 * float(wrong.detach())
    assert log_probs.grad is not None
    assert bool(log_probs.grad.any())
    assert float(trainee.mask_loss(log_probs[:0].detach(), masks[:0])) == 0


def test_a_refined_decoder_shows_what_the_model_meant() -> None:
    codes, masks = collect_answers(PaliGemma.load(), 30)
    assert codes.shape == (len(masks), CODES)
    decoder = load_decoder(MASK_DECODER)
    for parameter in decoder.decoder[-1].parameters():
        torch.nn.init.zeros_(parameter)
    assert mean_iou(decoder, codes, masks) == 0
    found = refine(decoder, codes, masks, 60)
    assert found["iou_after"] > 0.6 > found["iou_before"]


def test_masks_are_cropped_to_their_boxes() -> None:
    for item in make_scene(3).objects:
        crop = crop_mask(item.mask, item.box)
        assert crop.shape == (64, 64)
        assert crop.any(axis=0).all()  # the box is tight
        assert crop.any(axis=1).all()
        x1, y1, x2, y2 = item.box
        assert crop.mean() == pytest.approx(item.mask[y1:y2, x1:x2].mean(), abs=0.03)


def test_an_average_lies_between_its_checkpoints(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second", "mean")]
    for folder, value in zip(folders, (1.0, 2.0, 0.0), strict=True):
        folder.mkdir()
        save_file({"weight": torch.full((2,), value).half()}, folder / "model.safetensors")
    average(folders[:2], folders[2])
    found = load_file(folders[2] / "model.safetensors")["weight"]
    assert found.dtype == torch.float16
    assert found.tolist() == [1.5, 1.5]
    save_file({"weight": torch.zeros(3)}, folders[1] / "model.safetensors")
    with pytest.raises(ValueError, match="second has other tensors than"):
        average(folders[:2], folders[2])
