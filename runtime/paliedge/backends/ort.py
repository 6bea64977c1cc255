"""The session on ONNX Runtime, on the CPU or through its CUDA provider. The only module that imports it."""

# Tests: tests/backends/test_arithmetic.py and tests/test_parity.py.
from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from packaging.version import Version

from paliedge.backends.arithmetic import Arithmetic, Kind, measure_rate, probe
from paliedge.backends.session import FloatArray, GeneratedToken, IdRange, IntArray, present_name
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Manifest, Target
from paliedge.errors import BundleError, ClosedError, EngineMismatchError, MissingExtraError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
"""Wheels from 1.29 on write a device id into the user's cache and look for a server. Not from a robot."""
try:
    import onnxruntime as ort
except (ImportError, OSError, AttributeError) as error:
    if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
        raise MissingExtraError(
            expected="onnxruntime",
            found="no such package",
            action='Run `pip install "paliedge[cpu]"`, or `pip install "paliedge[gpu]"` for its CUDA provider.',
        ) from error
    raise MissingExtraError(  # one of its libraries is missing, or it was built for another numpy
        expected="an onnxruntime that can be imported",
        found=(str(error) or "one that cannot be imported").splitlines()[0],
        action='Install it again: `pip install --force-reinstall "paliedge[cpu]"`.',
    ) from error

VERSION: str = ort.__version__
WITHOUT: dict[Kind, str] = {
    "float16": "Export the checkpoint again with `--target cpu`, whose graphs multiply in float32; or use engines.",
    "signed": "Export the checkpoint again with this paliedge, whose 8-bit weights have no sign.",
    "eight_bit": "Export the checkpoint with `--precision fp16`, and report this with `paliedge doctor --json`.",
    "blocks": "Export the checkpoint with `--precision fp16`, and report this with `paliedge doctor --json`.",
}
"""What to do where such products come out wrong."""
_MAX_BATCH = 64
_SMALL_BYTES = 16_000_000
"""Of decoder weights: a model below that is faster on one thread, since its operators take less time than threads need
to meet. Measured at 4 to 8 MB, where two threads made whole answers 1.4 to 2 times slower."""
_FIRST_WITHOUT_SIGN = Version("0.2")
"""Of paliedge, whose exports for `cpu` have uint8 weights."""
_CONVERTS_SIGNED = Version(VERSION) >= Version("1.30")
"""Before, ONNX Runtime ends the whole process when it converts weights of a product without a zero point."""
_EXACT: tuple[str, ...] = (
    *(("session.x64quantprecision",) if _CONVERTS_SIGNED else ()),
    "session.disable_quant_qdq",
    "mlas.disable_kleidiai",
)
"""What makes products add up as graphs say.

x86 without VNNI cuts pairs of uint8 x int8 products that do not fit 16 bits. The first has int8 weights of
com.microsoft's operators converted to uint8, as newer exports store them, whose products are exact. The second has
graphs for TensorRT, which stand in for engines here, multiply in float32 what they dequantise, as near to 32-bit sums
as any. The third keeps KleidiAI's kernels for ARM out. They round a whole row of activations to one scale where blocks
have their own: twice the error where one channel is large. With SME they give zeros for int8 weights.
"""
_LOG = logging.getLogger(__name__)
_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}


