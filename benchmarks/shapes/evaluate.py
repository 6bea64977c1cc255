"""How good is the shapes model on scenes it has never seen, through the exported bundle?

    python -m benchmarks.shapes.evaluate BUNDLE

The scenes and the scores to be reached are those of `benchmarks.shapes.goals`.

Every class of a scene is asked for alone, and one class that is not there; then up to three of its
classes together in one prompt. Masks are asked for twice: with any labels, and with `only_asked`. AP50 is
pycocotools', once with each box ranked by its confidence, once with all boxes equal. Masks are compared with what
can be seen of each object: IoU with the best answer of its label, 0 where there is none. Text is scored by
jiwer's character error rate.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jiwer
import numpy as np

from benchmarks.machine import describe_machine
from benchmarks.shapes.goals import CHOOSING, JUDGED, lacking
from benchmarks.shapes.scenes import CLASSES, SHAPES, Scene, caption, make_scene
from benchmarks.shapes.scores import Answers, Scorer
from paliedge import EncodedImage, GenerationOptions, PaliGemma

RESULTS = Path("benchmarks/results/shapes_quality.json")


def evaluate(model: PaliGemma, seeds: Sequence[int], *, photographs: bool = True) -> Answers:
    """Ask `model` about the scenes of `seeds`."""
    answers = Answers()
    for index, seed in enumerate(seeds):
        scene = make_scene(seed, photographs=photographs)
        rng = np.random.default_rng((2, index))
        answers.num_scenes += 1
        answers.values.append({})
        encoded = model.encode(scene.image)
        answers.timings["vision_ms"].append(encoded.vision_ms)
        _detect(model, encoded, scene, index, rng, answers)
        _segment(model, encoded, scene, answers)
        answers.add("caption_exact_match", answers.time(model.caption(encoded)).text == caption(scene))
        _ask(model, encoded, scene, rng, answers)
        _read(model, encoded, scene, answers)
    return answers


def _detect(
    model: PaliGemma, encoded: EncodedImage, scene: Scene, index: int, rng: np.random.Generator, answers: Answers
) -> None:
    present = sorted({item.label for item in scene.objects})
    absent = str(rng.choice([label for label in CLASSES if label not in present]))
    for label in (*present, absent):
        answer = answers.time(model.detect(encoded, [label]))
        if label == absent:
            answers.add("absent_class_gives_nothing", not answer.detections)
        answers.alone.add_answer(index, answer)
    answers.alone.add_truth(index, scene.objects)
    asked = [str(label) for label in rng.permutation(present)[:3]]
    answers.together.add_answer(index, answers.time(model.detect(encoded, asked)))
    answers.together.add_truth(index, (item for item in scene.objects if item.label in asked))


def _segment(model: PaliGemma, encoded: EncodedImage, scene: Scene, answers: Answers) -> None:
    for label in sorted({item.label for item in scene.objects}):
        masks = [item.mask for item in scene.objects if item.label == label]
        for name, only_asked in (("segment_mean_iou", False), ("segment_mean_iou_only_asked", True)):
            answer = answers.time(model.segment(encoded, [label], options=GenerationOptions(only_requested=only_asked)))
            found = [item.mask.to_array() for item in answer.detections if item.mask and item.label == label]
            answers.add(name, *_overlaps(masks, found))


def _overlaps(masks: list[Any], found: list[Any]) -> list[float]:
    """IoU of each mask with its best answer, which then stands for no other."""
    best = []
    for mask in masks:
        overlaps = [float((one & mask).sum() / (one | mask).sum()) for one in found]
        best.append(max(overlaps, default=0.0))
        if found:
            found.pop(overlaps.index(best[-1]))
    return best


def _ask(model: PaliGemma, encoded: EncodedImage, scene: Scene, rng: np.random.Generator, answers: Answers) -> None:
    counts = Counter(item.shape for item in scene.objects)
    shape = str(rng.choice(SHAPES if rng.random() < 0.3 else [item.shape for item in scene.objects]))
    answer = answers.time(model.ask(encoded, f"how many {shape}s are there?"))
    answers.add("counting", answer.text == str(counts[shape]))
    single = [item for item in scene.objects if counts[item.shape] == 1]
    if single:
        target = single[rng.integers(len(single))]
        answer = answers.time(model.ask(encoded, f"what colour is the {target.shape}?"))
        answers.add("colour", answer.text == target.colour)


def _read(model: PaliGemma, encoded: EncodedImage, scene: Scene, answers: Answers) -> None:
    text = answers.time(model.ocr(encoded)).text
    if scene.text:
        found = jiwer.process_characters(scene.text.text, text)
        answers.errors.append((found.substitutions + found.deletions + found.insertions, len(scene.text.text)))
        answers.add("ocr_exact_match", text == scene.text.text)
    else:
        answers.errors.append((0, 0))
        answers.add("no_text_read_where_there_is_none", text == "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--choosing", action="store_true", help="the scenes by which weights are chosen")
    parser.add_argument("--results", type=Path, default=RESULTS, help="not written with --choosing")
    arguments = parser.parse_args()
    model = PaliGemma.load(arguments.bundle)
    answers = evaluate(model, CHOOSING if arguments.choosing else JUDGED)
    found = Scorer(answers).scores()
    content = {
        "machine": describe_machine(),
        "bundle": model.manifest.sha256,
        "precision": model.manifest.targets["cpu"].precision,
        "scores": found,
        "lacking": lacking(found),
        "median_ms": {name: round(median(values), 3) for name, values in sorted(answers.timings.items())},
    }
    if not arguments.choosing:
        arguments.results.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
