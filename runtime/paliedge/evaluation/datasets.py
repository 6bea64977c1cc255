"""Data with known answers: COCO annotations with their pictures, and JSONL files of pictures and texts.

Reads no picture; those that are not there are found missing when they are answered.
"""

# Tests: tests/evaluation/test_evaluation.py.
from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from paliedge.errors import UsageError

_COCO_FILES = ("annotations.json", "_annotations.coco.json", "annotations/instances_*.json")
_COCO_ACTION = (
    "Give a folder of images with annotations.json, _annotations.coco.json (Roboflow's name) or "
    "annotations/instances_*.json in it, or the .json file itself."
)
_TEXT_ACTION = (
    'Give a .jsonl file, or a folder with one, whose lines are like {"image": "a.png", "prefix": "answer en ...", '
    '"suffix": "..."}; `answers`, a list of texts, may stand for `suffix`.'
)


class Runs(msgspec.Struct, frozen=True):
    """A mask as COCO's run lengths; `size` is height and width in pixels."""

    size: tuple[int, int]
    counts: list[int] | str


Polygons = list[list[float]]
"""Outlines, each x, y, x, y, ... in pixels."""


@dataclass(frozen=True)
class Annotation:
    """One object of a picture.

    Attributes:
        label: its category's name.
        box: x1, y1, x2, y2 in pixels.
        area: square pixels.
        is_crowd: several objects in one.
        segmentation: its mask; None where only boxes were read.
    """

    label: str
    box: tuple[float, float, float, float]
    area: float
    is_crowd: bool
    segmentation: Polygons | Runs | None


@dataclass(frozen=True)
class CocoImage:
    """One picture; `size_wh` in pixels as the annotations have it, None where they do not say."""

    path: Path
    size_wh: tuple[int, int] | None
    annotations: tuple[Annotation, ...]


