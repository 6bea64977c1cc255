"""Train the shapes model's mask codebook: 16 codes out of 128 a mask, as PaliGemma's segmentation tokens are.

    python -m benchmarks.shapes.pool POOL
    python -m benchmarks.shapes.codebook POOL mask_decoder.safetensors
    python -m benchmarks.shapes.codebook POOL --decoder mask_decoder.safetensors     # codes of another pool

A VQ-VAE on masks of 64 x 64 pixels, cropped to their boxes. Its decoder and its codebook have the
names and the layout of the published vae-oid.npz, only narrower, and are what is written; the encoder serves
training alone: with it each mask of the pool gets its codes, POOL/codes.npy.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.shapes.pool import MASK_SIZE

NUM_CODES = 128
GRID = 4
CODES = GRID * GRID
_HELD_OUT = 2_000
_COMMITMENT = 0.25
_DECAY = 0.99


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class Codebook(nn.Module):
    """Masks [N, 1, 64, 64] in -1..1 to codes [N, 16], row by row, and back.

    Args:
        width: channels of the residual blocks; the published one has 128.
        dim: size of a codeword; the published one has 512.

    Attributes:
        keeps_words: training leaves the codewords where they are.
    """

    embedding: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, width: int = 32, dim: int = 32) -> None:
        super().__init__()
        self.keeps_words = False
        halves = [width, width // 2, width // 4, width // 8]
        self.encoder = nn.Sequential()
        for narrow, wide in zip([1, *halves[:0:-1]], halves[::-1], strict=True):
            self.encoder.extend([nn.Conv2d(narrow, wide, 4, 2, 1), nn.ReLU()])
        self.encoder.extend([_ResidualBlock(width), _ResidualBlock(width), nn.Conv2d(width, dim, 1)])
        self.decoder = nn.Sequential(nn.Conv2d(dim, width, 1), nn.ReLU(), _ResidualBlock(width), _ResidualBlock(width))
        for wide, narrow in zip([width, *halves[:-1]], halves, strict=True):
            self.decoder.extend([nn.ConvTranspose2d(wide, narrow, 4, 2, 1), nn.ReLU()])
        self.decoder.append(nn.Conv2d(halves[-1], 1, 1))
        self.register_buffer("embedding", torch.randn(NUM_CODES, dim))
        self.register_buffer("counts", torch.ones(NUM_CODES))
        self.register_buffer("sums", self.embedding.clone())

    def nearest(self, latent: Tensor) -> Tensor:
        """Codes [N, 16] of latents [N, D, 4, 4]."""
        points = latent.flatten(2).transpose(1, 2)
        return torch.cdist(points, self.embedding[None]).argmin(-1)

    def encode(self, masks: Tensor) -> Tensor:
        return self.nearest(self.encoder(masks))

    def decode(self, codes: Tensor) -> Tensor:
        """Maps [N, 1, 64, 64], positive inside."""
        words = self.embedding[codes].transpose(1, 2).unflatten(2, (GRID, GRID))
        return self.decoder(words)

    def forward(self, masks: Tensor) -> Tensor:
        """The loss; in training the codewords move to the means of what they stand for."""
        latent = self.encoder(masks)
        codes = self.nearest(latent)
        words = self.embedding[codes].transpose(1, 2).unflatten(2, (GRID, GRID))
        if self.training and not self.keeps_words:
            self._move(latent.detach().flatten(2).transpose(1, 2).flatten(0, 1), codes.flatten())
        found = self.decoder(latent + (words - latent).detach())
        return functional.mse_loss(found, masks) + _COMMITMENT * functional.mse_loss(latent, words)

    def _move(self, points: Tensor, codes: Tensor) -> None:
        """Exponential means; a codeword that nothing uses takes the place of a random point."""
        chosen = functional.one_hot(codes, NUM_CODES).to(points.dtype)
        self.counts.mul_(_DECAY).add_(chosen.sum(0), alpha=1 - _DECAY)
        self.sums.mul_(_DECAY).add_(chosen.T @ points, alpha=1 - _DECAY)
        self.embedding.copy_(self.sums / self.counts[:, None].clamp_min(1e-5))
        dead = (self.counts < 0.05).nonzero()[:, 0]
        fresh = points[torch.randint(len(points), (len(dead),))]
        self.embedding[dead], self.sums[dead], self.counts[dead] = fresh, fresh, 1.0


def overlap_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy and soft IoU of `maps`, positive inside, with `masks` in -1..1; both [M, 1, 64, 64]."""
    inside, logits = (masks + 1) / 2, 2 * maps
    probs = logits.sigmoid()
    both = (probs * inside).sum((1, 2, 3))
    either = (probs + inside).sum((1, 2, 3)) - both
    return functional.binary_cross_entropy_with_logits(logits, inside) + 1 - ((both + 1) / (either + 1)).mean()


