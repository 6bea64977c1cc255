"""Train the shapes model: a small PaliGemma, prefix-LM loss on the suffix, resumable.

    python -m benchmarks.shapes.pool POOL
    python -m benchmarks.shapes.codebook POOL mask_decoder.safetensors
    python -m benchmarks.shapes.train POOL RUN --steps 20000 --mask-decoder mask_decoder.safetensors
    python -m benchmarks.shapes.train ...                       # goes on where it stopped

On a CPU a process a core, each with one thread, is twice as fast as one process with two threads:
`OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.shapes.train ...`

RUN gets log.jsonl, the resumable state and, at the end, the checkpoint in Hugging Face format.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from transformers import PaliGemmaForConditionalGeneration

from benchmarks.shapes.batches import VALIDATION_SCENES, Encoder, make_batch
from benchmarks.shapes.codebook import load_decoder
from benchmarks.shapes.muon import Muon
from benchmarks.shapes.network import deepen, make_model, save_checkpoint
from benchmarks.shapes.pool import Pool
from benchmarks.shapes.trainee import ANSWER_LOSSES, Trainee
from benchmarks.shapes.validation import validate
from benchmarks.shapes.vocabulary import build_tokenizer
from paliedge_export.weights.integers import dequantize, quantize_int4

LOG_EVERY = 100
_MUON_RATE = 4


def _learning_rate(step: int, steps: int, peak: float, vision_steps: int) -> float:
    """Cosine decay; each of the two phases warms up."""
    warm = min(1.0, (step + 1 - (vision_steps if step >= vision_steps else 0)) / 200)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def _dense_weight(step: int, steps: int) -> float:
    """Full for the first half of training, down to a twentieth at nine tenths."""
    return float(np.interp(step / steps, (0.5, 0.9), (1.0, 0.05)))


def make_optimizers(trainee: Trainee, rate: float, worker: int, num_workers: int) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for tables, heads, norms and biases."""
    layers = (trainee.model.model.vision_tower.encoder, trainee.model.model.language_model.layers)
    matrices = [p for stack in layers for p in stack.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in trainee.parameters() if p.requires_grad and id(p) not in chosen]
    return [
        Muon(matrices, rate, weight_decay=0.02, worker=worker, num_workers=num_workers),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def average_gradients(model: nn.Module, num_workers: int) -> None:
    """Mean of the workers' gradients, in one exchange."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= num_workers
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def round_to_4_bits(weight: Tensor) -> Tensor:
    """`weight` [N, K] as `--precision int4` leaves it, all inputs taken for equally large."""
    rows = weight.T.cpu().numpy()
    return torch.from_numpy(dequantize(quantize_int4(rows, np.ones(len(rows), np.float32))).T)


@contextmanager
def rounded(trainee: Trainee) -> Iterator[None]:
    """The decoder's linear layers in 4 bits; what they were is back afterwards, and takes the gradient."""
    matrices = [p for p in trainee.model.model.language_model.layers.parameters() if p.ndim == 2]
    kept = [matrix.detach().clone() for matrix in matrices]
    with torch.no_grad():
        for matrix, weight in zip(matrices, kept, strict=True):
            matrix.copy_(round_to_4_bits(weight))
    try:
        yield
    finally:
        with torch.no_grad():
            for matrix, weight in zip(matrices, kept, strict=True):
                matrix.copy_(weight)


class Run:
    """One training run in its folder: what is learned, and how far it is."""

    def __init__(self, arguments: argparse.Namespace, num_workers: int, rank: int) -> None:
        torch.manual_seed(0)
        self.options = arguments
        self.num_workers, self.rank = num_workers, rank
        self.tokenizer = build_tokenizer()
        self.encoder = Encoder(self.tokenizer)
        start: Path | None = arguments.start
        model = PaliGemmaForConditionalGeneration.from_pretrained(start) if start else make_model(self.tokenizer)
        deepen(model)
        mask_decoder = load_decoder(arguments.mask_decoder)
        self.trainee = Trainee(model.float().train(), self.tokenizer, mask_decoder).to(arguments.device)
        self.optimizers = make_optimizers(self.trainee, arguments.rate, rank, num_workers)
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
        rng = np.random.default_rng((options.seed, self.step, self.rank))
        batch = make_batch(self.pool, self.encoder, rng, images, prompts, options.device)
        rate = _learning_rate(self.step, options.steps, options.rate, options.vision_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (_MUON_RATE if isinstance(optimizer, Muon) else 1)
        self.trainee.zero_grad(set_to_none=True)
        rounds = options.round_every and not alone and self.step % options.round_every == 0
        with rounded(self.trainee) if rounds else nullcontext():
            with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.bf16):
                losses = self.trainee.vision_loss(batch) if alone else self.trainee(batch)
            dense = _dense_weight(self.step, options.steps)
            weighted = [value if name in ANSWER_LOSSES else dense * value for name, value in losses.items()]
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
    parser.add_argument(
        "--mask-decoder", type=Path, default=Path("benchmarks/shapes/checkpoint/mask_decoder.safetensors")
    )
    parser.add_argument("--weights", dest="start", type=Path, help="checkpoint whose weights to start from")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--vision-steps", type=int, default=3_000, help="of these, on the vision encoder alone")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn from the pool")
    parser.add_argument(
        "--round-every", type=int, default=3, help="one of so many steps has the decoder in 4 bits; 0: none"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--every", type=int, default=500, help="steps between validations and saved states")
    arguments = parser.parse_args()
    train(arguments)


if __name__ == "__main__":
    main()
