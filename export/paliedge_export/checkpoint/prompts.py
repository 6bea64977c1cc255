"""The prompts that a checkpoint was trained with, as the bundle's templates.

Google's fine-tuned checkpoints do not all use the words of the pre-trained and mixed ones (big_vision's
configurations). A user's own fine-tune says in a JSON file what differs.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from paliedge.bundle.manifest import Prompts
from paliedge.errors import UsageError

_BARE_QUESTION = Prompts(answer="{question}")
_CHOICES = Prompts(answer="answer {lang}  {question}")
"""Two blanks; the question ends in `choose from: a \\t b`."""
PRESETS: dict[str, Prompts] = {
    "mix": Prompts(),
    "docvqa": _BARE_QUESTION,
    "chartqa": _BARE_QUESTION,
    "pope": _BARE_QUESTION,
    "scienceqa": _BARE_QUESTION,
    "ai2d": _CHOICES,
    "aokvqa-mc": _CHOICES,
    "refcoco-seg": Prompts(segment="{labels}"),
}
"""Fine-tunes whose prompts differ, by the name that their repositories have; all others are as "mix".

ScienceQA's prompt is a form of its own (question, context, options), all of which is the caller's question here.
"""
_FINE_TUNE = re.compile(r"paligemma2?-\w+-ft-([a-z0-9-]+?)-\d+")


def choose_prompts(choice: str | None, checkpoint: str) -> Prompts:
    """The templates for `choice`: a preset's name or a JSON file; without it those of the checkpoint's name.

    Raises:
        UsageError: neither, or a file with other templates than `Prompts` has, or without their places.
    """
    if choice is None:
        found = _FINE_TUNE.search(checkpoint.lower())
        return PRESETS.get(found[1], Prompts()) if found else Prompts()
    if choice in PRESETS:
        return PRESETS[choice]
    path = Path(choice)
    expected = f'one of {", ".join(PRESETS)}, or a JSON file of templates such as {{"answer": "{{question}}"}}'
    try:
        prompts = msgspec.json.decode(path.read_bytes(), type=Prompts)
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise UsageError(expected=expected, found=f"'{choice}': {error}", action="Correct --prompts.") from error
    for name, place in (("detect", "{labels}"), ("segment", "{labels}"), ("answer", "{question}")):
        if place not in getattr(prompts, name):
            raise UsageError(
                expected=f"{place} in the template '{name}'",
                found=f"'{getattr(prompts, name)}' in {path}",
                action="Put it where the user's words go.",
            )
    return prompts
