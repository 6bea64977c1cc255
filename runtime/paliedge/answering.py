"""From a request to an answer: decode with a cache of its own, read boxes out of the tokens, decode masks.

Knows no files and no prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from paliedge.constraints import Rule
from paliedge.decoding import GeneratedToken, decode_greedily
from paliedge.embedding import EmbeddingTable
from paliedge.locations import Detection, LocationParser, parse_locations
from paliedge.manifest import Tokens
from paliedge.masks import Mask
from paliedge.preprocess import WHOLE, Frame
from paliedge.prompt import PromptTokenizer
from paliedge.results import DeviceTimings, FinishReason, Generation, Timings
from paliedge.session import Session


@dataclass(frozen=True)
class EncodedImage:
    """What the vision encoder made of an image; good for any number of prompts.

    Attributes:
        features: [N, H] float32, an array or where the engine that made them keeps them.
        image_wh: width and height of the image in pixels.
        preprocess_ms: decoding, resizing and normalising.
        vision_ms: the vision encoder.
        image: the picture, upright and RGB, which answers hold too; None where it is not wanted.
        frame: where it lies in the model's square, see `paliedge.locations`.
    """

    features: Any
    image_wh: tuple[int, int]
    preprocess_ms: float
    vision_ms: float
    image: Image.Image | None = field(default=None, repr=False, compare=False)
    frame: Frame = WHOLE


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
class Request:
    """What is to be answered.

    Attributes:
        images: in the order that the model sees them; boxes refer to the first.
        fresh: those that were encoded for this request, whose times are its own.
        prefix: the prompt's ids.
        rule: what may be said.
        max_new_tokens: where to stop at the latest.
    """

    images: tuple[EncodedImage, ...]
    fresh: tuple[EncodedImage, ...]
    prefix: list[int]
    rule: Rule
    max_new_tokens: int


class Answerer:
    """Answers requests; may be shared between threads.

    Args:
        session: what runs the graphs.
        tokens: the bundle's token ids.
        tokenizer: turns ids into text.
        embed: the embedding table.
    """

    def __init__(
        self, session: Session[Any, Any], tokens: Tokens, tokenizer: PromptTokenizer, embed: EmbeddingTable
    ) -> None:
        self._session = session
        self._tokens = tokens
        self._tokenizer = tokenizer
        self._embed = embed
        self._idle_caches = [session.new_cache()]

    def close(self) -> None:
        """Let go of the caches."""
        self._idle_caches.clear()

    @contextmanager
    def _decode(self, request: Request) -> Iterator[Iterator[GeneratedToken]]:
        """Decode with a cache that is nobody else's meanwhile and goes back afterwards."""
        try:
            cache = self._idle_caches.pop()
        except IndexError:
            cache = self._session.new_cache()
        try:
            yield decode_greedily(
                self._session,
                cache,
                [image.features for image in request.images],
                self._embed(request.prefix),
                lambda token: self._embed([token])[0],
                eos=self._tokens.eos,
                rule=request.rule,
                max_new_tokens=request.max_new_tokens,
            )
        finally:
            self._idle_caches.append(cache)

    def stream(self, request: Request) -> Iterator[Piece]:
        """The answer, a token at a time."""
        decoder, image_wh = self._tokenizer.decode_stream(), request.images[0].image_wh
        parser = LocationParser(self._tokens, self._tokenizer.decode, image_wh, request.images[0].frame)
        with self._decode(request) as steps:
            for count, step in enumerate(steps, 1):
                if step.token == self._tokens.eos:
                    last = self._with_masks(parser.finish(), image_wh)
                    yield Piece("", step.token, step.log_prob, last, "stop")
                    return
                done, is_last = parser.push(step.token, step.log_prob), count == request.max_new_tokens
                found = self._with_masks([*done, *(parser.finish() if is_last else ())], image_wh)
                yield Piece(decoder(step.token), step.token, step.log_prob, found, "length" if is_last else None)

    def _with_masks(self, detections: Sequence[Detection], image_wh: tuple[int, int]) -> tuple[Detection, ...]:
        """The detections, their masks decoded if the bundle has what decodes them."""
        coded = [item.mask_codes for item in detections if item.mask_codes]
        if not coded or not self._session.has_mask_decoder:
            return tuple(detections)
        values = iter(self._session.decode_masks(np.array(coded, np.int64)))
        return tuple(
            item._replace(mask=Mask(next(values), item.box, image_wh)) if item.mask_codes else item
            for item in detections
        )

    def answer(self, request: Request) -> Generation:
        """The whole answer."""
        with self._decode(request) as decoding:
            steps = list(decoding)
        stopped = steps[-1].token == self._tokens.eos
        kept = steps[:-1] if stopped else steps
        ids, log_probs = tuple(step.token for step in kept), tuple(step.log_prob for step in kept)
        image = request.images[0]
        parsed = parse_locations(ids, log_probs, self._tokens, self._tokenizer.decode, image.image_wh, image.frame)
        return Generation(
            text=self._tokenizer.decode(ids),
            token_ids=ids,
            log_probs=log_probs,
            detections=self._with_masks(parsed.detections, image.image_wh),
            num_malformed=parsed.num_malformed,
            image_wh=image.image_wh,
            finish_reason="stop" if stopped else "length",
            timings=Timings(
                preprocess_ms=sum(one.preprocess_ms for one in request.fresh),
                vision_ms=sum(one.vision_ms for one in request.fresh),
                prefill_ms=steps[0].ms,
                decode_ms=tuple(step.ms for step in steps[1:]),
                device=_device_timings(steps, request.fresh),
            ),
            image=image.image,
        )


def _device_timings(steps: list[GeneratedToken], fresh: Sequence[EncodedImage]) -> DeviceTimings | None:
    times = [step.device_ms for step in steps if step.device_ms is not None]
    if len(times) < len(steps):
        return None
    vision_ms = sum(getattr(image.features, "device_ms", 0.0) for image in fresh)
    return DeviceTimings(vision_ms, times[0], tuple(times[1:]))
