"""How well the model answers while it is trained: a look at what it writes, not the scores that are published."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from benchmarks.shapes.batches import Encoder, pixels_from_images
from benchmarks.shapes.network import NUM_PATCHES
from benchmarks.shapes.pool import Pool
from benchmarks.shapes.scenes import SHARES_WITH_MASKS, Example, make_examples
from benchmarks.shapes.trainee import Trainee
from paliedge.results.locations import box_iou

_MAX_TOKENS = 80
_CODE = re.compile("<seg[0-9]{3}>")


@torch.no_grad()
def decode_freely(trainee: Trainee, encoder: Encoder, images: Any, examples: list[Example], limit: int) -> list[str]:
    """Greedy answers, each step a whole pass: slow and plain, for validation only."""
    device = next(trainee.parameters()).device
    _, features = trainee.encode_images(pixels_from_images(images).to(device))
    prefixes = [encoder.prefix(example) for example in examples]
    width = max(map(len, prefixes)) + limit
    ids = torch.zeros((len(examples), width), dtype=torch.long, device=device)
    for row, prefix in enumerate(prefixes):
        ids[row, : len(prefix)] = torch.tensor(prefix)
    prefix_length = torch.tensor([len(prefix) for prefix in prefixes], device=device)
    length = prefix_length.clone()
    done = torch.zeros(len(examples), dtype=torch.bool, device=device)
    rows = torch.arange(len(examples), device=device)
    for _ in range(limit):
        filled = int(length.max())
        _, hidden = trainee.decode(features, ids[:, :filled], prefix_length, length)
        token = trainee.model.lm_head(hidden[rows, NUM_PATCHES + length - 1]).argmax(-1)
        done |= token == encoder.eos
        if done.all():
            break
        ids[rows[~done], length[~done]] = token[~done]
        length[~done] += 1
    answers = []
    for row in range(len(examples)):
        answer = ids[row, int(prefix_length[row]) : int(length[row])].tolist()
        answers.append(encoder.tokenizer.decode(answer, skip_special_tokens=False))
    return answers


def validate(trainee: Trainee, encoder: Encoder, pool: Pool, num_scenes: int) -> dict[str, float]:
    """On the pool's last scenes, decoding freely: exactly right answers by task, boxes with IoU over 0.5, codes."""
    rng = np.random.default_rng(0)
    scenes = [pool.scene(index) for index in range(len(pool) - num_scenes, len(pool))]
    pairs = [(scene, example) for scene in scenes for example in make_examples(scene, rng, 2, SHARES_WITH_MASKS)]
    images = np.stack([scene.image for scene, _ in pairs])
    answers = decode_freely(trainee, encoder, images, [example for _, example in pairs], _MAX_TOKENS)
    right: dict[str, list[float]] = defaultdict(list)
    for answer, (_, example) in zip(answers, pairs, strict=True):
        right[example.task].append(answer == example.answer)
        if example.task in ("detect", "segment"):
            right[f"{example.task}_structure"].append(_labels(answer) == _labels(example.answer))
            right[f"{example.task}_iou50"] += _matched(answer, example.answer)
        if example.task == "segment":
            found, expected = (_CODE.findall(text) for text in (answer, example.answer))
            right["codes"] += [one == other for one, other in zip(found, expected, strict=False)]
    return {name: round(float(np.mean(values)), 4) for name, values in right.items()}


def _labels(answer: str) -> list[str]:
    return [label for _, label in _boxes(answer)]


def _boxes(answer: str) -> list[tuple[list[int], str]]:
    """Location bins and label of each object; masks are passed over."""
    found = []
    for part in _CODE.sub("", answer).split(" ; "):
        digits = [part[index + 4 : index + 8] for index in range(0, 36, 9)]
        if all(len(text) == 4 and text.isdigit() for text in digits):
            found.append(([int(text) for text in digits], part[36:]))
    return found


def _matched(answer: str, expected: str) -> list[float]:
    free = _boxes(answer)
    hits = []
    for box, label in _boxes(expected):
        best = max((item for item in free if item[1] == label), key=lambda item: box_iou(item[0], box), default=None)
        hit = best is not None and box_iou(best[0], box) > 0.5
        if hit and best is not None:
            free.remove(best)
        hits.append(float(hit))
    return hits
