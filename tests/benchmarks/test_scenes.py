"""The scenes are what their annotations say."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks.shapes.scenes import (
    CLASSES,
    COLOURS,
    IMAGE_SIZE,
    MAX_OBJECTS,
    Box,
    Scene,
    SceneObject,
    SceneText,
    box_example,
    caption,
    location_text,
    make_examples,
    make_scene,
)

SCENES = [make_scene(seed) for seed in range(60)]
NO_MASK = np.zeros((0, 0), bool)


def scene_of(*labels: str, text: str = "") -> Scene:
    objects = []
    for place, label in enumerate(labels):
        colour, shape = label.split()
        objects.append(SceneObject(shape, colour, Box(place, 10 * place, place + 9, 10 * place + 9), NO_MASK))
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    return Scene(image, tuple(objects), SceneText(text, ()) if text else None)


def test_a_scene_is_a_function_of_its_seed() -> None:
    again = make_scene(7)
    assert np.array_equal(again.image, SCENES[7].image)
    assert [item.box for item in again.objects] == [item.box for item in SCENES[7].objects]
    assert not np.array_equal(SCENES[7].image, SCENES[8].image)


def test_boxes_are_the_bounds_of_what_can_be_seen() -> None:
    for scene in SCENES:
        assert 1 <= len(scene.objects) <= MAX_OBJECTS
        for item in scene.objects:
            rows, columns = np.nonzero(item.mask)
            assert item.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_masks_do_not_overlap_and_hold_their_colour() -> None:
    for scene in SCENES:
        total = sum(item.mask.astype(int) for item in scene.objects)
        assert np.max(total) <= 1
        for item in scene.objects:
            mean = scene.image[item.mask].mean(axis=0)
            distances = {name: np.abs(mean - colour).sum() for name, colour in COLOURS.items()}
            assert min(distances, key=lambda name: distances[name]) == item.colour


def test_scenes_vary_in_number_kind_and_text() -> None:
    assert {len(scene.objects) for scene in SCENES} == set(range(1, MAX_OBJECTS + 1))
    assert {item.label for scene in SCENES for item in scene.objects} == set(CLASSES)
    assert 15 < sum(scene.text is not None for scene in SCENES) < 45
    several = [len(scene.objects) - len({item.label for item in scene.objects}) for scene in SCENES]
    assert sum(count > 0 for count in several) > 10


def test_text_stands_where_its_characters_are_said_to_be() -> None:
    """At every character there is both ink and paper."""
    for scene in SCENES:
        if scene.text:
            assert len(scene.text.centres) == len(scene.text.text)
            for x, y in scene.text.centres:
                part = scene.image[int(y) - 6 : int(y) + 7, max(int(x) - 4, 0) : int(x) + 5].mean(axis=-1)
                assert part.max() - part.min() > 80


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (["red circle"], "a red circle"),
        (["blue star", "red circle"], "a red circle and a blue star"),
        (["red circle"] * 2 + ["blue star"] * 3, "two red circles and three blue stars"),
        (["red circle", "white star", "green square"], "a red circle, a green square and a white star"),
    ],
)
def test_captions_count_classes_in_their_order(labels: list[str], sentence: str) -> None:
    assert caption(scene_of(*labels)) == sentence


def test_detect_lists_all_instances_by_label_then_in_reading_order() -> None:
    scene = scene_of("red circle", "blue star", "red circle")
    example = box_example(scene, ["blue star", "red circle", "white square"])
    assert example.prompt == "detect blue star ; red circle ; white square"
    first, second, third = (location_text(scene.objects[place].box) for place in (1, 0, 2))
    assert example.answer == f"{first} blue star ; {second} red circle ; {third} red circle"


def test_absent_classes_give_nothing() -> None:
    assert box_example(scene_of("red circle"), ["blue star"]).answer == ""


def test_location_tokens_are_y1_x1_y2_x2_over_1023() -> None:
    assert location_text(Box(0, 28, 112, 56)) == "<loc0256><loc0000><loc0512><loc1023>"


def test_prompts_are_paligemmas() -> None:
    rng = np.random.default_rng(0)
    forms = r"detect [a-z ;]+|caption en|answer en (how many \w+s are there|what colour is the \w+)\?|ocr"
    tasks = set()
    for scene in SCENES:
        for example in make_examples(scene, rng, 8):
            assert re.fullmatch(forms, example.prompt)
            tasks.add(example.task)
            if example.task == "count":
                assert example.answer == str(len(example.targets))
            if example.task == "ocr":
                assert example.answer == (scene.text.text if scene.text else "")
    assert tasks == {"detect", "caption", "count", "colour", "ocr"}
