"""How good is the shapes model on scenes it has never seen, through the exported bundle?

    python -m benchmarks.shapes.evaluate BUNDLE --scenes 500

Every class of a scene is asked for alone, and one class that is not there. AP50 is pycocotools',
once with each box ranked by the mean probability of its tokens, once with all boxes equal. Text is
scored by jiwer's character error rate.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.machine import describe_machine
from benchmarks.shapes.scenes import CLASSES, HELD_OUT_SEED, IMAGE_SIZE, SHAPES, Scene, caption, make_scene
from paliedge import Generation, PaliGemma


@dataclass
class Tally:
    """Answers so far, by task."""

    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    ground_truth: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    timings: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def time(self, answer: Generation) -> None:
        self.timings["prefill_ms"].append(answer.timings.prefill_ms)
        self.timings["decode_step_ms"] += answer.timings.decode_ms


def evaluate(model: PaliGemma, num_scenes: int) -> dict[str, Any]:
    """Scores of the first `num_scenes` held-out scenes."""
    tally = Tally()
    for index in range(num_scenes):
        scene = make_scene(HELD_OUT_SEED + index)
        rng = np.random.default_rng((2, index))
        encoded = model.encode(scene.image)
        tally.timings["vision_ms"].append(encoded.vision_ms)
        _detect(model, encoded, scene, index, rng, tally)
        answer = model.caption(encoded)
        tally.time(answer)
        tally.right["caption_exact_match"].append(answer.text == caption(scene))
        _ask(model, encoded, scene, rng, tally)
        answer = model.ocr(encoded)
        tally.time(answer)
        if scene.text:
            tally.texts.append((scene.text.text, answer.text))
        else:
            tally.right["no_text_read_where_there_is_none"].append(answer.text == "")
    shares = {name: round(float(np.mean(values)), 4) for name, values in sorted(tally.right.items())}
    expected, found = zip(*tally.texts, strict=True)
    return {
        "num_scenes": num_scenes,
        "detect_ap50": round(ap50(tally, scored=True, num_scenes=num_scenes), 4),
        "detect_ap50_unscored": round(ap50(tally, scored=False, num_scenes=num_scenes), 4),
        **shares,
        "counting_and_colour": round(float(np.mean(tally.right["counting"] + tally.right["colour"])), 4),
        "ocr_character_error_rate": round(float(jiwer.cer(list(expected), list(found))), 4),
        "ocr_exact_match": round(float(np.mean([a == b for a, b in tally.texts])), 4),
        "median_ms": {name: round(statistics.median(values), 3) for name, values in sorted(tally.timings.items())},
    }


def _detect(model: PaliGemma, encoded: Any, scene: Scene, index: int, rng: np.random.Generator, tally: Tally) -> None:
    present = sorted({item.label for item in scene.objects})
    absent = str(rng.choice([label for label in CLASSES if label not in present]))
    for label in (*present, absent):
        answer = model.detect(encoded, [label])
        tally.time(answer)
        if label == absent:
            tally.right["absent_class_gives_nothing"].append(not answer.detections)
        score = math.exp(statistics.fmean(answer.log_probs)) if answer.log_probs else 0.0
        for item in answer.detections:
            x1, y1, x2, y2 = item.box
            category = CLASSES.index(item.label) + 1 if item.label in CLASSES else len(CLASSES) + 1
            box = [x1, y1, x2 - x1, y2 - y1]
            tally.detections.append({"image_id": index, "category_id": category, "bbox": box, "score": score})
    for target in scene.objects:
        width, height = target.box.x2 - target.box.x1, target.box.y2 - target.box.y1
        tally.ground_truth.append(
            {
                "id": len(tally.ground_truth) + 1,
                "image_id": index,
                "category_id": CLASSES.index(target.label) + 1,
                "bbox": [target.box.x1, target.box.y1, width, height],
                "area": width * height,
                "iscrowd": 0,
            }
        )


def _ask(model: PaliGemma, encoded: Any, scene: Scene, rng: np.random.Generator, tally: Tally) -> None:
    counts = Counter(item.shape for item in scene.objects)
    shape = str(rng.choice(SHAPES if rng.random() < 0.3 else [item.shape for item in scene.objects]))
    answer = model.ask(encoded, f"how many {shape}s are there?")
    tally.time(answer)
    tally.right["counting"].append(answer.text == str(counts[shape]))
    single = [item for item in scene.objects if counts[item.shape] == 1]
    if single:
        target = single[rng.integers(len(single))]
        answer = model.ask(encoded, f"what colour is the {target.shape}?")
        tally.time(answer)
        tally.right["colour"].append(answer.text == target.colour)


def ap50(tally: Tally, *, scored: bool, num_scenes: int) -> float:
    """AP at IoU 0.5, all sizes, at most 100 boxes a scene, as COCO defines it."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": index, "width": IMAGE_SIZE, "height": IMAGE_SIZE} for index in range(num_scenes)],
            "annotations": tally.ground_truth,
            "categories": [{"id": index + 1, "name": name} for index, name in enumerate((*CLASSES, "other"))],
        }
        truth.createIndex()
        found = truth.loadRes([item if scored else item | {"score": 1.0} for item in tally.detections])
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
    content = {"machine": describe_machine(), "precision": target.precision, "scores": scores}
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
