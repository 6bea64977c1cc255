"""Seeded synthetic scenes with exact boxes, masks and text, and PaliGemma prompts about them.

A scene is a pure function of its seed. Seeds below `HELD_OUT_SEED` belong to training, the others
are never trained on. Knows nothing of models or tokenizers.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 112
HELD_OUT_SEED = 1_000_000_000
NUM_LOCATIONS = 1024
MAX_OBJECTS = 6
MIN_VISIBLE = 0.6
"""An object is kept only while this share of it stays uncovered."""

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (40, 90, 220),
    "yellow": (240, 208, 40),
    "purple": (140, 50, 180),
    "white": (240, 240, 240),
}
CLASSES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
CHARACTERS = string.digits + string.ascii_uppercase
WORDS = tuple(
    (
        "ALARM APPLE BACK BAKERY BANK BEACH BELL BIKE BLUE BOOK BREAD BRIDGE BUS CAFE CAMERA CAR CAT CITY CLOSED "
        "COFFEE COLD DAY DOG DOOR DOWN EAST EDGE EMPTY EXIT FAST FILM FIRE FISH FOOD FREE FROZEN GARAGE GATE GOLD "
        "GREEN HALL HELP HERE HIGH HOME HOT HOTEL ICE IN INN ISLAND JAM JAZZ JET KEEP KEY KING LAKE LANE LEFT LIFT "
        "LIGHT LINE LOW MAIN MAP MARKET METRO MILK MOON MOTOR MUSEUM NEW NIGHT NORTH NOW OFF OFFICE ON OPEN ORANGE "
        "OUT OVEN PARK PATH PHONE PIZZA POLICE POOL PORT PUSH PULL QUIET QUIZ RADIO RED RIGHT RIVER ROAD ROOM SAFE "
        "SALE SCHOOL SHOP SLOW SOUTH STAR STOP STREET SUN TAXI TEA TICKET TOWN TRAIN UNDER UNIT UP VALLEY VAN VIEW "
        "WAIT WALK WATER WAY WEST WINDOW YARD YES ZERO ZONE ZOO"
    ).split()
)
TASKS = ("detect", "caption", "count", "colour", "ocr", "segment")
SHARES = (0.5, 0.14, 0.08, 0.08, 0.2)
SHARES_WITH_MASKS = (0.1, 0.18, 0.1, 0.03, 0.31, 0.28)
"""Of the prompts to `ocr` a third is about a text: half of the scenes have none, and mostly get `detect` instead."""
PHOTOGRAPHS = Path(__file__).parent / "photographs"
TRAINED_PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "chelsea", "china"),
    *("coins", "grass", "gravel", "hubble_deep_field"),
)
JUDGED_PHOTOGRAPHS = ("coffee", "flower", "rocket")
"""Behind held-out scenes alone."""
_PHOTOGRAPHED = 0.8
"""The share of scenes on photographs, where these are wanted."""
_NUMBER_WORDS = ("no", "a", "two", "three", "four", "five", "six")
_OVERSAMPLING = 4


class Box(NamedTuple):
    """Pixel edges; x2 and y2 lie just outside the last pixel."""

    x1: int
    y1: int
    x2: int
    y2: int


@dataclass(frozen=True)
class SceneObject:
    """One shape: `mask` [H, W] bool is what can be seen of it, `box` its exact bounds.

    `codes` are the mask's 16 segmentation codes, where a codebook has given them.
    """

    shape: str
    colour: str
    box: Box
    mask: npt.NDArray[np.bool_]
    codes: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class SceneText:
    """A rendered word or number and the centre (x, y) in pixels of each of its characters."""

    text: str
    centres: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Scene:
    """`image` [H, W, 3] uint8; objects in reading order of their boxes (top, then left)."""

    image: npt.NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    text: SceneText | None


class Example(NamedTuple):
    """A prompt, its answer, and the objects that the answer is about."""

    task: str
    prompt: str
    answer: str
    targets: tuple[SceneObject, ...] = ()


def make_scene(seed: int, *, photographs: bool = False) -> Scene:
    """Draw the scene of `seed`, on a drawn background, or most of the time on a piece of a photograph."""
    rng = np.random.default_rng(seed)
    names = JUDGED_PHOTOGRAPHS if seed >= HELD_OUT_SEED else TRAINED_PHOTOGRAPHS
    canvas = _cut_background(rng, names) if photographs and rng.random() < _PHOTOGRAPHED else _draw_background(rng)
    layers = _place_layers(rng)
    objects: list[SceneObject] = []
    text = None
    for layer, mask in zip(layers, _visible_masks(layers), strict=True):
        if layer.ink is not None:
            text = layer.text
            dark, light = rng.uniform(0, 60), rng.uniform(195, 255)
            paper, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
            canvas += layer.alpha[..., None] * (paper - canvas)
            canvas += layer.ink[..., None] * (ink - canvas)
        else:
            shade = np.clip(np.array(COLOURS[layer.colour]) + rng.normal(0, 8, 3), 0, 255)
            canvas += layer.alpha[..., None] * (shade - canvas)
            objects.append(SceneObject(layer.shape, layer.colour, _bounds(mask), mask))
    canvas += rng.normal(0, rng.uniform(1, 6), canvas.shape)
    objects.sort(key=lambda item: (item.box.y1, item.box.x1))
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), tuple(objects), text)


def make_examples(
    scene: Scene, rng: np.random.Generator, num_examples: int, shares: Sequence[float] = SHARES
) -> list[Example]:
    """Draw `num_examples` random prompts about `scene`, each task with its share of `TASKS`."""
    makers = (_detect_example, _caption_example, _count_example, _colour_example, _ocr_example, _segment_example)
    picks = rng.choice(len(shares), size=num_examples, p=shares)
    return [makers[pick](scene, rng) for pick in picks]


def box_example(scene: Scene, labels: Sequence[str], task: str = "detect") -> Example:
    """The `detect` or `segment` prompt for `labels`: every instance, in the order of the labels, then of reading."""
    targets = tuple(item for label in labels for item in scene.objects if item.label == label)
    codes = [segmentation_text(item.codes) if task == "segment" else "" for item in targets]
    answer = " ; ".join(
        f"{location_text(item.box)}{mask} {item.label}" for item, mask in zip(targets, codes, strict=True)
    )
    return Example(task, f"{task} " + " ; ".join(labels), answer, targets)


def caption(scene: Scene) -> str:
    """One sentence that counts every class, in the order of `CLASSES`: `a red circle and two blue squares`."""
    counts = Counter(item.label for item in scene.objects)
    parts = [_counted(label, counts[label]) for label in CLASSES if counts[label]]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def location_text(box: Box) -> str:
    """PaliGemma's four location tokens, y1 x1 y2 x2: bin = round(edge / size * 1023)."""
    edges = (box.y1, box.x1, box.y2, box.x2)
    return "".join(f"<loc{round(edge / IMAGE_SIZE * (NUM_LOCATIONS - 1)):04d}>" for edge in edges)


