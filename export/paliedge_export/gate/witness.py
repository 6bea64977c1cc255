"""transformers as a witness of an export: is what is exported what the checkpoint's folder says?

At fp32 it judges the graphs themselves. At any other precision it is asked about a few pictures, and held against the
float32 graphs, by which that precision is judged.
"""

# Tests: tests/export/gate/test_reference.py.
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec

from paliedge.bundle import manifest
from paliedge.bundle.manifest import Precision
from paliedge.inputs.preprocess import Preprocessor
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge_export.checkpoint.config import ModelConfig
from paliedge_export.checkpoint.safetensors_reader import Checkpoint
from paliedge_export.gate.compare import check, compare
from paliedge_export.gate.reference import TransformersReference
from paliedge_export.gate.runner import ReferenceRun, Runner
from paliedge_export.gate.transformers_model import NotComparedError
from paliedge_export.weights.samples import Sample
from paliedge_export.writer import ModelSource

NUM_IMAGES = 2
"""On which it is asked, where it does not judge the graphs themselves."""


class Testimony(NamedTuple):
    """What transformers said to a few samples.

    Attributes:
        samples: these.
        answers: what it said.
        precision: whose gate it can be held to.
        config: of the model that it had, which may be cut off behind its first decoder layers.
    """

    samples: Sequence[Sample]
    answers: ReferenceRun
    precision: Precision
    config: ModelConfig


class Witness:
    """Asks transformers about one export.

    Args:
        checkpoint: what is exported.
        source: what was read of it.
        report: gets a line a stage.

    Attributes:
        said: what the manifest will say of it.
    """

    def __init__(self, checkpoint: Checkpoint, source: ModelSource, report: Callable[[str], None]) -> None:
        self.said = manifest.Reference()
        self._checkpoint = checkpoint
        self._source = source
        self._report = report

    def open(self, samples: Sequence[Sample]) -> TransformersReference | None:
        """transformers on the same folder, whose prompts, pixels and ends are the bundle's; None, and why, without it.

        Raises:
            PrecisionError: it reads something else than the bundle.
        """
        self._report("running transformers to compare with")
        try:
            reference = TransformersReference(self._checkpoint, self._source.preprocess)
        except NotComparedError as error:
            self._note(not_compared=str(error))
            self._report(f"not compared with transformers: {error}")
            return None
        source = self._source
        preprocess = Preprocessor(source.preprocess, source.config.vision.image_size)
        tokenizer = PromptTokenizer(source.tokenizer, source.tokens)
        reference.check_reading(samples, tokenizer, source.tokens, preprocess)
        other = reference.measure_torchvision(samples)
        if other:
            self._report(f"{other}; the bundle resizes as Pillow does")
        how = "".join(f"; {note}" for note in (reference.how and f"it answers {reference.how}", other) if note)
        self._note(name=reference.name, compared=f"prompts, pixels and ends of {len(samples)} images{how}")
        return reference

    def ask(self, samples: Sequence[Sample]) -> Testimony | None:
        """What it says to the last of the samples, before graphs take up memory; None without it."""
        few = [replace(sample, prompts=sample.prompts[:1]) for sample in samples[-NUM_IMAGES:]]
        reference = self.open(few)
        if reference is None:
            return None
        precision: Precision = "fp32" if reference.exact else "bf16"
        return Testimony(few, reference.answer(few, self._source.words), precision, reference.config)

    def hold(self, runner: Runner, testimony: Testimony) -> None:
        """Hold the float32 graphs of the model that it had against what it said.

        Raises:
            PrecisionError: they say something else.
        """
        samples, answers, precision, _ = testimony
        judged = compare(runner, samples, answers, self._source.tokens, precision)
        check(judged, "float32")
        self._note(compared=f"{self.said.compared}; float32 graphs: {judged.comparison.describe()}")

    def _note(self, **changes: str) -> None:
        self.said = msgspec.structs.replace(self.said, **changes)
