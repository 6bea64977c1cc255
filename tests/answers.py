"""Many requests, answered by `generate_batch`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from paliedge import Generation, GenerationOptions, PaliGemma, Prompt

DEFAULT = GenerationOptions()


def answer_together(
    model: PaliGemma, requests: Iterable[tuple[Any, str | Prompt]], options: GenerationOptions = DEFAULT, **rest: Any
) -> list[Generation]:
    """The answers, in the order of the requests, none of which may fail."""
    keyed = ((key, image, prompt) for key, (image, prompt) in enumerate(requests))
    found: list[Generation] = []
    for key, answer in model.generate_batch(keyed, options, **rest):
        assert key == len(found)
        assert isinstance(answer, Generation)
        found.append(answer)
    return found
