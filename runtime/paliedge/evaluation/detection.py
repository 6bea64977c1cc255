"""Boxes and masks against COCO's, by pycocotools."""

# Tests: tests/evaluation/test_evaluation.py.
from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from paliedge.bundle.manifest import Manifest, Prompts
from paliedge.errors import ImageError, UsageError
from paliedge.evaluation.cases import Case, Outcome, Shape, Watcher, answer_each
from paliedge.evaluation.datasets import Annotation, CocoDataset, CocoImage, Runs
from paliedge.inputs.prompt import BoxTask, Prompt, PromptMaker
from paliedge.results.generation import Generation

if TYPE_CHECKING:
    from paliedge import EncodedImage

_SIZE_ACTION = "Take the image that was annotated, or correct the annotations."


class Detector(Protocol):
    """What finds labels in pictures; `PaliGemma` does."""

    def encode(self, image: Path, /) -> EncodedImage: ...

    def generate(self, image: EncodedImage, prompt: Prompt, /) -> Generation: ...


@dataclass(frozen=True)
class Question:
    """What is asked for in each picture.

    Attributes:
        task: boxes, or masks too.
        only_present: ask for the labels that the picture has, not for all of the dataset.
        one_by_one: a prompt for each label, instead of one for all.
        prompts: the model's templates.
    """

    task: BoxTask = "detect"
    only_present: bool = False
    one_by_one: bool = False
    prompts: Prompts = field(default_factory=Prompts)


@dataclass(frozen=True)
class _Answered:
    """A picture that was answered; `case.score` is not known yet. `areas` are those of `case.truth`."""

    case: Case
    image_wh: tuple[int, int]
    areas: tuple[float, ...]


def check_masks(manifest: Manifest) -> None:
    """See that the bundle can give masks.

    Raises:
        UsageError: it cannot.
    """
    decoders = [target.mask_decoder for target in manifest.targets.values()]
    if not any(decoders) and not any(engine.mask_decoder for engine in manifest.engines):
        raise UsageError(
            expected="a bundle with a mask decoder, to score masks",
            found="one without",
            action="Export it again with --mask-decoder, or score the boxes alone with --task detect.",
        )


def evaluate_detection(
    model: Detector, dataset: CocoDataset, question: Question, watcher: Watcher, limit: int | None = None
) -> Outcome:
    """Ask in each picture, the first `limit` of them, and score the answers.

    A picture that cannot be read, or is not of the annotated size, is told to `watcher` and left out.

    Raises:
        UsageError: the labels are more than the bundle can be asked for, or no picture is left to ask about.
    """
    selected = [image for image in dataset.images if image.annotations or not question.only_present][:limit]

    def answer(image: CocoImage) -> _Answered:
        labels = [label for label in dataset.labels if label in {item.label for item in image.annotations}]
        return _answer(model, image, labels if question.only_present else dataset.labels, question)

    answered = list(answer_each(selected, answer, watcher))
    if not answered:
        return Outcome({}, ())
    scores, case_scores = score_shapes(answered, dataset.labels, "bbox")
    if question.task == "segment":
        mask_scores, case_scores = score_shapes(answered, dataset.labels, "segm")
        scores |= {f"mask_{name}": value for name, value in mask_scores.items()}
    cases = (replace(item.case, score=score) for item, score in zip(answered, case_scores, strict=True))
    return Outcome(scores, tuple(cases))


def _answer(model: Detector, image: CocoImage, labels: Sequence[str], question: Question) -> _Answered:
    encoded = model.encode(image.path)
    if image.size_wh and image.size_wh != encoded.image_wh:
        annotated, found = ("{} x {} pixels".format(*size) for size in (image.size_wh, encoded.image_wh))
        raise ImageError(expected=f"{annotated}, as annotated", found=found, action=_SIZE_ACTION)
    truth = tuple(_expected_shape(item, encoded.image_wh) for item in image.annotations)
    requested = [[label] for label in labels] if question.one_by_one else [list(labels)]
    prompts = [PromptMaker(question.prompts).boxes(question.task, each) for each in requested]
    try:
        results = [model.generate(encoded, prompt) for prompt in prompts]
    except UsageError as error:
        advice = "" if question.one_by_one else " With --one-by-one or --labels present the prompts are shorter."
        raise UsageError(expected=error.expected, found=error.found, action=error.action + advice) from error
    milliseconds = encoded.preprocess_ms + encoded.vision_ms + sum(result.timings.total_ms for result in results)
    names = {_plain(label): label for label in labels}
    case = Case(
        source=image.path,
        prompt="\n".join(prompt.text for prompt in prompts),
        answer="\n".join(result.text for result in results),
        score=0.0,
        seconds=milliseconds / 1000,
        is_cut_off=any(result.finish_reason == "length" for result in results),
        truth=truth,
        found=tuple(
            Shape(
                names.get(_plain(item.label), item.label),
                item.box,
                item.confidence,
                item.mask.to_rle() if item.mask else None,
            )
            for result in results
            for item in result.detections
        ),
    )
    return _Answered(case, encoded.image_wh, tuple(item.area for item in image.annotations))


