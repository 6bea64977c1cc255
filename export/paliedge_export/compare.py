"""The last step of an export: run its graphs and compare with a reference, token by token.

The reference's tokens are fed in (teacher forcing), so that one early difference does not hide
what comes after it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from paliedge.bundle import Bundle
from paliedge.embedding import EmbeddingTable
from paliedge.errors import PrecisionError
from paliedge.manifest import Comparison, Target
from paliedge.preprocess import Preprocessor
from paliedge.prompt import PromptTokenizer
from paliedge.session import FloatArray
from paliedge_export.golden import NUM_NEW_TOKENS, PROMPTS, Golden, golden_images

_FIRST_WITH_TENSOR_SCATTER = (1, 25)
LIMITS = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 2e-1}
"""Largest error of image features (relative to the largest one) and of log-probabilities (in nats)."""


class _Runner:
    """The bundle's graphs, a step at a time."""

    def __init__(self, folder: Path, target: str) -> None:
        from paliedge.ort_session import OrtSession

        bundle = Bundle(folder, check_hashes=False)
        manifest = bundle.manifest
        self._session = OrtSession(bundle, target)
        self._cache = self._session.new_cache()
        self._preprocess = Preprocessor(manifest.preprocess, manifest.model.vision.image_size)
        self._tokenizer = PromptTokenizer(bundle.path(manifest.tokenizer), manifest.tokens)
        self._embed = EmbeddingTable(bundle)
        self._allowed = (0, manifest.tokens.vocab_size - 1)

    def encode(self, image: npt.NDArray[np.uint8]) -> FloatArray:
        return self._session.encode_image(self._preprocess(Image.fromarray(image)))

    def decode(self, features: FloatArray, prompt: str, forced: list[int] | None) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities; each step is fed the forced token, or its own."""
        prefix = self._embed(self._tokenizer.encode_prefix(prompt))
        steps = [self._session.prefill(self._cache, features, prefix, self._allowed)]
        for index in range(NUM_NEW_TOKENS - 1):
            token = steps[-1].token if forced is None else forced[index]
            steps.append(self._session.decode(self._cache, self._embed([token])[0], self._allowed))
        return [step.token for step in steps], [step.log_prob for step in steps]


def make_golden(folder: Path, reference: str, target: str) -> Golden:
    """Let a target's graphs of the bundle in `folder` answer."""
    runner = _Runner(folder, target)
    images = golden_images()
    features = np.stack([runner.encode(image) for image in images])
    answers = [[runner.decode(feature, prompt, None) for prompt in PROMPTS] for feature in features]
    return Golden(
        reference=reference,
        images=images,
        image_features=features,
        token_ids=np.array([[tokens for tokens, _ in row] for row in answers]),
        log_probs=np.array([[scores for _, scores in row] for row in answers], np.float32),
    )


def compare_with_golden(folder: Path, golden: Golden, target: str) -> Comparison:
    """Run a target's graphs of the bundle in `folder` on the golden's images and tokens."""
    runner = _Runner(folder, target)
    features = np.stack([runner.encode(image) for image in golden.images])
    tokens, scores = [], []
    for feature, forced_row in zip(features, golden.token_ids.tolist(), strict=True):
        for prompt, forced in zip(PROMPTS, forced_row, strict=True):
            row_tokens, row_scores = runner.decode(feature, prompt, forced)
            tokens.append(row_tokens)
            scores.append(row_scores)
    largest = np.abs(golden.image_features).max()
    score_errors = np.abs(np.array(scores).reshape(golden.log_probs.shape) - golden.log_probs)
    return Comparison(
        reference=golden.reference,
        image_features_error=float(np.abs(features - golden.image_features).max() / largest),
        log_prob_error=float(score_errors.max()),
        token_match=float((np.array(tokens).reshape(golden.token_ids.shape) == golden.token_ids).mean()),
    )


def check_comparison(comparison: Comparison, precision: str) -> None:
    """Refuse graphs that are further off than their precision explains.

    A token may differ where two candidates are as good as equal; then their log-probabilities do not.

    Raises:
        PrecisionError: an error over the limit, or one that is no number.
    """
    limit = LIMITS[precision]
    if not (comparison.image_features_error <= limit and comparison.log_prob_error <= limit):
        raise PrecisionError(
            expected=f"{precision} graphs within {limit:g} of {comparison.reference}",
            found=f"image features off by {comparison.image_features_error:.2g}, "
            f"log-probabilities by {comparison.log_prob_error:.2g}, {comparison.token_match:.1%} of tokens equal",
            action="Nothing was published. Export with --precision fp32, and report this.",
        )


def find_obstacle(target: Target) -> str:
    """Why the installed ONNX Runtime cannot run the target's graphs; empty where it can."""
    from paliedge.ort_session import VERSION

    if target.cache_update == "in_place" and tuple(map(int, VERSION.split(".")[:2])) < _FIRST_WITH_TENSOR_SCATTER:
        needed = ".".join(map(str, _FIRST_WITH_TENSOR_SCATTER))
        return f"onnxruntime {VERSION} has no kernel for TensorScatter, which came with {needed}"
    return ""