def load_masks(pool: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Packed masks [M, 512] of all objects, and where they belong [M, 2]: scene and place."""
    packed, classes = (np.load(pool / f"{name}.npy", mmap_mode="r") for name in ("masks", "classes"))
    places = np.argwhere(classes >= 0)
    return packed[places[:, 0], places[:, 1]], places


def unpack(packed: np.ndarray[Any, Any]) -> Tensor:
    """Masks [N, 1, 64, 64] in -1..1."""
    bits = np.unpackbits(packed, axis=1).reshape(-1, 1, MASK_SIZE, MASK_SIZE)
    return torch.from_numpy(bits).float() * 2 - 1


@torch.no_grad()
def round_trip(model: Codebook, packed: np.ndarray[Any, Any]) -> float:
    """Mean IoU of masks with what comes back from their codes."""
    model.eval()
    found = []
    for part in np.array_split(packed, max(1, len(packed) // 500)):
        masks = unpack(part)
        inside, decoded = masks > 0, model.decode(model.encode(masks)) > 0
        overlap = (inside & decoded).sum((1, 2, 3)) / (inside | decoded).sum((1, 2, 3))
        found.append(overlap)
    model.train()
    return float(torch.cat(found).mean())


def train(
    packed: np.ndarray[Any, Any], steps: int, log: Path, decoder: Path | None, batch: int = 128, rate: float = 2e-3
) -> Codebook:
    """Train on all but the last masks; `log` gets the round trip on those, a row a line.

    With `decoder` that and its codewords stay what they are, and an encoder learns to say a mask in them.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = load_decoder(decoder).train() if decoder else Codebook()
    model.keeps_words = decoder is not None
    parameters = (model.encoder if decoder else model).parameters()
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    held_out, seen = packed[-_HELD_OUT:], packed[:-_HELD_OUT]
    started, rows = time.perf_counter(), list[str]()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = model(unpack(seen[rng.integers(len(seen), size=batch)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            row = {
                "step": step + 1,
                "loss": round(float(loss.detach()), 4),
                "round_trip_iou": round(round_trip(model, held_out), 4),
            }
            rows.append(json.dumps(row | {"seconds": round(time.perf_counter() - started, 1)}))
            print(rows[-1], flush=True)
            log.write_text("\n".join(rows) + "\n")
    model.eval()
    return model


@torch.no_grad()
def write_codes(model: Codebook, packed: np.ndarray[Any, Any], places: np.ndarray[Any, Any], pool: Path) -> None:
    """The codes of every mask of the pool, for training to read."""
    codes = np.zeros((*np.load(pool / "classes.npy", mmap_mode="r").shape, CODES), np.uint8)
    for start in range(0, len(packed), 1_000):
        scene, place = places[start : start + 1_000].T
        codes[scene, place] = model.encode(unpack(packed[start : start + 1_000])).numpy()
    np.save(pool / "codes.npy", codes)


def save_decoder(model: Codebook, path: Path) -> None:
    """Decoder and codebook under their published names."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name.startswith("decoder.")}
    save_file(tensors | {"_vq_vae._embedding": model.embedding.detach().contiguous()}, path)


def load_decoder(path: Path) -> Codebook:
    """What `save_decoder` wrote; the encoder is a fresh one."""
    tensors = load_file(path)
    model = Codebook()
    tensors["embedding"] = tensors.pop("_vq_vae._embedding")
    model.load_state_dict(tensors, strict=False)
    model.eval()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("output", type=Path, nargs="?", help="where the decoder goes; not needed with --decoder")
    parser.add_argument("--decoder", type=Path, help="keep this decoder and its codewords")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--log", type=Path, default=Path("benchmarks/results/shapes_codebook.jsonl"))
    arguments = parser.parse_args()
    if (arguments.output is None) == (arguments.decoder is None):
        parser.error("give either a file for a new decoder, or --decoder")
    packed, places = load_masks(arguments.pool)
    model = train(packed, arguments.steps, arguments.log, arguments.decoder)
    if arguments.output:
        save_decoder(model, arguments.output)
    write_codes(model, packed, places, arguments.pool)


if __name__ == "__main__":
    main()
