"""A user's words as a prompt in the model's own: templates of the tasks, and the boxes that a prompt asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from paliedge.bundle.manifest import Prompts
from paliedge.errors import UsageError

BoxTask = Literal["detect", "segment"]
_BOX_TASK = re.compile(r"\A\s*(detect|segment)\s+(\S.*)\Z")
CaptionStyle = Literal["caption", "cap", "describe"]


class BoxRequest(NamedTuple):
    """What a prompt that is answered in boxes asks for."""

    task: BoxTask
    labels: list[str]


class Prompt(NamedTuple):
    """A prompt in the model's own words, and the boxes that it asks for, if any."""

    text: str
    boxes: BoxRequest | None = None


def free_prompt(text: str) -> Prompt:
    """Any prompt as it is; one that begins with `detect` or `segment` asks for boxes."""
    return Prompt(text, find_box_request(text))


class PromptMaker:
    """Prompts of the tasks, in the words that a bundle's model was trained on.

    Args:
        templates: the bundle's.
    """

    def __init__(self, templates: Prompts) -> None:
        self._templates = templates

    def detect(self, labels: str | Sequence[str]) -> Prompt:
        """Every instance of `labels`: `["cat", "dog"]`, or `"cat ; dog"` as PaliGemma writes it.

        Raises:
            UsageError: there is no label.
        """
        return self.boxes("detect", labels)

    def segment(self, labels: str | Sequence[str]) -> Prompt:
        """Every instance of `labels` with its mask.

        Raises:
            UsageError: there is no label.
        """
        return self.boxes("segment", labels)

    def boxes(self, task: BoxTask, labels: str | Sequence[str]) -> Prompt:
        """`detect` or `segment`."""
        requested = split_labels(labels) if isinstance(labels, str) else list(labels)
        if not any(label.strip() for label in requested):
            raise UsageError(
                expected="at least one label", found="none", action='Say what to find, such as "cat ; dog".'
            )
        text = labels if isinstance(labels, str) else " ; ".join(labels)
        template: str = getattr(self._templates, task)
        return Prompt(fill(template, labels=text), BoxRequest(task, requested))

    def caption(self, lang: str = "en", style: CaptionStyle = "caption") -> Prompt:
        """One sentence about the image; `lang` is a language code."""
        return Prompt(fill(getattr(self._templates, style), lang=lang))

    def ask(self, question: str, lang: str = "en") -> Prompt:
        """A question about the image.

        Raises:
            UsageError: it is empty.
        """
        _check_text("a question", question)
        return Prompt(fill(self._templates.answer, lang=lang, question=question))

    def question(self, answer: str, lang: str = "en") -> Prompt:
        """The question about the image that has this answer.

        Raises:
            UsageError: it is empty.
        """
        _check_text("an answer to ask for", answer)
        return Prompt(fill(self._templates.question, lang=lang, answer=answer))

    def ocr(self) -> Prompt:
        """The text in the image."""
        return Prompt(self._templates.ocr)


def _check_text(what: str, text: str) -> None:
    if not text.strip():
        raise UsageError(expected=what, found="no text", action="Give one; an empty prompt is for `predict`.")


def find_box_request(prompt: str) -> BoxRequest | None:
    """The request of a `detect` or `segment` prompt; None for any other, and for several commands in one."""
    found = _BOX_TASK.match(prompt.removesuffix("\n"))
    labels = split_labels(found[2]) if found else []
    if not found or not labels:
        return None
    return BoxRequest("segment" if found[1] == "segment" else "detect", labels)


def fill(template: str, **values: str) -> str:
    """A template with its places filled in; braces in a value stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda field: values.get(field[1], field[0]), template)


def split_labels(text: str) -> list[str]:
    """`cat ; dog` to its labels."""
    return [label.strip() for label in text.split(";") if label.strip()]
