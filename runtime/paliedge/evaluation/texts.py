"""Captions, answers and read text against what was expected."""

# Tests: tests/evaluation/test_evaluation.py.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from paliedge.bundle.manifest import Prompts
from paliedge.errors import ImageError, UsageError
from paliedge.evaluation.cases import Case, Outcome, Watcher, answer_each
from paliedge.evaluation.datasets import TextExample
from paliedge.evaluation.metrics import (
    anls,
    error_rates,
    is_exact,
    mean,
    nearest,
    ocr_accuracy,
    similarity,
    vqa_accuracy,
)
from paliedge.evaluation.tasks import Task
from paliedge.results.generation import Generation


class TextModel(Protocol):
    """What answers a prompt; `PaliGemma` does."""

    def generate(self, image: Path, prompt: str, /) -> Generation: ...


def default_prompt(task: Task, prompts: Prompts, lang: str) -> str:
    """The bundle's prompt for examples without one; empty for questions, which all have their own."""
    return {"caption": prompts.caption.replace("{lang}", lang), "ocr": prompts.ocr}.get(task, "")


def evaluate_texts(
    model: TextModel, examples: Sequence[TextExample], task: Task, prompt: str, watcher: Watcher
) -> Outcome:
    """Ask for every example, with its own prompt or `prompt`, and score the answers.

    An example whose picture cannot be read or whose prompt is too long is told to `watcher` and left out.
    """

    def answer(example: TextExample) -> Case:
        actual_prompt = example.prompt or prompt
        result = model.generate(example.path, actual_prompt)
        seconds = result.timings.total_ms / 1000
        is_cut_off = result.finish_reason == "length"
        case = Case(example.path, actual_prompt, result.text, 0.0, seconds, is_cut_off, answers=example.answers)
        return replace(case, score=_score(case, task))

    cases = tuple(answer_each(examples, answer, watcher, (ImageError, UsageError)))
    return Outcome(score_texts(cases, task) if cases else {}, cases)


def score_texts(cases: Sequence[Case], task: Task) -> dict[str, float | None]:
    """The task's metrics by name, all but the error rates 0 to 1."""
    expected = [nearest(case.answers, case.answer) for case in cases]
    character_errors, word_errors = error_rates(expected, [case.answer for case in cases])
    scores: dict[str, float | None] = {
        "exact_match": mean([is_exact(case.answers, case.answer) for case in cases]),
        "cer": character_errors,
        "wer": word_errors,
        "anls": mean([anls(case.answers, case.answer) for case in cases]),
    }
    if task == "vqa":
        scores["vqa_accuracy"] = mean([case.score for case in cases])
    if task == "ocr":
        scores["accuracy"] = ocr_accuracy(character_errors)
    return scores


def _score(case: Case, task: Task) -> float:
    if task == "vqa":
        return vqa_accuracy(case.answers, case.answer)
    return similarity(nearest(case.answers, case.answer).strip(), case.answer.strip())
