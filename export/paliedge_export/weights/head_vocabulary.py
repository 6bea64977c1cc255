"""Which rows a reduced output head keeps: boxes, masks, punctuation, the end, and the pieces of some labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from paliedge.bundle.manifest import Tokens, Vocabulary
from paliedge.errors import UsageError
from paliedge.inputs.prompt import find_box_request, split_labels
from paliedge_export.weights.samples import Sample, SampleFolder

DETECT = "detect"
"""The labels that the samples' own prompts ask for."""
_PUNCTUATION = (" ;", ";", ",", ".", " ,", " .", " ; ", "\n")


class HeadVocabulary(NamedTuple):
    """The labels that an answer may hold, and the ids of all tokens that spell such answers, ascending."""

    labels: tuple[str, ...]
    token_ids: tuple[int, ...]

    def restrict(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with prompts that such a head can answer; one without any is asked for a label."""

        def can_answer(prompt: str) -> bool:
            requested = find_box_request(prompt)
            return requested is not None and set(requested.labels) <= set(self.labels)

        kept = (tuple(filter(can_answer, one.prompts)) or (f"detect {self.labels[0]}",) for one in samples)
        return [replace(one, prompts=prompts) for one, prompts in zip(samples, kept, strict=True)]

    def describe(self) -> Vocabulary:
        """For the manifest."""
        return Vocabulary(labels=self.labels, num_tokens=len(self.token_ids))


def choose_head_vocabulary(
    choice: str, tokenizer_json: bytes, tokens: Tokens, samples: SampleFolder | None
) -> HeadVocabulary:
    """The reduced vocabulary for `choice`: a file with one label a line, or "detect".

    Raises:
        UsageError: no such file, no label in it, or no prompts to take labels from.
    """
    labels = _labels_from_samples(samples) if choice == DETECT else _labels_from_file(Path(choice))
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    tokenizer.encode_special_tokens = True
    ids = {*tokens.end_ids, tokens.newline}
    ids |= set(range(tokens.first_location, tokens.first_location + tokens.num_locations))
    ids |= set(range(tokens.first_segmentation, tokens.first_segmentation + tokens.num_segmentations))
    for text in (*_PUNCTUATION, *_spellings(labels)):
        ids |= set(tokenizer.encode(text, add_special_tokens=False).ids)
    return HeadVocabulary(tuple(labels), tuple(sorted(ids)))


def _spellings(labels: Iterable[str]) -> Iterable[str]:
    """As answers have them: behind a location token, with and without a space, and before what follows."""
    for label in labels:
        yield from (label, f" {label}", f" {label} ;", f"{label} ; ")


def _labels_from_file(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _no_labels(f"a readable text file {path}", f"{error}") from error
    labels = [label for line in lines for label in split_labels(line)]
    if not labels:
        raise _no_labels(f"one label a line in {path}", "none")
    return list(dict.fromkeys(labels))


def _labels_from_samples(samples: SampleFolder | None) -> list[str]:
    labels: list[str] = []
    for prompt in samples.all_prompts() if samples else ():
        requested = find_box_request(prompt)
        labels += requested.labels if requested else []
    if not labels:
        raise _no_labels("samples with `detect` or `segment` prompts, whose labels the head keeps", "none")
    return sorted(set(labels))


def _no_labels(expected: str, found: str) -> UsageError:
    return UsageError(
        expected=expected,
        found=found,
        action="Give --head-vocab a text file with one label a line, or --calibrate a folder whose .jsonl asks for "
        "the labels.",
    )