class OrtCache:
    """A KV cache of fixed capacity with the bindings that read and fill it.

    Decode reads the whole buffers; the graph hides what lies behind the tokens that are there. All
    inputs and outputs of a decode step are bound once to memory that stays where it is: where the
    graph updates the cache itself, each cache output to the buffer of its input.
    """

    def __init__(
        self, session: ort.InferenceSession, target: Target, hidden_size: int, capacity: int, batch: int
    ) -> None:
        self.lengths = np.zeros(batch, np.int64)
        self.prefix_lengths = np.empty(batch, np.int64)
        self.allowed_ids = np.empty((batch, 2), np.int64)
        self.next_tokens = np.empty(batch, np.int64)
        self.log_probs = np.empty(batch, np.float32)
        names, heads, dim, dtype = _cache_inputs(target)
        shape = (len(names), batch, heads)
        self._rows = np.zeros((*shape, capacity, dim), dtype)
        self._new_rows = np.empty((*shape, 1, dim), dtype)
        self._stores_rows = target.cache_update == "rows"
        self.buffers = dict(zip(names, self._rows, strict=True))
        self.inputs_embeds = np.empty((batch, 1, hidden_size), np.float32)
        self.position_ids = np.empty((batch, 1), np.int64)
        self._session = session
        self._decode_bindings: dict[int, ort.IOBinding] = {}

    def bind_decode(self, batch: int) -> ort.IOBinding:
        """The binding of a decode step on the first `batch` rows."""
        if batch not in self._decode_bindings:
            rows = slice(0, batch)
            self._decode_bindings[batch] = self.bind(rows, self.inputs_embeds[rows], self.position_ids[rows])
        return self._decode_bindings[batch]

    def bind(self, rows: slice, inputs_embeds: FloatArray, position_ids: npt.NDArray[np.int64]) -> ort.IOBinding:
        """Bind a step on S tokens, inputs_embeds [B, S, H] and position_ids [B, S], to rows of this cache."""
        binding = self._session.io_binding()
        binding.bind_cpu_input("inputs_embeds", inputs_embeds)
        binding.bind_cpu_input("position_ids", position_ids)
        binding.bind_cpu_input("prefix_length", self.prefix_lengths[rows])
        binding.bind_cpu_input("allowed_ids", self.allowed_ids[rows])
        _bind_output(binding, "next_token", self.next_tokens[rows])
        _bind_output(binding, "log_prob", self.log_probs[rows])
        for (name, buffer), new in zip(self.buffers.items(), self._new_rows, strict=True):
            binding.bind_cpu_input(name, buffer[rows])
            _bind_output(binding, present_name(name), (new if self._stores_rows else buffer)[rows])
        return binding

    def append(self, rows: slice) -> None:
        """Take the step's new rows in, where the graph has not written them itself: `rows` grow by a token."""
        if self._stores_rows:
            for row in range(len(self.lengths))[rows]:
                self._rows[:, row, :, self.lengths[row]] = self._new_rows[:, row, :, 0]
        self.lengths[rows] += 1

    def steps(self, rows: slice) -> list[GeneratedToken]:
        """What the last step put out for `rows`."""
        return [
            GeneratedToken(*pair)
            for pair in zip(self.next_tokens[rows].tolist(), self.log_probs[rows].tolist(), strict=True)
        ]


class _Graphs(NamedTuple):
    """The loaded graphs of an open session."""

    vision: ort.InferenceSession
    decoder: ort.InferenceSession
    prefill: ort.InferenceSession | None


