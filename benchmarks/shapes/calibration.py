"""Write the shapes checkpoint's calibration samples: scenes that are neither trained on nor scored.

    python -m benchmarks.shapes.calibration

Images and a JSONL file as PaliGemma fine-tunes have them. Every class is asked for at least once.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image

from benchmarks.shapes.scenes import CLASSES, IMAGE_SIZE, NUM_LOCATIONS, Scene, caption, make_scene
from paliedge.results.locations import location_tokens_from_box

_FIRST_SEED = 500_000_000
_NUM_SCENES = 48
FOLDER = Path("benchmarks/shapes/checkpoint/calibration")


def _detection(scene: Scene, labels: list[str]) -> tuple[str, str]:
    boxes = [
        location_tokens_from_box(item.box, (IMAGE_SIZE, IMAGE_SIZE), NUM_LOCATIONS) + f" {label}"
        for label in labels
        for item in scene.objects
        if item.label == label
    ]
    return f"detect {' ; '.join(labels)}", " ; ".join(boxes)


def _other(scene: Scene, index: int) -> tuple[str, str]:
    if index % 2 and scene.text:
        return "ocr", scene.text.text
    return "caption en", caption(scene)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    lines: list[dict[str, str]] = []
    unasked, seed, index = set(CLASSES), _FIRST_SEED, 0
    while index < _NUM_SCENES:
        scene = make_scene(seed)
        seed += 1
        present = {item.label for item in scene.objects}
        if unasked and not present & unasked:
            continue
        labels = sorted(present, key=lambda label: (label not in unasked, label))[:3]
        unasked -= set(labels)
        name = f"{index:02d}.png"
        Image.fromarray(scene.image).save(FOLDER / name)
        for prefix, suffix in (_detection(scene, labels), _other(scene, index)):
            lines.append({"image": name, "prefix": prefix, "suffix": suffix})
        index += 1
    (FOLDER / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
