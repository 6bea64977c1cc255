"""Train the shapes model: a small PaliGemma, prefix-LM loss on the suffix, resumable.

    python -m benchmarks.shapes.pool POOL
    python -m benchmarks.shapes.codebook POOL mask_decoder.safetensors
    python -m benchmarks.shapes.train POOL RUN --steps 20000
    python -m benchmarks.shapes.train POOL RUN --steps 20000    # goes on where it stopped

On a CPU a process a core, each with one thread, is twice as fast as one process with two threads:
`OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.shapes.train ...`

RUN gets log.jsonl, the resumable state and, at the end, the checkpoint in Hugging Face format.
Three helps that training has and the model does not keep: location targets are spread over the
neighbouring bins; a dense head on the vision encoder's output names each patch's object, its box, the codes
of its mask and its characters; a head in the middle of the decoder marks the patches that answer the prompt, by rank.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn
from torch.nn import functional
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from benchmarks.shapes.codebook import CODES, NUM_CODES
from benchmarks.shapes.pool import CHARS_PER_PATCH, GRID, PATCH, Pool
from benchmarks.shapes.scenes import (
    CHARACTERS,
    CLASSES,
    IMAGE_SIZE,
    MAX_OBJECTS,
    SHARES_WITH_MASKS,
    Example,
    make_examples,
)
from benchmarks.shapes.vocabulary import IMAGE, LOCATIONS, NEWLINE, build_tokenizer, write_tokenizer

NUM_PATCHES = GRID * GRID
IGNORE = -100
LOG_EVERY = 100
VALIDATION_SCENES = 60
_VALIDATION_TOKENS = 80
_CODE = re.compile("<seg[0-9]{3}>")
_TASKS_WITH_TARGETS = ("detect", "count", "colour", "segment")
_MARK_LAYER = 3
_LENGTH_GROUPS = 3
_MUON_RATE = 4
_SOFT_BINS = 512 / IMAGE_SIZE
"""Standard deviation of a location target, in bins: half a pixel."""


def make_config(tokenizer: Tokenizer, width: int = 128) -> PaliGemmaConfig:
    """The shapes model's dimensions, as transformers' configuration."""
    rows = -(-(tokenizer.get_vocab_size() + 1) // 64) * 64  # PaliGemma, too, stores rows beyond its vocabulary
    vocabulary = tokenizer.get_vocab()
    tokens = {name: vocabulary[f"<{name}>"] for name in ("pad", "bos", "eos")}
    vision = SiglipVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=width,
        vision_use_head=False,
    )
    text = GemmaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=5 * width // 2,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=width // 4,
        max_position_embeddings=512,
        hidden_activation="gelu_pytorch_tanh",
        **{f"{name}_token_id": value for name, value in tokens.items()},
    )
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary[IMAGE],
        projection_dim=width,
        hidden_size=width,
        tie_word_embeddings=True,
        **{f"{name}_token_id": value for name, value in tokens.items()},
    )
    config.text_config.num_image_tokens = NUM_PATCHES
    return config


def _fourier_features(positions: Tensor, width: int, scale: float, seed: int) -> Tensor:
    """Random Fourier features [N, width] whose dot products fall off with distance over about `scale`."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.randn(width // 2, generator=generator) / scale
    angles = positions[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(width / 2)


def make_model(tokenizer: Tokenizer) -> PaliGemmaForConditionalGeneration:
    """A fresh model; neighbouring location tokens and neighbouring patches start out alike."""
    config = make_config(tokenizer)
    config._attn_implementation = "sdpa"
    model = PaliGemmaForConditionalGeneration(config)
    width = config.text_config.hidden_size
    first = tokenizer.get_vocab()[LOCATIONS[0]]
    edges = torch.arange(len(LOCATIONS)) / (len(LOCATIONS) - 1)
    centres = (torch.arange(GRID) + 0.5) / GRID
    half = width // 2
    with torch.no_grad():
        rows = torch.cat([_fourier_features(edges, half, scale, 1) for scale in (0.015, 0.1)], 1)
        model.model.language_model.embed_tokens.weight[first : first + len(LOCATIONS)] = 0.4 * rows
        grid = torch.cat(
            [
                _fourier_features(centres, half, 0.2, 2).repeat_interleave(GRID, 0),
                _fourier_features(centres, half, 0.2, 3).repeat(GRID, 1),
            ],
            1,
        )
        model.model.vision_tower.embeddings.position_embedding.weight.copy_(2 * grid)
        model.model.vision_tower.embeddings.patch_embedding.weight.normal_(0, 0.05)
        model.model.multi_modal_projector.linear.weight.normal_(0, 0.1)
    return model


class DenseHeads(nn.Module):
    """What training asks of every patch, dropped afterwards."""

    sizes = (len(CLASSES) + 1, 4, CHARS_PER_PATCH * (len(CHARACTERS) + 1), 7)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, sum(self.sizes))
        self.codes = nn.Linear(width, CODES * NUM_CODES)
        self.mark = nn.Linear(width, MAX_OBJECTS + 1)

    def patch_losses(self, features: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """`features` [I, 64, D] of the vision encoder."""
        classes, box, chars, order = self.patch(features).split(self.sizes, -1)
        inside = targets["patch_class"] >= 0
        char_targets = targets["patch_chars"].flatten() % (len(CHARACTERS) + 1)
        char_losses = functional.cross_entropy(chars.reshape(-1, len(CHARACTERS) + 1), char_targets, reduction="none")
        has_char = char_targets != len(CHARACTERS)
        kinds = targets["patch_class"].flatten() % (len(CLASSES) + 1)
        codes = self.codes(features[inside]).unflatten(-1, (CODES, NUM_CODES))
        return {
            "class": functional.cross_entropy(classes.flatten(0, 1), kinds),
            "box": 12 * functional.smooth_l1_loss(box[inside], targets["patch_box"][inside], beta=0.03),
            "code": 0.3 * functional.cross_entropy(codes.flatten(0, 1), targets["patch_codes"][inside].flatten()),
            "char": char_losses.mean() + char_losses[has_char].sum() / (has_char.sum() + 1),
            "order": functional.cross_entropy(order.flatten(0, 1), targets["patch_order"].flatten() % 7),
        }

    def mark_loss(self, hidden: Tensor, ranks: Tensor) -> Tensor:
        """`hidden` [B, 64, D] in the middle of the decoder; `ranks` [B, 64], or IGNORE."""
        hidden = functional.rms_norm(hidden, hidden.shape[-1:])
        return functional.cross_entropy(self.mark(hidden).flatten(0, 1), ranks.flatten(), ignore_index=IGNORE)


@dataclass
class Batch:
    """I images, B sequences: `input_ids` and `labels` [B, T] hold the text behind the image tokens."""

    pixel_values: Tensor
    image_index: Tensor
    input_ids: Tensor
    labels: Tensor
    prefix_length: Tensor
    length: Tensor
    ranks: Tensor
    dense: dict[str, Tensor]


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
    prefixes, suffixes, ranks = [], [], []
    for index in picks.tolist():
        scene = pool.scene(index)
        for example in make_examples(scene, rng, prompts, SHARES_WITH_MASKS):
            prefixes.append(encoder.prefix(example))
            suffixes.append(encoder.suffix(example))
            ranks.append(_patch_ranks(pool.patch_object[index], scene.objects, example))
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
        dense={name: value.to(device) for name, value in dense.items()},
    )


