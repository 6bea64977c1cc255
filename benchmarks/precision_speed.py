"""How fast is each precision on this CPU, at full size, beside transformers on the same weights and tokens?

    python -m benchmarks.make_checkpoint CHECKPOINT --model paligemma-3b
    python -m benchmarks.precision_speed CHECKPOINT --bundle FP32 --bundle INT8 --bundle INT4 --bundle INT4_REDUCED_HEAD

The bundles are exports of that checkpoint. Every engine answers in a process of its own, one after the
other, in several rounds, so that a machine that changes its speed changes it for all. An answer is 10
tokens to one image and 16 prompt tokens; the same tokens are fed to every engine, and none stops early.
Behind each engine a process of its own measures how fast this machine reads memory, with as many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from paliedge.bundle import Bundle
from paliedge.planning import estimate_memory
from paliedge.roofline import count_parameters, scheme_for

NUM_TOKENS = 10
NUM_PROMPT_TOKENS = 16
PRECISIONS = ("float32", "bfloat16")
_PROBE_BYTES = 1 << 29
_PROBES = 8
_ANSWERS = 2
"""Measured in each process, behind one that warms it up."""


def measure_transformers(folder: Path, dtype: str, num_threads: int) -> dict[str, Any]:
    """Answers of transformers, eager; prefill is its forward pass less what its vision encoder takes alone."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    torch.set_num_threads(num_threads)
    started = time.perf_counter()
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    loaded = time.perf_counter() - started
    vision = model.config.vision_config
    pixels, prompt, forced = _inputs(vision.image_size, 2)
    image = torch.from_numpy(pixels).to(model.dtype)
    num_image_tokens = (vision.image_size // vision.patch_size) ** 2
    ids = torch.tensor([[model.config.image_token_index] * num_image_tokens + prompt])

    def step(ids: Any, length: int, kind: int, past: Any = None, **inputs: Any) -> Any:
        return model(
            input_ids=ids,
            attention_mask=torch.ones((1, length), dtype=torch.long),
            token_type_ids=torch.full_like(ids, kind),
            past_key_values=past,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )

    def answer() -> dict[str, Any]:
        clock = _Clock()
        model.get_image_features(image)
        alone = clock()
        clock = _Clock()
        output = step(ids, ids.shape[1], 0, pixel_values=image)
        whole, tokens, times = clock(), [int(output.logits[0, -1].argmax())], []
        for place, token in enumerate(forced, 1):
            output = step(torch.tensor([[token]]), ids.shape[1] + place, 1, output.past_key_values)
            tokens.append(int(output.logits[0, -1].argmax()))
            times.append(clock())
        return {
            "vision": alone, "prefill": whole - alone, "tokens": times, "answer": clock.total(), "chosen": tokens
        }  # fmt: skip

    with torch.inference_mode():
        return _measure(answer, loaded, num_threads)


def describe_bundle(folder: Path) -> dict[str, Any]:
    """Sizes in bytes, on disk and by `paliedge plan`'s arithmetic."""
    manifest = Bundle(folder, check_hashes=False).manifest
    target = next(iter(manifest.targets.values()))
    decoder, vision = (
        sum(manifest.files[name].size for name in graph.weights) for graph in (target.decoder, target.vision_encoder)
    )
    planned = estimate_memory(manifest, count_parameters(manifest), scheme_for(target.precision))
    return {
        "name": f"paliedge {target.precision}" + (", reduced head" if manifest.vocabulary else ""),
        "bundle_bytes": sum(file.size for file in manifest.files.values()),
        "decoder_bytes": decoder,
        "vision_bytes": vision,
        "plan_over_files": round((planned.vision + planned.decoder) / (vision + decoder), 4),
    }


def _run_child(engine: str, path: Path, num_threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.precision_speed", str(path), "--child", engine]
    answer = subprocess.run([*command, "--threads", str(num_threads)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def measure_all(checkpoint: Path, bundles: list[Path], num_rounds: int, num_threads: int) -> dict[str, Any]:
    """All engines in turn, round after round."""
    load = os.getloadavg()[0]
    described = {one.pop("name"): one for one in map(describe_bundle, bundles)}
    engines = {name: ("bundle", folder) for name, folder in zip(described, bundles, strict=True)}
    engines |= {f"transformers {dtype}": (dtype, checkpoint) for dtype in PRECISIONS}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    bandwidths: list[float] = []
    for index in range(num_rounds):
        for name, (kind, path) in engines.items():
            rounds[name].append(_run_child(kind, path, num_threads))
            bandwidths.append(_run_child("probe", path, num_threads)["read_bandwidth"])
            print(index + 1, name, json.dumps(summarise(rounds[name][-1:])), flush=True)
    found = {name: summarise(one) | described.get(name, {}) for name, one in rounds.items()}
    best = min(one["answer"] for name, one in found.items() if name.startswith("transformers"))
    bandwidth = statistics.median(bandwidths)
    for one in found.values():
        one["speedup_over_best_transformers"] = round(best / one["answer"], 2)
        if "decoder_bytes" in one:
            one["decode_bandwidth"] = round(one["decoder_bytes"] / one["token"])
            one["share_of_read_bandwidth"] = round(one["decode_bandwidth"] / bandwidth, 3)
    conditions = {"read_bandwidth_range": [min(bandwidths), max(bandwidths)], "load_average_before": load}
    return {
        "read_bandwidth": bandwidth,
        **conditions,
        "num_threads": num_threads,
        "num_rounds": num_rounds,
        "engines": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bundle", type=Path, action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/precision_speed.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "bundle":
        print(json.dumps(measure_bundle(arguments.checkpoint, arguments.threads)))
    elif arguments.child == "probe":
        print(json.dumps({"read_bandwidth": read_bandwidth(arguments.threads)}))
    elif arguments.child:
        print(json.dumps(measure_transformers(arguments.checkpoint, arguments.child, arguments.threads)))
    else:
        found = measure_all(arguments.checkpoint, arguments.bundle, arguments.rounds, arguments.threads)
        content = {"machine": describe_machine(), **found}
        arguments.results.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
