"""The child process of transformers: `python -m benchmarks.peers.hf CHECKPOINT INPUTS`, in an environment with torch.

It is called as its authors mean it to be: with `token_type_ids`, without which PaliGemma's mask is wrong; compiled,
with a static cache that is allocated once, so that every step has the shapes of the one before it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PaliGemmaForConditionalGeneration, StaticCache
from transformers.modeling_outputs import ModelOutput

from benchmarks.peers.harness import Clock, Inputs, load_inputs, measure

DTYPES = ("float32", "bfloat16")


class Transformers:
    """PaliGemma on torch, fed tokens.

    Args:
        folder: the checkpoint.
        inputs: what it is fed.
        dtype: one of `DTYPES`.
        compiled: by torch.compile, with a static cache; else eager, with the cache that grows.
    """

    def __init__(self, folder: Path, inputs: Inputs, dtype: str, compiled: bool) -> None:
        model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        # transformers calls it `cache` from 5.24 on
        self._cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        vision = model.config.vision_config
        num_image_tokens = (vision.image_size // vision.patch_size) ** 2
        self._ids = torch.tensor([[model.config.image_token_id] * num_image_tokens + inputs.prompt])
        self._forced = inputs.forced
        self._pixels = torch.from_numpy(inputs.pixels).to(model.dtype)
        self._features, self._forward = model.get_image_features, model.forward
        self._static: StaticCache | None = None
        if compiled:
            self._static = _static_cache(model, self._ids.shape[1] + len(self._forced))
            self._features, self._forward = (
                torch.compile(one, dynamic=False) for one in (self._features, self._forward)
            )

    def _step(self, ids: torch.Tensor, length: int, past: Any, **inputs: Any) -> ModelOutput:
        """One forward pass on `ids`, behind which `length` tokens are there; those of the prefix are of type 0."""
        kind = 0 if inputs else 1
        # A static cache hides what is not written yet by itself, and a mask that grows would be compiled at each step.
        mask = None if self._static else torch.ones((1, length), dtype=torch.long)
        return self._forward(
            input_ids=ids,
            attention_mask=mask,
            token_type_ids=torch.full_like(ids, kind),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache: past},
            **inputs,
        )

    def _prefill(self) -> ModelOutput:
        if self._static:
            self._static.reset()
        # pixel_values are what tells a first step from others: without them an allocated cache means a causal mask
        return self._step(self._ids, self._ids.shape[1], self._static, pixel_values=self._pixels)

    def _decode(self, token: int, place: int, past: Any) -> ModelOutput:
        return self._step(torch.tensor([[token]]), self._ids.shape[1] + place, past)

    def answer(self) -> dict[str, Any]:
        """An answer's times; prefill is the forward pass less what its vision encoder takes alone."""
        clock = Clock()
        self._features(self._pixels)
        vision = clock()
        clock = Clock()
        output = self._prefill()
        whole, chosen, times = clock(), [int(output.logits[0, -1].argmax())], []
        for place, token in enumerate(self._forced, 1):
            output = self._decode(token, place, output[self._cache])
            chosen.append(int(output.logits[0, -1].argmax()))
            times.append(clock())
        answer = {"prefill": whole - vision, "tokens": times, "answer": clock.total(), "chosen": chosen}
        return {"vision": vision, **answer}

    def log_probs(self) -> list[float]:
        """Log-probabilities of the forced tokens, each behind those before it."""
        output = self._prefill()
        found = []
        for place, token in enumerate(self._forced, 1):
            found.append(float(torch.log_softmax(output.logits[0, -1].float(), -1)[token]))
            output = self._decode(token, place, output[self._cache])
        return found


def _static_cache(model: PaliGemmaForConditionalGeneration, capacity: int) -> StaticCache:
    """Allocated here: a compiled prefill cannot."""
    text = model.config.text_config
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    cache.early_initialization(1, text.num_key_value_heads, text.head_dim, model.dtype, model.device)
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--answers", type=int, default=2)
    parser.add_argument("--agree", action="store_true", help="print log-probabilities of the forced tokens instead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    started = time.perf_counter()
    inputs = load_inputs(arguments.inputs)
    peer = Transformers(arguments.checkpoint, inputs, arguments.dtype, arguments.compile)
    load_s = time.perf_counter() - started
    if arguments.agree:
        started = time.perf_counter()
        answer: dict[str, Any] = {"log_probs": peer.log_probs(), "chosen": peer.answer()["chosen"]}
        if arguments.compile:
            answer["compile_s"] = time.perf_counter() - started
        print(json.dumps(answer))
    else:
        print(json.dumps(measure(peer.answer, load_s, arguments.answers)))


if __name__ == "__main__":
    main()