def _patch_ranks(patch_object: Any, objects: Any, example: Example) -> np.ndarray[Any, Any]:
    if example.task not in _TASKS_WITH_TARGETS:
        return np.full(NUM_PATCHES, IGNORE)
    table = np.full(MAX_OBJECTS + 1, MAX_OBJECTS)  # the last one serves patch_object == -1
    for rank, target in enumerate(example.targets):
        table[next(place for place, item in enumerate(objects) if item is target)] = rank
    ranks: np.ndarray[Any, Any] = table[patch_object]
    return ranks


def prefix_lm_mask(prefix_length: Tensor, length: Tensor, width: int) -> Tensor:
    """[B, 1, width, width] bool: everyone sees the prefix, the suffix sees itself causally, nobody the padding."""
    place = torch.arange(width, device=length.device)
    visible = (place[None, None, :] <= place[None, :, None]) | (place[None, None, :] < prefix_length[:, None, None])
    visible = visible & (place[None, None, :] < length[:, None, None])
    return (visible | torch.eye(width, dtype=torch.bool, device=length.device))[:, None]


class Trainee(nn.Module):
    """Model and heads with the loss as forward."""

    def __init__(self, model: PaliGemmaForConditionalGeneration, first_location: int) -> None:
        super().__init__()
        self.model = model
        self.heads = DenseHeads(model.config.text_config.hidden_size)
        self.first_location = first_location
        bins = torch.arange(len(LOCATIONS))
        spread = torch.exp(-((bins[:, None] - bins[None, :]) ** 2) / (2 * _SOFT_BINS**2))
        self.register_buffer("spread", spread / spread.sum(1, keepdim=True), persistent=False)

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.model.vision_tower(pixel_values).last_hidden_state
        return features, self.model.model.multi_modal_projector(features)

    def decode(self, images: Tensor, input_ids: Tensor, prefix_length: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, 64 + T, D]: after layer `_MARK_LAYER`, and the last."""
        language = self.model.model.language_model
        embeds = torch.cat([images, language.embed_tokens(input_ids)], 1)
        mask = prefix_lm_mask(prefix_length + NUM_PATCHES, length + NUM_PATCHES, embeds.shape[1])
        positions = torch.arange(1, embeds.shape[1] + 1, device=embeds.device)[None]
        hidden = embeds
        middle = hidden
        rotary = language.rotary_emb(hidden, positions)
        for index, layer in enumerate(language.layers):
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            if index + 1 == _MARK_LAYER:
                middle = hidden
        return middle, language.norm(hidden)

    def vision_loss(self, batch: Batch) -> dict[str, Tensor]:
        """The dense losses alone: what the vision encoder learns before the decoder joins."""
        features, _ = self.encode_images(batch.pixel_values)
        return self.heads.patch_losses(features.float(), batch.dense)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features, images = self.encode_images(batch.pixel_values)
        chosen, marks = [], []
        order = batch.length.argsort()
        for rows in order.chunk(_LENGTH_GROUPS):  # short texts apart from long ones: less padding
            width = int(batch.length[rows].max())
            lengths = batch.prefix_length[rows], batch.length[rows]
            middle, hidden = self.decode(images[batch.image_index[rows]], batch.input_ids[rows, :width], *lengths)
            chosen.append(hidden[:, NUM_PATCHES:][batch.labels[rows, :width] != IGNORE])
            marks.append(middle[:, :NUM_PATCHES])
        log_probs = self.model.lm_head(torch.cat(chosen)).float().log_softmax(-1)
        labels = batch.labels[order]
        labels = labels[labels != IGNORE]
        bins = labels - self.first_location
        is_location = (bins >= 0) & (bins < len(LOCATIONS))
        location_probs = log_probs[is_location][:, self.first_location : self.first_location + len(LOCATIONS)]
        location = -(self.spread[bins[is_location]] * location_probs).sum()
        text = functional.nll_loss(log_probs[~is_location], labels[~is_location], reduction="sum")
        return {
            "location": location / (is_location.sum() + 1),
            "text": text / ((~is_location).sum() + 1),
            **self.heads.patch_losses(features.float(), batch.dense),
            "mark": self.heads.mark_loss(torch.cat(marks).float(), batch.ranks[order]),
        }


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
    answers = decode_freely(trainee, encoder, images, [example for _, example in pairs], _VALIDATION_TOKENS)
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
        best = max((item for item in free if item[1] == label), key=lambda item: _iou(item[0], box), default=None)
        hit = best is not None and _iou(best[0], box) > 0.5
        if hit and best is not None:
            free.remove(best)
        hits.append(float(hit))
    return hits


def _iou(first: list[int], second: list[int]) -> float:
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    inter = float(np.prod(np.maximum(high - low, 0)))
    areas = [float((box[2] - box[0]) * (box[3] - box[1])) for box in (first, second)]
    return inter / max(sum(areas) - inter, 1e-9)


def _learning_rate(step: int, steps: int, peak: float, vision_steps: int) -> float:
    """Cosine decay; each of the two phases warms up."""
    warm = min(1.0, (step + 1 - (vision_steps if step >= vision_steps else 0)) / 200)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def _dense_weight(step: int, steps: int) -> float:
    """Full for the first half of training, down to a twentieth at nine tenths."""
    return float(np.interp(step / steps, (0.5, 0.9), (1.0, 0.05)))


def make_optimizers(trainee: Trainee, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for tables, heads, norms and biases."""
    layers = (trainee.model.model.vision_tower.encoder, trainee.model.model.language_model.layers)
    matrices = [p for stack in layers for p in stack.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in trainee.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def save_checkpoint(model: PaliGemmaForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Hugging Face format, float16 weights: half the size of what training holds."""
    half = PaliGemmaForConditionalGeneration(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    processor = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": NUM_PATCHES,
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "PaliGemmaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def average_gradients(model: nn.Module, num_workers: int) -> None:
    """Mean of the workers' gradients, in one exchange."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= num_workers
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class Run:
    """One training run in its folder: what is learned, and how far it is."""

    def __init__(self, arguments: argparse.Namespace, num_workers: int, rank: int) -> None:
        torch.manual_seed(0)
        self.options = arguments
        self.num_workers, self.rank = num_workers, rank
        self.tokenizer = build_tokenizer()
        self.encoder = Encoder(self.tokenizer)
        first_location = self.tokenizer.get_vocab()[LOCATIONS[0]]
        start: Path | None = arguments.start
        model = PaliGemmaForConditionalGeneration.from_pretrained(start) if start else make_model(self.tokenizer)
        self.trainee = Trainee(model.float().train(), first_location).to(arguments.device)
        self.optimizers = make_optimizers(self.trainee, arguments.rate)
        self.pool = Pool.load(arguments.pool)
        self.step, self._seconds, self._started = 0, 0.0, time.perf_counter()
        self._state_path: Path = arguments.run / "state.pt"
        if self._state_path.exists():
            state = torch.load(self._state_path, weights_only=True)
            self.trainee.load_state_dict(state["trainee"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self._seconds = state["step"], state["seconds"]

    @property
    def seconds(self) -> float:
        """Time spent in training, over all starts."""
        return self._seconds + time.perf_counter() - self._started

    def train_step(self) -> dict[str, float]:
        """One optimizer step on fresh examples; returns its losses."""
        options, alone = self.options, self.step < self.options.vision_steps
        num_images = options.images // self.num_workers
        images, prompts = (num_images * options.prompts, 1) if alone else (num_images, options.prompts)
        rng = np.random.default_rng((1, self.step, self.rank))
        batch = make_batch(self.pool, self.encoder, rng, images, prompts, options.device)
        rate = _learning_rate(self.step, options.steps, options.rate, options.vision_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (_MUON_RATE if isinstance(optimizer, torch.optim.Muon) else 1)
        with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.bf16):
            losses = self.trainee.vision_loss(batch) if alone else self.trainee(batch)
        dense = _dense_weight(self.step, options.steps)
        weighted = [value if name in ("location", "text") else dense * value for name, value in losses.items()]
        self.trainee.zero_grad(set_to_none=True)
        torch.stack(weighted).sum().backward()
        if self.num_workers > 1:
            average_gradients(self.trainee, self.num_workers)
        nn.utils.clip_grad_norm_(self.trainee.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return {name: float(value.detach()) for name, value in losses.items()}

    def save(self) -> None:
        """Keep all that a later start needs; the file is whole at any moment."""
        state = {
            "trainee": self.trainee.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self._state_path.with_suffix(".new")
        torch.save(state, partial)
        partial.replace(self._state_path)

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to log.jsonl, in place of what a killed run logged beyond its last saved state."""
        path = self.options.run / "log.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        rows = [old for old in rows if old["step"] < self.step] + [row]
        path.write_text("".join(json.dumps(old) + "\n" for old in rows))
        print(json.dumps(row), flush=True)


def train(arguments: argparse.Namespace) -> None:
    """Train to `arguments.steps` and write the checkpoint."""
    arguments.run.mkdir(parents=True, exist_ok=True)
    num_workers, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if num_workers > 1:
        distributed.init_process_group("gloo")
    run = Run(arguments, num_workers, rank)
    recent: dict[str, list[float]] = defaultdict(list)
    while run.step < arguments.steps:
        for name, value in run.train_step().items():
            recent[name].append(value)
        last = run.step == arguments.steps
        save = last or run.step % arguments.every == 0
        if rank or not (save or run.step % LOG_EVERY == 0):
            continue
        row: dict[str, Any] = {"step": run.step, **{name: round(fmean(values), 4) for name, values in recent.items()}}
        recent.clear()
        if save and run.step > arguments.vision_steps:
            row |= validate(run.trainee, run.encoder, run.pool, VALIDATION_SCENES)
        if save:
            run.save()
        run.log(row | {"seconds": round(run.seconds, 1)})
    if rank == 0:
        save_checkpoint(run.trainee.model, run.tokenizer, arguments.run / "checkpoint")
    if num_workers > 1:
        distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--weights", dest="start", type=Path, help="checkpoint whose weights to start from")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--vision-steps", type=int, default=3_000, help="of these, on the vision encoder alone")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--every", type=int, default=500, help="steps between validations and saved states")
    arguments = parser.parse_args()
    train(arguments)


if __name__ == "__main__":
    main()
