"""Check this machine's answers against those that the exporting machine stored in the bundle."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from paliedge.bundle import Bundle
from paliedge.errors import BundleError
from paliedge.model import PaliGemma

_TIE = 0.05
"""Nats: a first different token whose score is this near the golden's is a tie that rounding decided."""


class GoldenReport(NamedTuple):
    """How many answers were compared, how many were equal, how many left at a tie."""

    num_answers: int
    num_equal: int
    num_ties: int


def verify_golden(bundle: Bundle, model: PaliGemma) -> GoldenReport | None:
    """Answer the bundle's golden prompts; None for a bundle without any.

    Raises:
        BundleError: an answer differs by more than a tie.
    """
    if bundle.manifest.golden is None:
        return None
    num_answers = num_equal = num_ties = 0
    with np.load(bundle.path(bundle.manifest.golden), allow_pickle=False) as golden:
        images, prompts = golden["images"], golden["prompts"].tolist()
        token_ids, log_probs = golden["token_ids"], golden["log_probs"]
    for image_index, image in enumerate(images):
        encoded = model.encode(image)
        for prompt_index, prompt in enumerate(prompts):
            expected = token_ids[image_index, prompt_index].tolist()
            scores = log_probs[image_index, prompt_index].tolist()
            answer = model.generate(encoded, prompt, max_new_tokens=len(expected))
            num_answers += 1
            found = list(answer.token_ids)
            wanted = expected[: len(found)]
            if found == wanted:
                num_equal += 1
                continue
            first = next(place for place, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
            if abs(answer.log_probs[first] - scores[first]) > _TIE:
                raise BundleError(
                    expected=f"the answer to '{prompt}' that was exported with the bundle",
                    found=f"another token at place {first}",
                    action="Report this machine, its onnxruntime version and `paliedge info`.",
                )
            num_ties += 1
    return GoldenReport(num_answers, num_equal, num_ties)
