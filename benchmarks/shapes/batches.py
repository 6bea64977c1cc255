"""Batches of training: scenes of the pool with random prompts, and all that the losses ask about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.shapes.codebook import unpack
from benchmarks.shapes.network import NUM_PATCHES
from benchmarks.shapes.pool import GRID, PATCH, Pool
from benchmarks.shapes.scenes import MAX_OBJECTS, SHARES_WITH_MASKS, Example, make_examples
from benchmarks.shapes.vocabulary import NEWLINE

IGNORE = -100
VALIDATION_SCENES = 60
"""The pool's last ones, never trained on."""
_TASKS_WITH_TARGETS = ("detect", "count", "colour", "segment")


@dataclass
class Batch:
    """I images, B sequences: `input_ids` and `labels` [B, T] hold the text behind the image tokens.

    `masks` [M, 1, 64, 64] in -1..1 are those that the answers of rows `mask_row` [M] say, in their order.
    """

    pixel_values: Tensor
    image_index: Tensor
    input_ids: Tensor
    labels: Tensor
    prefix_length: Tensor
    length: Tensor
    ranks: Tensor
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

    def prefix(self, example: Example) -> list[int]:
        return [self.bos, *self.tokenizer.encode(example.prompt, add_special_tokens=False).ids, self.newline]

    def suffix(self, example: Example) -> list[int]:
        return [*self.tokenizer.encode(example.answer, add_special_tokens=False).ids, self.eos]


def pixels_from_images(images: np.ndarray[Any, Any]) -> Tensor:
    """[I, H, W, 3] uint8 to [I, 3, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def make_batch(
    pool: Pool, encoder: Encoder, rng: np.random.Generator, num_images: int, prompts: int, device: str
) -> Batch:
    """Random scenes with random prompts."""
    picks = np.sort(rng.integers(len(pool) - VALIDATION_SCENES, size=num_images))
    prefixes, suffixes, ranks, masks, mask_rows = [], [], [], [np.zeros((0, pool.masks.shape[-1]), np.uint8)], []
    for index in picks.tolist():
        scene = pool.scene(index)
        for example in make_examples(scene, rng, prompts, SHARES_WITH_MASKS):
            prefixes.append(encoder.prefix(example))
            suffixes.append(encoder.suffix(example))
            ranks.append(_patch_ranks(pool.patch_object[index], scene.objects, example))
            if example.task == "segment":
                places = [_place(scene.objects, target) for target in example.targets]
                masks.append(pool.masks[index, places])
                mask_rows += [len(prefixes) - 1] * len(places)
    length = max(len(prefix) + len(suffix) for prefix, suffix in zip(prefixes, suffixes, strict=True)) - 1
    input_ids = np.zeros((len(prefixes), length), np.int64)
    labels = np.full((len(prefixes), length), IGNORE)
    for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        text = prefix + suffix
        input_ids[row, : len(text) - 1] = text[:-1]
        labels[row, len(prefix) - 1 : len(text) - 1] = suffix
    objects = pool.patch_object[picks].astype(np.int64)
    rows = np.arange(num_images)[:, None]
    centres = (np.stack(np.meshgrid(range(GRID), range(GRID)), -1).reshape(-1, 2) + 0.5) * PATCH
    boxes = (pool.boxes[picks].astype(np.float32)[rows, objects] - np.tile(centres, 2)) / 32
    dense = {
        "patch_class": torch.from_numpy(np.where(objects < 0, -1, pool.classes[picks][rows, objects]).astype(np.int64)),
        "patch_box": torch.from_numpy(boxes.astype(np.float32)),
        "patch_codes": torch.from_numpy(pool.codes[picks].astype(np.int64)[rows, objects]),
        "patch_chars": torch.from_numpy(pool.patch_chars[picks].astype(np.int64)),
        "patch_order": torch.from_numpy(pool.patch_order[picks].astype(np.int64)),
    }
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
        masks=unpack(np.concatenate(masks)).to(device),
        mask_row=torch.tensor(mask_rows, dtype=torch.long, device=device),
        dense={name: value.to(device) for name, value in dense.items()},
    )


def _place(objects: Any, target: Any) -> int:
    return next(place for place, item in enumerate(objects) if item is target)


def _patch_ranks(patch_object: Any, objects: Any, example: Example) -> np.ndarray[Any, Any]:
    if example.task not in _TASKS_WITH_TARGETS:
        return np.full(NUM_PATCHES, IGNORE)
    table = np.full(MAX_OBJECTS + 1, MAX_OBJECTS)  # the last one serves patch_object == -1
    for rank, target in enumerate(example.targets):
        table[_place(objects, target)] = rank
    ranks: np.ndarray[Any, Any] = table[patch_object]
    return ranks
