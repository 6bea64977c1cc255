"""PaliGemma as a user meets it: load a bundle, then detect, caption, ask, read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from paliedge.backends.select import BackendOptions, open_session
from paliedge.backends.session import Session
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Vocabulary
from paliedge.errors import PaliEdgeError, UsageError
from paliedge.generation.answering import Answerer, EncodedImage, Piece, Request
from paliedge.generation.constraints import BoxRule, Rule, anything
from paliedge.generation.embedding import EmbeddingTable
from paliedge.generation.prefetch import read_ahead
from paliedge.inputs.images import ImageSource, load_image
from paliedge.inputs.preprocess import Preprocessor
from paliedge.inputs.prompt import (
    CaptionStyle,
    Prompt,
    answer_prompt,
    box_prompt,
    caption_prompt,
    find_box_request,
    free_prompt,
    ocr_prompt,
    question_prompt,
)
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge.results.generation import Generation

SHIPPED_BUNDLE = Path(__file__).parent / "shapes"
"""A small PaliGemma that knows coloured shapes and printed words."""
DEFAULT_OPTIONS = BackendOptions()
Images: TypeAlias = "ImageSource | EncodedImage | Sequence[ImageSource | EncodedImage]"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Asked:
    """A prompt and how it is to be answered, see `PaliGemma.generate`."""

    prompt: Prompt
    max_new_tokens: int | None
    location_tokens: bool
    free: bool
    only_asked: bool


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
        self._answerer = Answerer(session, manifest.tokens, self._tokenizer, EmbeddingTable(bundle))

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

    @property
    def arithmetic(self) -> tuple[str, ...]:
        """What this processor makes of the products of the bundle's graphs, a line a kind; empty on a GPU."""
        return self._session.arithmetic

    @property
    def max_batch(self) -> int:
        """Requests that the engine decodes together; 1 where it cannot."""
        return self._session.max_batch

    def close(self) -> None:
        """Give back what the engine holds; for a GPU whose memory others want. Nothing works afterwards."""
        self._answerer.close()
        self._session.close()

    def encode(self, image: ImageSource, *, bgr: bool = False) -> EncodedImage:
        """Run the vision encoder once, for several prompts on one image.

        Raises:
            ImageError: see `paliedge.inputs.images.load_image`.
        """
        started = time.perf_counter()
        picture = load_image(image, bgr=bgr)
        pixel_values = self._preprocess(picture)
        preprocessed = time.perf_counter()
        features = self._session.encode_image(pixel_values)
        encoded = time.perf_counter()
        times = ((preprocessed - started) * 1000, (encoded - preprocessed) * 1000)
        return EncodedImage(features, picture.size, *times, picture, self._preprocess.frame(picture.size))

    def generate(
        self,
        image: Images,
        prompt: str | Prompt,
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
            image: a path, the bytes of a file, PIL, a uint8 array, or an EncodedImage; or a list of them, such as
                the frames of a video, for a bundle that was exported with --max-images. Boxes refer to the first.
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
        asked = _Asked(_as_prompt(prompt), max_new_tokens, location_tokens, free, only_asked)
        (answer,) = self._answerer.answer([self._prepare(_as_list(image), asked, bgr)])
        assert isinstance(answer, Generation)
        return answer

    def generate_batch(
        self,
        requests: Iterable[tuple[Images, str | Prompt]],
        *,
        batch_size: int = 8,
        overlap: bool = False,
        on_error: Callable[[PaliEdgeError], None] | None = None,
        max_new_tokens: int | None = None,
        location_tokens: bool = True,
        free: bool = False,
        only_asked: bool = False,
        bgr: bool = False,
    ) -> Iterator[Generation]:
        """Like `generate`, for many pairs of images and a prompt; the answers come in their order.

        Requests are taken as there is room for them. Vision encoder and prefill run for each request alone; decode
        steps are shared. For many prompts on one image give what `encode` made of it.

        Args:
            requests: pairs as `generate` takes them.
            batch_size: requests that are decoded together, at most 64, where the engine can: not on TensorRT, whose
                engines are built for one, and not with int8 graphs on the CPU, where it would change answers.
            overlap: encode the next request's images while this one is decoded. A frame of a camera is then
                older when its answer comes.
            on_error: gets the error of a request that cannot be answered, in its turn, and the others are done;
                without it the error is raised.
            max_new_tokens, location_tokens, free, only_asked, bgr: see `generate`.
        """
        if batch_size < 1:
            raise UsageError(expected="a batch_size from 1 on", found=f"{batch_size}", action="Give a larger one.")
        asked = partial(
            _Asked,
            max_new_tokens=max_new_tokens,
            location_tokens=location_tokens,
            free=free,
            only_asked=only_asked,
        )
        prepared = (
            self._try_to_prepare(_as_list(images), asked(_as_prompt(prompt)), bgr) for images, prompt in requests
        )
        for found in self._answerer.answer(read_ahead(prepared) if overlap else prepared, batch_size):
            if isinstance(found, Generation):
                yield found
            elif on_error:
                on_error(found)
            else:
                raise found

    def stream(
        self,
        image: Images,
        prompt: str | Prompt,
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
        asked = _Asked(_as_prompt(prompt), max_new_tokens, location_tokens, free, only_asked)
        return self._answerer.stream(self._prepare(_as_list(image), asked, bgr))

    def detect(
        self,
        image: Images,
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
        prompt = box_prompt(self.manifest.prompts, "detect", labels)
        return self.generate(image, prompt, max_new_tokens=max_new_tokens, free=free, only_asked=only_asked, bgr=bgr)

    def segment(
        self,
        image: Images,
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
        prompt = box_prompt(self.manifest.prompts, "segment", labels)
        return self.generate(image, prompt, max_new_tokens=max_new_tokens, free=free, only_asked=only_asked, bgr=bgr)

    def caption(
        self,
        image: Images,
        lang: str = "en",
        *,
        style: CaptionStyle = "caption",
        max_new_tokens: int | None = None,
        bgr: bool = False,
    ) -> Generation:
        """Describe the image in one sentence; `lang` is a language code.

        The styles "cap" and "describe" are those of pre-trained checkpoints: as raw as on the web, and longer.
        """
        prompt = caption_prompt(self.manifest.prompts, lang, style)
        return self.generate(image, prompt, max_new_tokens=max_new_tokens, bgr=bgr)

    def ask(
        self,
        image: Images,
        question: str,
        lang: str = "en",
        *,
        max_new_tokens: int | None = None,
        bgr: bool = False,
    ) -> Generation:
        """Answer a question about the image."""
        prompt = answer_prompt(self.manifest.prompts, question, lang)
        return self.generate(image, prompt, max_new_tokens=max_new_tokens, bgr=bgr)

    def question(
        self,
        image: Images,
        answer: str,
        lang: str = "en",
        *,
        max_new_tokens: int | None = None,
        bgr: bool = False,
    ) -> Generation:
        """Ask the question about the image that has this answer; a task of pre-trained checkpoints."""
        prompt = question_prompt(self.manifest.prompts, answer, lang)
        return self.generate(image, prompt, max_new_tokens=max_new_tokens, bgr=bgr)

    def ocr(self, image: Images, *, max_new_tokens: int | None = None, bgr: bool = False) -> Generation:
        """Read the text in the image."""
        return self.generate(image, ocr_prompt(self.manifest.prompts), max_new_tokens=max_new_tokens, bgr=bgr)

    def _rule(self, asked: _Asked) -> Rule:
        tokens, boxes = self.manifest.tokens, asked.prompt.boxes
        if asked.only_asked and (asked.free or not boxes):
            raise UsageError(
                expected="a `detect` or `segment` prompt, not free, to restrict the labels of",
                found="a free answer" if asked.free else "another prompt",
                action="Leave out one of the two.",
            )
        if asked.free or not boxes:
            return anything(tokens)
        if not asked.only_asked:
            return BoxRule(tokens, masks=boxes.task == "segment")
        labels, separators = zip(*map(self._tokenizer.encode_label, boxes.labels), strict=True)
        return BoxRule(tokens, masks=boxes.task == "segment", labels=labels, separator=separators[0])

    def _prepare(self, sources: Sequence[ImageSource | EncodedImage], asked: _Asked, bgr: bool) -> Request:
        """Check everything that can be wrong, then encode the images."""
        limits = self.manifest.limits
        limit = limits.new_tokens if asked.max_new_tokens is None else asked.max_new_tokens
        if not 1 <= limit <= limits.new_tokens:
            raise UsageError(
                expected=f"max_new_tokens from 1 to {limits.new_tokens}",
                found=f"{limit}",
                action="For longer answers export the checkpoint again with --max-new-tokens.",
            )
        rule = self._rule(asked)
        if self.manifest.vocabulary:
            self._check_task(asked.prompt.text, self.manifest.vocabulary)
        started = time.perf_counter()
        prefix = self._tokenizer.encode_prefix(asked.prompt.text, location_tokens=asked.location_tokens)
        tokenize_ms = (time.perf_counter() - started) * 1000
        room = limits.prefix - len(sources) * self.manifest.model.vision.num_image_tokens
        if not sources or room < 1:
            raise UsageError(
                expected=f"at least one image, and no more than {limits.prefix} tokens have room for",
                found=f"{len(sources)} images",
                action="Give fewer, or export the checkpoint again with --max-images.",
            )
        if len(prefix) > room:
            raise UsageError(
                expected=f"a prompt of at most {room} tokens",
                found=f"{len(prefix)}",
                action="Shorten it, or export the checkpoint again with --max-prompt-tokens.",
            )
        for source in sources:
            if isinstance(source, EncodedImage):
                self._check_features(source)
        encoded = [source if isinstance(source, EncodedImage) else self.encode(source, bgr=bgr) for source in sources]
        fresh = [one for one, source in zip(encoded, sources, strict=True) if one is not source]
        labels = asked.prompt.boxes.labels if asked.prompt.boxes else []
        only = labels[0] if len(labels) == 1 else ""
        return Request(tuple(encoded), tuple(fresh), prefix, rule, only, limit, tokenize_ms)

    def _try_to_prepare(
        self, sources: Sequence[ImageSource | EncodedImage], asked: _Asked, bgr: bool
    ) -> Request | PaliEdgeError:
        try:
            return self._prepare(sources, asked, bgr)
        except PaliEdgeError as error:
            return error

    def _check_features(self, image: EncodedImage) -> None:
        shape = (self.manifest.model.vision.num_image_tokens, self.manifest.model.text.hidden_size)
        if image.features.shape != shape:
            raise UsageError(
                expected=f"image features of shape {list(shape)}",
                found=f"an image that another model encoded, {list(image.features.shape)}",
                action="Encode the image with the model that answers.",
            )

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


def _as_prompt(prompt: str | Prompt) -> Prompt:
    return prompt if isinstance(prompt, Prompt) else free_prompt(prompt)


def _as_list(images: Images) -> list[ImageSource | EncodedImage]:
    if isinstance(images, list | tuple):
        return list(images)
    return [images]  # type: ignore[list-item]  # no other sequence: a str is a path, an array a picture


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 8} more" if len(labels) > 8 else ""
    return ", ".join(labels[:8]) + more
