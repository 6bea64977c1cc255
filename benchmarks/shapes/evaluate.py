"""How good is the shapes model on scenes it has never seen, through the exported bundle?

    python -m benchmarks.shapes.evaluate BUNDLE --scenes 500

Every class of a scene is asked for alone, and one class that is not there; then up to three of its
classes together in one prompt. Masks are asked for twice: with any labels, and with `only_asked`. AP50 is
pycocotools', once with each box ranked by its confidence, once with all boxes equal. Masks are compared with what
can be seen of each object: IoU with the best answer of its label, 0 where there is none. Text is scored by
jiwer's character error rate.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.machine import describe_machine
from benchmarks.shapes.scenes import (
    CLASSES,
    HELD_OUT_SEED,
    IMAGE_SIZE,
    SHAPES,
    Scene,
    SceneObject,
    caption,
    make_scene,
)
from paliedge import EncodedImage, Generation, GenerationOptions, PaliGemma


@dataclass
class Boxes:
    """COCO annotations and results."""

    ground_truth: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)

    def add_truth(self, image: int, objects: Iterable[SceneObject]) -> None:
        for item in objects:
            width, height = item.box.x2 - item.box.x1, item.box.y2 - item.box.y1
            self.ground_truth.append(
                {
                    "id": len(self.ground_truth) + 1,
                    "image_id": image,
                    "category_id": _category(item.label),
                    "bbox": [item.box.x1, item.box.y1, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )

    def add_answer(self, image: int, answer: Generation) -> None:
        for item in answer.detections:
            x1, y1, x2, y2 = item.box
            box = [x1, y1, x2 - x1, y2 - y1]
            row = {"image_id": image, "category_id": _category(item.label), "bbox": box, "score": item.confidence}
            self.detections.append(row)


@dataclass
class Tally:
    """Answers so far, by task."""

    alone: Boxes = field(default_factory=Boxes)
    together: Boxes = field(default_factory=Boxes)
    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    texts: list[tuple[str, str]] = field(default_factory=list)
    mask_overlaps: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    timings: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def time(self, answer: Generation) -> Generation:
        self.timings["prefill_ms"].append(answer.timings.prefill_ms)
        self.timings["decode_step_ms"] += answer.timings.decode_ms
        return answer


def evaluate(model: PaliGemma, num_scenes: int) -> dict[str, Any]:
    """Scores of the first `num_scenes` held-out scenes."""
    tally = Tally()
    for index in range(num_scenes):
        scene = make_scene(HELD_OUT_SEED + index)
        rng = np.random.default_rng((2, index))
        encoded = model.encode(scene.image)
        tally.timings["vision_ms"].append(encoded.vision_ms)
        _detect(model, encoded, scene, index, rng, tally)
        _segment(model, encoded, scene, tally)
        tally.right["caption_exact_match"].append(tally.time(model.caption(encoded)).text == caption(scene))
        _ask(model, encoded, scene, rng, tally)
        text = tally.time(model.ocr(encoded)).text
        if scene.text:
            tally.texts.append((scene.text.text, text))
        else:
            tally.right["no_text_read_where_there_is_none"].append(text == "")
    shares = {name: round(float(np.mean(values)), 4) for name, values in sorted(tally.right.items())}
    expected, found = zip(*tally.texts, strict=True)
    return {
        "num_scenes": num_scenes,
        "detect_ap50": round(ap50(tally.alone, scored=True, num_scenes=num_scenes), 4),
        "detect_ap50_unscored": round(ap50(tally.alone, scored=False, num_scenes=num_scenes), 4),
        "detect_ap50_several_labels": round(ap50(tally.together, scored=True, num_scenes=num_scenes), 4),
        **{name: round(statistics.fmean(overlaps), 4) for name, overlaps in tally.mask_overlaps.items()},
        **shares,
        "counting_and_colour": round(float(np.mean(tally.right["counting"] + tally.right["colour"])), 4),
        "ocr_character_error_rate": round(float(jiwer.cer(list(expected), list(found))), 4),
        "ocr_exact_match": round(float(np.mean([a == b for a, b in tally.texts])), 4),
        "median_ms": {name: round(statistics.median(values), 3) for name, values in sorted(tally.timings.items())},
    }


def _category(label: str) -> int:
    return CLASSES.index(label) + 1 if label in CLASSES else len(CLASSES) + 1


def _detect(
    model: PaliGemma, encoded: EncodedImage, scene: Scene, index: int, rng: np.random.Generator, tally: Tally
) -> None:
    present = sorted({item.label for item in scene.objects})
    absent = str(rng.choice([label for label in CLASSES if label not in present]))
    for label in (*present, absent):
        answer = tally.time(model.detect(encoded, [label]))
        if label == absent:
            tally.right["absent_class_gives_nothing"].append(not answer.detections)
        tally.alone.add_answer(index, answer)
    tally.alone.add_truth(index, scene.objects)
    asked = [str(label) for label in rng.permutation(present)[:3]]
    tally.together.add_answer(index, tally.time(model.detect(encoded, asked)))
    tally.together.add_truth(index, (item for item in scene.objects if item.label in asked))


def _segment(model: PaliGemma, encoded: EncodedImage, scene: Scene, tally: Tally) -> None:
    for label in sorted({item.label for item in scene.objects}):
        masks = [item.mask for item in scene.objects if item.label == label]
        for name, only_asked in (("segment_mean_iou", False), ("segment_mean_iou_only_asked", True)):
            answer = tally.time(model.segment(encoded, [label], options=GenerationOptions(only_requested=only_asked)))
            found = [item.mask.to_array() for item in answer.detections if item.mask and item.label == label]
            tally.mask_overlaps[name] += _overlaps(masks, found)


def _overlaps(masks: list[Any], found: list[Any]) -> list[float]:
    """IoU of each mask with its best answer, which then stands for no other."""
    best = []
    for mask in masks:
        overlaps = [float((one & mask).sum() / (one | mask).sum()) for one in found]
        best.append(max(overlaps, default=0.0))
        if found:
            found.pop(overlaps.index(best[-1]))
    return best


def _ask(model: PaliGemma, encoded: EncodedImage, scene: Scene, rng: np.random.Generator, tally: Tally) -> None:
    counts = Counter(item.shape for item in scene.objects)
    shape = str(rng.choice(SHAPES if rng.random() < 0.3 else [item.shape for item in scene.objects]))
    answer = tally.time(model.ask(encoded, f"how many {shape}s are there?"))
    tally.right["counting"].append(answer.text == str(counts[shape]))
    single = [item for item in scene.objects if counts[item.shape] == 1]
    if single:
        target = single[rng.integers(len(single))]
        answer = tally.time(model.ask(encoded, f"what colour is the {target.shape}?"))
        tally.right["colour"].append(answer.text == target.colour)


def ap50(boxes: Boxes, *, scored: bool, num_scenes: int) -> float:
    """AP at IoU 0.5, all sizes, at most 100 boxes a scene, as COCO defines it."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": index, "width": IMAGE_SIZE, "height": IMAGE_SIZE} for index in range(num_scenes)],
            "annotations": boxes.ground_truth,
            "categories": [{"id": index + 1, "name": name} for index, name in enumerate((*CLASSES, "other"))],
        }
        truth.createIndex()
        found = truth.loadRes([item if scored else item | {"score": 1.0} for item in boxes.detections])
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, 2]
    return float(np.mean(precision[precision > -1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/shapes_quality.json"))
    arguments = parser.parse_args()
    model = PaliGemma.load(arguments.bundle)
    scores = evaluate(model, arguments.scenes)
    target = model.manifest.targets["cpu"]
    content = {
        "machine": describe_machine(),
        "bundle": model.manifest.sha256,
        "precision": target.precision,
        "scores": scores,
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
