"""PaliGemma as a user meets it: load a bundle, then detect, caption, ask, read."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from paliedge.backends.select import Backend, BackendOptions, open_session
from paliedge.backends.session import Session
from paliedge.bundle.bundle import Bundle
from paliedge.errors import ClosedError, PaliEdgeError, UsageError
from paliedge.generation.answering import Answerer
from paliedge.generation.embedding import EmbeddingTable
from paliedge.generation.prefetch import read_ahead
from paliedge.generation.request import (
    DEFAULT_OPTIONS,
    EncodedImage,
    GenerationOptions,
    Images,
    Request,
    RequestMaker,
)
from paliedge.inputs.images import ImageSource, load_image
from paliedge.inputs.preprocess import Preprocessor
from paliedge.inputs.prompt import CaptionStyle, Prompt, PromptMaker
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge.results.generation import Generation, Piece

SHIPPED_BUNDLE = Path(__file__).parent / "shapes"
"""A small PaliGemma that knows coloured shapes and printed words."""
DEFAULT_BACKEND = BackendOptions()
KeyT = TypeVar("KeyT")
MethodT = TypeVar("MethodT", bound=Callable[..., Any])
_OLD_KEYWORDS = {
    "max_new_tokens": "max_new_tokens",
    "free": "free",
    "only_asked": "only_requested",
    "location_tokens": "location_tokens",
    "bgr": "bgr",
}
_LOG = logging.getLogger(__name__)


def _takes_old_keywords(method: MethodT) -> MethodT:
    """Options as keywords of their own, as in 0.1, still work in this version; type checkers know them no more."""

    @wraps(method)
    def call(model: PaliGemma, *arguments: Any, **keywords: Any) -> Any:
        old = {_OLD_KEYWORDS[name]: keywords.pop(name) for name in list(keywords) if name in _OLD_KEYWORDS}
        if old:
            spelt = ", ".join(f"{name}={value!r}" for name, value in old.items())
            message = f"give options=GenerationOptions({spelt}): keywords of their own go with the next version"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            keywords["options"] = replace(keywords.get("options", DEFAULT_OPTIONS), **old)
        return method(model, *arguments, **keywords)

    return call  # type: ignore[return-value]


class PaliGemma:
    """A loaded bundle. May be shared between threads.

    Args:
        bundle: an opened bundle.
        session: what runs its graphs.

    Attributes:
        manifest: what the bundle says of itself.
        prompts: makes the prompts of `detect` and its like, for `stream` and `generate_batch`.
    """

    def __init__(self, bundle: Bundle, session: Session[Any, Any]) -> None:
        manifest = bundle.manifest
        self.manifest = manifest
        self.prompts = PromptMaker(manifest.prompts)
        self._session = session
        self._is_closed = False
        tokenizer = PromptTokenizer(bundle.path(manifest.tokenizer), manifest.tokens)
        self._preprocess = Preprocessor(manifest.preprocess, manifest.model.vision.image_size)
        self._make_request = RequestMaker(manifest, tokenizer, self._encode)
        self._answerer = Answerer(session, manifest.tokens, tokenizer, EmbeddingTable(bundle))

    @classmethod
    def load(
        cls,
        bundle: str | Path = SHIPPED_BUNDLE,
        options: BackendOptions = DEFAULT_BACKEND,
        *,
        backend: Backend | None = None,
        threads: int | None = None,
        report: Callable[[str], None] = _LOG.info,
    ) -> PaliGemma:
        """Open a bundle and load it into the best backend that works here.

        Args:
            bundle: the folder; without it the shapes model that paliedge ships.
            options: which backend, and how.
            backend, threads: these of the options, for short.
            report: gets one line that says which backend runs, and why no better one.

        Raises:
            UsageError: a backend that there is not, or a number of threads below 0.
            BundleError: no bundle there, or one that is damaged.
            EngineMismatchError: its engines were built for something else, or it has no graphs for
                the wanted backend.
            MissingExtraError: what the backend needs is not installed.
            DeviceError: the backend needs a GPU, and there is none.
        """
        options = replace(
            options,
            backend=options.backend if backend is None else backend,
            threads=options.threads if threads is None else threads,
        )
        opened = Bundle(Path(bundle))
        session = open_session(opened, options, report)
        try:
            return cls(opened, session)
        except BaseException:  # such as a cache that the GPU has no memory for
            session.close()
            raise

    def __repr__(self) -> str:
        pixels, text = self.manifest.model.vision.image_size, self.manifest.model.text
        closed = ", closed" if self._is_closed else ""
        return f"PaliGemma: {pixels} x {pixels} pixels, {text.num_layers} layers of width {text.hidden_size}{closed}"

    def __enter__(self) -> PaliGemma:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def has_device_clock(self) -> bool:
        """Whether the backend times its own work; then it runs on a GPU, by a CUDA graph or without."""
        return self._session.has_device_clock

    @property
    def arithmetic(self) -> tuple[str, ...]:
        """What this processor makes of the products of the bundle's graphs, a line a kind; empty on a GPU."""
        return self._session.arithmetic

    @property
    def max_batch(self) -> int:
        """Requests that the backend decodes together; 1 where it cannot."""
        return self._session.max_batch

    def close(self) -> None:
        """Give back what the backend holds; for a GPU whose memory others want. May be called twice.

        Every later question raises ClosedError.
        """
        self._is_closed = True
        self._answerer.close()
        self._session.close()

    def encode(self, image: ImageSource, *, bgr: bool = False, keep_image: bool = False) -> EncodedImage:
        """Run the vision encoder once, for several prompts on one image.

        Args:
            image: a path, the bytes of a file, PIL, or a uint8 array.
            bgr: an array's channels are in OpenCV's order.
            keep_image: answers hold the picture.

        Raises:
            ImageError: see `paliedge.inputs.images.load_image`.
        """
        return self._encode(image, GenerationOptions(bgr=bgr, keep_image=keep_image))

    @_takes_old_keywords
    def generate(self, image: Images, prompt: str | Prompt, options: GenerationOptions = DEFAULT_OPTIONS) -> Generation:
        """Answer a free prompt, greedily.

        The answer to a prompt that begins with `detect` or `segment` is held to whole boxes, for `segment`
        with masks; see `BoxConstraint`.

        Args:
            image: a path, the bytes of a file, PIL, a uint8 array, or an EncodedImage; or an ImageSet of them.
            prompt: in PaliGemma's own words, such as `caption en`, or what `prompts` makes.
            options: how it is to be answered.

        Raises:
            ImageError: the image cannot be read.
            UsageError: the prompt or `max_new_tokens` is over the bundle's limit, or the bundle's reduced
                head cannot answer the prompt.
        """
        return self._answerer.generate(self._request(image, prompt, options))

    @_takes_old_keywords
    def stream(
        self, image: Images, prompt: str | Prompt, options: GenerationOptions = DEFAULT_OPTIONS
    ) -> Iterator[Piece]:
        """Like `generate`, a token at a time: `model.stream(image, model.prompts.detect("cat"))`.

        The pieces' texts joined are its text, but for bytes that make no character; their detections
        together are its detections.
        """
        return self._answerer.stream(self._request(image, prompt, options))

    @_takes_old_keywords
    def generate_batch(
        self,
        requests: Iterable[tuple[KeyT, Images | PaliEdgeError, str | Prompt]],
        options: GenerationOptions = DEFAULT_OPTIONS,
        *,
        batch_size: int = 8,
        overlap: bool = False,
    ) -> Iterator[tuple[KeyT, Generation | PaliEdgeError]]:
        """Like `generate`, for many requests: yields the key of each with its answer, or with why there is none.

        Requests are taken as there is room for them, and answered in their order. Vision encoder and prefill run
        for each alone; decode steps are shared. For many prompts on one image give what `encode` made of it.

        Args:
            requests: a key of your own, the image and the prompt of each, as `generate` takes them. An error in
                place of the image comes out in its turn.
            options: how all of them are to be answered.
            batch_size: requests that are decoded together, at most 64, where the backend can: not on TensorRT, whose
                engines are built for one, and not with int8 graphs on the CPU, where it would change answers.
            overlap: encode the next request's images while this one is decoded. A frame of a camera is then
                older when its answer comes.
        """
        if batch_size < 1:
            raise UsageError(expected="a batch_size from 1 on", found=f"{batch_size}", action="Give a larger one.")
        self._check_open()
        made = ((key, self._try_request(image, prompt, options)) for key, image, prompt in requests)
        return self._answerer.generate_batch(read_ahead(made) if overlap else made, batch_size)

    @_takes_old_keywords
    def detect(
        self, image: Images, labels: str | Iterable[str], options: GenerationOptions = DEFAULT_OPTIONS
    ) -> Generation:
        """Find every instance of `labels`: `["cat", "dog"]`, or `"cat ; dog"` as PaliGemma writes it.

        Raises:
            UsageError: no label, or too many for the bundle's limits.
        """
        return self.generate(image, self.prompts.detect(labels), options)

    @_takes_old_keywords
    def segment(
        self, image: Images, labels: str | Iterable[str], options: GenerationOptions = DEFAULT_OPTIONS
    ) -> Generation:
        """Find every instance of `labels` with its mask; a referring expression is a label too.

        A bundle without a mask decoder gives boxes with `mask_codes` and no `mask`.

        Raises:
            UsageError: no label, or too many for the bundle's limits.
        """
        return self.generate(image, self.prompts.segment(labels), options)

    @_takes_old_keywords
    def caption(
        self,
        image: Images,
        lang: str = "en",
        options: GenerationOptions = DEFAULT_OPTIONS,
        *,
        style: CaptionStyle = "caption",
    ) -> Generation:
        """Describe the image in one sentence; `lang` is a language code.

        The styles "cap" and "describe" are those of pre-trained checkpoints: as raw as on the web, and longer.
        """
        return self.generate(image, self.prompts.caption(lang, style), options)

    @_takes_old_keywords
    def ask(
        self, image: Images, question: str, lang: str = "en", options: GenerationOptions = DEFAULT_OPTIONS
    ) -> Generation:
        """Answer a question about the image."""
        return self.generate(image, self.prompts.ask(question, lang), options)

    @_takes_old_keywords
    def question(
        self, image: Images, answer: str, lang: str = "en", options: GenerationOptions = DEFAULT_OPTIONS
    ) -> Generation:
        """Ask the question about the image that has this answer; a task of pre-trained checkpoints."""
        return self.generate(image, self.prompts.question(answer, lang), options)

    @_takes_old_keywords
    def ocr(self, image: Images, options: GenerationOptions = DEFAULT_OPTIONS) -> Generation:
        """Read the text in the image."""
        return self.generate(image, self.prompts.ocr(), options)

    def _request(self, image: Images, prompt: str | Prompt, options: GenerationOptions) -> Request:
        self._check_open()
        return self._make_request(image, prompt, options)

    def _try_request(
        self, image: Images | PaliEdgeError, prompt: str | Prompt, options: GenerationOptions
    ) -> Request | PaliEdgeError:
        if isinstance(image, PaliEdgeError):
            return image
        try:
            return self._request(image, prompt, options)
        except ClosedError:  # of the model, not of this request
            raise
        except PaliEdgeError as error:
            return error

    def _encode(self, image: ImageSource, options: GenerationOptions) -> EncodedImage:
        self._check_open()
        started = time.perf_counter()
        picture = load_image(image, bgr=options.bgr)
        pixel_values = self._preprocess(picture)
        preprocessed = time.perf_counter()
        features = self._session.encode_image(pixel_values)
        encoded = time.perf_counter()
        return EncodedImage(
            features=features,
            image_wh=picture.size,
            preprocess_ms=(preprocessed - started) * 1000,
            vision_ms=(encoded - preprocessed) * 1000,
            image=picture if options.keep_image else None,
            path=Path(image) if isinstance(image, str | os.PathLike) else None,
            content_box=self._preprocess.content_box(picture.size),
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError
