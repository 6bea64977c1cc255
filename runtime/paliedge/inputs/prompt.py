"""A user's words as a prompt in the model's own: templates of the tasks, and the boxes that a prompt asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable
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
    """Any prompt as it is; one that begins with `detect` or `segment` asks for boxes.

    Raises:
        UsageError: it is no text, or begins with transformers' `<image>`.
    """
    if not isinstance(text, str):
        raise UsageError(expected="a prompt, as text", found=_say(text), action="Give one such as `caption en`.")
    if text.lstrip().startswith("<image>"):
        raise UsageError(
            expected="a prompt without `<image>`",
            found=f"'{_cut(text)}'",
            action="Leave `<image>` out: paliedge puts the pictures before the prompt by itself.",
        )
    return Prompt(text, find_box_request(text))


class PromptMaker:
    """Prompts of the tasks, in the words that a bundle's model was trained on.

    Args:
        templates: the bundle's.
    """

    def __init__(self, templates: Prompts) -> None:
        self._templates = templates

    def detect(self, labels: str | Iterable[str]) -> Prompt:
        """Every instance of `labels`: `["cat", "dog"]`, or `"cat ; dog"` as PaliGemma writes it.

        Raises:
            UsageError: there is no label, or one that is none.
        """
        return self.boxes("detect", labels)

    def segment(self, labels: str | Iterable[str]) -> Prompt:
        """Every instance of `labels` with its mask.

        Raises:
            UsageError: there is no label, or one that is none.
        """
        return self.boxes("segment", labels)

    def boxes(self, task: BoxTask, labels: str | Iterable[str]) -> Prompt:
        """`detect` or `segment`."""
        requested = _read_labels(task, labels)
        template: str = getattr(self._templates, task)
        return Prompt(fill(template, labels=" ; ".join(requested)), BoxRequest(task, requested))

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
    if not isinstance(text, str):
        raise UsageError(expected=f"{what}, as text", found=_say(text), action="Give it in quotes.")
    if not text.strip():
        raise UsageError(expected=what, found="no text", action="Give one; an empty prompt is for `predict`.")


def _read_labels(task: BoxTask, labels: str | Iterable[str]) -> list[str]:
    """What is to be found, a label each: a semicolon parts labels wherever it stands."""
    if isinstance(labels, bytes) or not isinstance(labels, Iterable):
        raise _no_labels(_say(labels))
    requested = []
    for item in [labels] if isinstance(labels, str) else labels:
        if not isinstance(item, str):
            raise _no_labels(f"{_say(item)} among them")
        found = split_labels(item)
        if not found:
            raise _no_labels("an empty one")
        requested += found
    if not requested:
        raise _no_labels("none")
    for label in requested:
        for start in (f"{task} ", "<image>"):
            if label.startswith(start):
                raise UsageError(
                    expected="labels alone",
                    found=f"'{_cut(label)}'",
                    action=f"Leave out `{start.strip()}`: it is put before the labels by itself.",
                )
    return requested


def _no_labels(found: str) -> UsageError:
    return UsageError(
        expected="at least one label, as text", found=found, action='Say what to find, such as "cat ; dog".'
    )


def _say(value: object) -> str:
    return "None" if value is None else f"{_cut(repr(value))} ({type(value).__name__})"


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


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