@dataclass(frozen=True)
class CocoDataset:
    """`labels` are the names of the categories that have an annotation, in the file's order."""

    images: tuple[CocoImage, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class TextExample:
    """A picture, the prompt if the data has one, and the expected texts, any of which is right."""

    path: Path
    prompt: str | None
    answers: tuple[str, ...]


class _Image(msgspec.Struct):
    id: int | str
    file_name: str
    width: int = 0
    height: int = 0


class _Category(msgspec.Struct):
    id: int | str
    name: str


class _Annotation(msgspec.Struct):
    image_id: int | str
    category_id: int | str
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool = 0
    segmentation: msgspec.Raw = msgspec.Raw(b"null")


class _Coco(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class _Line(msgspec.Struct):
    image: str
    prefix: str | None = None
    suffix: str | None = None
    answers: list[str] | None = None


def open_coco(dataset: Path, *, masks: bool) -> CocoDataset:
    """Read COCO annotations; with `masks`, each must have a segmentation.

    Raises:
        UsageError: none there, several, or what is there is no COCO dataset with pictures.
    """
    file = _find_one(dataset, _COCO_FILES, _COCO_ACTION)
    try:
        content = msgspec.json.decode(_read(file, _COCO_ACTION), type=_Coco)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unusable(file, f"something else: {error}", _COCO_ACTION) from error
    names = {category.id: category.name for category in content.categories}
    by_image: dict[int | str, list[Annotation]] = {image.id: [] for image in content.images}
    for number, entry in enumerate(content.annotations):
        if entry.image_id not in by_image or entry.category_id not in names:
            found = f"annotations[{number}] of image {entry.image_id} and category {entry.category_id}, one not listed"
            raise _unusable(file, found, "Correct the file.")
        outline = _segmentation(entry.segmentation, file, number) if masks else None
        by_image[entry.image_id].append(_annotation(entry, names[entry.category_id], outline))
    used = {item.label for items in by_image.values() for item in items}
    if not used:
        raise _unusable(file, "no annotation", _COCO_ACTION)
    folders = [file.parent, file.parent.parent] if file.parent.name == "annotations" else [file.parent]
    split = file.stem.removeprefix("instances_")
    candidates = [folder / name for folder in folders for name in ("", "images", split, f"images/{split}")]
    paths = _locate([image.file_name for image in content.images], candidates, file)
    images = (
        CocoImage(path, _size(image), tuple(by_image[image.id]))
        for path, image in zip(paths, content.images, strict=True)
    )
    return CocoDataset(tuple(images), tuple(dict.fromkeys(name for name in names.values() if name in used)))


def open_texts(dataset: Path, *, needs_prompt: bool) -> tuple[TextExample, ...]:
    """Read a JSONL file of pictures with the texts that are expected.

    Raises:
        UsageError: none there, several, or a line that is no such example.
    """
    file = _find_one(dataset, ("*.jsonl",), _TEXT_ACTION)
    lines = [_parse_line(file, number, line, needs_prompt) for number, line in _lines(file)]
    if not lines:
        raise _unusable(file, "no line", _TEXT_ACTION)
    paths = _locate([line.image for line in lines], [file.parent, file.parent / "images"], file)
    return tuple(
        TextExample(path, line.prefix, tuple(line.answers or [line.suffix or ""]))
        for path, line in zip(paths, lines, strict=True)
    )


def _find_one(dataset: Path, patterns: Sequence[str], action: str) -> Path:
    """The file that `dataset` is, or the one in it that one of `patterns` names."""
    if _is_there(dataset, folder=False):
        return dataset
    if not _is_there(dataset, folder=True):
        raise _unusable(dataset, "no such file or folder", action)
    found = [path for pattern in patterns for path in sorted(dataset.glob(pattern))]
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(path.relative_to(dataset)) for path in found)
    if found:
        raise _unusable(dataset, f"several files: {names}", "Name one of them.")
    deeper = [path for pattern in patterns for path in sorted(dataset.glob(f"*/{pattern}"))]
    if deeper:
        names = ", ".join(str(path.relative_to(dataset)) for path in deeper)
        raise _unusable(dataset, f"files in folders below: {names}", "Name one of them.")
    raise _unusable(dataset, "none", action)


def _locate(names: Sequence[str], folders: Sequence[Path], file: Path) -> list[Path]:
    """Where the pictures lie: in the first of `folders` that has them."""
    found = [
        next((path for path in (f / name for f in folders) if _is_there(path, folder=False)), None) for name in names
    ]
    if not any(found):
        looked = ", ".join(dict.fromkeys(str(folder) for folder in folders if _is_there(folder, folder=True)))
        first = f"such as {names[0][:100]}" if names else "in the list"
        raise _unusable(file, f"no image {first}; looked in {looked}", "Put the images there.")
    return [path or folders[0] / name for path, name in zip(found, names, strict=True)]


def _is_there(path: Path, *, folder: bool) -> bool:
    try:
        return path.is_dir() if folder else path.is_file()
    except (OSError, ValueError):  # a name that is too long, a NUL in it
        return False


def _read(file: Path, action: str) -> bytes:
    try:
        return file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise _unusable(file, error.strerror or "an error of the file system", action) from error


def _annotation(entry: _Annotation, label: str, outline: Polygons | Runs | None) -> Annotation:
    x, y, width, height = entry.bbox
    area = width * height if entry.area is None else entry.area
    return Annotation(label, (x, y, x + width, y + height), area, bool(entry.iscrowd), outline)


def _segmentation(raw: msgspec.Raw, file: Path, number: int) -> Polygons | Runs:
    try:
        decoded = msgspec.json.decode(raw, type=Polygons | Runs)
    except (msgspec.DecodeError, UnicodeDecodeError):
        decoded = []
    if isinstance(decoded, Runs):
        height, width = decoded.size
        is_whole = isinstance(decoded.counts, str) or sum(decoded.counts) == height * width
    else:
        is_whole = bool(decoded) and all(len(outline) >= 6 and len(outline) % 2 == 0 for outline in decoded)
    if not is_whole:
        raise _unusable(
            file,
            f"annotations[{number}] without polygons or run lengths in `segmentation`",
            "Add them, or score the boxes alone with --task detect.",
        )
    return decoded


def _size(image: _Image) -> tuple[int, int] | None:
    return (image.width, image.height) if image.width and image.height else None


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(_read(file, _TEXT_ACTION).split(b"\n"), 1):
        if line.strip():
            yield number, line


def _parse_line(file: Path, number: int, line: bytes, needs_prompt: bool) -> _Line:
    try:
        entry = msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unusable(file, f"line {number}: {error}", _TEXT_ACTION) from error
    if not entry.answers and entry.suffix is None:
        raise _unusable(file, f"line {number} without `suffix` or `answers`", _TEXT_ACTION)
    if needs_prompt and not entry.prefix:
        raise _unusable(file, f"line {number} without the question in `prefix`", _TEXT_ACTION)
    return entry


def _unusable(path: Path, found: str, action: str) -> UsageError:
    return UsageError(expected=f"a dataset to evaluate at {str(path)[:200]}", found=found, action=action)
