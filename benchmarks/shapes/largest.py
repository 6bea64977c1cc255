"""Examples of a question that the shapes model does not know, in the form in which PaliGemma is fine-tuned.

    python -m benchmarks.shapes.largest FOLDER --scenes 400

FOLDER gets pictures and samples.jsonl: `image`, `prefix` (the prompt) and `suffix` (the answer) in each line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from benchmarks.shapes.scenes import HELD_OUT_SEED, Scene, make_scene

QUESTION = "what is the largest?"
SAMPLES = "samples.jsonl"
_FIRST_SEED = 7 * HELD_OUT_SEED // 10


def largest(scene: Scene) -> str:
    """The label of the object with the largest box."""
    return max(scene.objects, key=lambda item: (item.box.x2 - item.box.x1) * (item.box.y2 - item.box.y1)).label


def write_examples(folder: Path, seeds: Iterable[int]) -> Path:
    """A picture and a line for each scene; returns the file of the lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in seeds:
        scene = make_scene(seed, photographs=True)
        name = f"{seed}.png"
        Image.fromarray(scene.image).save(folder / name)
        lines.append({"image": name, "prefix": f"answer en {QUESTION}", "suffix": largest(scene)})
    path = folder / SAMPLES
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=400)
    arguments = parser.parse_args()
    print(write_examples(arguments.folder, range(_FIRST_SEED, _FIRST_SEED + arguments.scenes)))


if __name__ == "__main__":
    main()