class OrtSession:
    """Vision encoder and decoder of one target, loaded by memory map.

    Args:
        bundle: its hashes are already checked.
        target: whose graphs.
        num_threads: for the operators; 0 takes the number of cores this process may use, and one for a small model.
        provider: "cpu" or "cuda".

    Raises:
        BundleError: a graph that ONNX Runtime refuses.
        EngineMismatchError: the target or the provider is not there, or this processor's sums are not the graphs'.
    """

    has_device_clock = False
    graph_capture_s: float | None = None

    def __init__(
        self, bundle: Bundle, target: str = "cpu", num_threads: int = 0, provider: Literal["cpu", "cuda"] = "cpu"
    ) -> None:
        manifest = bundle.manifest
        self._target = bundle.target(target)
        self.arithmetic = _check_arithmetic(bundle, target) if provider == "cpu" else ()
        self.has_mask_decoder = self._target.mask_decoder is not None
        self.max_batch = _MAX_BATCH if self._target.independent_rows else 1
        self._hidden_size = manifest.model.text.hidden_size
        self._capacity = manifest.limits.capacity
        small = _is_small(manifest, self._target)
        self._num_threads = num_threads = num_threads or (1 if small else len(os.sched_getaffinity(0)))
        self._bundle = bundle
        self._masks: ort.InferenceSession | None = None
        # The decoder first: while its head is copied into the kernels' order, the head is there twice.
        decoder = load_graph(bundle.path(self._target.decoder.file), num_threads, provider, plan_memory=small)
        prefill: ort.InferenceSession | None = None
        if self._target.prefill and provider == "cpu":  # CUDA has no kernel for its products
            prefill = load_graph(bundle.path(self._target.prefill.file), num_threads, plan_memory=small)
        vision = load_graph(bundle.path(self._target.vision_encoder.file), num_threads, provider, plan_memory=small)
        self._loaded: _Graphs | None = _Graphs(vision, decoder, prefill)
        names, heads, dim, dtype = _cache_inputs(self._target)
        self._empty = dict.fromkeys(names, np.zeros((1, heads, 0, dim), dtype))
        self._prefill_outputs = [tensor.name for tensor in self._target.decoder.outputs]

    def encode_image(self, pixel_values: FloatArray) -> FloatArray:
        (features,) = self._graphs.vision.run(["image_features"], {"pixel_values": pixel_values})
        image_features: FloatArray = features[0]
        return image_features

    def new_cache(self, batch: int = 1) -> OrtCache:
        return OrtCache(self._graphs.decoder, self._target, self._hidden_size, self._capacity, batch)

    def close(self) -> None:
        self._loaded = self._masks = None

    @property
    def _graphs(self) -> _Graphs:
        if self._loaded is None:
            raise ClosedError
        return self._loaded

    def prefill(
        self,
        cache: OrtCache,
        image_features: Sequence[FloatArray],
        prompt_embeds: FloatArray,
        allowed: IdRange,
        row: int = 0,
    ) -> GeneratedToken:
        graphs = self._graphs
        inputs_embeds = np.concatenate([*image_features, prompt_embeds])[None]
        length = inputs_embeds.shape[1]
        position_ids = np.arange(1, length + 1)[None]
        rows = slice(row, row + 1)
        cache.lengths[row] = cache.prefix_lengths[row] = length
        cache.allowed_ids[row] = allowed
        if self._target.cache_update == "in_place":
            graphs.decoder.run_with_iobinding(cache.bind(rows, inputs_embeds, position_ids))
            return cache.steps(rows)[0]
        if graphs.prefill:
            present = [present_name(name) for name in cache.buffers]
            outputs = graphs.prefill.run(present, {"inputs_embeds": inputs_embeds, "position_ids": position_ids})
            for buffer, new in zip(cache.buffers.values(), outputs, strict=True):
                buffer[rows, :, :length] = new
            cache.lengths[row] = length - 1
            last = np.ascontiguousarray(inputs_embeds[:, -1:]), np.array([[length]])
            graphs.decoder.run_with_iobinding(cache.bind(rows, *last))
            cache.append(rows)
            return cache.steps(rows)[0]
        inputs = self._empty | {
            "inputs_embeds": inputs_embeds,
            "position_ids": position_ids,
            "prefix_length": cache.prefix_lengths[rows],
            "allowed_ids": cache.allowed_ids[rows],
        }
        found = dict(zip(self._prefill_outputs, graphs.decoder.run(self._prefill_outputs, inputs), strict=True))
        for name, buffer in cache.buffers.items():
            buffer[rows, :, :length] = found[present_name(name)]
        return GeneratedToken(int(found["next_token"][0]), float(found["log_prob"][0]))

    def decode(self, cache: OrtCache, inputs_embeds: FloatArray, allowed: Sequence[IdRange]) -> list[GeneratedToken]:
        batch = len(inputs_embeds)
        cache.inputs_embeds[:batch, 0] = inputs_embeds
        cache.position_ids[:batch, 0] = cache.lengths[:batch] + 1
        steps = self.repeat_decode(cache, allowed)
        cache.append(slice(0, batch))
        return steps

    def repeat_decode(self, cache: OrtCache, allowed: Sequence[IdRange]) -> list[GeneratedToken]:
        batch = len(allowed)
        cache.allowed_ids[:batch] = allowed
        self._graphs.decoder.run_with_iobinding(cache.bind_decode(batch))
        return cache.steps(slice(0, batch))

    def move_row(self, cache: OrtCache, source: int, target: int) -> None:
        length = cache.lengths[source]
        for lengths in (cache.lengths, cache.prefix_lengths):
            lengths[target] = lengths[source]
        for buffer in cache.buffers.values():
            buffer[target, :, :length] = buffer[source, :, :length]

    def decode_masks(self, codes: IntArray) -> FloatArray:
        if self._loaded is None:
            raise ClosedError
        masks = self._masks
        if masks is None:
            assert self._target.mask_decoder is not None
            masks = load_graph(self._bundle.path(self._target.mask_decoder.file), self._num_threads)
            self._masks = masks
        decoded: FloatArray = masks.run(["masks"], {"mask_codes": codes})[0]
        return decoded


def kinds_of(manifest: Manifest, target: str) -> tuple[Kind, ...]:
    """The products of a target's graphs that ONNX Runtime may get wrong on some processor."""
    graphs = manifest.targets[target]
    if graphs.precision == "fp32":
        return ()
    if target != "cpu" or any(tensor.dtype == "float16" for tensor in graphs.decoder.inputs):
        return ("float16",)
    if graphs.precision == "fp16":
        return ()
    signed = Version(manifest.producer.paliedge) < _FIRST_WITHOUT_SIGN
    return ("signed" if signed else "eight_bit", "blocks")


