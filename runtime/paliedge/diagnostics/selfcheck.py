"""Does a bundle run on this machine as it should: its golden answers, graph against no graph, no growth?

Used by `paliedge verify --run` on a user's board and by the project's own tests on a GPU. Knows
backends by their options only.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from paliedge.backends.select import BackendOptions
from paliedge.backends.trt.match import probe_gpu
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.golden import load_golden
from paliedge.diagnostics.verify import GoldenReport, verify_golden
from paliedge.errors import DeviceError, EngineMismatchError, PaliEdgeError
from paliedge.model import PaliGemma

NUM_DECODES = 1000
_WARM_UP = 0.2
"""Share of the decodes after which memory must not grow: pools are filled by then."""
_GROWTH_LIMIT = 4 << 20
"""Bytes; what allocators and the system move without a leak."""
_GROWTH_LIMIT_OF_SHARED_MEMORY = 64 << 20
_SCORE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class RunReport:
    """What was run and measured.

    Attributes:
        backend: what ran, in words.
        golden: how many golden answers were equal; None for a bundle without any.
        graph_equal: whether answers with and without a CUDA graph are the same; None without a GPU's graph.
        num_decodes: steps that were run to see memory grow.
        host_growth: bytes of memory of its own that this process holds after them and did not before.
        gpu_growth: bytes of GPU memory after them; None where no CUDA answers.
        decode_ms: median of a decode step on the wall; None where every answer had one token.
        decode_device_ms: the same by the GPU's own clock; None where it has none.
        prefill_ms: median on the wall.
        vision_ms: of one image, on the wall.
        arithmetic: what this processor makes of the products of these graphs, a line a kind; empty on a GPU.
    """

    backend: str
    golden: GoldenReport | None
    graph_equal: bool | None
    num_decodes: int
    host_growth: int
    gpu_growth: int | None
    decode_ms: float | None
    decode_device_ms: float | None
    prefill_ms: float
    vision_ms: float
    arithmetic: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        return asdict(self) | {"golden": self.golden._asdict() if self.golden else None}


def check_run(bundle: Bundle, options: BackendOptions, num_decodes: int = NUM_DECODES) -> RunReport:
    """Run the bundle with the backend that `options` name.

    Raises:
        BundleError: an answer differs from the golden one.
        DeviceError: a CUDA graph changes answers, or memory grows.
        PaliEdgeError: the backend cannot be opened, see `open_session`.
    """
    without_graph = None
    lines: list[str] = []
    if options.use_cuda_graph:  # first, and closed again: a small board has no room for both
        with closing(
            PaliGemma.load(bundle.folder, replace(options, use_cuda_graph=False), report=lines.append)
        ) as model:
            without_graph = _answer_all(bundle, model) if model.has_device_clock else None
    with closing(PaliGemma.load(bundle.folder, options, report=lines.append)) as model:
        if bundle.manifest.engines and options.backend == "auto" and not model.has_device_clock:
            raise EngineMismatchError(
                expected="an engine of the bundle that runs here",
                found=f"a run {lines[-1]}",
                action=f"Run `paliedge doctor {bundle.folder}`; for ONNX Runtime alone use --backend cpu.",
            )
        golden = verify_golden(bundle, model)
        graph_equal = None if without_graph is None else _are_equal(without_graph, _answer_all(bundle, model))
        if graph_equal is False:
            raise DeviceError(
                expected="the same answers with a CUDA graph as without",
                found="other answers",
                action="Use --no-cuda-graph, and report this with `paliedge doctor --json`.",
            )
        return _measure(bundle, model, lines[-1], golden, graph_equal, num_decodes)


Answer = tuple[tuple[int, ...], tuple[float, ...]]


def _are_equal(first: list[Answer], second: list[Answer]) -> bool:
    """The same tokens; their scores but for the order in which a kernel may add up."""
    return all(
        one[0] == other[0] and np.allclose(one[1], other[1], atol=_SCORE_TOLERANCE)
        for one, other in zip(first, second, strict=True)
    )


def _answer_all(bundle: Bundle, model: PaliGemma) -> list[Answer]:
    """Tokens and log-probabilities of every golden question."""
    golden = load_golden(bundle)
    images = [np.zeros((64, 64, 3), np.uint8)] if golden is None else list(golden.images)
    prompts = ["caption en"] if golden is None else golden.prompts
    answers = [model.generate(encoded, prompt) for encoded in map(model.encode, images) for prompt in prompts]
    return [(answer.token_ids, answer.log_probs) for answer in answers]


def _measure(
    bundle: Bundle,
    model: PaliGemma,
    backend: str,
    golden: GoldenReport | None,
    graph_equal: bool | None,
    num_decodes: int,
) -> RunReport:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    decode_ms: list[float] = []
    device_ms: list[float] = []
    prefill_ms: list[float] = []
    num_decodes_done = 0
    encoded = model.encode(image)
    before: tuple[int, int | None] | None = None
    while before is None or num_decodes_done < num_decodes:  # at least one answer before and one after
        if before is None and num_decodes_done >= _WARM_UP * num_decodes:
            before = _memory_in_use()
        answer = model.generate(encoded, "caption en")
        num_decodes_done += max(1, len(answer.timings.decode_ms))  # an answer of one token has no step
        decode_ms += answer.timings.decode_ms
        device_ms += answer.timings.device.decode_ms if answer.timings.device else ()
        prefill_ms.append(answer.timings.prefill_ms)
    host, gpu = _memory_in_use()
    host_before, gpu_before = before
    report = RunReport(
        backend=backend,
        golden=golden,
        graph_equal=graph_equal,
        num_decodes=num_decodes_done,
        host_growth=host - host_before,
        gpu_growth=None if gpu is None or gpu_before is None else gpu - gpu_before,
        decode_ms=median(decode_ms) if decode_ms else None,
        decode_device_ms=median(device_ms) if device_ms else None,
        prefill_ms=median(prefill_ms),
        vision_ms=encoded.vision_ms,
        arithmetic=list(model.arithmetic),
    )
    if report.host_growth > _GROWTH_LIMIT or (report.gpu_growth or 0) > _gpu_growth_limit():
        raise DeviceError(
            expected=f"memory that grows by at most {_GROWTH_LIMIT >> 20} MB over {report.num_decodes} decode steps",
            found=f"growth of {report.host_growth} bytes on the host and {report.gpu_growth} on the GPU",
            action="Report this with `paliedge doctor --json`.",
        )
    return report


def _memory_in_use() -> tuple[int, int | None]:
    """Bytes: of this process on the host, mapped files aside, and of everybody on the GPU."""
    gpu = _gpu_memory_in_use()  # first: what its import takes must not look like growth
    gc.collect()
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # or what the heap has free hides as much of a leak
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["RssAnon"].split()[0]) * 1024, gpu


def _gpu_growth_limit() -> int:
    """On a Jetson the GPU's memory is everybody's: whatever else runs there moves it."""
    gpu = probe_gpu()
    shared = not isinstance(gpu, PaliEdgeError) and gpu.integrated
    return _GROWTH_LIMIT_OF_SHARED_MEMORY if shared else _GROWTH_LIMIT


def _gpu_memory_in_use() -> int | None:
    gpu = probe_gpu()
    return None if isinstance(gpu, PaliEdgeError) else gpu.total_memory - gpu.free_memory
