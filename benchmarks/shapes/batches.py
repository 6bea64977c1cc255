"""Batches of training: scenes of the pool with random prompts, and all that the losses ask about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from benchmarks.shapes.codebook import unpack
from benchmarks.shapes.network import NUM_PATCHES
from benchmarks.shapes.pool import GRID, PATCH, Pool
from benchmarks.shapes.scenes import CHARACTERS, MAX_OBJECTS, SHARES_WITH_MASKS, Example, make_examples
from benchmarks.shapes.vocabulary import LOCATIONS, NEWLINE, SEGMENTATIONS

IGNORE = -100
VALIDATION_SCENES = 60
"""The pool's last ones, never trained on."""
_BOX_ERROR = 12
"""Largest standard deviation, in bins, of an edge that the model is shown as its own: 1.3 pixels."""
_READ_ERROR = 0.1
"""Share of the characters that the model is shown as read by itself and are others."""


@dataclass
class Batch:
    """I images, B sequences: `input_ids` and `labels` [B, T] hold the text behind the image tokens.

    `points` [B, T] are the patches that hold the next character of an answer to `ocr`, IGNORE elsewhere.

    `masks` [M, 1, 64, 64] in -1..1 are those that the answers of rows `mask_row` [M] say, in their order, each
    within the box of `input_ids`, which is a little wrong, as a box is that the model has said.
    """

    pixel_values: Tensor
    image_index: Tensor
    input_ids: Tensor
    labels: Tensor
    prefix_length: Tensor
    length: Tensor
    ranks: Tensor
    points: Tensor
    masks: Tensor
    mask_row: Tensor
    dense: dict[str, Tensor]

    def masks_of(self, rows: Tensor) -> Tensor:
        """`masks` in the order in which the rows, all of them in the order `rows` [B], say them."""
        place = torch.empty_like(rows)
        place[rows] = torch.arange(len(rows), device=rows.device)
        return self.masks[place[self.mask_row].argsort(stable=True)]


