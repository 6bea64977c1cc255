"""The smallest complete fine-tune of a PaliGemma: examples in, an adapter or whole weights out.

    python -m benchmarks.shapes.largest EXAMPLES
    python -m benchmarks.shapes.fine_tune benchmarks/shapes/checkpoint EXAMPLES/samples.jsonl ADAPTER
    paliedge export ADAPTER -o BUNDLE

With --full all weights are trained, and OUTPUT is a checkpoint. Nothing here knows of shapes: any PaliGemma and any
JSONL of `image`, `prefix` and `suffix` will do. It learns the suffix alone, as PaliGemma was trained.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def fine_tune(
    checkpoint: str, examples: Path, output: Path, *, full: bool, steps: int, batch: int = 16, rate: float = 1e-3
) -> list[float]:
    """Train for `steps` on `batch` random examples each, and save; returns the loss of each step."""
    random.seed(0)
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    model = PaliGemmaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    if not full:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=_LINEARS))
    model.train()
    lines = [json.loads(line) for line in examples.read_text().splitlines()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    losses = []
    for _ in range(steps):
        chosen = random.choices(lines, k=batch)
        inputs = processor(
            images=[Image.open(examples.parent / line["image"]).convert("RGB") for line in chosen],
            text=["<image>" + line["prefix"] for line in chosen],
            suffix=[line["suffix"] for line in chosen],
            padding="longest",
            return_tensors="np",
        )
        loss = model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(output)
    processor.save_pretrained(output)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder or a hub id")
    parser.add_argument("examples", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--full", action="store_true", help="all weights instead of an adapter")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    losses = fine_tune(
        arguments.checkpoint, arguments.examples, arguments.output, full=arguments.full, steps=arguments.steps
    )
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}: {arguments.output}")


if __name__ == "__main__":
    main()
