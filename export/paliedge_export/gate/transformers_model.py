"""transformers' PaliGemma: as much of it as fits into memory, and its greedy steps, as every version of it means them.

With `reference.py` the only module that imports torch and transformers, and only when it is called.
"""

# Tests: tests/export/gate/test_reference.py and tests/test_parity.py.
from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from paliedge.backends.session import FloatArray
from paliedge_export.checkpoint.config import ModelConfig
from paliedge_export.checkpoint.safetensors_reader import Checkpoint, expected_shapes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PaliGemmaForConditionalGeneration

_OLDEST = (5, 18)
_INSTALL = 'pip install "paliedge[reference]"'
_HEADROOM = 1.3
"""Memory that the model takes beside its weights, as a factor."""


class NotComparedError(Exception):
    """Why transformers cannot be asked about a checkpoint, in a line."""


def import_transformers() -> Any:
    """transformers, of a version that reads PaliGemma right.

    Raises:
        NotComparedError: it or torch is missing, broken or too old.
    """
    for name in ("torch", "transformers"):
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            what = f"{name} is not installed" if error.name == name else f"{name} lacks {error.name}"
            raise NotComparedError(f"{what}; {_INSTALL}") from error
        except Exception as error:  # a library of another version may raise anything
            raise NotComparedError(f"{name} cannot be imported ({first_line(error)}); {_INSTALL}") from error
    version = str(getattr(module, "__version__", "0"))
    if tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2]) < _OLDEST:
        raise NotComparedError(f"transformers {version} is too old to compare with; {_INSTALL}")
    return module


def first_line(error: Exception) -> str:
    """What an error says, short."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def choose_size(checkpoint: Checkpoint) -> tuple[str, int]:
    """A type and a number of decoder layers whose model fits into the memory that is free.

    That is float32 with all layers, else bfloat16 with all, else float32 with the first ones.

    Raises:
        NotComparedError: not even one layer fits.
    """
    text, free = checkpoint.config.text, _free_memory()
    tables = text.hidden_size * checkpoint.num_rows * (1 if checkpoint.config.tied else 2)

    def memory(dtype: str, num_layers: int) -> float:
        shapes = expected_shapes(with_layers(checkpoint.config, num_layers)).values()
        count = tables + sum(math.prod(shape) for shape in shapes)
        return count * {"float32": 4, "bfloat16": 2}[dtype] * _HEADROOM

    sizes = [(dtype, text.num_layers) for dtype in ("float32", "bfloat16")]
    sizes += [("float32", fewer) for fewer in range(text.num_layers - 1, 0, -1)]
    for size in sizes:
        if memory(*size) < free:
            return size
    raise NotComparedError(
        f"one layer of the model takes {memory('float32', 1) / 1e9:.1f} GB in float32, and {free / 1e9:.1f} GB are free"
    )


def with_layers(config: ModelConfig, num_layers: int) -> ModelConfig:
    """The model cut off behind its first decoder layers."""
    return replace(config, text=replace(config.text, num_layers=num_layers))


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def load_model(
    folder: Path, dtype: str = "float32", num_layers: int | None = None
) -> PaliGemmaForConditionalGeneration:
    """A checkpoint's model, with Gemma 2's softcaps whichever transformers is installed.

    Before 5.21 its SDPA attention leaves the scores' softcap out, hence eager attention. A section about quantisation
    that merged models keep in config.json does not count: weights of floats are read as they are. With `num_layers`
    it is cut off behind its first decoder layers.

    Raises:
        NotComparedError: transformers does not find all weights in the folder.
    """
    import torch
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
    from transformers.utils import logging

    config = PaliGemmaConfig.from_pretrained(folder)
    for section in (config, config.text_config, config.vision_config):
        if hasattr(section, "quantization_config"):
            del section.quantization_config
    if num_layers is not None and num_layers < config.text_config.num_hidden_layers:
        config.text_config.num_hidden_layers = num_layers
        if kinds := getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = kinds[:num_layers]
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # or it lists the layers that were cut off
    try:
        model, info = PaliGemmaForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(level)
    if missing := sorted(info["missing_keys"]):
        raise NotComparedError(f"it finds no {missing[0]} and {len(missing) - 1} others in {folder}")
    assert isinstance(model, PaliGemmaForConditionalGeneration)
    return model.eval()


def cache_name(model: PaliGemmaForConditionalGeneration) -> str:
    """What transformers calls the KV cache: `cache` from 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _with_final_softcap(model: PaliGemmaForConditionalGeneration, logits: Tensor, hidden: Tensor) -> Tensor:
    """The logits as Gemma 2's config caps them; PaliGemma's class left that out before 5.23."""
    import torch

    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is None:
        return logits
    uncapped = model.lm_head(hidden)
    capped = cap * torch.tanh(uncapped / cap)
    left_out = (logits - uncapped).abs().max() < (logits - capped).abs().max()
    return capped if left_out else logits


def reference_steps(
    model: PaliGemmaForConditionalGeneration,
    pixel_values: object,
    prefix: Sequence[int],
    image_token: int,
    num_new_tokens: int,
    kept: npt.NDArray[np.int64],
) -> Iterator[tuple[int, FloatArray, FloatArray]]:
    """Greedy decoding past end-of-sequence: token, logits of the tokens `kept`, last hidden state [H].

    Called with token_type_ids, without which transformers masks the prefix causally.
    """
    import torch

    cache = cache_name(model)
    vision = model.config.vision_config
    num_image_tokens = (vision.image_size // vision.patch_size) ** 2
    ids = torch.tensor([[image_token] * num_image_tokens + list(prefix)])
    inputs: dict[str, Any] = {"pixel_values": pixel_values, "token_type_ids": torch.zeros_like(ids)}
    past = None
    for length in range(ids.shape[1], ids.shape[1] + num_new_tokens):
        with torch.no_grad():
            output = model(
                input_ids=ids,
                attention_mask=torch.ones((1, length), dtype=torch.long),
                use_cache=True,
                output_hidden_states=True,
                **{cache: past},
                **inputs,
            )
            hidden = output.hidden_states[-1][0, -1]
            scores = _with_final_softcap(model, output.logits[0, -1], hidden)
        past = output[cache]
        logits = scores.float().numpy()[kept]
        token = int(kept[logits.argmax()])
        yield token, logits, hidden.float().numpy()
        ids = torch.tensor([[token]])
        inputs = {"token_type_ids": torch.ones((1, 1), dtype=torch.long)}


def reference_logits(
    model: PaliGemmaForConditionalGeneration,
    pixel_values: object,
    prefix: list[int],
    image_token: int,
    vocab_size: int,
    num_new_tokens: int,
) -> FloatArray:
    """Greedy decoding past end-of-sequence: logits [num_new_tokens, vocab_size] float32."""
    kept = np.arange(vocab_size)
    steps = reference_steps(model, pixel_values, prefix, image_token, num_new_tokens, kept)
    return np.stack([logits for _, logits, _ in steps])
