"""Golden answers of an export: a reference's to a few prompts on the drawn pictures.

A quantised bundle's are its own graphs' answers, and so are those of a bundle without a reference.
"""

# Tests: tests/export/test_exporter.py.
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paliedge.bundle.golden import Golden
from paliedge_export.gate.runner import ReferenceRun
from paliedge_export.weights.samples import golden_images


def golden_from_answers(prompts: Sequence[str], answers: ReferenceRun, eos: int) -> Golden:
    """The answers to `prompts` on `golden_images`, each filled up with `eos`."""
    length = max(len(answer.tokens) for row in answers.answers for answer in row)
    shape = (len(answers.answers), len(prompts), length)
    token_ids, log_probs = np.full(shape, eos, np.int64), np.zeros(shape, np.float32)
    for index, row in enumerate(answers.answers):
        for column, answer in enumerate(row):
            token_ids[index, column, : len(answer.tokens)] = answer.tokens
            log_probs[index, column, : len(answer.tokens)] = answer.log_probs
    return Golden(golden_images(), list(prompts), token_ids, log_probs)
