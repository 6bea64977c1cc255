"""Answers in the forms that other tools read, a picture at a time. Knows neither a model nor the command line.

| format | where | one | boxes | masks | text answers |
|---|---|---|---|---|---|
| `json` | output | array of objects | yes | run lengths | yes |
| `jsonl` | output | object a line | yes | run lengths | yes |
| `csv` | output | table | yes | no | yes |
| `coco` | output | dataset | yes | run lengths | no |
| `yolo` | folder | .txt a picture, and classes.txt | yes | largest outline | no |
| `labelme` | folder | .json a picture | yes | largest outline | no |

The two that write files name them after the picture; nothing but these files comes into the folder.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from paliedge.errors import PaliEdgeError, UsageError
from paliedge.results.arrays import outline_of, yolo_lines
from paliedge.results.generation import Generation, writing
from paliedge.results.locations import Detection
from paliedge.results.masks import Mask

if TYPE_CHECKING:
    from PIL import Image

    from paliedge.inputs.prompt import BoxRequest

Format: TypeAlias = Literal["json", "jsonl", "csv", "coco", "yolo", "labelme"]
# `paliedge.cli.options.FORMATS` lists them again, for `--help`, which must not import this module.
TEXT_FORMATS = ("json", "jsonl", "csv")
"""Those that hold answers without boxes too."""
FOLDER_FORMATS = ("yolo", "labelme")
"""Those that make a file a picture."""
Emit: TypeAlias = Callable[[str], object]
CSV_COLUMNS = ("file", "time_s", "label", "x1", "y1", "x2", "y2", "confidence", "text")
_LABELME_VERSION = "5.5.0"


class Writer:
    """Takes the answers of a run in the order of its pictures.

    Attributes:
        reports_errors: whether its output has a place for pictures that failed.
    """

    reports_errors = False

    def add(self, source: Path, result: Generation, time_s: float | None = None) -> None:
        """One answer.

        Args:
            source: the picture's path.
            result: its answer.
            time_s: of a video's frame, seconds since the first; formats for text have a place for it.

        Raises:
            OutputError: a file cannot be written; the other pictures are none the worse.
        """
        raise NotImplementedError

    def fail(self, source: Path, error: PaliEdgeError) -> None:
        """A picture that has no answer."""

    def finish(self) -> None:
        """The end of the run, also of an interrupted one. After no picture at all it writes nothing."""


def open_writer(
    form: Format, emit: Emit, folder: Path | None = None, requested: BoxRequest | None = None, *, free: bool = False
) -> Writer:
    """The writer of a format.

    Args:
        form: the format.
        emit: takes text for the output as it is, line ends included.
        folder: where the formats that make a file a picture write.
        requested: what a prompt that is answered in boxes asks for; its labels are the first classes, in their order.
        free: the model is not held to it, so that any answer may have masks.

    Raises:
        UsageError: the format has no place for text, and the answers are text; or it needs a folder.
        MissingExtraError: the format needs contourpy for the masks to come, and it is not installed.
    """
    if form not in TEXT_FORMATS and requested is None:
        raise UsageError(
            expected=f"a verb or prompt that is answered in boxes, for {form}",
            found="one that is answered in text",
            action=f"Take `--format` {', '.join(TEXT_FORMATS[:-1])} or {TEXT_FORMATS[-1]}.",
        )
    labels = requested.labels if requested else []
    if form == "coco":
        return CocoWriter(emit, labels)
    if form == "json":
        return JsonWriter(emit)
    if form == "jsonl":
        return JsonLinesWriter(emit)
    if form == "csv":
        return CsvWriter(emit)
    if folder is None:
        raise UsageError(
            expected=f"a folder for {form}, which makes a file a picture",
            found="none",
            action="Name one with `--save FOLDER`.",
        )
    if free or (requested and requested.task == "segment"):
        require_polygons()
    return YoloWriter(folder, labels) if form == "yolo" else LabelmeWriter(folder)


def require_polygons() -> None:
    """Raise now what the first mask's polygon would.

    Raises:
        MissingExtraError: contourpy is not installed.
    """
    Mask(np.zeros((1, 1), np.float32), (0, 0, 1, 1), (1, 1)).to_polygons()


class JsonLinesWriter(Writer):
    """An object a line and picture: `source`, a frame's `time_s`, and what `Generation.to_dict` gives or an `error`."""

    reports_errors = True

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def add(self, source: Path, result: Generation, time_s: float | None = None) -> None:
        time = {} if time_s is None else {"time_s": round(time_s, 3)}
        self._write({"source": str(source), **time, **result.to_dict()})

    def fail(self, source: Path, error: PaliEdgeError) -> None:
        parts = {"expected": error.expected, "found": error.found, "action": error.action}
        self._write({"source": str(source), "error": parts})

    def _write(self, row: dict[str, Any]) -> None:
        self._emit(json.dumps(row, ensure_ascii=False) + "\n")


class JsonWriter(JsonLinesWriter):
    """One array of the objects that JSON lines have, an object a line."""

    def __init__(self, emit: Emit) -> None:
        super().__init__(emit)
        self._is_empty = True

    def finish(self) -> None:
        if not self._is_empty:
            self._emit("\n]\n")

    def _write(self, row: dict[str, Any]) -> None:
        self._emit(("[\n" if self._is_empty else ",\n") + json.dumps(row, ensure_ascii=False))
        self._is_empty = False


