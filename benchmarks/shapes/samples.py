"""Write the sample scenes that ship with the runtime: held-out seeds, none of them scored."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from PIL import Image

from benchmarks.shapes.scenes import HELD_OUT_SEED, SHAPES, Scene, caption, make_scene

_FIRST_SEED = HELD_OUT_SEED + 30_000
_NUM_SCENES = 3
_FOLDER = Path("runtime/paliedge/scenes")


def _shows_much(scene: Scene) -> bool:
    kinds = Counter(item.label for item in scene.objects)
    return scene.text is not None and len(scene.text.text) > 3 and len(kinds) >= 2 and max(kinds.values()) == 2


def _truth(scene: Scene, shape: str) -> dict[str, object]:
    """What the answers should be, and where everything is."""
    return {
        "objects": [{"label": item.label, "box": list(item.box)} for item in scene.objects],
        "caption": caption(scene),
        "ask": str(sum(item.shape == shape for item in scene.objects)),
        "ocr": scene.text.text if scene.text else "",
    }


def main() -> None:
    _FOLDER.mkdir(exist_ok=True)
    entries: list[dict[str, object]] = []
    seed = _FIRST_SEED
    while len(entries) < _NUM_SCENES:
        scene = make_scene(seed)
        if _shows_much(scene):
            kinds = Counter(item.label for item in scene.objects).most_common(2)
            name = f"scene-{len(entries) + 1}.png"
            Image.fromarray(scene.image).save(_FOLDER / name)
            shape = max(SHAPES, key=[item.shape for item in scene.objects].count)
            question = f"how many {shape}s are there?"
            entries.append(
                {"file": name, "detect": [label for label, _ in kinds], "ask": question, "truth": _truth(scene, shape)}
            )
        seed += 1
    (_FOLDER / "scenes.json").write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()
