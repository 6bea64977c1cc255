"""Parameters, operations and the roofline: how long a stage must take at the least.

By arithmetic from a manifest; knows nothing of what fits where. Parameters are counted by the bytes of
weight files, norms, biases and padding included, which errs upwards; operations by the dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

from paliedge.devices import Device
from paliedge.errors import BundleError
from paliedge.manifest import ITEMSIZE, Manifest, Model, Precision, Text

_ITEMSIZE: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
_CACHE_ITEMSIZE = 2
_CHANNELS = 3


@dataclass(frozen=True)
class Scheme:
    """A precision in bytes a parameter; `int8_compute` says whether products run at the INT8 rate."""

    name: str
    vision: float
    layers: float
    head: float
    int8_compute: bool


SCHEMES = (
    Scheme("fp16", 2, 2, 2, int8_compute=False),
    Scheme("int8", 1, 1, 1, int8_compute=True),
    Scheme("int4", 2, 4 / 8 + 2 / 128, 1, int8_compute=False),
)
"""fp16 (bf16 is as large and as fast), int8 weights and activations, and int4: 4-bit decoder weights with a
16-bit scale for every 128, INT8 head, FP16 vision encoder, products at the FP16 rate. The cache has 16 bits."""


@dataclass(frozen=True)
class Parameters:
    """Parameters of the vision encoder (projector included), of the decoder's layers and of its head.

    `tied` says that the head is the embedding table's file: on disk the two are one.
    """

    vision: int
    layers: int
    head: int
    tied: bool


@dataclass(frozen=True)
class Times:
    """Milliseconds of each stage, of one decode step, and of the whole answer."""

    vision: float
    prefill: float
    token: float
    answer: float


@dataclass(frozen=True)
class Request:
    """Tokens: image and prompt together, and those of the answer."""

    prefix: int
    new_tokens: int


def count_parameters(manifest: Manifest) -> Parameters:
    """Parameters by the sizes of the weight files; every target holds the same model.

    Raises:
        BundleError: no target, or a decoder smaller than its head.
    """
    table = manifest.embedding
    head = table.rows * manifest.model.text.hidden_size
    for target in manifest.targets.values():
        decoder = sum(_file_parameters(manifest, name, target.precision) for name in target.decoder.weights)
        vision = sum(_file_parameters(manifest, name, target.precision) for name in target.vision_encoder.weights)
        if decoder > head:
            return Parameters(vision, decoder - head, head, tied=table.file in target.decoder.weights)
    raise BundleError(
        expected=f"graphs with a head of {head} parameters in the decoder's weight files",
        found="none, or files that are smaller",
        action="Export the checkpoint again.",
    )


def _file_parameters(manifest: Manifest, name: str, precision: Precision) -> int:
    table = manifest.embedding
    itemsize = ITEMSIZE[table.dtype] if name == table.file else _ITEMSIZE[precision]
    return manifest.files[name].size // itemsize


def vision_flops(model: Model) -> int:
    """Operations of the vision encoder and the projector on one image, two a multiply-add.

    Matrix products alone: norms, biases and positions are not counted. The attention of N tokens of
    width H takes 4 N^2 H a layer.
    """
    vision = model.vision
    tokens, width = vision.num_image_tokens, vision.hidden_size
    patches = _CHANNELS * vision.patch_size**2 * width
    layer = 4 * width**2 + 2 * width * vision.intermediate_size
    products = patches + vision.num_layers * layer + width * model.text.hidden_size
    return 2 * tokens * products + 4 * vision.num_layers * tokens**2 * width


def decoder_flops(manifest: Manifest, tokens: int, length: int) -> int:
    """Operations of `tokens` new tokens, each of which sees `length` tokens; the head at the last one only."""
    text = manifest.model.text
    attended = text.num_heads * text.head_dim
    layer = text.hidden_size * (2 * attended + 2 * text.num_kv_heads * text.head_dim + 3 * text.intermediate_size)
    head = manifest.embedding.rows * text.hidden_size
    attention = 4 * text.num_layers * tokens * length * attended
    return 2 * (tokens * text.num_layers * layer + head) + attention


def cache_bytes_per_token(text: Text) -> int:
    """Bytes of one token's keys and values in all layers, in 16 bits."""
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * _CACHE_ITEMSIZE


def estimate_times(
    manifest: Manifest,
    parameters: Parameters,
    scheme: Scheme,
    device: Device,
    request: Request,
    *,
    sustained: bool,
) -> Times:
    """The roofline: a stage takes as long as its operations or its bytes, whichever is longer.

    Prefill gives the first token, so it reads the head too. Each further token is a step that reads all
    of the decoder and the filled part of the cache, taken half-way through the answer. Attention counts
    at the rate of the other products, although its operands have 16 bits in every scheme.

    Args:
        manifest, parameters: the model.
        scheme: its precision.
        device: where it runs.
        request: how many tokens.
        sustained: at the rates that the device reaches in practice, not at those of its data sheet.
    """
    compute = device.int8_ops if scheme.int8_compute else device.fp16_flops
    bandwidth = device.bandwidth
    if sustained:
        compute, bandwidth = compute * device.sustained_compute, bandwidth * device.sustained_bandwidth

    def stage_ms(flops: float, num_bytes: float) -> float:
        return 1000 * max(flops / compute, num_bytes / bandwidth)

    prefix, length = request.prefix, request.prefix + request.new_tokens // 2
    decoder_bytes = parameters.layers * scheme.layers + parameters.head * scheme.head
    cache_bytes = cache_bytes_per_token(manifest.model.text) * length
    vision = stage_ms(vision_flops(manifest.model), parameters.vision * scheme.vision)
    prefill = stage_ms(decoder_flops(manifest, prefix, prefix), decoder_bytes)
    token = stage_ms(decoder_flops(manifest, 1, length), decoder_bytes + cache_bytes)
    return Times(vision, prefill, token, vision + prefill + (request.new_tokens - 1) * token)