def segmentation_text(codes: Sequence[int]) -> str:
    """PaliGemma's segmentation tokens."""
    return "".join(f"<seg{code:03d}>" for code in codes)


def _counted(label: str, count: int) -> str:
    return f"{_NUMBER_WORDS[count]} {label}{'s' if count > 1 else ''}"


def _detect_example(scene: Scene, rng: np.random.Generator) -> Example:
    return box_example(scene, _asked_labels(scene, rng))


def _segment_example(scene: Scene, rng: np.random.Generator) -> Example:
    return box_example(scene, _asked_labels(scene, rng), "segment")


def _asked_labels(scene: Scene, rng: np.random.Generator) -> list[str]:
    present = sorted({item.label for item in scene.objects})
    num_labels = int(rng.choice((1, 2, 3), p=(0.6, 0.28, 0.12)))
    num_present = min(len(present), int(rng.binomial(num_labels, 0.85)))
    absent = [label for label in CLASSES if label not in present]
    labels = [*rng.choice(present, num_present, False), *rng.choice(absent, num_labels - num_present, False)]
    return [str(label) for label in rng.permutation(labels)]


def _caption_example(scene: Scene, rng: np.random.Generator) -> Example:
    targets = sorted(scene.objects, key=lambda item: CLASSES.index(item.label))
    return Example("caption", "caption en", caption(scene), tuple(targets))


