"""What `bundle.json` holds. These types are its documentation; anything else in it is refused."""

# Tests: tests/bundle/test_bundle.py.
from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec

FORMAT_VERSION: Literal[2] = 2
"""What is written. Format 1, of paliedge 0.1, lacks the optional sections and is read as it is."""
MANIFEST = "bundle.json"

Count = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
FileName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")]
Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Flavour = Literal["tensorrt", "rtx"]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}
"""Bytes of a tensor's element."""
CODES_PER_MASK = 16
"""Segmentation tokens of a mask: a grid of 4 x 4, row by row."""
MASK_SIZE = 64
"""Rows and columns of a decoded mask."""
Dimension = Count | Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class File(_Strict, frozen=True):
    """Size in bytes and digest of one file of the bundle."""

    size: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Sha256


class Producer(_Strict, frozen=True):
    """Who wrote the bundle, from which checkpoint."""

    paliedge: str
    onnx: str
    checkpoint: str


class Vision(_Strict, frozen=True):
    """Dimensions of the vision encoder; `image_size` in pixels, square."""

    image_size: Count
    patch_size: Count
    num_layers: Count
    hidden_size: Count
    intermediate_size: Count
    num_image_tokens: Count


class Text(_Strict, frozen=True):
    """Dimensions of the decoder."""

    num_layers: Count
    hidden_size: Count
    intermediate_size: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count


class Model(_Strict, frozen=True):
    """Dimensions of the model; `family` is `paligemma` or `paligemma2`."""

    family: Literal["paligemma", "paligemma2"]
    vision: Vision
    text: Text


class Preprocess(_Strict, frozen=True):
    """Resize to the square by `resample`, then (value * rescale_factor - mean) / std, channels first.

    With `letterbox` the picture keeps its proportions, in the middle of a square of that colour (red, green,
    blue). Without it the picture is squashed, as PaliGemma itself was trained.
    """

    resample: Resample
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    letterbox: tuple[Byte, Byte, Byte] | None = None
    rescale_factor: float = 1 / 255


class Tokens(_Strict, frozen=True):
    """Token ids. Ids from `vocab_size` on are no tokens and are never generated.

    Each of `ends` ends an answer; `eos`, which is one of them, is what a constraint lets an answer end with. An end
    that is text, in `spoken_ends`, belongs to the answer; others do not.
    """

    bos: TokenId
    eos: TokenId
    pad: TokenId
    image: TokenId
    newline: TokenId
    first_location: TokenId
    num_locations: Count
    first_segmentation: TokenId
    num_segmentations: Count
    vocab_size: Count
    ends: tuple[TokenId, ...] = ()
    spoken_ends: tuple[TokenId, ...] = ()

    @property
    def end_ids(self) -> frozenset[int]:
        """Every id that ends an answer."""
        return frozenset(self.ends or (self.eos,))


class Prompts(_Strict, frozen=True):
    """This checkpoint's prompt templates; `{labels}`, `{lang}`, `{question}` and `{answer}` are filled in.

    `cap`, `caption` and `describe` are captions, the raw, the short and the long one; `question` asks for a
    question that has the answer.
    """

    detect: str = "detect {labels}"
    segment: str = "segment {labels}"
    cap: str = "cap {lang}"
    caption: str = "caption {lang}"
    describe: str = "describe {lang}"
    answer: str = "answer {lang} {question}"
    question: str = "question {lang} {answer}"
    ocr: str = "ocr"


class Limits(_Strict, frozen=True):
    """`prefix`: image and prompt tokens of a request; `new_tokens`: generated ones."""

    prefix: Count
    new_tokens: Count

    @property
    def capacity(self) -> int:
        """Rows of a KV cache."""
        return self.prefix + self.new_tokens


class Embedding(_Strict, frozen=True):
    """The embedding table [rows, hidden], kept on the host; a row times `scale` is an input embedding.

    Integers are multiples of their row's number in `row_scales`, float32 [rows]; uint8 has its zero at 128.
    """

    file: FileName
    dtype: Literal["float32", "float16", "int8", "uint8"]
    rows: Count
    scale: float
    row_scales: FileName | None = None


class Vocabulary(_Strict, frozen=True):
    """What a reduced head can say: boxes, segments and `labels`; `num_tokens` is its number of rows.

    The graph puts out ids of the whole vocabulary; its log-probabilities are among these tokens alone.
    """

    labels: tuple[str, ...]
    num_tokens: Count


class Tensor(_Strict, frozen=True):
    """A graph's input or output; unknown sizes are names."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


class Graph(_Strict, frozen=True):
    """One ONNX graph of one target, with the files that hold its weights."""

    file: FileName
    weights: tuple[FileName, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Target(_Strict, frozen=True):
    """The lowering for one kind of runtime. Cache tensors are [batch, kv heads, capacity, head_dim].

    `cache_update` says who stores the new rows. With "rows" the graph returns them and the runtime copies
    them into the cache. With "in_place" the graph writes them at `write_index`, and each cache output lies
    where its input does. Without a `mask_decoder` segmentation tokens stay codes. The rows of a batch are
    not independent where the graph measures a scale over all tokens at hand.

    `prefill`, where there is one, gives the cache rows of a prefix faster than `decoder` and chooses no token:
    `decoder` is then run on the prefix's last token, whose rows it gives again.
    """

    precision: Precision
    cache_update: Literal["rows", "in_place"]
    vision_encoder: Graph
    decoder: Graph
    mask_decoder: Graph | None
    prefill: Graph | None
    independent_rows: bool

    @property
    def weights(self) -> set[str]:
        """The files that hold the weights of its vision encoder, its decoder and its prefill."""
        graphs = filter(None, (self.vision_encoder, self.decoder, self.prefill))
        return {name for graph in graphs for name in graph.weights}


class Range(_Strict, frozen=True):
    """The shapes of one input that an engine's optimization profile covers."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class Plan(_Strict, frozen=True):
    """A serialised engine with its optimization profiles, each an input's name to its shapes."""

    file: FileName
    profiles: tuple[dict[str, Range], ...]


