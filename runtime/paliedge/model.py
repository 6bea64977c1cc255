"""PaliGemma as a user meets it: load a bundle, then detect, caption, ask, read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

from paliedge.answering import Answerer, EncodedImage, Piece, Request
from paliedge.backends import BackendOptions, open_session
from paliedge.bundle import Bundle
from paliedge.constraints import BoxRule, Rule, anything
from paliedge.embedding import EmbeddingTable
from paliedge.errors import UsageError
from paliedge.images import ImageSource, load_image
from paliedge.manifest import Vocabulary
from paliedge.preprocess import Preprocessor
from paliedge.prompt import BoxRequest, BoxTask, PromptTokenizer, fill, find_box_request, split_labels
from paliedge.results import Generation
from paliedge.session import Session

SHIPPED_BUNDLE = Path(__file__).parent / "shapes"
"""A small PaliGemma that knows coloured shapes and printed words."""
DEFAULT_OPTIONS = BackendOptions()
Images: TypeAlias = "ImageSource | EncodedImage | Sequence[ImageSource | EncodedImage]"
CaptionStyle = Literal["caption", "cap", "describe"]
_LOG = logging.getLogger(__name__)


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

    def close(self) -> None:
        """Give back what the engine holds; for a GPU whose memory others want. Nothing works afterwards."""
        self._answerer.close()
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
        return EncodedImage(features, picture.size, *times, picture, self._preprocess.frame(picture.size))

    def generate(
        self,
        image: Images,
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
        rule = self._rule(find_box_request(prompt), free, only_asked)
        return self._answerer.answer(self._prepare(image, prompt, rule, max_new_tokens, location_tokens, bgr))

    def stream(
        self,
        image: Images,
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
        return self._answerer.stream(self._prepare(image, prompt, rule, max_new_tokens, location_tokens, bgr))

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
        return self._find("detect", image, labels, free, only_asked, max_new_tokens, bgr)

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
        return self._find("segment", image, labels, free, only_asked, max_new_tokens, bgr)

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
        prompt = fill(getattr(self.manifest.prompts, style), lang=lang)
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
        prompt = fill(self.manifest.prompts.answer, lang=lang, question=question)
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
        prompt = fill(self.manifest.prompts.question, lang=lang, answer=answer)
        return self.generate(image, prompt, max_new_tokens=max_new_tokens, bgr=bgr)

    def ocr(self, image: Images, *, max_new_tokens: int | None = None, bgr: bool = False) -> Generation:
        """Read the text in the image."""
        return self.generate(image, self.manifest.prompts.ocr, max_new_tokens=max_new_tokens, bgr=bgr)

    def _find(
        self,
        task: BoxTask,
        image: Images,
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
        return self._answerer.answer(
            self._prepare(image, fill(template, labels=text), rule, max_new_tokens, location_tokens=True, bgr=bgr)
        )

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
        images: Images,
        prompt: str,
        rule: Rule,
        max_new_tokens: int | None,
        location_tokens: bool,
        bgr: bool,
    ) -> Request:
        """Check everything that can be wrong, then encode the images."""
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
        sources = _as_list(images)
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
        return Request(tuple(encoded), tuple(fresh), prefix, rule, limit)

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


def _as_list(images: Images) -> list[ImageSource | EncodedImage]:
    if isinstance(images, list | tuple):
        return list(images)
    return [images]  # type: ignore[list-item]  # no other sequence: a str is a path, an array a picture


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 8} more" if len(labels) > 8 else ""
    return ", ".join(labels[:8]) + more