class CsvWriter(Writer):
    """A table: a row a box with its edges in pixels; an answer without boxes is one row with its text."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._is_empty = True

    def add(self, source: Path, result: Generation, time_s: float | None = None) -> None:
        picture = (source, "" if time_s is None else round(time_s, 3))
        rows: list[Sequence[object]] = [
            (*picture, item.label, *(round(edge, 2) for edge in item.box), round(item.confidence, 5), "")
            for item in result.detections
        ] or [(*picture, *[""] * 6, result.text)]
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([CSV_COLUMNS, *rows] if self._is_empty else rows)
        self._emit(table.getvalue())
        self._is_empty = False


class _Classes:
    """Labels by the order in which they come, the requested ones first."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._indices = {label: index for index, label in enumerate(dict.fromkeys(labels))}

    def __call__(self, label: str) -> int:
        return self._indices.setdefault(label, len(self._indices))

    @property
    def labels(self) -> list[str]:
        return list(self._indices)


class CocoWriter(Writer):
    """One COCO dataset: `images`, `categories` and, as `annotations`, the results.

    The file is two things at once. Each annotation has `id`, `area` and `iscrowd`: `pycocotools.coco.COCO(file)`
    loads it, as annotation tools do. Each is a COCO result too, with a `score`: `loadRes` takes the list
    `annotations`, here or on a ground truth with the same ids. A box is x, y, width, height in pixels.
    `segmentation` is compressed run lengths, and absent without a mask. Ids count from 1: images in the order
    of the run (`file_name` is the path as it was found), categories with the requested labels first. Nothing is
    written before the end.
    """

    def __init__(self, emit: Emit, labels: Sequence[str] = ()) -> None:
        self._emit = emit
        self._classes = _Classes(labels)
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, source: Path, result: Generation, time_s: float | None = None) -> None:
        width, height = result.image_wh
        image = len(self._images) + 1
        self._images.append({"id": image, "file_name": str(source), "width": width, "height": height})
        for item in result.detections:
            ids = {"id": len(self._annotations) + 1, "image_id": image}
            self._annotations.append({**ids, **_coco_annotation(item, self._classes(item.label) + 1)})

    def finish(self) -> None:
        if not self._images:
            return
        categories = [{"id": index, "name": label} for index, label in enumerate(self._classes.labels, 1)]
        dataset = {
            "info": {"description": "made by paliedge"},
            "images": self._images,
            "categories": categories,
            "annotations": self._annotations,
        }
        self._emit(json.dumps(dataset, ensure_ascii=False) + "\n")


def _coco_annotation(item: Detection, category: int) -> dict[str, Any]:
    x1, y1, x2, y2 = item.box
    width, height = x2 - x1, y2 - y1
    annotation: dict[str, Any] = {
        "category_id": category,
        "bbox": [round(value, 2) for value in (x1, y1, width, height)],
        "area": round(width * height, 2),
        "iscrowd": 0,
        "score": round(item.confidence, 5),
    }
    if item.mask:
        annotation["segmentation"] = item.mask.to_rle()
        annotation["area"] = int(item.mask.to_array().sum())
    return annotation


class _FolderWriter(Writer):
    """Writes files named after the pictures; pictures of one name get a number behind it."""

    def __init__(self, folder: Path, suffix: str, taken: Sequence[str] = ()) -> None:
        self._folder = folder
        self._suffix = suffix
        self._taken = set(taken)

    def _free_path(self, source: Path) -> Path:
        stem, number = source.stem, 1
        while f"{stem}{self._suffix}" in self._taken:
            number += 1
            stem = f"{source.stem}-{number}"
        self._taken.add(f"{stem}{self._suffix}")
        return self._folder / f"{stem}{self._suffix}"


class YoloWriter(_FolderWriter):
    """A label file a picture, see `arrays.yolo_lines`, and `classes.txt`, a label a line from class 0 on."""

    def __init__(self, folder: Path, labels: Sequence[str] = ()) -> None:
        super().__init__(folder, ".txt", taken=["classes.txt"])
        self._classes = _Classes(labels)
        self._is_empty = True

    def add(self, source: Path, result: Generation, time_s: float | None = None) -> None:
        kinds = [self._classes(item.label) for item in result.detections]
        lines = yolo_lines(result.detections, kinds, result.image_wh, with_confidence=True)
        _write_text(self._free_path(source), lines)
        self._is_empty = False

    def finish(self) -> None:
        if not self._is_empty:
            _write_text(self._folder / "classes.txt", [" ".join(label.split()) for label in self._classes.labels])


class LabelmeWriter(_FolderWriter):
    """A file a picture that LabelMe opens: a polygon for each mask, its largest outline, a rectangle for other boxes.

    The picture is named relative to the folder and not copied. Where there is no such file, as of a video's
    frame, the picture lies in the file itself. A shape's `description` is its confidence.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ".json")

    def add(self, source: Path, result: Generation, time_s: float | None = None) -> None:
        width, height = result.image_wh
        is_file = time_s is None and source.is_file()
        content: dict[str, Any] = {
            "version": _LABELME_VERSION,
            "flags": {},
            "shapes": [_labelme_shape(item) for item in result.detections],
            "imagePath": os.path.relpath(source.parent.resolve() / source.name, self._folder.resolve()),
            "imageData": None if is_file or not result.image else _png_as_text(result.image),
            "imageHeight": height,
            "imageWidth": width,
        }
        _write_text(self._free_path(source), [json.dumps(content, ensure_ascii=False, indent=2)])


def _png_as_text(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _labelme_shape(item: Detection) -> dict[str, Any]:
    outline = outline_of(item) if item.mask else np.reshape(item.box, (2, 2))
    return {
        "label": item.label,
        "points": outline.round(2).tolist(),
        "group_id": None,
        "description": f"confidence {item.confidence:.4f}",
        "shape_type": "polygon" if item.mask else "rectangle",
        "flags": {},
    }


def _write_text(path: Path, lines: Sequence[str]) -> None:
    with writing(path):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
