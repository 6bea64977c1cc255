"""Fit the mask decoder to the codes that the model says, instead of those that the encoder would.

    python -m benchmarks.shapes.refine_masks BUNDLE benchmarks/shapes/checkpoint/mask_decoder.safetensors

The model's codes are often near the true ones and seldom equal to them. BUNDLE answers `segment` on scenes
that are neither trained on nor scored; decoder and codewords learn to bring back what lies in the box of each
answer. What a code stands for hardly moves, so that the model need not be trained again. The file is replaced.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes.codebook import Codebook, load_decoder, overlap_loss, save_decoder
from benchmarks.shapes.pool import crop_mask
from benchmarks.shapes.scenes import HELD_OUT_SEED, make_scene
from paliedge import GenerationOptions, PaliGemma
from paliedge.results.locations import box_iou

FIRST_SEED = 9 * HELD_OUT_SEED // 10
"""Scenes from here up to the held-out ones are in no pool that anybody draws."""
_MIN_BOX_IOU = 0.4
_HELD_OUT_SHARE = 0.1
_BATCH = 64


def collect_answers(model: PaliGemma, num_scenes: int) -> tuple[Tensor, Tensor]:
    """Codes [N, 16] of the model's answers, and the true masks [N, 1, 64, 64] in -1..1 within their boxes."""
    codes, masks = [], []
    for seed in range(FIRST_SEED, FIRST_SEED + num_scenes):
        scene = make_scene(seed)
        encoded = model.encode(scene.image)
        for label in sorted({item.label for item in scene.objects}):
            objects = [item for item in scene.objects if item.label == label]
            for found in model.segment(encoded, [label], options=GenerationOptions(only_requested=True)).detections:
                overlap, place = max((box_iou(item.box, found.box), place) for place, item in enumerate(objects))
                if overlap >= _MIN_BOX_IOU and found.mask_codes:
                    codes.append(found.mask_codes)
                    masks.append(crop_mask(objects[place].mask, found.box))
    return torch.tensor(codes), torch.from_numpy(np.stack(masks)[:, None]).float() * 2 - 1


def refine(decoder: Codebook, codes: Tensor, masks: Tensor, steps: int, rate: float = 1e-3) -> dict[str, Any]:
    """Train `decoder` and its codewords in place; mean IoU on the last tenth, before and after."""
    torch.manual_seed(0)
    seen = len(codes) - max(1, round(_HELD_OUT_SHARE * len(codes)))
    before = mean_iou(decoder, codes[seen:], masks[seen:])
    decoder.embedding = torch.nn.Parameter(decoder.embedding)
    trained = [*decoder.decoder.parameters(), decoder.embedding]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        picks = torch.randint(seen, (_BATCH,))
        loss = overlap_loss(decoder.decode(codes[picks]), masks[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = mean_iou(decoder, codes[seen:], masks[seen:])
    return {"answers": len(codes), "steps": steps, "iou_before": round(before, 4), "iou_after": round(after, 4)}


def mean_iou(decoder: Codebook, codes: Tensor, masks: Tensor) -> float:
    """Of what the codes say with `masks`, within the box."""
    with torch.no_grad():
        found, inside = decoder.decode(codes) > 0, masks > 0
    return float(((found & inside).sum((1, 2, 3)) / (found | inside).sum((1, 2, 3)).clamp_min(1)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("mask_decoder", type=Path)
    parser.add_argument("--scenes", type=int, default=8_000)
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--log", type=Path, default=Path("benchmarks/results/shapes_refined_masks.json"))
    arguments = parser.parse_args()
    decoder = load_decoder(arguments.mask_decoder)
    codes, masks = collect_answers(PaliGemma.load(arguments.bundle), arguments.scenes)
    found = refine(decoder, codes, masks, arguments.steps)
    save_decoder(decoder, arguments.mask_decoder)
    arguments.log.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
