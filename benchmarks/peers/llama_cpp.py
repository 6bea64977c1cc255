"""The child process of llama.cpp: `python -m benchmarks.peers.llama_cpp FILE.gguf --fed FED.json`.

    python -m benchmarks.peers.llama_cpp SOURCE.gguf --quantize Q4_0 TARGET.gguf

By the C functions, through their bindings: a batch with logits for its last token alone, as llama-bench's.
Everything else is llama.cpp's default: memory map, weights repacked where it has kernels for that, float16
KV cache, flash attention where it thinks best.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.stepping import FloatArray, Stepper, run_stepper

REQUIREMENTS = (
    "llama-cpp-python==0.3.36",
    "gguf==0.19.0",
    "numpy==2.2.6",
    "safetensors==0.6.2",
    "ml_dtypes==0.5.3",
)
VARIABLES = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_BLAS=OFF -DGGML_LLAMAFILE=ON -DLLAVA_BUILD=OFF"}
"""Compiled for the processor at hand, with llama.cpp's own kernels for small and for large batches."""
FORMS = {"Q8_0": (7, False), "Q4_0": (2, False), "Q4_0 pure": (2, True)}
"""llama.cpp's numbers of file types. Unless pure, a head of a 4-bit file gets more bits by its own choice."""
_CONTEXT = 512


class LlamaCpp:
    """A GGUF file, fed tokens."""

    def __init__(self, path: Path, num_threads: int) -> None:
        self._library = library = _load_library()
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        options = library.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = _CONTEXT
        options.n_threads = options.n_threads_batch = num_threads
        self._context = library.llama_init_from_model(self._model, options)
        self._num_rows = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._batch = library.llama_batch_init(_CONTEXT, 0, 1)
        self._length = 0

    def reset(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._length = 0

    def step(self, ids: Sequence[int]) -> FloatArray:
        batch = self._batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = self._length + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index == len(ids) - 1
        if code := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode of {len(ids)} tokens behind {self._length} gave {code}")
        self._length += len(ids)
        logits = self._library.llama_get_logits_ith(self._context, len(ids) - 1)
        return np.ctypeslib.as_array(logits, (self._num_rows,))


def quantize(source: Path, target: Path, form: str) -> None:
    """Write `target` by llama.cpp's own quantiser, as `llama-quantize` does."""
    library = _load_library()
    options = library.llama_model_quantize_default_params()
    options.ftype, options.pure = FORMS[form]
    if code := library.llama_model_quantize(str(source).encode(), str(target).encode(), options):
        raise RuntimeError(f"llama_model_quantize of {source} to {form} gave {code}")


def _load_library() -> Any:
    library = importlib.import_module("llama_cpp")
    library.llama_backend_init()
    return library


def load(path: Path, num_threads: int) -> Stepper:
    return LlamaCpp(path, num_threads)


def main() -> None:
    if "--quantize" in sys.argv:
        source, _, form, target = sys.argv[1:]
        quantize(Path(source), Path(target), form)
    else:
        about = _load_library().llama_print_system_info().decode()
        run_stepper(load, ("llama-cpp-python", "gguf", "numpy"), about)


if __name__ == "__main__":
    main()
