"""What the model answers, with the times it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from paliedge.locations import Detection

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class DeviceTimings:
    """Milliseconds between a stage's first copy and its last, as the GPU's own events tell them."""

    vision_ms: float
    prefill_ms: float
    decode_ms: tuple[float, ...]


@dataclass(frozen=True)
class Timings:
    """Wall-clock times in milliseconds.

    `decode_ms` has one entry a decode step: the first token comes out of prefill, so there are
    len(token_ids) - 1 of them, one more where the end-of-sequence token came by a step of its own.
    `preprocess_ms` and `vision_ms` are 0 for an image that was encoded before. `device` is there
    where the engine has a clock of its own.
    """

    preprocess_ms: float
    vision_ms: float
    prefill_ms: float
    decode_ms: tuple[float, ...]
    device: DeviceTimings | None = None

    @property
    def total_ms(self) -> float:
        return self.preprocess_ms + self.vision_ms + self.prefill_ms + sum(self.decode_ms)


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: the answer; location tokens are spelled out.
        token_ids: the generated ids without end-of-sequence.
        log_probs: natural logarithm of each token's probability among all tokens.
        detections: the boxes in it, in the model's order; at the token limit the last label may be cut.
        num_malformed: groups of location or segmentation tokens in it that are no box or no mask.
        image_wh: width and height in pixels that the boxes refer to.
        finish_reason: "stop" at end-of-sequence, "length" at the token limit.
        timings: milliseconds by stage.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    detections: tuple[Detection, ...]
    num_malformed: int
    image_wh: tuple[int, int]
    finish_reason: FinishReason
    timings: Timings

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