def _count_example(scene: Scene, rng: np.random.Generator) -> Example:
    shape = str(rng.choice(SHAPES)) if rng.random() < 0.3 else str(rng.choice([o.shape for o in scene.objects]))
    targets = tuple(item for item in scene.objects if item.shape == shape)
    return Example("count", f"answer en how many {shape}s are there?", str(len(targets)), targets)


def _colour_example(scene: Scene, rng: np.random.Generator) -> Example:
    counts = Counter(item.shape for item in scene.objects)
    single = [item for item in scene.objects if counts[item.shape] == 1]
    if not single:
        return _count_example(scene, rng)
    target = single[rng.integers(len(single))]
    return Example("colour", f"answer en what colour is the {target.shape}?", target.colour, (target,))


def _ocr_example(scene: Scene, rng: np.random.Generator) -> Example:
    if scene.text is None and rng.random() < 0.8:
        return _detect_example(scene, rng)
    return Example("ocr", "ocr", scene.text.text if scene.text else "")


class _Layer(NamedTuple):
    """A shape or a text plate, with the share of each pixel that it covers [H, W]."""

    alpha: npt.NDArray[np.float32]
    shape: str = ""
    colour: str = ""
    ink: npt.NDArray[np.float32] | None = None
    text: SceneText | None = None


def _place_layers(rng: np.random.Generator) -> list[_Layer]:
    """Shapes from back to front, a text plate last on half of the scenes; each stays visible enough."""
    layers: list[_Layer] = []
    wanted = 1 + int(rng.choice(MAX_OBJECTS, p=(0.2, 0.2, 0.2, 0.16, 0.13, 0.11)))
    for _ in range(8 * wanted):
        if len(layers) == wanted:
            break
        if layers and rng.random() < 0.35:  # several of one kind are common
            _, shape, colour, _, _ = layers[rng.integers(len(layers))]
        else:
            shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        _append_if_visible(layers, _Layer(_draw_shape(rng, shape), shape, colour))
    if rng.random() < 0.5:
        for _ in range(20):
            if _append_if_visible(layers, _draw_plate(rng, _random_text(rng))):
                break
    return layers


def _append_if_visible(layers: list[_Layer], layer: _Layer) -> bool:
    candidate = [*layers, layer]
    for (alpha, *_), mask in zip(candidate, _visible_masks(candidate), strict=True):
        if mask.sum() < MIN_VISIBLE * (alpha > 0.5).sum():
            return False
    layers.append(layer)
    return True


def _visible_masks(layers: Sequence[_Layer]) -> list[npt.NDArray[np.bool_]]:
    masks: list[npt.NDArray[np.bool_]] = []
    covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    for layer in reversed(layers):
        solid = layer.alpha > 0.5
        masks.append(solid & ~covered)
        covered |= solid
    return masks[::-1]


