"""From requests to answers, as one ladder: the engine's steps, a stream of pieces, whole answers, many of them.

Knows no files and no prompts.
"""

# Tests: tests/generation/test_batches.py and tests/generation/test_boxes_in_answers.py.
from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from paliedge.backends.session import GeneratedToken, Session
from paliedge.bundle.manifest import Tokens
from paliedge.errors import PaliEdgeError
from paliedge.generation.caches import CachePool
from paliedge.generation.embedding import EmbeddingTable
from paliedge.generation.engine import GenerationEngine, NewTokens
from paliedge.generation.request import EncodedImage, Request
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge.results.generation import DeviceTimings, FinishReason, Generation, Piece, Timings
from paliedge.results.locations import Detection, LocationParser
from paliedge.results.masks import Mask

KeyT = TypeVar("KeyT")


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
        self._caches = CachePool(session)

    def close(self) -> None:
        """Let go of the caches."""
        self._caches.close()

    def stream(self, request: Request) -> Iterator[Piece]:
        """The answer, a token at a time."""
        return self._stream(self._begin(request))

    def generate(self, request: Request) -> Generation:
        """The answer as a whole: its stream, collected."""
        answer = self._begin(request)
        deque(self._stream(answer), maxlen=0)
        return answer.finish()

    def generate_batch(
        self, requests: Iterable[tuple[KeyT, Request | PaliEdgeError]], num_rows: int
    ) -> Iterator[tuple[KeyT, Generation | PaliEdgeError]]:
        """Whole answers, each with its request's key, in the order of the requests; `num_rows` are decoded together.

        A request is taken when a row is free for it. An error that stands in place of a request comes out in its turn.
        """
        num_rows = min(num_rows, self._session.max_batch)
        coming = iter(requests)
        turns: deque[tuple[KeyT, _Answer | PaliEdgeError]] = deque()
        answers: dict[int, _Answer] = {}
        with self._caches.lend(num_rows) as cache:
            engine = self._engine(cache, num_rows)
            while True:
                while engine.has_room and (one := next(coming, None)):
                    key, request = one
                    if isinstance(request, PaliEdgeError):
                        turns.append((key, request))
                    else:
                        answer = answers[engine.add(request)] = self._begin(request)
                        turns.append((key, answer))
                    yield from _ended(turns)
                if not engine.num_requests:
                    return
                for new in engine.step():
                    answers[new.request_id].take(new)
                    if new.finish_reason:
                        del answers[new.request_id]
                yield from _ended(turns)

    def _stream(self, answer: _Answer) -> Iterator[Piece]:
        with self._caches.lend(1) as cache:
            engine = self._engine(cache, 1)
            engine.add(answer.request)
            while answer.finish_reason is None:
                for new in engine.step():
                    yield from answer.take(new)

    def _engine(self, cache: Any, num_rows: int) -> GenerationEngine[Any]:
        return GenerationEngine(self._session, cache, self._embed, end_ids=self._tokens.end_ids, num_rows=num_rows)

    def _begin(self, request: Request) -> _Answer:
        return _Answer(request, self._tokens, self._tokenizer, self._add_masks)

    def _add_masks(self, detections: Sequence[Detection], image_wh: tuple[int, int]) -> tuple[Detection, ...]:
        """The detections, their masks decoded if the bundle has what decodes them."""
        coded = [item.mask_codes for item in detections if item.mask_codes]
        if not coded or not self._session.has_mask_decoder:
            return tuple(detections)
        values = iter(self._session.decode_masks(np.array(coded, np.int64)))
        return tuple(
            item._replace(mask=Mask(next(values), item.uncut_box or item.box, image_wh)) if item.mask_codes else item
            for item in detections
        )


def _ended(turns: deque[tuple[KeyT, _Answer | PaliEdgeError]]) -> Iterator[tuple[KeyT, Generation | PaliEdgeError]]:
    """Those at the front that are whole."""
    while turns:
        key, first = turns[0]
        if isinstance(first, _Answer) and first.finish_reason is None:
            return
        turns.popleft()
        yield key, first.finish() if isinstance(first, _Answer) else first


class _Answer:
    """One answer in the making.

    Attributes:
        request: what it answers.
        finish_reason: None until it has ended.
    """

    def __init__(
        self,
        request: Request,
        tokens: Tokens,
        tokenizer: PromptTokenizer,
        add_masks: Callable[[Sequence[Detection], tuple[int, int]], tuple[Detection, ...]],
    ) -> None:
        self.request = request
        self.finish_reason: FinishReason | None = None
        image = request.images[0]
        self._spoken_ends = tokens.spoken_ends
        self._tokenizer = tokenizer
        self._add_masks = add_masks
        self._decode_next = tokenizer.decode_stream()
        self._parser = LocationParser(
            tokens, tokenizer.decode, image.image_wh, image.content_box, request.requested_label
        )
        self._generated: list[GeneratedToken] = []
        self._detections: list[Detection] = []
        self._parse_s = 0.0

    def take(self, new: NewTokens) -> list[Piece]:
        """What the new tokens add to the answer."""
        started = time.perf_counter()
        pieces = []
        for token in new.tokens:
            reason = new.finish_reason if token is new.tokens[-1] else None
            stopped = reason == "stop" and token.token_id not in self._spoken_ends
            found = [] if stopped else self._parser.push(token.token_id, token.log_prob)
            if reason:
                found = [*found, *self._parser.finish()]
            found = [item for item in found if item.confidence >= self.request.options.min_confidence]
            detections = self._add_masks(found, self.request.images[0].image_wh)
            text = "" if stopped else self._decode_next(token.token_id)
            pieces.append(Piece(text, token.token_id, token.log_prob, detections, reason))
            self._detections += detections
        self._generated += new.tokens
        self.finish_reason = new.finish_reason
        self._parse_s += time.perf_counter() - started
        return pieces

    def finish(self) -> Generation:
        """The whole answer."""
        started = time.perf_counter()
        assert self.finish_reason
        generated, request, image = self._generated, self.request, self.request.images[0]
        is_silent = self.finish_reason == "stop" and generated[-1].token_id not in self._spoken_ends
        kept = generated[:-1] if is_silent else generated
        ids = tuple(token.token_id for token in kept)
        text = self._tokenizer.decode(ids)
        self._parse_s += time.perf_counter() - started
        return Generation(
            text=text,
            token_ids=ids,
            log_probs=tuple(token.log_prob for token in kept),
            detections=tuple(self._detections),
            num_malformed=self._parser.num_malformed,
            image_wh=image.image_wh,
            finish_reason=self.finish_reason,
            timings=Timings(
                preprocess_ms=sum(one.preprocess_ms for one in request.fresh),
                vision_ms=sum(one.vision_ms for one in request.fresh),
                prefill_ms=generated[0].ms,
                decode_ms=tuple(token.ms for token in generated[1:]),
                device=_device_timings(generated, request.fresh),
                tokenize_ms=request.tokenize_ms,
                parse_ms=self._parse_s * 1000,
            ),
            image=image.image,
            path=image.path,
        )


def _device_timings(generated: Sequence[GeneratedToken], fresh: Sequence[EncodedImage]) -> DeviceTimings | None:
    times = [token.device_ms for token in generated if token.device_ms is not None]
    if len(times) < len(generated):
        return None
    vision_ms = sum(getattr(image.features, "device_ms", 0.0) for image in fresh)
    return DeviceTimings(vision_ms, times[0], tuple(times[1:]))
