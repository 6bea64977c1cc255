"""The checkpoint as transformers reads it by its own means: tokenizer, image processor, weights, ends of answers.

An export is held against it, and nothing in it is ours: neither ids nor pixels nor the end of an answer. The only
module that imports torch, transformers and PEFT, and only when it is called.
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
from PIL import Image

from paliedge.backends.session import FloatArray
from paliedge.bundle.manifest import Preprocess, Tokens
from paliedge.errors import PrecisionError
from paliedge.inputs.preprocess import Preprocessor
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge_export.checkpoint.config import ModelConfig
from paliedge_export.checkpoint.metadata import PROCESSOR_FILES, asks_for_torchvision
from paliedge_export.checkpoint.safetensors_reader import Checkpoint, canonical_name, expected_shapes
from paliedge_export.checkpoint.tokenizer import FILE as TOKENIZER_FILE
from paliedge_export.gate.runner import MAX_NEW_TOKENS, ReferenceRun, TeacherForcedAnswer
from paliedge_export.weights.samples import Sample

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
            raise NotComparedError(f"{name} cannot be imported ({_first_line(error)}); {_INSTALL}") from error
    version = str(getattr(module, "__version__", "0"))
    if tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2]) < _OLDEST:
        raise NotComparedError(f"transformers {version} is too old to compare with; {_INSTALL}")
    return module


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _choose_size(checkpoint: Checkpoint) -> tuple[str, int]:
    """A type and a number of decoder layers whose model fits into the memory that is free.

    That is float32 with all layers, else bfloat16 with all, else float32 with the first ones.

    Raises:
        NotComparedError: not even one layer fits.
    """
    text, free = checkpoint.config.text, _free_memory()
    tables = text.hidden_size * checkpoint.num_rows * (1 if checkpoint.config.tied else 2)

    def memory(dtype: str, num_layers: int) -> float:
        shapes = expected_shapes(_with_layers(checkpoint.config, num_layers)).values()
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


def _with_layers(config: ModelConfig, num_layers: int) -> ModelConfig:
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


class TransformersReference:
    """A checkpoint as transformers reads it.

    Its processor knows no letterbox: then it gets the square.

    Args:
        checkpoint: what is exported; only its folders and, for an adapter that PEFT is not there for, its merged
            weights are used.
        preprocess: says whether pictures are letterboxed.

    Attributes:
        name: who it is.
        config: what it was loaded as; cut off behind its first decoder layers where no more fit into memory.
        exact: whether it computes in float32.
        how: what was done that is not transformers' own, for people; empty if nothing was.

    Raises:
        NotComparedError: it cannot be asked.
    """

    def __init__(self, checkpoint: Checkpoint, preprocess: Preprocess) -> None:
        if checkpoint.why_no_reference:
            raise NotComparedError(checkpoint.why_no_reference)
        transformers = import_transformers()
        self._folder = checkpoint.folder
        dtype, layers = _choose_size(checkpoint)
        self.config = _with_layers(checkpoint.config, layers)
        self.name = f"transformers {transformers.__version__}"
        self.exact = dtype == "float32"
        self.how = "" if self.exact else "in bfloat16, since float32 does not fit into memory"
        if layers < checkpoint.config.text.num_layers:
            of_all = f"{layers} of {checkpoint.config.text.num_layers} layers"
            self.how = f"with the first {of_all}, since no more fit into memory"
        try:
            self._model = load_model(checkpoint.folder, dtype, layers)
            self._take_adapters(checkpoint)
            self._processor = self._load_processor(checkpoint.folder)
            folder = next(one for one in checkpoint.folders if (one / TOKENIZER_FILE).is_file())
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        except NotComparedError:
            raise
        except Exception as error:  # whatever transformers makes of somebody's folder
            raise NotComparedError(f"{self.name} does not read it ({_first_line(error)})") from error
        size = self._model.config.vision_config.image_size
        self._fit = Preprocessor(preprocess, size).fit if preprocess.letterbox else None
        self._image_token = self._tokenizer.convert_tokens_to_ids("<image>")

    def _load_processor(self, folder: Path) -> Any:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        if any((folder / name).is_file() for name in PROCESSOR_FILES):
            return SiglipImageProcessorPil.from_pretrained(folder)
        size = self._model.config.vision_config.image_size
        return SiglipImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def _take_adapters(self, checkpoint: Checkpoint) -> None:
        """By PEFT where it is installed and can, else the weights as they are merged here."""
        if not checkpoint.changed:
            return
        try:
            from peft import PeftModel

            (adapter,) = checkpoint.folders[:-1]
            rows = checkpoint.num_rows
            if rows != self._model.get_input_embeddings().weight.shape[0]:
                self._model.resize_token_embeddings(rows, mean_resizing=False)
            adapted = PeftModel.from_pretrained(self._model, str(adapter))
            self._model = (
                adapted.base_model.model.eval()
            )  # unmerged: PEFT merges into both where table and head are one
        except Exception:  # no PEFT, several adapters, or a kind that it does not load
            self.how = "; ".join(filter(None, [self.how, "with the adapter merged here"]))
            layers = self.config.text.num_layers
            self._model = load_model(checkpoint.folder, "float32" if self.exact else "bfloat16", layers)
            self._replace_weights(checkpoint)

    def _replace_weights(self, checkpoint: Checkpoint) -> None:
        import torch

        rows = checkpoint.num_rows
        if rows != self._model.get_input_embeddings().weight.shape[0]:
            self._model.resize_token_embeddings(rows, mean_resizing=False)
        state = {canonical_name(name): value for name, value in self._model.state_dict().items()}
        for name in state.keys() & set(checkpoint.changed):
            state[name].copy_(torch.from_numpy(np.asarray(checkpoint[name], np.float32)))

    @property
    def end_ids(self) -> frozenset[int]:
        """Where `generate` ends an answer."""
        ends = self._model.generation_config.eos_token_id
        if ends is None:
            return frozenset()
        return frozenset(ends if isinstance(ends, list) else [ends])

    def prompt_ids(self, prompt: str) -> list[int]:
        """What stands behind the image tokens, as its processor writes it."""
        text = f"{self._tokenizer.bos_token}{prompt}\n"
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def pixel_values(self, picture: Image.Image) -> FloatArray:
        """[1, 3, S, S], of any type of numbers."""
        pixels: FloatArray = np.asarray(self._processor([self._fitted(picture)], return_tensors="np").pixel_values)
        return pixels

    def _fitted(self, picture: Image.Image) -> Image.Image:
        return self._fit(picture) if self._fit else picture

    def check_reading(
        self, samples: Sequence[Sample], tokenizer: PromptTokenizer, tokens: Tokens, preprocess: Preprocessor
    ) -> None:
        """Hold prompts, pixels and ends against those of the bundle, bit for bit.

        Raises:
            PrecisionError: they differ: what is exported is not what the checkpoint's folder says.
        """
        for sample in samples:
            for prompt in sample.prompts:
                theirs, ours = self.prompt_ids(prompt), tokenizer.encode_prefix(prompt)
                if theirs != ours:
                    raise self._differs(f"the prompt '{prompt[:60]}' as tokens {theirs[:12]}", f"{ours[:12]}")
            wanted, made = self.pixel_values(sample.image), preprocess(sample.image)
            if wanted.shape != made.shape or not np.array_equal(wanted.astype(np.float32), made):
                off = "another shape" if wanted.shape != made.shape else f"{np.abs(wanted - made).max():.3g} off"
                raise self._differs("pixel_values as its image processor makes them", off)
        if self.end_ids and self.end_ids != tokens.end_ids:
            raise self._differs(f"answers that end at {sorted(self.end_ids)}", f"ends at {sorted(tokens.end_ids)}")

    def measure_torchvision(self, samples: Sequence[Sample]) -> str:
        """What another image processor than Pillow's would change, where the folder asks for it; empty elsewhere."""
        if not asks_for_torchvision(self._folder):
            return ""
        asked = "the folder asks for torchvision's image processor"
        try:
            processor = _torchvision_processor(self._folder)
            made = [processor([self._fitted(sample.image)], return_tensors="pt").pixel_values for sample in samples]
        except Exception as error:  # torchvision is missing or belongs to another torch
            return f"{asked}, which cannot be compared with Pillow's here ({_first_line(error)})"
        pairs = zip(made, samples, strict=True)
        off = np.concatenate([np.abs(theirs.numpy() - self.pixel_values(one.image)).ravel() for theirs, one in pairs])
        off *= 127.5
        return f"{asked}, whose pixels are up to {off.max():.1f} of 255 off Pillow's, {off.mean():.2f} on average"

    def _differs(self, expected: str, found: str) -> PrecisionError:
        return PrecisionError(
            expected=f"{expected}, by {self.name}",
            found=f"{found} in the bundle",
            action="Nothing was published. Report this with the checkpoint's small files.",
        )

    def answer(self, samples: Sequence[Sample], kept_tokens: Sequence[int]) -> ReferenceRun:
        """Answer all prompts greedily, in `kept_tokens` alone: rows of the table that are no words never win."""
        import torch

        run = ReferenceRun(self.name)
        for sample in samples:
            pixels = torch.from_numpy(np.asarray(self.pixel_values(sample.image), np.float32)).to(self._model.dtype)
            with torch.no_grad():
                features = self._model.get_image_features(pixels).pooler_output[0].float().numpy()
            run.features.append(features)
            run.answers.append([self._answer(pixels, prompt, np.asarray(kept_tokens)) for prompt in sample.prompts])
        return run

    def _answer(self, pixels: object, prompt: str, kept: npt.NDArray[np.int64]) -> TeacherForcedAnswer:
        tokens, scores, states = [], [], []
        steps = reference_steps(self._model, pixels, self.prompt_ids(prompt), self._image_token, MAX_NEW_TOKENS, kept)
        for token, logits, hidden in steps:
            tokens.append(token)
            shifted = logits - logits.max()
            scores.append(float(-np.log(np.exp(shifted).sum())))
            states.append(hidden)
            if token in self.end_ids:
                break
        return TeacherForcedAnswer(tokens, scores, np.array(states, np.float32))


def _torchvision_processor(folder: Path) -> Any:
    from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

    return SiglipImageProcessor.from_pretrained(folder)


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
