"""Pictures and prompts that a model is calibrated and judged with.

A folder of images, and in it, if there are any, the JSONL files that PaliGemma is fine-tuned with: a line
with `image`, `prefix` (the prompt) and `suffix` (the answer, not needed here) for each example.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from paliedge.errors import UsageError
from paliedge.inputs.images import SUFFIXES, load_image

PROMPTS = ("caption en", "detect cat ; dog", "answer en what is this?")
"""For a head that can say everything."""
_NUM_IMAGES = 2
_CANVAS = 256
_TILE = 8

MAX_IMAGES = 48
PROMPTS_PER_IMAGE = 2
DEFAULT_PROMPTS = ("caption en", "ocr")
"""For images without prompts: every PaliGemma mix and most fine-tunes know them."""
CALIBRATE = (
    "Give --calibrate a folder with a few dozen images that are like those to come, and a .jsonl with a line for each: "
    "image, prefix (the prompt), suffix (the answer; may be left out)."
)
PLAIN_PICTURES = (
    f"They are asked {' and '.join(f'`{prompt}`' for prompt in DEFAULT_PROMPTS)}. What other prompts need, such as "
    "`detect`, is neither calibrated nor judged."
)
FOLDER = "calibration"
"""A checkpoint may bring its samples in a folder of this name."""


@dataclass(frozen=True)
class Sample:
    """An image, by name, and its prompts. A path is read whenever the image is wanted: photographs are large."""

    name: str
    source: Path | Image.Image
    prompts: tuple[str, ...]

    @property
    def image(self) -> Image.Image:
        """The picture, in RGB.

        Raises:
            ImageError: it cannot be read.
        """
        return load_image(self.source)


@dataclass(frozen=True)
class SampleFolder:
    """A folder of samples; no image is read yet."""

    path: Path
    prompts: dict[Path, list[str]]

    @property
    def has_prompts(self) -> bool:
        """Whether any picture has a prompt of its own."""
        return any(self.prompts.values())

    def load(self) -> list[Sample]:
        """At most `MAX_IMAGES` spread over the folder, each with its first prompts."""
        paths = sorted(self.prompts)
        count = min(MAX_IMAGES, len(paths))
        chosen = [paths[index * len(paths) // count] for index in range(count)]
        return [Sample(path.name, path, tuple(self._prompts(path))) for path in chosen]

    def _prompts(self, path: Path) -> list[str]:
        return (list(dict.fromkeys(self.prompts[path])) or list(DEFAULT_PROMPTS))[:PROMPTS_PER_IMAGE]

    def all_prompts(self) -> Iterator[str]:
        """Every prompt of every line."""
        for path in sorted(self.prompts):
            yield from self.prompts[path]


def open_samples(folder: Path) -> SampleFolder:
    """Look through a folder of images with optional JSONL files.

    Raises:
        UsageError: no such folder, no image, or a line that is no sample.
    """
    if not folder.is_dir():
        raise _unusable(folder, "no such folder")
    prompts: dict[Path, list[str]] = {}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    for path in files:
        if path.suffix.lower() == ".jsonl":
            for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
                if line.strip():
                    image, prompt = _read_line(path, number, line)
                    prompts.setdefault(image, []).append(prompt)
    if not prompts:
        prompts = {path: [] for path in files if path.suffix.lower() in SUFFIXES}
    if not prompts:
        raise _unusable(folder, f"no file that ends in {', '.join(SUFFIXES)} and no .jsonl")
    return SampleFolder(folder, prompts)


def builtin_samples(prompts: tuple[str, ...] = PROMPTS) -> list[Sample]:
    """The two drawn pictures of the golden answers, for a model without samples of its own."""
    images = map(Image.fromarray, golden_images())
    return [Sample(f"drawn {index}", image, prompts) for index, image in enumerate(images, 1)]


class _Line(msgspec.Struct):
    image: str
    prefix: str
    suffix: str = ""


def _read_line(path: Path, number: int, line: bytes) -> tuple[Path, str]:
    try:
        entry = msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unusable(path, f"line {number} without texts `image` and `prefix`") from error
    file = path.parent / entry.image
    try:
        there = file.is_file()
    except (OSError, ValueError):  # a name that is too long, a NUL in it
        there = False
    if not there:
        raise _unusable(path, f"{entry.image[:100]} in line {number}, which is not there")
    return file, entry.prefix


def _unusable(path: Path, found: str) -> UsageError:
    return UsageError(expected=f"images to calibrate with in {path}", found=found, action=CALIBRATE)


def golden_images() -> npt.NDArray[np.uint8]:
    """Pictures with edges, gradients and noise; any will do, these need no file.

    They are mosaics, which are small in a bundle: zip packs noise in every pixel not at all.
    """
    rows, columns = np.mgrid[0:_CANVAS:_TILE, 0:_CANVAS:_TILE]
    images = []
    for index in range(_NUM_IMAGES):
        noise = np.random.default_rng(index).integers(0, 32, (*rows.shape, 3))
        disc = (rows - 90 - 40 * index) ** 2 + (columns - 150 + 50 * index) ** 2 < 60**2
        ramps = np.stack([rows * 0.7, columns * 0.7, (rows + columns) * 0.35], -1)
        images.append(np.where(disc[..., None], (200, 60, 30 + 150 * index), ramps) + noise)
    return np.stack(images).clip(0, 255).astype(np.uint8).repeat(_TILE, 1).repeat(_TILE, 2)