def _bounds(mask: npt.NDArray[np.bool_]) -> Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _draw_background(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A muted colour with coarse and fine texture: low-frequency noise, then a little of a finer one."""
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), rng.uniform(60, 190) + rng.normal(0, 12, 3))
    for cells, strength in ((4, rng.uniform(0, 22)), (16, rng.uniform(0, 10))):
        noise = rng.normal(0, strength, (cells, cells)).astype(np.float32)
        canvas += np.asarray(Image.fromarray(noise).resize((IMAGE_SIZE,) * 2, Image.Resampling.BICUBIC))[..., None]
    return canvas


def _cut_background(rng: np.random.Generator, names: Sequence[str]) -> npt.NDArray[np.float64]:
    """A square piece of a photograph, in any of eight positions, paler and greyer than it is."""
    picture = _photograph(names[int(rng.integers(len(names)))])
    side = int(rng.integers(IMAGE_SIZE, len(picture) + 1))
    top, left = rng.integers(len(picture) - side + 1, size=2)
    piece = Image.fromarray(picture[top : top + side, left : left + side])
    canvas = np.asarray(piece.resize((IMAGE_SIZE,) * 2, Image.Resampling.BICUBIC), np.float64)
    canvas = np.rot90(canvas[:, :: rng.choice((1, -1))], int(rng.integers(4)))
    grey = canvas.mean(axis=2, keepdims=True)
    canvas = grey + rng.uniform(0.2, 0.9) * (canvas - grey)
    return np.asarray(rng.uniform(70, 170) + rng.uniform(0.4, 0.9) * (canvas - canvas.mean()))


@cache
def _photograph(name: str) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(PHOTOGRAPHS / f"{name}.jpg"))


def _draw_shape(rng: np.random.Generator, shape: str) -> npt.NDArray[np.float32]:
    """Anti-aliased coverage [H, W] of one shape at a random place, size, stretch and rotation."""
    radius = rng.uniform(8, 21)
    stretch = rng.uniform(0.8, 1.0)
    turn = rng.uniform(-0.25, 0.25)
    centre = rng.uniform(radius + 1, IMAGE_SIZE - radius - 1, 2)
    if shape == "circle":
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        points = np.stack([np.cos(angles), np.sin(angles)], 1)
    elif shape == "square":
        points = np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    elif shape == "triangle":
        points = np.array([(0, -1), (0.9, 0.75), (-0.9, 0.75)])
    else:
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        points = np.stack([np.cos(angles), np.sin(angles)], 1) * np.where(np.arange(10) % 2, 0.45, 1.05)[:, None]
    points = points * (1, stretch)
    rotation = np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))])
    return _draw_polygon((points @ rotation) * radius + centre)


def _draw_polygon(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    low = np.maximum(np.floor(points.min(axis=0)).astype(int), 0)
    high = np.minimum(np.ceil(points.max(axis=0)).astype(int) + 1, IMAGE_SIZE)
    width, height = (int(side) for side in high - low)
    stencil = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    ImageDraw.Draw(stencil).polygon([(x, y) for x, y in ((points - low) * _OVERSAMPLING).tolist()], fill=255)
    alpha = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    alpha[low[1] : high[1], low[0] : high[0]] = np.asarray(stencil.reduce(_OVERSAMPLING)) / np.float32(255)
    return alpha


def _random_text(rng: np.random.Generator) -> str:
    """A word, a number of up to four digits, or (a quarter of the time) a string that is no word."""
    kind = rng.random()
    if kind < 0.45:
        return str(rng.choice(WORDS))
    if kind < 0.75:
        return str(rng.integers(10 ** rng.integers(1, 5)))
    return "".join(rng.choice(list(CHARACTERS), rng.integers(2, 7)))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _draw_plate(rng: np.random.Generator, text: str) -> _Layer:
    """A rectangle somewhere in the picture with `text` on it, 14 to 18 pixels high letters."""
    font = _font(int(rng.integers(14, 19)))
    advances = [font.getlength(character) + 1 for character in text]
    _, top, _, bottom = font.getbbox(text)
    margin = 3
    width, height = round(sum(advances)) + 2 * margin, round(bottom - top) + 2 * margin
    x, y = (int(rng.integers(IMAGE_SIZE - side)) for side in (width, height))
    alpha = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    alpha[y : y + height, x : x + width] = 1
    ink = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    draw = ImageDraw.Draw(ink)
    lefts = x + margin + np.cumsum([0, *advances[:-1]])
    for left, character in zip(lefts.tolist(), text, strict=True):
        draw.text((left, y + margin - top), character, fill=255, font=font)
    centres = tuple(
        (left + advance / 2, y + height / 2) for left, advance in zip(lefts.tolist(), advances, strict=True)
    )
    return _Layer(alpha, ink=np.asarray(ink) / np.float32(255), text=SceneText(text, centres))
