"""What the model answers, with the times it took, and the forms in which users want it."""

# Tests: tests/results/test_arrays.py.
from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from paliedge.errors import MissingExtraError, OutputError, PaliEdgeError, UsageError
from paliedge.inputs.images import ImageSource, load_image
from paliedge.results.arrays import Boxes, Masks, boxes_from_detections, masks_from_detections, yolo_lines
from paliedge.results.locations import Detection

FinishReason = Literal["stop", "length"]
_NUM_IN_REPR = 4


@dataclass(frozen=True)
class Piece:
    """One streamed token.

    Attributes:
        text: what it adds to the answer; empty while a character is incomplete, and at end-of-sequence.
        token_id: its id.
        log_prob: natural logarithm of its probability among all tokens.
        detections: those whose last token is known now.
        finish_reason: of the last piece, see `Generation`.
    """

    text: str
    token_id: int
    log_prob: float
    detections: tuple[Detection, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class DeviceTimings:
    """Milliseconds between a stage's first copy and its last, as the GPU's own events tell them."""

    vision_ms: float
    prefill_ms: float
    decode_ms: tuple[float, ...]


@dataclass(frozen=True)
class Timings:
    """Wall-clock times in milliseconds.

    `decode_ms` has one entry a decode step. The first token comes out of prefill, so there are
    len(token_ids) - 1 of them. There is one more where the end-of-sequence token came by a step of its own.
    `preprocess_ms` and `vision_ms` are 0 for an image that was encoded before. `device` is there
    where the engine has a clock of its own. `tokenize_ms` is the prompt's, `parse_ms` is what makes text,
    boxes and masks of tokens.
    """

    preprocess_ms: float
    vision_ms: float
    prefill_ms: float
    decode_ms: tuple[float, ...]
    device: DeviceTimings | None = None
    tokenize_ms: float = 0.0
    parse_ms: float = 0.0

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        return self.preprocess_ms + self.tokenize_ms + self.vision_ms + self.prefill_ms

    @property
    def total_ms(self) -> float:
        return self.ttft_ms + sum(self.decode_ms) + self.parse_ms


@dataclass(frozen=True, repr=False)
class Generation:
    """One answer. Its properties and methods beyond the attributes have the names of Ultralytics' results.

    Attributes:
        text: the answer; location tokens are spelled out.
        token_ids: the generated ids without end-of-sequence; another end that the checkpoint names and that is text
            is one of them.
        log_probs: natural logarithm of each token's probability among all tokens.
        detections: the boxes in it, in the model's order; at the token limit the last label may be cut.
        num_malformed: groups of location or segmentation tokens in it that are no box or no mask.
        image_wh: width and height in pixels that the boxes refer to.
        finish_reason: "stop" at end-of-sequence, "length" at the token limit.
        timings: milliseconds by stage.
        image: the picture that was asked about, where it was to be kept; held as long as the answer is.
        path: the file that the picture was read from, if it was one.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    detections: tuple[Detection, ...]
    num_malformed: int
    image_wh: tuple[int, int]
    finish_reason: FinishReason
    timings: Timings
    image: Image.Image | None = field(default=None, compare=False)
    path: Path | None = None

    def __repr__(self) -> str:
        """One line: what was found or said, why it ended, how long it took."""
        width, height = self.image_wh
        found = ", ".join(f"{item.label or 'box'} {item.confidence:.2f}" for item in self.detections[:_NUM_IN_REPR])
        if len(self.detections) > _NUM_IN_REPR:
            found += f" and {len(self.detections) - _NUM_IN_REPR} more"
        said = found or repr(self.text if len(self.text) <= 60 else f"{self.text[:57]}...")
        ended = "" if self.finish_reason == "stop" else ", cut off at the token limit"
        return f"<Generation: {said}{ended}; {width} x {height} pixels, {self.timings.total_ms:.0f} ms>"

    def _repr_png_(self) -> bytes | None:
        """The picture with its boxes, as notebooks show it; None where there is no picture any more."""
        try:
            picture = self.plot()
        except PaliEdgeError:
            return None
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        return stream.getvalue()

    @cached_property
    def names(self) -> dict[int, str]:
        """The labels by class index, in the order in which they first appear in this answer."""
        return dict(enumerate(dict.fromkeys(item.label for item in self.detections)))

    @property
    def orig_shape(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.image_wh[1], self.image_wh[0]

    @cached_property
    def boxes(self) -> Boxes:
        """The detections' boxes as arrays."""
        return boxes_from_detections(self.detections, self._classes(), self.orig_shape)

    @cached_property
    def masks(self) -> Masks | None:
        """The detections' masks as arrays; None where no detection has one."""
        return masks_from_detections(self.detections, self.orig_shape)

    @property
    def speed(self) -> dict[str, float]:
        """Milliseconds: `preprocess`, `inference` (its parts are `vision`, `prefill`, `decode`) and `postprocess`."""
        times = self.timings
        parts = {"vision": times.vision_ms, "prefill": times.prefill_ms, "decode": sum(times.decode_ms)}
        return {
            "preprocess": times.preprocess_ms + times.tokenize_ms,
            "inference": sum(parts.values()),
            "postprocess": times.parse_ms,
            **parts,
        }

    def plot(self, picture: ImageSource | None = None) -> Image.Image:
        """A copy of the picture with boxes and masks drawn in, or with the text below it; small ones are enlarged.

        Args:
            picture: the one that was asked about; unless given the one that was kept, or its file, read again.

        Raises:
            ImageError: the file is there no more.
            UsageError: there is no picture, or one of another size.
        """
        from paliedge.results.draw import draw_answer, draw_detections

        image = self._picture(picture)
        return draw_detections(image, self.detections) if self.detections else draw_answer(image, self.text)

    def _picture(self, given: ImageSource | None) -> Image.Image:
        if given is None and self.image:
            return self.image
        source = self.path if given is None else given
        if source is None:
            raise UsageError(
                expected="the picture that was asked about",
                found="an answer without it",
                action="Give it: answer.plot(picture); or ask with GenerationOptions(keep_image=True).",
            )
        image = load_image(source)
        if image.size != self.image_wh:
            raise UsageError(
                expected=f"the picture that was asked about, {self.image_wh[0]} x {self.image_wh[1]} pixels",
                found=f"one of {image.width} x {image.height}",
                action="Give the same picture.",
            )
        return image

    def save(self, path: str | Path, picture: ImageSource | None = None) -> Path:
        """Write `plot(picture)`; the name's ending says in which format. Folders are made. Returns the path.

        Raises:
            ImageError, UsageError: see `plot`, or the name ends in no format that Pillow writes.
            OutputError: it cannot be written.
        """
        path, plotted = Path(path), self.plot(picture)
        if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
            raise UsageError(
                expected="a name that ends in .png, .jpg or another format that Pillow writes",
                found=f"{path.name}",
                action="Name it with such an ending.",
            )
        with writing(path):
            plotted.save(path)
        return path

    def save_txt(self, path: str | Path, *, save_conf: bool = False) -> Path:
        """Write the detections as a YOLO label file, see `paliedge.results.arrays.yolo_lines`. Returns the path.

        Raises:
            MissingExtraError: there is a mask, and contourpy is not installed.
            OutputError: it cannot be written.
        """
        lines = yolo_lines(self.detections, self._classes(), self.image_wh, with_confidence=save_conf)
        path = Path(path)
        with writing(path):
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    def to_json(self) -> str:
        """`to_dict()` as one line of JSON, as `--json` prints it."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_supervision(self) -> Any:
        """The detections as `supervision.Detections`; where only some have masks, the others' are empty.

        Raises:
            MissingExtraError: supervision is not installed.
        """
        try:
            supervision = import_module("supervision")
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                expected="supervision, for its Detections",
                found="no such package",
                action="Run `pip install supervision`.",
            ) from error
        boxes, masks = self.boxes, None
        if self.masks:
            masks = np.zeros((len(boxes), *self.orig_shape), np.bool_)
            masks[self.masks.index] = self.masks.data
        labels = np.array([item.label for item in self.detections], np.str_)
        return supervision.Detections(
            xyxy=boxes.xyxy, mask=masks, confidence=boxes.conf, class_id=boxes.cls, data={"class_name": labels}
        )

    def above(self, confidence: float) -> Generation:
        """The same answer with only the detections of at least this confidence."""
        kept = tuple(item for item in self.detections if item.confidence >= confidence)
        return replace(self, detections=kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them; masks as COCO's compressed run lengths."""
        return {
            "text": self.text,
            "detections": [
                {
                    "label": item.label,
                    "box": [round(value, 2) for value in item.box],
                    "box_normalized": [round(value, 5) for value in item.box_normalized],
                    "confidence": round(item.confidence, 5),
                    "mask": item.mask.to_rle() if item.mask else None,
                }
                for item in self.detections
            ],
            "num_malformed": self.num_malformed,
            "image_wh": list(self.image_wh),
            "token_ids": list(self.token_ids),
            "log_probs": [round(value, 5) for value in self.log_probs],
            "finish_reason": self.finish_reason,
            "timings": {
                "preprocess_ms": round(self.timings.preprocess_ms, 3),
                "vision_ms": round(self.timings.vision_ms, 3),
                "prefill_ms": round(self.timings.prefill_ms, 3),
                "decode_ms": [round(value, 3) for value in self.timings.decode_ms],
                "total_ms": round(self.timings.total_ms, 3),
                "device": asdict(self.timings.device) if self.timings.device else None,
            },
        }

    def _classes(self) -> list[int]:
        indices = {label: index for index, label in self.names.items()}
        return [indices[item.label] for item in self.detections]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes the folder of `path`; an error of the file system in the block is an OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OutputError(
            expected=f"room and permission to write {path}",
            found=error.strerror or "an error of the file system",
            action="Name another folder (--save), or make room.",
        ) from error
