"""What a stage's bytes and operations make of its time: GB/s and FLOP/s, beside the machine's own."""

from __future__ import annotations

import msgspec
import numpy as np

from paliedge.benching.record import Roofs, Run, Stage
from paliedge.manifest import Manifest, Target
from paliedge.roofline import decoder_flops, prefill_flops_saved, vision_flops


def add_shares(run: Run, manifest: Manifest, target: Target, roofs: Roofs, prompt_tokens: int) -> Run:
    """`run` with achieved bandwidth of decode steps, achieved operations of vision and prefill, and their shares.

    A decode step of one request reads the decoder's weights and all of the cache once; a step that several
    requests share reads the weights once for all, so it has no such figure.
    """
    prefix = manifest.model.vision.num_image_tokens + prompt_tokens
    skipped = prefill_flops_saved(manifest, prefix) if target.prefill else 0
    flops = {"vision": vision_flops(manifest.model), "prefill": decoder_flops(manifest, prefix, prefix) - skipped}
    stages = {
        name: _with_flops(stage, flops[name], roofs) if name in flops else stage for name, stage in run.stages.items()
    }
    if run.batch == 1 and "token" in stages:
        stages["token"] = _with_bytes(stages["token"], step_bytes(manifest, target), roofs)
    return msgspec.structs.replace(run, stages=stages)


def step_bytes(manifest: Manifest, target: Target) -> int:
    """Bytes that one decode step reads: the files of the decoder's weights, and the cache at its capacity."""
    weights = sum(manifest.files[name].size for name in target.decoder.weights)
    cache = 0
    for tensor in target.decoder.inputs:
        if tensor.name.startswith("past_key_values."):
            heads, dim = tensor.shape[1], tensor.shape[3]
            assert isinstance(heads, int)
            assert isinstance(dim, int)
            cache += heads * manifest.limits.capacity * dim * np.dtype(tensor.dtype).itemsize
    return weights + cache


def _with_flops(stage: Stage, flops: int, roofs: Roofs) -> Stage:
    seconds = _seconds(stage)
    if not seconds:  # images that were encoded before
        return stage
    return msgspec.structs.replace(
        stage,
        gigaflops_per_s=flops / seconds / 1e9,
        mfu=flops / seconds / roofs.flops_per_s if roofs.flops_per_s else None,
    )


def _with_bytes(stage: Stage, num_bytes: int, roofs: Roofs) -> Stage:
    seconds = _seconds(stage)
    return msgspec.structs.replace(
        stage,
        gigabytes_per_s=num_bytes / seconds / 1e9,
        mbu=num_bytes / seconds / roofs.read_bytes_per_s if roofs.read_bytes_per_s else None,
    )


def _seconds(stage: Stage) -> float:
    """The median, by the GPU's clock where there is one."""
    return (stage.device or stage.wall).p50 / 1000
