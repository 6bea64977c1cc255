"""The verb `demo`: the sample scenes that ship with the package, and where an answer about them is wrong."""

# Tests: tests/cli/test_demo.py.
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paliedge.cli.help import command, option
from paliedge.cli.options import json_option, load_model, model_options
from paliedge.cli.output import print_answer, save_picture

if TYPE_CHECKING:
    from paliedge.backends.select import BackendOptions
    from paliedge.results.generation import Generation
    from paliedge.results.locations import Detection

DEMO_SCENES = Path(__file__).parents[1] / "scenes"
_SAME = 0.5
"""Intersection over union from which a box is the one that it should be."""


@command("paliedge demo", "paliedge demo -m bundle --save pictures")
@model_options
@option(
    "--save",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo_output"),
    show_default=True,
    help="Folder for annotated pictures.",
    group="Output",
)
@json_option("Answers as JSON lines.")
def demo(bundle: Path | None, options: BackendOptions, save: Path, as_json: bool) -> None:
    """Detect, segment, caption, count and read on the sample scenes that ship with paliedge.

    Where an answer is wrong, the truth stands below it.
    """
    from paliedge.inputs.images import load_image

    model = load_model(bundle, options)
    for scene in json.loads((DEMO_SCENES / "scenes.json").read_text()):
        image = load_image(DEMO_SCENES / scene["file"])
        encoded = model.encode(image)
        labels, truth = scene["detect"], scene["truth"]
        boxes = model.detect(encoded, labels)
        masks = model.segment(encoded, labels[:1])
        answers: dict[str, tuple[Generation, Iterator[str]]] = {
            f"detect {' ; '.join(labels)}": (boxes, box_faults(boxes.detections, truth["objects"], labels)),
            f"segment {labels[0]}": (masks, box_faults(masks.detections, truth["objects"], labels[:1])),
        }
        for prompt, answer, right in (
            ("caption en", model.caption(encoded), truth["caption"]),
            (f"answer en {scene['ask']}", model.ask(encoded, scene["ask"]), truth["ask"]),
            ("ocr", model.ocr(encoded), truth["ocr"]),
        ):
            answers[prompt] = answer, iter([] if answer.text == right else [f"the truth is {right}"])
        for prompt, (answer, faults) in answers.items():
            print_answer(f"{scene['file']}: {prompt}", answer, as_json)
            for fault in () if as_json else faults:
                click.echo(f"  wrong: {fault}")
        others = [item for item in boxes.detections if item.label != labels[0]]
        save_picture(image, replace(masks, detections=(*masks.detections, *others)), save / scene["file"])


def box_faults(
    detections: Sequence[Detection], objects: Sequence[dict[str, Any]], labels: Sequence[str]
) -> Iterator[str]:
    """What is wrong with boxes for `labels`: one that is no such object, and each object that has none."""
    from paliedge.results.locations import box_iou

    missed = [item for item in objects if item["label"] in labels]
    for found in detections:
        alike = [item for item in missed if item["label"] == found.label]
        same = next((item for item in alike if box_iou(found.box, item["box"]) > _SAME), None)
        if same:
            missed.remove(same)
        else:
            there = max(objects, key=lambda item: box_iou(found.box, item["box"]))
            what = f"a {there['label']}" if box_iou(found.box, there["box"]) > _SAME else "nothing like it"
            yield f"{what} is where {found.label} was found"
    for item in missed:
        yield f"{item['label']} at {' '.join(map(str, item['box']))} was missed"


VERBS = (demo,)
