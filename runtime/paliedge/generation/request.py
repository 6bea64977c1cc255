"""What is asked: pictures, a prompt and options, checked and made ready to be decoded."""

# Tests: tests/test_model.py and tests/generation/test_several_images.py.
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from paliedge.bundle.manifest import Manifest, Vocabulary
from paliedge.errors import UsageError
from paliedge.generation.constraints import BoxConstraint, TokenConstraint, allow_all
from paliedge.inputs.images import ImageSource
from paliedge.inputs.preprocess import WHOLE, ContentBox
from paliedge.inputs.prompt import Prompt, find_box_request, free_prompt
from paliedge.inputs.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class GenerationOptions:
    """How a prompt is to be answered.

    Attributes:
        max_new_tokens: where to stop at the latest; the bundle's limit unless given.
        free: let the model say whatever it likes, malformed boxes too.
        only_requested: labels may only be those of the `detect` or `segment` prompt.
        min_confidence: leave out detections below, 0 to 1.
        location_tokens: `<locNNNN>` and `<segNNN>` in the prompt are tokens, not text.
        bgr: an array's channels are in OpenCV's order.
        keep_image: the answer holds its picture, for `plot()` without an argument.
    """

    max_new_tokens: int | None = None
    free: bool = False
    only_requested: bool = False
    min_confidence: float = 0.0
    location_tokens: bool = True
    bgr: bool = False
    keep_image: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            UsageError: a confidence outside of 0 to 1, or a token limit that is no number.
        """
        if not isinstance(self.min_confidence, int | float) or not 0 <= self.min_confidence <= 1:
            raise UsageError(
                expected="a min_confidence from 0 to 1", found=repr(self.min_confidence), action="Give one of these."
            )
        if self.max_new_tokens is not None and not isinstance(self.max_new_tokens, int):
            raise UsageError(
                expected="max_new_tokens as a whole number",
                found=repr(self.max_new_tokens),
                action="Give one, or None.",
            )


DEFAULT_OPTIONS = GenerationOptions()


@dataclass(frozen=True)
class EncodedImage:
    """What the vision encoder made of an image; good for any number of prompts.

    Attributes:
        features: [N, H] float32, an array or where the engine that made them keeps them.
        image_wh: width and height of the image in pixels.
        preprocess_ms: decoding, resizing and normalising.
        vision_ms: the vision encoder.
        image: the picture, upright and RGB, if it was to be kept.
        path: the file that it was read from, if it was one.
        content_box: where it lies in the model's square, see `paliedge.results.locations`.
    """

    features: Any = field(repr=False)
    image_wh: tuple[int, int]
    preprocess_ms: float
    vision_ms: float
    image: Image.Image | None = field(default=None, repr=False, compare=False)
    path: Path | None = None
    content_box: ContentBox = WHOLE


class ImageSet:
    """Several pictures that one prompt is about, such as the frames of a video, in the order that the model sees them.

    For bundles that were exported with --max-images. Boxes refer to the first.
    """

    def __init__(self, *images: ImageSource | EncodedImage) -> None:
        self.images = images

    def __repr__(self) -> str:
        return f"ImageSet of {len(self.images)} pictures"


Images: TypeAlias = "ImageSource | EncodedImage | ImageSet"
Encode: TypeAlias = "Callable[[ImageSource, GenerationOptions], EncodedImage]"


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be answered.

    Attributes:
        images: in the order that the model sees them; boxes refer to the first.
        fresh: those that were encoded for this request, whose times are its own.
        prompt_ids: the prompt's ids.
        constraint: what may be said, from token to token.
        requested_label: the only label that boxes are asked for; empty if there is none or more.
        options: as the user gave them.
        max_new_tokens: where to stop at the latest.
        tokenize_ms: what making the ids took.
    """

    images: tuple[EncodedImage, ...]
    fresh: tuple[EncodedImage, ...]
    prompt_ids: list[int]
    constraint: TokenConstraint
    requested_label: str
    options: GenerationOptions
    max_new_tokens: int
    tokenize_ms: float


