"""What came of each picture, in plain values, and the loop over them."""

# Tests: tests/evaluation/test_evaluation.py.
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from paliedge.errors import ImageError, PaliEdgeError


@dataclass(frozen=True)
class Shape:
    """One object, expected or found.

    Attributes:
        label: its name.
        box: x1, y1, x2, y2 in pixels.
        confidence: of a found one, 0 to 1; None for an expected one.
        mask: COCO's compressed run lengths, `size` [height, width] and `counts`; None without a mask.
        is_crowd: several objects in one, as COCO marks them; finding it is neither right nor wrong.
    """

    label: str
    box: tuple[float, float, float, float]
    confidence: float | None = None
    mask: dict[str, Any] | None = None
    is_crowd: bool = False


@dataclass(frozen=True)
class Case:
    """One picture with its question.

    Attributes:
        source: the picture's file.
        prompt: what was asked, a line a prompt.
        answer: what the model said.
        score: 0 (all wrong) to 1; it tells the worst cases.
        seconds: from the file to the last token.
        is_cut_off: the answer ended at the token limit.
        answers: the expected texts, any of which is right; empty where shapes are expected.
        truth: the expected shapes.
        found: the answer's shapes.
    """

    source: Path
    prompt: str
    answer: str
    score: float
    seconds: float
    is_cut_off: bool
    answers: tuple[str, ...] = ()
    truth: tuple[Shape, ...] = ()
    found: tuple[Shape, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A line of `predictions.jsonl`."""
        row: dict[str, Any] = {
            "source": str(self.source),
            "prompt": self.prompt,
            "answer": self.answer,
            "score": round(self.score, 5),
            "seconds": round(self.seconds, 6),
            "is_cut_off": self.is_cut_off,
        }
        if self.answers:
            return row | {"expected": list(self.answers)}
        return row | {"expected": list(map(asdict, self.truth)), "found": list(map(asdict, self.found))}


@dataclass(frozen=True)
class Outcome:
    """Scores by name (None where nothing in the data can be scored), and the cases they are made of."""

    scores: dict[str, float | None]
    cases: tuple[Case, ...]


class Watcher(Protocol):
    """Who is told how it goes."""

    def started(self, number: int, total: int, source: Path) -> None: ...

    def failed(self, source: Path, error: PaliEdgeError) -> None: ...


class _HasPath(Protocol):
    @property
    def path(self) -> Path: ...


Item = TypeVar("Item", bound=_HasPath)
Answer = TypeVar("Answer")


def answer_each(
    items: Sequence[Item],
    answer: Callable[[Item], Answer],
    watcher: Watcher,
    errors: type[PaliEdgeError] | tuple[type[PaliEdgeError], ...] = ImageError,
) -> Iterator[Answer]:
    """The answers in order; an item that raises one of `errors` is told to `watcher` and left out."""
    for number, item in enumerate(items, 1):
        watcher.started(number, len(items), item.path)
        try:
            result = answer(item)
        except errors as error:
            watcher.failed(item.path, error)
        else:
            yield result
