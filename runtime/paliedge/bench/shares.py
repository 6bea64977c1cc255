"""What a stage's bytes and operations make of its time: GB/s and FLOP/s, beside the machine's own."""

# Tests: tests/cli/test_bench.py.
from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from paliedge.bench.record import Roofs, Run, Stage
from paliedge.bundle.manifest import Manifest, Target
from paliedge.planning.roofline import decoder_flops, prefill_flops, vision_flops


def add_shares(run: Run, manifest: Manifest, target: Target, roofs: Roofs, prompt_tokens: int) -> Run:
    """`run` with achieved bandwidth and operations of vision, prefill and decode steps, and their shares.

    Each reads its weights once; a decode step of one request reads all of the cache, too. A step that several
    requests share reads the weights once for all, so it has no such figure. The roof of operations is that of the
    linear layers' products, of integers or of floats.
    """
    prefix = manifest.model.vision.num_image_tokens + prompt_tokens
    needs = {
        "vision": (_file_bytes(manifest, target.vision_encoder.weights), vision_flops(manifest.model)),
        "prefill": (
            _file_bytes(manifest, (target.prefill or target.decoder).weights),
            prefill_flops(manifest, prefix) if target.prefill else decoder_flops(manifest, prefix, prefix),
        ),
    }
    if run.batch == 1:
        needs["token"] = step_bytes(manifest, target), decoder_flops(manifest, 1, prefix)
    highest = roofs.operations_per_s(target.precision)
    stages = {
        name: _with_shares(stage, *needs[name], roofs.read_bytes_per_s, highest) if name in needs else stage
        for name, stage in run.stages.items()
    }
    return msgspec.structs.replace(run, stages=stages)


def step_bytes(manifest: Manifest, target: Target) -> int:
    """Bytes that one decode step reads: the files of the decoder's weights, and the cache at its capacity."""
    weights, cache = _file_bytes(manifest, target.decoder.weights), 0
    for tensor in target.decoder.inputs:
        if tensor.name.startswith("past_key_values."):
            heads, dim = tensor.shape[1], tensor.shape[3]
            assert isinstance(heads, int)
            assert isinstance(dim, int)
            cache += heads * manifest.limits.capacity * dim * np.dtype(tensor.dtype).itemsize
    return weights + cache


def _file_bytes(manifest: Manifest, names: Sequence[str]) -> int:
    return sum(manifest.files[name].size for name in names)


def _with_shares(
    stage: Stage, num_bytes: int, flops: int, bytes_per_s: float | None, operations_per_s: float | None
) -> Stage:
    seconds = _seconds(stage)
    if not seconds:  # images that were encoded before
        return stage
    return msgspec.structs.replace(
        stage,
        gigabytes_per_s=num_bytes / seconds / 1e9,
        gigaflops_per_s=flops / seconds / 1e9,
        mbu=num_bytes / seconds / bytes_per_s if bytes_per_s else None,
        mfu=flops / seconds / operations_per_s if operations_per_s else None,
    )


def _seconds(stage: Stage) -> float:
    """The median, by the GPU's clock where there is one."""
    return (stage.device or stage.wall).p50 / 1000