class Encoder:
    """Turns examples into token ids: prefix and suffix apart, as the model is asked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.bos, self.eos, self.newline = (vocabulary[name] for name in ("<bos>", "<eos>", NEWLINE))
        self.first_location, self.first_code = vocabulary[LOCATIONS[0]], vocabulary[SEGMENTATIONS[0]]
        self.characters = np.array([vocabulary[character] for character in CHARACTERS])

    def prefix(self, example: Example) -> list[int]:
        return [self.bos, *self.tokenizer.encode(example.prompt, add_special_tokens=False).ids, self.newline]

    def suffix(self, example: Example) -> list[int]:
        return [*self.tokenizer.encode(example.answer, add_special_tokens=False).ids, self.eos]


def pixels_from_images(images: np.ndarray[Any, Any]) -> Tensor:
    """[I, H, W, 3] uint8 to [I, 3, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def misread(
    answer: np.ndarray[Any, Any], characters: np.ndarray[Any, Any], rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    """`answer` [T], an end behind characters, with some of them read wrong."""
    wrong = rng.random(len(answer)) < _READ_ERROR
    wrong[-1] = False
    return np.where(wrong, rng.choice(characters, len(answer)), answer)


def misplace(boxes: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """`boxes` [N, 4] in bins (y1, x1, y2, x2) with edges as far off as a model's; each keeps some width and height."""
    spread = rng.uniform(0, _BOX_ERROR, (len(boxes), 1))
    moved = boxes + rng.normal(size=boxes.shape) * spread
    moved = moved.round().astype(np.int64).clip(0, len(LOCATIONS) - 1)
    flat = (moved[:, 2:] <= moved[:, :2]).any(1, keepdims=True)
    return np.where(flat, boxes, moved)


def move_masks(masks: Tensor, boxes: np.ndarray[Any, Any], moved: np.ndarray[Any, Any]) -> Tensor:
    """What of `masks` [M, 1, 64, 64] in -1..1, each within its row of `boxes` [M, 4], lies within that of `moved`."""
    if not len(masks):  # nobody asked for a mask of what is there
        return masks
    before, after = torch.from_numpy(boxes).float(), torch.from_numpy(moved).float()
    size = before[:, 2:] - before[:, :2]
    scale = (after[:, 2:] - after[:, :2]) / size
    shift = (after.unflatten(1, (2, 2)).sum(1) - before.unflatten(1, (2, 2)).sum(1)) / size
    theta = torch.zeros(len(masks), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, 0, 2], theta[:, 1, 2] = scale[:, 1], scale[:, 0], shift[:, 1], shift[:, 0]
    grid = functional.affine_grid(theta, list(masks.shape), align_corners=False)
    return functional.grid_sample(masks + 1, grid, align_corners=False) - 1  # outside is 0, which is not inside


def make_batch(
    pool: Pool, encoder: Encoder, rng: np.random.Generator, num_images: int, prompts: int, device: str
) -> Batch:
    """Random scenes with random prompts."""
    picks = np.sort(rng.integers(len(pool) - VALIDATION_SCENES, size=num_images))
    prefixes, suffixes, said, ranks, read = [], [], [], [], []
    no_masks, no_boxes = np.zeros((0, pool.masks.shape[-1]), np.uint8), np.zeros((0, 4), np.int64)
    masks, mask_rows, boxes, moved = [no_masks], [], [no_boxes], [no_boxes]
    for index in picks.tolist():
        scene = pool.scene(index)
        for example in make_examples(scene, rng, prompts, SHARES_WITH_MASKS):
            prefixes.append(encoder.prefix(example))
            suffixes.append(encoder.suffix(example))
            said.append(np.array(suffixes[-1]))
            ranks.append(_patch_ranks(pool.patch_object[index], scene.objects, example))
            read.append(pool.patches_of_text(index) if example.task == "ocr" else [])
            if example.task == "ocr":
                said[-1] = misread(said[-1], encoder.characters, rng)
            if example.task == "segment":
                places = [_place(scene.objects, target) for target in example.targets]
                masks.append(pool.masks[index, places])
                mask_rows += [len(prefixes) - 1] * len(places)
                bins = said[-1] - encoder.first_location
                edges = (bins >= 0) & (bins < len(LOCATIONS))
                boxes.append(bins[edges].reshape(-1, 4))
                moved.append(misplace(boxes[-1], rng))
                said[-1][edges] = moved[-1].flatten() + encoder.first_location
    length = max(len(prefix) + len(suffix) for prefix, suffix in zip(prefixes, suffixes, strict=True)) - 1
    input_ids = np.zeros((len(prefixes), length), np.int64)
    labels = np.full((len(prefixes), length), IGNORE)
    points = np.full((len(prefixes), length), IGNORE)
    for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        end = len(prefix) + len(suffix) - 1
        input_ids[row, :end] = [*prefix, *said[row][:-1]]
        labels[row, len(prefix) - 1 : end] = suffix
        points[row, len(prefix) - 1 : len(prefix) - 1 + len(read[row])] = read[row]
    return Batch(
        pixel_values=pixels_from_images(pool.images[picks]).to(device),
        image_index=torch.arange(num_images, device=device).repeat_interleave(prompts),
        input_ids=torch.from_numpy(input_ids).to(device),
        labels=torch.from_numpy(labels).to(device),
        prefix_length=torch.tensor([len(prefix) for prefix in prefixes], device=device),
        length=torch.tensor(
            [len(prefix) + len(suffix) - 1 for prefix, suffix in zip(prefixes, suffixes, strict=True)], device=device
        ),
        ranks=torch.from_numpy(np.stack(ranks)).to(device),
        points=torch.from_numpy(points).to(device),
        masks=move_masks(unpack(np.concatenate(masks)), np.concatenate(boxes), np.concatenate(moved)).to(device),
        mask_row=torch.tensor(mask_rows, dtype=torch.long, device=device),
        dense={name: value.to(device) for name, value in _dense_targets(pool, picks).items()},
    )


def _dense_targets(pool: Pool, picks: np.ndarray[Any, Any]) -> dict[str, Tensor]:
    """What the heads on the vision encoder are asked of each patch of the scenes `picks` [I]."""
    objects = pool.patch_object[picks].astype(np.int64)
    rows = np.arange(len(picks))[:, None]
    centres = (np.stack(np.meshgrid(range(GRID), range(GRID)), -1).reshape(-1, 2) + 0.5) * PATCH
    patch_boxes = (pool.boxes[picks].astype(np.float32)[rows, objects] - np.tile(centres, 2)) / 32
    return {
        "patch_class": torch.from_numpy(np.where(objects < 0, -1, pool.classes[picks][rows, objects]).astype(np.int64)),
        "patch_box": torch.from_numpy(patch_boxes.astype(np.float32)),
        "patch_codes": torch.from_numpy(pool.codes[picks].astype(np.int64)[rows, objects]),
        "patch_chars": torch.from_numpy(pool.patch_chars[picks].astype(np.int64)),
        "patch_order": torch.from_numpy(pool.patch_order[picks].astype(np.int64)),
    }


def _place(objects: Any, target: Any) -> int:
    return next(place for place, item in enumerate(objects) if item is target)


def _patch_ranks(patch_object: Any, objects: Any, example: Example) -> np.ndarray[Any, Any]:
    if example.task == "ocr":
        return np.full(NUM_PATCHES, IGNORE)
    table = np.full(MAX_OBJECTS + 1, MAX_OBJECTS)  # the last one serves patch_object == -1
    for rank, target in enumerate(example.targets):
        table[_place(objects, target)] = rank
    ranks: np.ndarray[Any, Any] = table[patch_object]
    return ranks
