"""From a request to an answer: decode with a cache of its own, read boxes out of the tokens, decode masks.

Knows no files and no prompts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from paliedge.backends.session import Session
from paliedge.bundle.manifest import Tokens
from paliedge.errors import PaliEdgeError
from paliedge.generation.constraints import Rule
from paliedge.generation.decoding import GeneratedToken, Prefix, decode_greedily
from paliedge.generation.embedding import EmbeddingTable
from paliedge.inputs.preprocess import WHOLE, Frame
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge.results.generation import DeviceTimings, FinishReason, Generation, Timings
from paliedge.results.locations import Detection, LocationParser, parse_locations
from paliedge.results.masks import Mask


@dataclass(frozen=True)
class EncodedImage:
    """What the vision encoder made of an image; good for any number of prompts.

    Attributes:
        features: [N, H] float32, an array or where the engine that made them keeps them.
        image_wh: width and height of the image in pixels.
        preprocess_ms: decoding, resizing and normalising.
        vision_ms: the vision encoder.
        image: the picture, upright and RGB, which answers hold too; None where it is not wanted.
        frame: where it lies in the model's square, see `paliedge.results.locations`.
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
        asked: the only label that boxes are asked for; empty if there is none or more.
        max_new_tokens: where to stop at the latest.
        tokenize_ms: what making the ids took.
    """

    images: tuple[EncodedImage, ...]
    fresh: tuple[EncodedImage, ...]
    prefix: list[int]
    rule: Rule
    asked: str
    max_new_tokens: int
    tokenize_ms: float


@dataclass(frozen=True, eq=False)
class _Pending(Prefix):
    """A request with what is decoded for it so far."""

    request: Request
    steps: list[GeneratedToken] = field(default_factory=list)


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
    def _cache(self, batch: int) -> Iterator[Any]:
        """A cache that is nobody else's meanwhile; one for a single request goes back afterwards."""
        if batch > 1:
            yield self._session.new_cache(batch)
            return
        try:
            cache = self._idle_caches.pop()
        except IndexError:
            cache = self._session.new_cache()
        try:
            yield cache
        finally:
            self._idle_caches.append(cache)

    def _decode(
        self, cache: Any, pending: Iterable[_Pending], batch: int = 1
    ) -> Iterator[tuple[_Pending, GeneratedToken]]:
        return decode_greedily(self._session, cache, pending, self._embed, eos=self._tokens.eos, batch=batch)

    def _start(self, request: Request) -> _Pending:
        features = [image.features for image in request.images]
        return _Pending(features, self._embed(request.prefix), request.rule, request.max_new_tokens, request)

    def stream(self, request: Request) -> Iterator[Piece]:
        """The answer, a token at a time."""
        decoder, image = self._tokenizer.decode_stream(), request.images[0]
        image_wh = image.image_wh
        parser = LocationParser(self._tokens, self._tokenizer.decode, image_wh, image.frame, request.asked)
        with self._cache(1) as cache:
            for count, (_, step) in enumerate(self._decode(cache, [self._start(request)]), 1):
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
            item._replace(mask=Mask(next(values), item.uncut_box or item.box, image_wh)) if item.mask_codes else item
            for item in detections
        )

    def answer(
        self, requests: Iterable[Request | PaliEdgeError], batch: int = 1
    ) -> Iterator[Generation | PaliEdgeError]:
        """Whole answers in the order of the requests, of which up to `batch` are decoded together.

        An error that stands in place of a request comes out in its turn.
        """
        line: deque[_Pending | PaliEdgeError] = deque()
        batch = min(batch, self._session.max_batch)
        with self._cache(batch) as cache:
            for pending, step in self._decode(cache, self._line_up(requests, line), batch):
                pending.steps.append(step)
                while line and (isinstance(first := line[0], PaliEdgeError) or self._has_ended(first)):
                    line.popleft()
                    yield first if isinstance(first, PaliEdgeError) else self._read(first.request, first.steps)
        yield from (left for left in line if isinstance(left, PaliEdgeError))

    def _line_up(
        self, requests: Iterable[Request | PaliEdgeError], line: deque[_Pending | PaliEdgeError]
    ) -> Iterator[_Pending]:
        for one in requests:
            line.append(one if isinstance(one, PaliEdgeError) else self._start(one))
            if isinstance(last := line[-1], _Pending):
                yield last

    def _has_ended(self, pending: _Pending) -> bool:
        steps = pending.steps
        return bool(steps) and (steps[-1].token == self._tokens.eos or len(steps) == pending.max_new_tokens)

    def _read(self, request: Request, steps: list[GeneratedToken]) -> Generation:
        """The answer that the tokens make."""
        started = time.perf_counter()
        stopped = steps[-1].token == self._tokens.eos
        kept = steps[:-1] if stopped else steps
        ids, log_probs = tuple(step.token for step in kept), tuple(step.log_prob for step in kept)
        image = request.images[0]
        parsed = parse_locations(
            ids, log_probs, self._tokens, self._tokenizer.decode, image.image_wh, image.frame, request.asked
        )
        text, detections = self._tokenizer.decode(ids), self._with_masks(parsed.detections, image.image_wh)
        return Generation(
            text=text,
            token_ids=ids,
            log_probs=log_probs,
            detections=detections,
            num_malformed=parsed.num_malformed,
            image_wh=image.image_wh,
            finish_reason="stop" if stopped else "length",
            timings=Timings(
                preprocess_ms=sum(one.preprocess_ms for one in request.fresh),
                vision_ms=sum(one.vision_ms for one in request.fresh),
                prefill_ms=steps[0].ms,
                decode_ms=tuple(step.ms for step in steps[1:]),
                device=_device_timings(steps, request.fresh),
                tokenize_ms=request.tokenize_ms,
                parse_ms=(time.perf_counter() - started) * 1000,
            ),
            image=image.image,
        )


def _device_timings(steps: list[GeneratedToken], fresh: Sequence[EncodedImage]) -> DeviceTimings | None:
    times = [step.device_ms for step in steps if step.device_ms is not None]
    if len(times) < len(steps):
        return None
    vision_ms = sum(getattr(image.features, "device_ms", 0.0) for image in fresh)
    return DeviceTimings(vision_ms, times[0], tuple(times[1:]))
