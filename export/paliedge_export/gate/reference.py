"""The checkpoint as transformers reads it by its own means: tokenizer, image processor, weights, ends of answers.

An export is held against it, and nothing in it is ours: neither ids nor pixels nor the end of an answer.
"""

# Tests: tests/export/gate/test_reference.py and tests/test_parity.py.
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from paliedge.backends.session import FloatArray
from paliedge.bundle.manifest import Preprocess, Tokens
from paliedge.errors import PrecisionError
from paliedge.inputs.preprocess import Preprocessor
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge_export.checkpoint.metadata import PROCESSOR_FILES, asks_for_torchvision, find_processor
from paliedge_export.checkpoint.safetensors_reader import Checkpoint, canonical_name
from paliedge_export.checkpoint.tokenizer import FILES as TOKENIZER_FILES
from paliedge_export.checkpoint.tokenizer import HELD_BACK
from paliedge_export.gate import transformers_model
from paliedge_export.gate.runner import MAX_NEW_TOKENS, ReferenceRun, TeacherForcedAnswer
from paliedge_export.gate.transformers_model import NotComparedError, first_line, reference_steps, with_layers
from paliedge_export.weights.samples import Sample


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
        transformers = transformers_model.import_transformers()
        dtype, layers = transformers_model.choose_size(checkpoint)
        self.config = with_layers(checkpoint.config, layers)
        self.name = f"transformers {transformers.__version__}"
        self.exact = dtype == "float32"
        self.how = "" if self.exact else "in bfloat16, since float32 does not fit into memory"
        if layers < checkpoint.config.text.num_layers:
            of_all = f"{layers} of {checkpoint.config.text.num_layers} layers"
            self.how = f"with the first {of_all}, since no more fit into memory"
        try:
            self._model = transformers_model.load_model(checkpoint.folder, dtype, layers)
            self._take_adapters(checkpoint)
            self._folder = find_processor(checkpoint.folders) or checkpoint.folder
            self._processor = self._load_processor(self._folder)
            self._tokenizer_folder = next(one for one in checkpoint.folders if (one / TOKENIZER_FILES[0]).is_file())
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._tokenizer_folder)
        except NotComparedError:
            raise
        except Exception as error:  # whatever transformers makes of somebody's folder
            raise NotComparedError(f"{self.name} does not read it ({first_line(error)})") from error
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
            self._model = transformers_model.load_model(
                checkpoint.folder, "float32" if self.exact else "bfloat16", layers
            )
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
        prompts = [prompt for sample in samples for prompt in sample.prompts]
        for prompt in prompts + [f"a {token} b{token}c" for token in self._named_tokens()]:
            theirs, ours = self.prompt_ids(prompt), tokenizer.encode_prefix(prompt)
            if theirs != ours:
                raise self._differs(f"the prompt '{prompt[:60]}' as tokens {theirs[:12]}", f"{ours[:12]}")
        for sample in samples:
            wanted, made = self.pixel_values(sample.image), preprocess(sample.image)
            if wanted.shape != made.shape or not np.array_equal(wanted.astype(np.float32), made):
                off = "another shape" if wanted.shape != made.shape else f"{np.abs(wanted - made).max():.3g} off"
                raise self._differs("pixel_values as its image processor makes them", off)
        if self.end_ids and self.end_ids != tokens.end_ids:
            raise self._differs(f"answers that end at {sorted(self.end_ids)}", f"ends at {sorted(tokens.end_ids)}")

    def _named_tokens(self) -> list[str]:
        """The added tokens that a file names; transformers' class may add others, which no model was trained on."""
        texts = [path.read_text() for path in self._tokenizer_folder.glob("*.json") if path.name in TOKENIZER_FILES]
        spellings = {token: (token, json.dumps(token)[1:-1]) for token in self._tokenizer.get_added_vocab()}
        named = {token for token, ways in spellings.items() if any(way in text for text in texts for way in ways)}
        return sorted(named - set(HELD_BACK))

    def measure_torchvision(self, samples: Sequence[Sample]) -> str:
        """What another image processor than Pillow's would change, where the folder asks for it; empty elsewhere."""
        if not asks_for_torchvision(self._folder):
            return ""
        asked = "the folder asks for torchvision's image processor"
        try:
            processor = _torchvision_processor(self._folder)
            made = [processor([self._fitted(sample.image)], return_tensors="pt").pixel_values for sample in samples]
        except Exception as error:  # torchvision is missing or belongs to another torch
            return f"{asked}, which cannot be compared with Pillow's here ({first_line(error)})"
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
