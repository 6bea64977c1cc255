"""The model as transformers runs it, in float32: the reference that fp32 graphs are compared with.

The only module that imports torch and transformers, and only when it is called.
"""

# Tests: tests/test_parity.py.
from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from paliedge.backends.session import FloatArray
from paliedge.bundle.manifest import Preprocess
from paliedge.inputs.preprocess import Preprocessor
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge_export.checkpoint.metadata import PROCESSOR_FILES, read_tokens
from paliedge_export.checkpoint.safetensors_reader import Array, canonical_name
from paliedge_export.gate.runner import MAX_NEW_TOKENS, ReferenceRun, TeacherForcedAnswer
from paliedge_export.weights.samples import Sample

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PaliGemmaForConditionalGeneration


def load_model(folder: Path) -> PaliGemmaForConditionalGeneration:
    """A checkpoint's model in float32, with Gemma 2's softcaps whichever transformers is installed.

    Before 5.21 its SDPA attention leaves the scores' softcap out, hence eager attention.
    """
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    model = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert isinstance(model, PaliGemmaForConditionalGeneration)
    return model


class Reference:
    """A checkpoint as transformers runs it; the pixels are its own processor's, the prompt's ids are ours.

    Its processor knows no letterbox: then it gets the square.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
    """

    def __init__(self, folder: Path, preprocess: Preprocess) -> None:
        import transformers
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        self._name = f"transformers {transformers.__version__}"
        self._model = load_model(folder)
        if any((folder / name).is_file() for name in PROCESSOR_FILES):
            self._processor = SiglipImageProcessorPil.from_pretrained(folder)
        else:
            size = self._model.config.vision_config.image_size
            self._processor = SiglipImageProcessorPil(
                size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
            )
        size = self._model.config.vision_config.image_size
        self._fit = Preprocessor(preprocess, size).fit if preprocess.letterbox else None
        self._tokens = read_tokens(folder)
        self._tokenizer = PromptTokenizer(folder / "tokenizer.json", self._tokens)

    def replace_weights(self, tensors: Mapping[str, Array], names: Sequence[str]) -> None:
        """Put the tensors called `names` in the place of the model's own."""
        import torch

        state = {canonical_name(name): value for name, value in self._model.state_dict().items()}
        for name in names:
            state[name].copy_(torch.from_numpy(np.asarray(tensors[name], np.float32)))

    def answer(self, samples: Sequence[Sample], kept_tokens: Sequence[int] | None = None) -> ReferenceRun:
        """Answer all prompts greedily, in `kept_tokens` alone if they are given."""
        import torch

        found = ReferenceRun(self._name)
        for sample in samples:
            picture = self._fit(sample.image) if self._fit else sample.image
            pixels = self._processor([picture], return_tensors="pt").pixel_values
            with torch.no_grad():
                features = self._model.get_image_features(pixels).pooler_output[0].numpy()
            found.features.append(features)
            found.answers.append([self._answer(pixels, prompt, kept_tokens) for prompt in sample.prompts])
        return found

    def _answer(self, pixels: object, prompt: str, kept_tokens: Sequence[int] | None) -> TeacherForcedAnswer:
        tokens, scores, states = [], [], []
        kept = np.asarray(range(self._tokens.vocab_size) if kept_tokens is None else kept_tokens)
        steps = reference_steps(
            self._model, pixels, self._tokenizer.encode_prefix(prompt), self._tokens.image, MAX_NEW_TOKENS, kept
        )
        for token, logits, hidden in steps:
            tokens.append(token)
            shifted = logits - logits.max()
            scores.append(float(-np.log(np.exp(shifted).sum())))
            states.append(hidden)
            if token == self._tokens.eos:
                break
        return TeacherForcedAnswer(tokens, scores, np.array(states, np.float32))


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