def compare_rates() -> float:
    """How many times as fast as float32 ONNX Runtime multiplies 8-bit integers here, exactly, on one thread."""
    return measure_rate(lambda path: load_graph(path, num_threads=1))


@cache
def examine_arithmetic(kind: Kind) -> Arithmetic:
    """What this processor makes of such products, asked once a process."""
    return probe(kind, lambda path: load_graph(path, num_threads=1))


def find_wrong_products(manifest: Manifest, target: str) -> Arithmetic | None:
    """The first kind of the graphs' products that this processor gets wrong; None where all are as graphs say."""
    return next((found for kind in kinds_of(manifest, target) if (found := examine_arithmetic(kind)).wrong), None)


def _check_arithmetic(bundle: Bundle, target: str) -> tuple[str, ...]:
    """What was found of the graphs' products; an EngineMismatchError where they come out wrong on this processor."""
    if wrong := find_wrong_products(bundle.manifest, target):
        raise EngineMismatchError(
            expected=f"a processor on which onnxruntime {ort.__version__} adds up as the graphs for {target} say",
            found=str(wrong),
            action=WITHOUT[wrong.kind],
        )
    return tuple(str(examine_arithmetic(kind)) for kind in kinds_of(bundle.manifest, target))


def available_providers() -> list[str]:
    """What this build of ONNX Runtime could run on, whether or not the hardware is there."""
    providers: list[str] = ort.get_available_providers()
    return providers


def load_graph(
    path: Path,
    num_threads: int,
    provider: Literal["cpu", "cuda"] = "cpu",
    *,
    prepack: bool = True,
    fold: bool = True,
    plan_memory: bool = True,
) -> ort.InferenceSession:
    """Load one graph.

    Args:
        path: of the .onnx file.
        num_threads: for the operators.
        provider: "cpu" or "cuda".
        prepack: copy weights into the order that the kernels like best; without it they stay in their files.
        fold: compute what is constant once; without it weights in integers are dequantised anew for each product and
            never held in floats.
        plan_memory: from the second run of a shape on, ask for all of its memory in one piece. That saves a hundredth
            where operators take microseconds. It costs a large model as much memory again as the first run took,
            and the second run the time to fetch it.

    Raises:
        BundleError, EngineMismatchError: see `OrtSession`.
    """
    options = ort.SessionOptions()
    for name in _EXACT:
        options.add_session_config_entry(name, "1")
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not fold:
        options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    options.enable_mem_pattern = plan_memory
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    wanted = _PROVIDERS[provider]
    if wanted[0] not in ort.get_available_providers():
        raise EngineMismatchError(
            expected=f"an ONNX Runtime with {wanted[0]}",
            found=f"onnxruntime {ort.__version__} with {', '.join(ort.get_available_providers())}",
            action='Replace it: `pip uninstall onnxruntime`, then `pip install "paliedge[gpu]"`.',
        )
    started = time.perf_counter()
    try:
        session = ort.InferenceSession(path, options, providers=wanted)
    except Exception as error:  # the bindings raise a class of their own for each cause
        raise BundleError(
            expected=f"a graph in {path} that ONNX Runtime {ort.__version__} can load",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            action="Export the checkpoint again, or update onnxruntime.",
        ) from error
    if wanted[0] not in session.get_providers():  # ONNX Runtime goes on without it, and says so in a log
        raise EngineMismatchError(
            expected=f"a {wanted[0]} of onnxruntime {ort.__version__} that loads",
            found="one that does not: no NVIDIA driver, or no CUDA and cuDNN of its version",
            action="Run `paliedge doctor`, or use `--backend cpu`.",
        )
    _LOG.info("loaded %s for %s on %d threads in %.2f s", path, wanted[0], num_threads, time.perf_counter() - started)
    return session


def _is_small(manifest: Manifest, target: Target) -> bool:
    return sum(manifest.files[name].size for name in target.decoder.weights) < _SMALL_BYTES


def _cache_inputs(target: Target) -> tuple[list[str], int, int, str]:
    """Names of the cache's tensors, and the heads, the width and the type that all of them have."""
    tensors = [tensor for tensor in target.decoder.inputs if tensor.name.startswith("past_key_values.")]
    (kind,) = {(tensor.shape[1], tensor.shape[3], tensor.dtype) for tensor in tensors}
    heads, dim, dtype = kind
    assert isinstance(heads, int)
    assert isinstance(dim, int)
    return [tensor.name for tensor in tensors], heads, dim, dtype


def _bind_output(binding: ort.IOBinding, name: str, array: npt.NDArray[np.generic]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
