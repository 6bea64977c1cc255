"""Numbers from texts, times and prices. Knows no models and no files."""

# Tests: tests/evaluation/test_evaluation.py.
from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

_ANLS_THRESHOLD = 0.5
_FULL_PANEL = 10
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MARKS = re.compile(r"""[;/\[\]"{}()=+\\_\-><@`,?!]""")


def is_exact(answers: Sequence[str], found: str) -> bool:
    """Whether `found` is one of `answers`, but for white space around it."""
    return found.strip() in {answer.strip() for answer in answers}


def vqa_accuracy(answers: Sequence[str], found: str) -> float:
    """Soft accuracy, 0 to 1, of VQA (Antol et al. 2015).

    Of the answers of ten people or more: min(number that agree / 3, 1), averaged over the subsets with one
    person left out. With fewer answers: 1 where `found` is one of them, else 0.
    """
    wanted = normalize_answer(found)
    agree, total = sum(normalize_answer(answer) == wanted for answer in answers), len(answers)
    if total < _FULL_PANEL:
        return float(agree > 0)
    return (agree * min((agree - 1) / 3, 1) + (total - agree) * min(agree / 3, 1)) / total


def normalize_answer(text: str) -> str:
    """Lower case without punctuation, articles and number words, as VQA's evaluation compares answers.

    Its table of contractions without an apostrophe ("dont") is left out.
    """
    text = _FULL_STOP.sub("", _MARKS.sub(" ", _THOUSANDS.sub("", text.lower())))
    return " ".join(_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES)


def anls(answers: Sequence[str], found: str) -> float:
    """Normalised Levenshtein similarity to the best answer, 0 where over half must change.

    Of Biten et al. 2019 (ST-VQA): 1 - NL where the normalised distance NL < 0.5, else 0; case and runs of
    white space make no difference. Its mean over a dataset is ANLS.
    """
    best = max(similarity(_plain(answer), _plain(found)) for answer in answers)
    return best if 1 - best < _ANLS_THRESHOLD else 0.0


def similarity(expected: str, found: str) -> float:
    """1 - Levenshtein distance / length of the longer text: 0 to 1."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(expected, found)


def nearest(answers: Sequence[str], found: str) -> str:
    """The expected text that `found` is most like."""
    return max(answers, key=lambda answer: similarity(answer.strip(), found.strip()))


def error_rates(expected: Sequence[str], found: Sequence[str]) -> tuple[float, float]:
    """CER and WER over all texts: characters or words to change / those expected; may exceed 1."""
    import jiwer

    return float(jiwer.cer(list(expected), list(found))), float(jiwer.wer(list(expected), list(found)))


def ocr_accuracy(character_error_rate: float) -> float:
    """1 - CER, held to 0..1."""
    return min(max(1 - character_error_rate, 0.0), 1.0)


def speed_efficiency(accuracy: float, seconds_per_image: float) -> float | None:
    """Accuracy per second per image; None where no time passed."""
    return accuracy / seconds_per_image if seconds_per_image > 0 else None


def price_per_image(seconds_per_image: float, price_per_hour: float) -> float:
    """What a picture costs on a machine of this price, in the price's currency."""
    return seconds_per_image / 3600 * price_per_hour


def cost_efficiency(accuracy: float, price: float) -> float | None:
    """Accuracy per price of a picture; None where it costs nothing."""
    return accuracy / price if price > 0 else None


def mean(values: Sequence[float]) -> float | None:
    """None for no values."""
    return fmean(values) if values else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