class RequestMaker:
    """Makes requests for one bundle.

    Args:
        manifest: the bundle's.
        tokenizer: the bundle's.
        encode: runs the vision encoder.
    """

    def __init__(self, manifest: Manifest, tokenizer: PromptTokenizer, encode: Encode) -> None:
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._encode = encode

    def __call__(self, images: Images, prompt: str | Prompt, options: GenerationOptions) -> Request:
        """Check everything that can be wrong, then encode the images.

        Raises:
            ImageError: an image cannot be read.
            UsageError: the prompt or an option is over the bundle's limit, or the bundle cannot answer the prompt.
        """
        if not isinstance(options, GenerationOptions):
            raise UsageError(
                expected="options as `GenerationOptions`",
                found=type(options).__name__,
                action="Give `options=GenerationOptions(...)`.",
            )
        sources = _sources_of(images)
        prompt = prompt if isinstance(prompt, Prompt) else free_prompt(prompt)
        limit = self._limit_of(options)
        constraint = self._constraint_of(prompt, options)
        if self._manifest.vocabulary:
            _check_vocabulary(prompt.text, self._manifest.vocabulary)
        started = time.perf_counter()
        prompt_ids = self._tokenizer.encode_prefix(prompt.text, location_tokens=options.location_tokens)
        tokenize_ms = (time.perf_counter() - started) * 1000
        self._check_room(len(sources), len(prompt_ids))
        for source in sources:
            if isinstance(source, EncodedImage):
                self._check_features(source)
        encoded = [source if isinstance(source, EncodedImage) else self._encode(source, options) for source in sources]
        fresh = [one for one, source in zip(encoded, sources, strict=True) if one is not source]
        labels = prompt.boxes.labels if prompt.boxes else []
        requested_label = labels[0] if len(labels) == 1 else ""
        return Request(
            tuple(encoded), tuple(fresh), prompt_ids, constraint, requested_label, options, limit, tokenize_ms
        )

    def _limit_of(self, options: GenerationOptions) -> int:
        most = self._manifest.limits.new_tokens
        limit = most if options.max_new_tokens is None else options.max_new_tokens
        if not 1 <= limit <= most:
            raise UsageError(
                expected=f"max_new_tokens from 1 to {most}",
                found=f"{limit}",
                action="For longer answers export the checkpoint again with --max-new-tokens.",
            )
        return limit

    def _constraint_of(self, prompt: Prompt, options: GenerationOptions) -> TokenConstraint:
        tokens, boxes = self._manifest.tokens, prompt.boxes
        if options.only_requested and (options.free or not boxes):
            raise UsageError(
                expected="a `detect` or `segment` prompt, not free, to restrict the labels of",
                found="a free answer" if options.free else "another prompt",
                action="Leave out one of the two.",
            )
        if options.free or not boxes:
            return allow_all(tokens)
        if not options.only_requested:
            return BoxConstraint(tokens, masks=boxes.task == "segment")
        labels, separators = zip(*map(self._tokenizer.encode_label, boxes.labels), strict=True)
        return BoxConstraint(tokens, masks=boxes.task == "segment", labels=labels, separator=separators[0])

    def _check_room(self, num_images: int, num_prompt_tokens: int) -> None:
        limit = self._manifest.limits.prefix
        room = limit - num_images * self._manifest.model.vision.num_image_tokens
        if not num_images or room < 1:
            raise UsageError(
                expected=f"at least one image, and no more than {limit} tokens have room for",
                found=f"{num_images} images",
                action="Give fewer, or export the checkpoint again with --max-images.",
            )
        if num_prompt_tokens > room:
            raise UsageError(
                expected=f"a prompt of at most {room} tokens",
                found=f"{num_prompt_tokens} tokens",
                action="Shorten it, or export the checkpoint again with --max-prompt-tokens.",
            )

    def _check_features(self, image: EncodedImage) -> None:
        shape = (self._manifest.model.vision.num_image_tokens, self._manifest.model.text.hidden_size)
        if image.features.shape != shape:
            raise UsageError(
                expected=f"image features of shape {list(shape)}",
                found=f"an image that another model encoded, {list(image.features.shape)}",
                action="Encode the image with the model that answers.",
            )


def _sources_of(images: Images) -> tuple[ImageSource | EncodedImage, ...]:
    if isinstance(images, ImageSet):
        return images.images
    if isinstance(images, list | tuple):
        raise UsageError(
            expected="one picture",
            found=f"a {type(images).__name__} of {len(images)}",
            action="For one prompt about all of them give `ImageSet(*pictures)`; for an answer to each use "
            "`generate_batch`.",
        )
    return (images,)


def _check_vocabulary(prompt: str, vocabulary: Vocabulary) -> None:
    """Refuse what a reduced head cannot say: other tasks, other labels."""
    boxes = find_box_request(prompt)
    unknown = [label for label in (boxes.labels if boxes else [prompt]) if label not in vocabulary.labels]
    if unknown:
        more = f" and {len(vocabulary.labels) - 8} more" if len(vocabulary.labels) > 8 else ""
        raise UsageError(
            expected=f"`detect` or `segment` with labels that this bundle's reduced output head kept: "
            f"{', '.join(vocabulary.labels[:8])}{more}",
            found=f"'{unknown[0]}'",
            action="Ask for one of them (`paliedge info` lists all), or export without --head-vocab.",
        )
