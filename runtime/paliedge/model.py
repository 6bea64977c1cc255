"""PaliGemma as a user meets it: load a bundle, then detect, caption, ask, read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from paliedge.backends import BackendOptions, open_session
from paliedge.bundle import Bundle
from paliedge.constraints import BoxRule, Rule, anything
from paliedge.decoding import GeneratedToken, decode_greedily
from paliedge.embedding import EmbeddingTable
from paliedge.errors import UsageError
from paliedge.images import ImageSource, load_image
from paliedge.locations import Detection, LocationParser, parse_locations
from paliedge.manifest import Vocabulary
from paliedge.masks import Mask
from paliedge.preprocess import Preprocessor
from paliedge.prompt import BoxRequest, BoxTask, PromptTokenizer, find_box_request, split_labels
from paliedge.results import DeviceTimings, FinishReason, Generation, Timings
from paliedge.session import Session

SHIPPED_BUNDLE = Path(__file__).parent / "shapes"
"""A small PaliGemma that knows coloured shapes and printed words."""
DEFAULT_OPTIONS = BackendOptions()
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedImage:
    """What the vision encoder made of an image; good for any number of prompts.

    Attributes:
        features: [N, H] float32, an array or where the engine that made them keeps them.
        image_wh: width and height of the image in pixels.
        preprocess_ms: decoding, resizing and normalising.
        vision_ms: the vision encoder.
    """

    features: Any
    image_wh: tuple[int, int]
    preprocess_ms: float
    vision_ms: float


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
class _Request:
    """What is to be answered; `prefix` are the prompt's ids."""

    image: EncodedImage
    prefix: list[int]
    rule: Rule
    max_new_tokens: int
    reused: bool


