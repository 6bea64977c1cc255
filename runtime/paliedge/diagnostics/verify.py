"""Check this machine's answers against those that the exporting machine stored in the bundle."""

# Tests: tests/diagnostics/test_selfcheck.py and tests/cli/test_bundles.py.
from __future__ import annotations

from collections.abc import Container
from itertools import takewhile
from typing import NamedTuple

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.golden import load_golden
from paliedge.errors import BundleError
from paliedge.generation.request import GenerationOptions
from paliedge.model import PaliGemma
from paliedge.results.generation import Generation

_TIE = 0.05
"""Nats: a first different token whose score is this near the golden's is a tie that rounding decided. Where
the export itself was further off than that, twice as much as it was."""


class GoldenReport(NamedTuple):
    """How many answers were compared, how many were equal, how many left at a tie."""

    num_answers: int
    num_equal: int
    num_ties: int


def verify_golden(bundle: Bundle, model: PaliGemma, *, strict: bool = True) -> GoldenReport | None:
    """Answer the bundle's golden prompts; None for a bundle without any.

    Raises:
        BundleError: an answer differs by more than a tie, and `strict` wants to know.
    """
    golden = load_golden(bundle)
    if golden is None:
        return None
    num_answers = num_equal = num_ties = 0
    tokens = bundle.manifest.tokens
    ends = tokens.end_ids - set(tokens.spoken_ends)
    tie = max([_TIE, *(2 * found.log_prob_error for found in bundle.manifest.comparisons.values())])
    for image_index, image in enumerate(golden.images):
        encoded = model.encode(image)
        for prompt_index, prompt in enumerate(golden.prompts):
            expected = golden.token_ids[image_index, prompt_index].tolist()
            scores = golden.log_probs[image_index, prompt_index].tolist()
            answer = model.generate(encoded, prompt, options=GenerationOptions(max_new_tokens=len(expected), free=True))
            num_answers += 1
            if _until(ends, expected) == list(answer.token_ids):
                num_equal += 1
            elif _is_tie(expected, scores, answer, ends, tie):
                num_ties += 1
            elif strict:
                raise BundleError(
                    expected=f"the answer to '{prompt}' that was exported with the bundle",
                    found=f"tokens {list(answer.token_ids)} instead of {_until(ends, expected)}",
                    action="Report this with `paliedge doctor --json` and `paliedge info`.",
                )
    return GoldenReport(num_answers, num_equal, num_ties)


def _until(ends: Container[int], tokens: list[int]) -> list[int]:
    """The tokens before the first that ends an answer."""
    return list(takewhile(lambda token: token not in ends, tokens))


def _is_tie(expected: list[int], scores: list[float], answer: Generation, ends: Container[int], tie: float) -> bool:
    """Whether the first different token scored as much as the golden one; an early end scores nothing."""
    pairs = zip(_until(ends, expected), answer.token_ids, strict=False)
    first = next((index for index, (wanted, found) in enumerate(pairs) if wanted != found), None)
    return first is not None and abs(answer.log_probs[first] - scores[first]) <= tie