def score_shapes(
    answered: Sequence[_Answered], labels: Sequence[str], kind: Literal["bbox", "segm"]
) -> tuple[dict[str, float | None], list[float]]:
    """COCO's average precisions (all sizes, at most 100 shapes a picture), and F1 at IoU 0.5 of each picture.

    Shapes with a label that is not the dataset's count for F1 alone. A precision is None where no picture
    has an annotation; F1 is 1 where nothing was expected and nothing found.
    """
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth, found = (_coco(answered, labels, kind, expected=expected) for expected in (True, False))
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # [IoU 0.5, 0.55, ..., 0.95; recall; category]
    scores = {"ap": _mean(precision), "ap50": _mean(precision[0]), "ap75": _mean(precision[5])}
    counts = {number: [0, 0, 0] for number in range(1, len(answered) + 1)}  # right, found, expected
    for entry in filter(None, evaluation.evalImgs):
        if entry["aRng"] == evaluation.params.areaRng[0]:
            counted = ~np.asarray(entry["dtIgnore"][0], bool)
            right = np.count_nonzero(counted & (np.asarray(entry["dtMatches"][0]) > 0))
            expected_here = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
            for position, count in enumerate((right, np.count_nonzero(counted), expected_here)):
                counts[entry["image_id"]][position] += int(count)
    for number, item in enumerate(answered, 1):
        counts[number][1] += sum(shape.label not in labels for shape in item.case.found)
    return scores, [2 * right / total if (total := num + wanted) else 1.0 for right, num, wanted in counts.values()]


def _coco(answered: Sequence[_Answered], labels: Sequence[str], kind: str, *, expected: bool) -> Any:
    """pycocotools' index of the expected shapes, or of those found. Its ids begin at 1: 0 means none to it."""
    from pycocotools.coco import COCO

    ids = {label: number for number, label in enumerate(labels, 1)}
    rows: list[dict[str, Any]] = []
    sizes = defaultdict(list)
    for number, item in enumerate(answered, 1):
        sizes[number] = list(item.image_wh)
        shapes = item.case.truth if expected else item.case.found
        for position, shape in enumerate(shapes):
            if shape.label in ids and (kind == "bbox" or shape.mask):
                area = item.areas[position] if expected else _area(shape, kind)
                rows.append(_row(len(rows) + 1, number, ids[shape.label], shape, area))
    index = COCO()
    index.dataset = {
        "info": {},
        "images": [{"id": number, "width": width, "height": height} for number, (width, height) in sizes.items()],
        "annotations": rows,
        "categories": [{"id": number, "name": label} for label, number in ids.items()],
    }
    index.createIndex()
    return index


def _row(row_id: int, image_id: int, category_id: int, shape: Shape, area: float) -> dict[str, Any]:
    x1, y1, x2, y2 = shape.box
    return {
        "id": row_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "segmentation": shape.mask,
        "area": area,
        "iscrowd": int(shape.is_crowd),
        "score": shape.confidence,
    }


def _area(shape: Shape, kind: str) -> float:
    if kind == "segm":
        from pycocotools import mask

        return float(mask.area(shape.mask))
    x1, y1, x2, y2 = shape.box
    return (x2 - x1) * (y2 - y1)


def _expected_shape(item: Annotation, image_wh: tuple[int, int]) -> Shape:
    return Shape(item.label, item.box, mask=_run_lengths(item, image_wh), is_crowd=item.is_crowd)


def _run_lengths(item: Annotation, image_wh: tuple[int, int]) -> dict[str, Any] | None:
    """The annotation's mask in COCO's compressed form."""
    from pycocotools import mask

    if item.segmentation is None:
        return None
    width, height = image_wh
    if not isinstance(item.segmentation, Runs):
        runs = mask.merge(mask.frPyObjects(item.segmentation, height, width))
    elif item.segmentation.size != (height, width):
        found = "a mask of {1} x {0}".format(*item.segmentation.size)
        raise ImageError(expected=f"masks of {width} x {height} pixels", found=found, action=_SIZE_ACTION)
    elif isinstance(item.segmentation.counts, str):
        return {"size": [height, width], "counts": item.segmentation.counts}
    else:
        runs = mask.frPyObjects({"size": [height, width], "counts": item.segmentation.counts}, height, width)
    return {"size": [height, width], "counts": runs["counts"].decode()}


def _mean(precision: Any) -> float | None:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def _plain(label: str) -> str:
    return " ".join(label.casefold().split())
