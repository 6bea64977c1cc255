"""A pool of training scenes as flat arrays, with the dense targets that training's auxiliary heads need.

Drawing a scene takes milliseconds and a scene serves many prompts, so training draws each once and
keeps it. The arrays lie in a folder, one .npy a field, and are mapped, not read. Masks are kept apart,
as packed bits, for the codebook to learn from.
"""

from __future__ import annotations

import argparse
import multiprocessing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.shapes.scenes import (
    CHARACTERS,
    CLASSES,
    HELD_OUT_SEED,
    IMAGE_SIZE,
    MAX_OBJECTS,
    Box,
    Scene,
    SceneObject,
    SceneText,
    make_scene,
)

PATCH = 14
GRID = IMAGE_SIZE // PATCH
CHARS_PER_PATCH = 2
MASK_SIZE = 64
_MIN_PATCH_PIXELS = 20
_NO_MASK = np.zeros((0, 0), bool)

Row = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Pool:
    """N scenes. -1 stands for "none" in `classes`, `patch_object`, `patch_chars` and `patch_order`.

    images [N, 112, 112, 3] uint8, boxes [N, 6, 4] (x1 y1 x2 y2), classes [N, 6],
    text [N] bytes, patch_object [N, 64] (the object that covers most of the patch),
    patch_chars [N, 64, 2] (characters centred in the patch), patch_order [N, 64] (place of the first of them),
    codes [N, 6, 16] (each mask's segmentation codes, which benchmarks.shapes.codebook adds),
    masks [N, 6, 512] (64 x 64 bits within the box).
    """

    images: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.uint8]
    classes: npt.NDArray[np.int8]
    text: npt.NDArray[np.bytes_]
    patch_object: npt.NDArray[np.int8]
    patch_chars: npt.NDArray[np.int8]
    patch_order: npt.NDArray[np.int8]
    codes: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.uint8]

    @classmethod
    def load(cls, folder: Path) -> Pool:
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__annotations__})

    def __len__(self) -> int:
        return len(self.images)

    def patches_of_text(self, index: int) -> list[int]:
        """The patch in which each character of the scene's text has its centre, in the order of the text."""
        places = {int(place): patch for patch, place in enumerate(self.patch_order[index]) if place >= 0}
        starts = sorted(places)
        ends = [*starts, len(self.text[index])][1:]
        return [places[start] for start, end in zip(starts, ends, strict=True) for _ in range(start, end)]

    def scene(self, index: int) -> Scene:
        """The scene without its masks."""
        objects = []
        rows = (array[index].tolist() for array in (self.boxes, self.classes, self.codes))
        for box, class_id, codes in zip(*rows, strict=True):
            if class_id >= 0:
                colour, shape = CLASSES[class_id].split()
                objects.append(SceneObject(shape, colour, Box(*box), _NO_MASK, tuple(codes)))
        text = self.text[index].decode()
        return Scene(self.images[index], tuple(objects), SceneText(text, ()) if text else None)


def crop_mask(mask: npt.NDArray[np.bool_], box: tuple[float, float, float, float]) -> npt.NDArray[np.bool_]:
    """What of `mask` [H, W] lies in `box`, at the mask codebook's size [64, 64]."""
    crop = Image.fromarray(mask.astype(np.uint8) * 255).resize((MASK_SIZE,) * 2, Image.Resampling.BILINEAR, box)
    return np.asarray(crop) > 127


def _row_from_seed(seed: int, photographs: bool) -> Row:
    scene = make_scene(seed, photographs=photographs)
    boxes = np.zeros((MAX_OBJECTS, 4), np.uint8)
    classes = np.full(MAX_OBJECTS, -1, np.int8)
    cover = np.zeros((MAX_OBJECTS, GRID, GRID), np.int64)
    masks = np.zeros((MAX_OBJECTS, MASK_SIZE * MASK_SIZE // 8), np.uint8)
    for place, item in enumerate(scene.objects):
        boxes[place], classes[place] = item.box, CLASSES.index(item.label)
        cover[place] = item.mask.reshape(GRID, PATCH, GRID, PATCH).sum(axis=(1, 3))
        masks[place] = np.packbits(crop_mask(item.mask, item.box))
    patch_object = np.where(cover.max(axis=0) >= _MIN_PATCH_PIXELS, cover.argmax(axis=0), -1)
    chars = np.full((GRID * GRID, CHARS_PER_PATCH), -1, np.int8)
    order = np.full(GRID * GRID, -1, np.int8)
    if scene.text:
        for place, (character, (x, y)) in enumerate(zip(scene.text.text, scene.text.centres, strict=True)):
            patch = int(y // PATCH) * GRID + int(x // PATCH)
            free = np.flatnonzero(chars[patch] < 0)
            if order[patch] < 0:
                order[patch] = place
            if free.size:
                chars[patch, free[0]] = CHARACTERS.index(character)
    return {
        "images": scene.image,
        "boxes": boxes,
        "classes": classes,
        "text": np.array(scene.text.text if scene.text else "", "S6"),
        "patch_object": patch_object.reshape(-1).astype(np.int8),
        "patch_chars": chars,
        "patch_order": order,
        "masks": masks,
    }


def draw_pool(folder: Path, num_scenes: int, workers: int, *, photographs: bool = False) -> None:
    """Draw the scenes of seeds 0 to `num_scenes` - 1 into `folder`."""
    assert num_scenes <= HELD_OUT_SEED
    folder.mkdir(parents=True, exist_ok=True)
    arrays: Row = {}
    with multiprocessing.Pool(workers) as workers_pool:
        for index, row in enumerate(
            workers_pool.imap(partial(_row_from_seed, photographs=photographs), range(num_scenes), chunksize=64)
        ):
            if not arrays:
                arrays = {name: np.zeros((num_scenes, *value.shape), value.dtype) for name, value in row.items()}
            for name, value in row.items():
                arrays[name][index] = value
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--photographs", action="store_true", help="most backgrounds are pieces of photographs")
    arguments = parser.parse_args()
    draw_pool(arguments.folder, arguments.scenes, arguments.workers, photographs=arguments.photographs)


if __name__ == "__main__":
    main()