class PaliGemma:
    """A loaded bundle. May be shared between threads.

    Args:
        bundle: an opened bundle.
        session: what runs its graphs.
    """

    def __init__(self, bundle: Bundle, session: Session[Any, Any]) -> None:
        manifest = bundle.manifest
        self.manifest = manifest
        self._session = session
        self._tokenizer = PromptTokenizer(bundle.path(manifest.tokenizer), manifest.tokens)
        self._preprocess = Preprocessor(manifest.preprocess, manifest.model.vision.image_size)
        self._embed = EmbeddingTable(bundle)
        self._idle_caches = [session.new_cache()]

    @classmethod
    def load(
        cls,
        bundle: str | Path = SHIPPED_BUNDLE,
        options: BackendOptions = DEFAULT_OPTIONS,
        *,
        report: Callable[[str], None] = _LOG.info,
    ) -> PaliGemma:
        """Open a bundle and load it into the best engine that works here.

        Args:
            bundle: the folder; without it the shapes model that paliedge ships.
            options: which engine, and how.
            report: gets one line that says which engine runs, and why no better one.

        Raises:
            BundleError: no bundle there, or one that is damaged.
            EngineMismatchError: its engines were built for something else, or it has no graphs for
                the wanted backend.
            MissingExtraError: what the backend needs is not installed.
            DeviceError: the backend needs a GPU, and there is none.
        """
        opened = Bundle(Path(bundle))
        session = open_session(opened, options, report)
        try:
            return cls(opened, session)
        except BaseException:  # such as a cache that the GPU has no memory for
            session.close()
            raise

    def __enter__(self) -> PaliGemma:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def has_device_clock(self) -> bool:
        """Whether the engine times its own work; then it runs on a GPU, by a CUDA graph or without."""
        return self._session.has_device_clock

    def close(self) -> None:
        """Give back what the engine holds; for a GPU whose memory others want. Nothing works afterwards."""
        self._idle_caches.clear()
        self._session.close()

    def encode(self, image: ImageSource, *, bgr: bool = False) -> EncodedImage:
        """Run the vision encoder once, for several prompts on one image.

        Raises:
            ImageError: see `paliedge.images.load_image`.
        """
        started = time.perf_counter()
        picture = load_image(image, bgr=bgr)
        pixel_values = self._preprocess(picture)
        preprocessed = time.perf_counter()
        features = self._session.encode_image(pixel_values)
        encoded = time.perf_counter()
        times = ((preprocessed - started) * 1000, (encoded - preprocessed) * 1000)
        return EncodedImage(features, picture.size, *times)

    def generate(
        self,
        image: ImageSource | EncodedImage,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        location_tokens: bool = True,
        free: bool = False,
        only_asked: bool = False,
        bgr: bool = False,
    ) -> Generation:
        """Answer a free prompt, greedily.

        The answer to a prompt that begins with `detect` or `segment` is held to whole boxes, for `segment`
        with masks; see `BoxRule`.

        Args:
            image: a path, the bytes of a file, PIL, a uint8 array, or an EncodedImage.
            prompt: in PaliGemma's own words, such as `caption en`.
            max_new_tokens: where to stop at the latest; the bundle's limit unless given.
            location_tokens: `<locNNNN>` and `<segNNN>` in the prompt are tokens, not text.
            free: let the model say whatever it likes, malformed boxes too.
            only_asked: labels may only be those of the `detect` or `segment` prompt.
            bgr: an array's channels are in OpenCV's order.

        Raises:
            ImageError: the image cannot be read.
            UsageError: the prompt or `max_new_tokens` is over the bundle's limit, or the bundle's reduced
                head cannot answer the prompt.
        """
        rule = self._rule(find_box_request(prompt), free, only_asked)
        request = self._prepare(image, prompt, rule, max_new_tokens, location_tokens, bgr)
        with self._decode(request) as steps:
            return self._collect(list(steps), request)

    def stream(
        self,
        image: ImageSource | EncodedImage,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        location_tokens: bool = True,
        free: bool = False,
        only_asked: bool = False,
        bgr: bool = False,
    ) -> Iterator[Piece]:
        """Like `generate`, a token at a time.

        The pieces' texts joined are its text, but for bytes that make no character; their detections
        together are its detections.
        """
        rule = self._rule(find_box_request(prompt), free, only_asked)
        return self._stream(self._prepare(image, prompt, rule, max_new_tokens, location_tokens, bgr))

    def detect(
        self,
        image: ImageSource | EncodedImage,
        labels: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        free: bool = False,
        only_asked: bool = False,
        bgr: bool = False,
    ) -> Generation:
        """Find every instance of `labels`: `["cat", "dog"]`, or `"cat ; dog"` as PaliGemma writes it.

        For `free` and `only_asked` see `generate`.

        Raises:
            UsageError: no label, or too many for the bundle's limits.
        """
        return self._find("detect", image, labels, free, only_asked, max_new_tokens, bgr)

    def segment(
        self,
        image: ImageSource | EncodedImage,
        labels: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        free: bool = False,
        only_asked: bool = False,
        bgr: bool = False,
    ) -> Generation:
        """Find every instance of `labels` with its mask; a referring expression is a label too.

        A bundle without a mask decoder gives boxes with `mask_codes` and no `mask`.

        Raises:
            UsageError: no label, or too many for the bundle's limits.
        """
        return self._find("segment", image, labels, free, only_asked, max_new_tokens, bgr)

    def caption(
        self,
        image: ImageSource | EncodedImage,
        lang: str = "en",
        *,
        max_new_tokens: int | None = None,
        bgr: bool = False,
    ) -> Generation:
        """Describe the image in one sentence; `lang` is a language code."""
        prompt = self.manifest.prompts.caption.replace("{lang}", lang)
        return self.generate(image, prompt, max_new_tokens=max_new_tokens, bgr=bgr)

    def ask(
        self,
        image: ImageSource | EncodedImage,
        question: str,
        lang: str = "en",
        *,
        max_new_tokens: int | None = None,
        bgr: bool = False,
    ) -> Generation:
        """Answer a question about the image."""
        prompt = self.manifest.prompts.answer.replace("{lang}", lang).replace("{question}", question)
        return self.generate(image, prompt, max_new_tokens=max_new_tokens, bgr=bgr)

    def ocr(
        self, image: ImageSource | EncodedImage, *, max_new_tokens: int | None = None, bgr: bool = False
    ) -> Generation:
        """Read the text in the image."""
        return self.generate(image, self.manifest.prompts.ocr, max_new_tokens=max_new_tokens, bgr=bgr)

    def _find(
        self,
        task: BoxTask,
        image: ImageSource | EncodedImage,
        labels: str | Sequence[str],
        free: bool,
        only_asked: bool,
        max_new_tokens: int | None,
        bgr: bool,
    ) -> Generation:
        asked = split_labels(labels) if isinstance(labels, str) else list(labels)
        if not any(label.strip() for label in asked):
            raise UsageError(expected="at least one label", found="none", action='Say what to find: ["cat"].')
        text = labels if isinstance(labels, str) else " ; ".join(labels)
        template: str = getattr(self.manifest.prompts, task)
        rule = self._rule(BoxRequest(task, asked), free, only_asked)
        request = self._prepare(image, template.replace("{labels}", text), rule, max_new_tokens, True, bgr)
        with self._decode(request) as steps:
            return self._collect(list(steps), request)

    def _rule(self, asked: BoxRequest | None, free: bool, only_asked: bool) -> Rule:
        tokens = self.manifest.tokens
        if only_asked and (free or not asked):
            raise UsageError(
                expected="a `detect` or `segment` prompt, not free, to restrict the labels of",
                found="a free answer" if free else "another prompt",
                action="Leave out one of the two.",
            )
        if free or not asked:
            return anything(tokens)
        if not only_asked:
            return BoxRule(tokens, masks=asked.task == "segment")
        labels, separators = zip(*map(self._tokenizer.encode_label, asked.labels), strict=True)
        return BoxRule(tokens, masks=asked.task == "segment", labels=labels, separator=separators[0])

    def _prepare(
        self,
        image: ImageSource | EncodedImage,
        prompt: str,
        rule: Rule,
        max_new_tokens: int | None,
        location_tokens: bool,
        bgr: bool,
    ) -> _Request:
        """Check everything that can be wrong, then encode the image."""
        limits = self.manifest.limits
        limit = limits.new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= limit <= limits.new_tokens:
            raise UsageError(
                expected=f"max_new_tokens from 1 to {limits.new_tokens}",
                found=f"{limit}",
                action="For longer answers export the checkpoint again with --max-new-tokens.",
            )
        if self.manifest.vocabulary:
            self._check_task(prompt, self.manifest.vocabulary)
        prefix = self._tokenizer.encode_prefix(prompt, location_tokens=location_tokens)
        room = limits.prefix - self.manifest.model.vision.num_image_tokens
        if len(prefix) > room:
            raise UsageError(
                expected=f"a prompt of at most {room} tokens",
                found=f"{len(prefix)}",
                action="Shorten it, or export the checkpoint again with --max-prompt-tokens.",
            )
        if not isinstance(image, EncodedImage):
            return _Request(self.encode(image, bgr=bgr), prefix, rule, limit, reused=False)
        shape = (self.manifest.model.vision.num_image_tokens, self.manifest.model.text.hidden_size)
        if image.features.shape != shape:
            raise UsageError(
                expected=f"image features of shape {list(shape)}",
                found=f"an image that another model encoded, {list(image.features.shape)}",
                action="Encode the image with the model that answers.",
            )
        return _Request(image, prefix, rule, limit, reused=True)

    def _check_task(self, prompt: str, vocabulary: Vocabulary) -> None:
        """Refuse what a reduced head cannot say: other tasks, other labels."""
        asked = find_box_request(prompt)
        unknown = [label for label in (asked.labels if asked else [prompt]) if label not in vocabulary.labels]
        if unknown:
            raise UsageError(
                expected=f"`detect` or `segment` with labels that this bundle's reduced output head kept: "
                f"{_some(vocabulary.labels)}",
                found=f"'{unknown[0]}'",
                action="Ask for one of them (`paliedge info` lists all), or export without --head-vocab.",
            )

    @contextmanager
    def _decode(self, request: _Request) -> Iterator[Iterator[GeneratedToken]]:
        """Decode with a cache that is nobody else's meanwhile and goes back afterwards."""
        try:
            cache = self._idle_caches.pop()
        except IndexError:
            cache = self._session.new_cache()
        try:
            yield decode_greedily(
                self._session,
                cache,
                request.image.features,
                self._embed(request.prefix),
                lambda token: self._embed([token])[0],
                eos=self.manifest.tokens.eos,
                rule=request.rule,
                max_new_tokens=request.max_new_tokens,
            )
        finally:
            self._idle_caches.append(cache)

    def _stream(self, request: _Request) -> Iterator[Piece]:
        decoder, image_wh = self._tokenizer.decode_stream(), request.image.image_wh
        parser = LocationParser(self.manifest.tokens, self._tokenizer.decode, image_wh)
        with self._decode(request) as steps:
            for count, step in enumerate(steps, 1):
                if step.token == self.manifest.tokens.eos:
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

    def _collect(self, steps: list[GeneratedToken], request: _Request) -> Generation:
        stopped = steps[-1].token == self.manifest.tokens.eos
        kept = steps[:-1] if stopped else steps
        ids, log_probs = tuple(step.token for step in kept), tuple(step.log_prob for step in kept)
        image, reused = request.image, request.reused
        parsed = parse_locations(ids, log_probs, self.manifest.tokens, self._tokenizer.decode, image.image_wh)
        return Generation(
            text=self._tokenizer.decode(ids),
            token_ids=ids,
            log_probs=log_probs,
            detections=self._with_masks(parsed.detections, image.image_wh),
            num_malformed=parsed.num_malformed,
            image_wh=image.image_wh,
            finish_reason="stop" if stopped else "length",
            timings=Timings(
                preprocess_ms=0.0 if reused else image.preprocess_ms,
                vision_ms=0.0 if reused else image.vision_ms,
                prefill_ms=steps[0].ms,
                decode_ms=tuple(step.ms for step in steps[1:]),
                device=_device_timings(steps, image, reused=reused),
            ),
        )


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 8} more" if len(labels) > 8 else ""
    return ", ".join(labels[:8]) + more


def _device_timings(steps: list[GeneratedToken], image: EncodedImage, *, reused: bool) -> DeviceTimings | None:
    times = [step.device_ms for step in steps if step.device_ms is not None]
    if len(times) < len(steps):
        return None
    vision_ms = 0.0 if reused else getattr(image.features, "device_ms", 0.0)
    return DeviceTimings(vision_ms, times[0], tuple(times[1:]))
