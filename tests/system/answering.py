"""Ask bundles about scenes, wherever this runs: `python -m tests.system.answering SCENES.npz OUT.json BUNDLE...`.

Needs the runtime alone, so that it runs in a root, under an emulated processor and here. With `as_it_is` in front of a
bundle's name products are taken as they come: nothing makes them exact, nothing refuses them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from paliedge import Generation, PaliGemma
from paliedge.backends import ort
from paliedge.backends.arithmetic import NAMES, Arithmetic

AS_IT_IS = "as_it_is:"
Answers = dict[str, Any]


def answer(model: PaliGemma, image: np.ndarray[Any, Any], labels: list[str]) -> list[Generation]:
    """A picture's answers: boxes, a sentence, words."""
    seen = model.encode(image)
    return [model.detect(seen, labels), model.caption(seen), model.ocr(seen)]


def answer_all(scenes: Path, bundles: list[str]) -> Answers:
    """By bundle the token ids and log-probabilities of all answers, and what the processor's products are."""
    with np.load(scenes) as stored:
        images, labels = stored["images"], [str(text).split(";") for text in stored["labels"]]
    exact, examine = ort._EXACT, ort.examine_arithmetic
    found: Answers = {"arithmetic": {kind: dict(examine(kind).wrong) for kind in NAMES}}
    for name in bundles:
        if name.startswith(AS_IT_IS):
            ort._EXACT = ()
            ort.examine_arithmetic = lambda kind: Arithmetic(kind, {})  # type: ignore[assignment]
        with PaliGemma.load(name.removeprefix(AS_IT_IS)) as model:
            pairs = zip(images, labels, strict=True)
            answers = [one for image, asked in pairs for one in answer(model, image, asked)]
            features = np.asarray(model.encode(images[0]).features)
        rows = [{"ids": list(one.token_ids), "log_probs": list(map(float, one.log_probs))} for one in answers]
        found[name] = {"answers": rows, "features": features.ravel().tolist()}
        ort._EXACT, ort.examine_arithmetic = exact, examine
    return found


def equal(first: Answers, second: Answers) -> float:
    """Share of answers with the same tokens."""
    pairs = zip(first["answers"], second["answers"], strict=True)
    return float(np.mean([one["ids"] == other["ids"] for one, other in pairs]))


def distance(first: Answers, second: Answers) -> float:
    """Of the first picture's features, as a share of their length."""
    return float(np.linalg.norm(np.subtract(first["features"], second["features"])) / np.linalg.norm(first["features"]))


def furthest(first: Answers, second: Answers) -> float:
    """Largest difference of log-probabilities where the tokens are the same, in nats."""
    both = zip(first["answers"], second["answers"], strict=True)
    pairs = [(one, other) for one, other in both if one["ids"] == other["ids"]]
    return max(float(np.abs(np.subtract(a["log_probs"], b["log_probs"])).max(initial=0)) for a, b in pairs)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answer_all(Path(sys.argv[1]), sys.argv[3:])))