class Engine(_Strict, frozen=True):
    """Plans built from one target's graphs, good only for what they were built for.

    `compute_capability` such as "8.7"; "any" where the flavour compiles on the device.
    `gpu` is the name of the device that built them, for messages.
    """

    target: str
    flavour: Flavour
    version: str
    compute_capability: str
    gpu: str
    precision: Precision
    vision_encoder: Plan
    decoder: Plan
    mask_decoder: Plan | None
    timing_cache: FileName | None

    @property
    def files(self) -> list[str]:
        """Names of all its files."""
        plans = filter(None, [self.vision_encoder, self.decoder, self.mask_decoder])
        return [*(plan.file for plan in plans), *filter(None, [self.timing_cache])]


class Cosine(_Strict, frozen=True):
    """Cosines of vectors and their reference's: the smallest and the mean."""

    min: float
    mean: float


class Comparison(_Strict, frozen=True):
    """What the export's last step measured against `reference`, whose tokens were fed in.

    Attributes:
        num_images, num_answers: how many were compared.
        image_features_error: largest difference, relative to the largest feature.
        log_prob_error: largest difference of a reference token's log-probability, in nats.
        image_features: cosine of each image token's features.
        last_hidden: cosine of the decoder's last-position states after the final norm, one a step.
        num_not_finite: activations that were infinite or no number.
        token_match: share of equal tokens.
        sure_token_match: the same among tokens to which the reference gave a probability of 0.5 or
            more; None where there were none.
        first_difference: index of the first token that differs in any answer; None if all are equal.
        box_iou: mean IoU of the reference's boxes and those at the same position; None without boxes.
    """

    reference: str
    num_images: int
    num_answers: int
    image_features_error: float
    log_prob_error: float
    image_features: Cosine
    last_hidden: Cosine
    num_not_finite: int
    token_match: float
    sure_token_match: float | None
    first_difference: int | None
    box_iou: float | None

    def describe(self) -> str:
        """One line."""
        boxes = "" if self.box_iou is None else f", boxes overlap by {self.box_iou:.1%}"
        return (
            f"cosine of features {self.image_features.mean:.5f} (least {self.image_features.min:.4f}), of last states "
            f"{self.last_hidden.mean:.5f} ({self.last_hidden.min:.4f}), {self.token_match:.1%} of tokens equal{boxes} "
            f"({self.num_answers} answers on {self.num_images} images, with {self.reference})"
        )


class Reference(_Strict, frozen=True):
    """Who else read the checkpoint, by means of its own, and what came out.

    Attributes:
        name: such as "transformers 5.24.0"; empty where nobody did.
        compared: what was held against it, in a line.
        not_compared: why nothing was, or not all; empty where all was.
    """

    name: str = ""
    compared: str = ""
    not_compared: str = ""


class Manifest(_Strict, frozen=True):
    """The content of `bundle.json`; `sha256` is of the same JSON, compact, with this field empty.

    Each target has an entry in `comparisons` or, with the reason, in `not_compared`. `calibration` holds
    the statistics that a quantised bundle was made with, `precision_report` the comparisons in detail.

    Sections from `reference` on came with format 2 and are optional: who the export was held against, the layer
    lists of engines, a signature of this file, and adapters, each a name and its file.
    """

    format_version: Literal[1, 2]
    producer: Producer
    model: Model
    preprocess: Preprocess
    tokens: Tokens
    prompts: Prompts
    limits: Limits
    embedding: Embedding
    targets: dict[str, Target]
    engines: tuple[Engine, ...]
    tokenizer: FileName
    golden: FileName | None
    comparisons: dict[str, Comparison]
    not_compared: dict[str, str]
    vocabulary: Vocabulary | None
    calibration: FileName | None
    precision_report: FileName | None
    files: dict[FileName, File]
    reference: Reference | None = None
    layer_lists: dict[str, FileName] = {}
    signature: FileName | None = None
    adapters: dict[str, FileName] = {}
    sha256: Sha256 | Literal[""] = ""


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write `bundle.json`, the last file of a bundle, in one step; returns it with its digest."""
    manifest = msgspec.structs.replace(manifest, sha256=manifest_digest(manifest))
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    partial = folder / f".{MANIFEST}.new"
    with partial.open("wb") as stream:
        stream.write(content + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(folder / MANIFEST)
    return manifest


def manifest_digest(manifest: Manifest) -> str:
    """sha256 of the manifest, compact and with an empty `sha256`."""
    return content_digest(msgspec.json.encode(manifest))


def content_digest(content: bytes) -> str:
    """The digest that `bundle.json` of this content should have, of whatever format it is."""
    return hashlib.sha256(msgspec.json.encode(msgspec.json.decode(content) | {"sha256": ""})).hexdigest()
