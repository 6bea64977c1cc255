"""The session on ONNX Runtime. The only module that imports it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from paliedge.bundle import Bundle
from paliedge.errors import BundleError, MissingExtraError
from paliedge.manifest import Target
from paliedge.session import FloatArray, IdRange, Step

try:
    import onnxruntime as ort
except ModuleNotFoundError:
    raise MissingExtraError(
        expected="onnxruntime for the target 'cpu'",
        found="no such package",
        action='Run `pip install "paliedge[cpu]"`.',
    ) from None


class OrtCache:
    """A KV cache of fixed capacity with the bindings that read and fill it.

    Decode reads the whole buffers; the graph hides what lies behind the tokens that are there. All
    inputs and outputs of a decode step are bound once to memory that stays where it is.
    """

    def __init__(self, session: ort.InferenceSession, target: Target, hidden_size: int, capacity: int) -> None:
        self.length = 0
        self.binding = session.io_binding()
        self.buffers: dict[str, npt.NDArray[np.generic]] = {}
        self.rows: dict[str, npt.NDArray[np.generic]] = {}
        for tensor in target.decoder.inputs:
            if tensor.name.startswith("past_key_values."):
                heads, dim = tensor.shape[1], tensor.shape[3]
                assert isinstance(heads, int)
                assert isinstance(dim, int)
                present = tensor.name.replace("past_key_values.", "present.")
                self.buffers[present] = np.zeros((1, heads, capacity, dim), tensor.dtype)
                self.rows[present] = np.empty((1, heads, 1, dim), tensor.dtype)
                self.binding.bind_cpu_input(tensor.name, self.buffers[present])
                _bind_output(self.binding, present, self.rows[present])
        self.inputs_embeds = np.empty((1, 1, hidden_size), np.float32)
        self.position_ids = np.empty((1, 1), np.int64)
        self.prefix_length = np.empty(1, np.int64)
        self.allowed_ids = np.empty((1, 2), np.int64)
        self.next_token = np.empty(1, np.int64)
        self.log_prob = np.empty(1, np.float32)
        for name in ("inputs_embeds", "position_ids", "prefix_length", "allowed_ids"):
            self.binding.bind_cpu_input(name, getattr(self, name))
        for name in ("next_token", "log_prob"):
            _bind_output(self.binding, name, getattr(self, name))


class OrtSession:
    """Vision encoder and decoder of the target `cpu`, loaded by memory map.

    Args:
        bundle: its hashes are already checked.
        num_threads: for the operators; 0 takes the number of cores this process may use.

    Raises:
        BundleError: a graph that ONNX Runtime refuses.
    """

    def __init__(self, bundle: Bundle, num_threads: int = 0) -> None:
        manifest = bundle.manifest
        self._target = bundle.target("cpu")
        self._hidden_size = manifest.model.text.hidden_size
        self._capacity = manifest.limits.prefix + manifest.limits.new_tokens
        num_threads = num_threads or len(os.sched_getaffinity(0))
        self._vision = _load(bundle.path(self._target.vision_encoder.file), num_threads)
        self._decoder = _load(bundle.path(self._target.decoder.file), num_threads)
        self._empty = {
            tensor.name: np.zeros(
                [size if isinstance(size, int) else 0 for size in (1, *tensor.shape[1:])], tensor.dtype
            )
            for tensor in self._target.decoder.inputs
            if tensor.name.startswith("past_key_values.")
        }
        self._prefill_outputs = [tensor.name for tensor in self._target.decoder.outputs]

    def encode_image(self, pixel_values: FloatArray) -> FloatArray:
        (features,) = self._vision.run(["image_features"], {"pixel_values": pixel_values})
        image_features: FloatArray = features[0]
        return image_features

    def new_cache(self) -> OrtCache:
        return OrtCache(self._decoder, self._target, self._hidden_size, self._capacity)

    def prefill(self, cache: OrtCache, inputs_embeds: FloatArray, allowed: IdRange) -> Step:
        length = len(inputs_embeds)
        inputs = self._empty | {
            "inputs_embeds": inputs_embeds[None],
            "position_ids": np.arange(1, length + 1)[None],
            "prefix_length": np.array([length]),
            "allowed_ids": np.array([allowed]),
        }
        outputs = dict(zip(self._prefill_outputs, self._decoder.run(self._prefill_outputs, inputs), strict=True))
        for name, buffer in cache.buffers.items():
            buffer[:, :, :length] = outputs[name]
        cache.length = length
        cache.prefix_length[0] = length
        return Step(int(outputs["next_token"][0]), float(outputs["log_prob"][0]))

    def decode(self, cache: OrtCache, inputs_embeds: FloatArray, allowed: IdRange) -> Step:
        cache.inputs_embeds[0, 0] = inputs_embeds
        cache.position_ids[0, 0] = cache.length + 1
        cache.allowed_ids[0] = allowed
        self._decoder.run_with_iobinding(cache.binding)
        for name, buffer in cache.buffers.items():
            buffer[:, :, cache.length] = cache.rows[name][:, :, 0]
        cache.length += 1
        return Step(int(cache.next_token[0]), float(cache.log_prob[0]))


def _load(path: Path, num_threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the bindings raise a class of their own for each cause
        raise BundleError(
            expected=f"a graph in {path} that ONNX Runtime {ort.__version__} can load",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            action="Export the checkpoint again, or update onnxruntime.",
        ) from None


def _bind_output(binding: ort.IOBinding, name: str, array: npt.NDArray[np.generic]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
