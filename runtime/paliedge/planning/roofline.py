"""Parameters, operations and the roofline: how long a stage must take at the least.

By arithmetic from a manifest's dimensions; knows nothing of what fits where, and looks at no file.
"""

from __future__ import annotations

from dataclasses import dataclass

from paliedge.bundle.manifest import Manifest, Model, Precision, Text
from paliedge.planning.devices import Device

_CACHE_ITEMSIZE = 2
_CHANNELS = 3


@dataclass(frozen=True)
class Scheme:
    """A precision in bytes a parameter, and whose products run at the INT8 rate.

    All of a stage counts at the width of its linear layers. Parts of an int8 or int4 bundle stay wider: norms,
    biases, positions, patch embedding, projector, the scales of 8-bit weights. They add less than 1 % to a 3B
    model. Layers that an export kept in 16 bits because it was told to are not counted.

    Attributes:
        name: of the precision.
        vision, layers, head: bytes a parameter of the vision encoder, of the decoder's layers, of head and table.
        int8_vision, int8_decoder: whether that graph's linear layers multiply integers.
    """

    name: str
    vision: float
    layers: float
    head: float
    int8_vision: bool
    int8_decoder: bool


_FP32 = Scheme("fp32", 4, 4, 4, int8_vision=False, int8_decoder=False)
SCHEMES = (
    Scheme("fp16", 2, 2, 2, int8_vision=False, int8_decoder=False),
    Scheme("int8", 1, 1, 1, int8_vision=True, int8_decoder=True),
    Scheme("int4", 1, 4 / 8 + 2 / 128, 1, int8_vision=True, int8_decoder=False),
)
"""For a device, widest first: fp16 (bf16 is as large and as fast), int8 weights and activations, and int4: 4-bit
decoder weights with a 16-bit scale for every 128 and products at the FP16 rate, INT8 head, and an INT8 vision
encoder. The cache has 16 bits in all of them."""


@dataclass(frozen=True)
class Parameters:
    """Parameters of the vision encoder (projector included), of the decoder's layers and of its head.

    `tied` says that a head is the embedding table's file: on disk the two are one.
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
class Workload:
    """Tokens: image and prompt together, and those of the answer."""

    prefix: int
    new_tokens: int


def scheme_for(precision: Precision) -> Scheme:
    """The scheme of a bundle's own precision."""
    name = "fp16" if precision == "bf16" else precision
    return next(scheme for scheme in (_FP32, *SCHEMES) if scheme.name == name)


def count_parameters(manifest: Manifest) -> Parameters:
    """Parameters by the model's dimensions, norms, biases and positions included; scales are none."""
    return Parameters(
        vision=_vision_parameters(manifest.model),
        layers=_decoder_parameters(manifest.model),
        head=_head_rows(manifest) * manifest.model.text.hidden_size,
        tied=any(manifest.embedding.file in target.decoder.weights for target in manifest.targets.values()),
    )


def _vision_parameters(model: Model) -> int:
    """Patch embedding, positions, layers, last norm and projector, all but the positions with biases."""
    vision, text = model.vision, model.text
    width, inner = vision.hidden_size, vision.intermediate_size
    patches = _CHANNELS * vision.patch_size**2 * width + width
    positions = vision.num_image_tokens * width
    attention = 4 * (width**2 + width)
    mlp = 2 * width * inner + inner + width
    norm = 2 * width
    projector = width * text.hidden_size + text.hidden_size
    return patches + positions + vision.num_layers * (attention + mlp + 2 * norm) + norm + projector


def _decoder_parameters(model: Model) -> int:
    """Layers and last norm, without biases. PaliGemma 2 has norms behind attention and MLP as well as before."""
    text = model.text
    norms = 4 if model.family == "paligemma2" else 2
    return text.num_layers * (_layer_products(text) + norms * text.hidden_size) + text.hidden_size


def _layer_products(text: Text) -> int:
    """Weights of a decoder layer's matrices: query, key, value, output, gate, up and down."""
    projected = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    return text.hidden_size * projected + _behind_attention(text)


def _behind_attention(text: Text) -> int:
    """Those of a layer's weights that multiply what its heads saw: output, gate, up and down."""
    return text.hidden_size * (text.num_heads * text.head_dim + 3 * text.intermediate_size)


def _head_rows(manifest: Manifest) -> int:
    """Tokens that the head can say: all that have a row in the embedding table, or a reduced head's."""
    return manifest.vocabulary.num_tokens if manifest.vocabulary else manifest.embedding.rows


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
    """Operations of `tokens` new tokens, each of which sees `length` tokens.

    What is behind the last layer's attention, and the head, is done for the last token only.
    """
    text = manifest.model.text
    head = _head_rows(manifest) * text.hidden_size
    products = tokens * text.num_layers * _layer_products(text) - max(tokens - 1, 0) * _behind_attention(text)
    return 2 * (products + head) + text.num_layers * _attention_flops(text, tokens, length)


def prefill_flops(manifest: Manifest, tokens: int) -> int:
    """Operations that a prefill with a graph of its own needs: of the last attention, the last token's."""
    text = manifest.model.text
    return decoder_flops(manifest, tokens, tokens) - _attention_flops(text, tokens - 1, tokens)


def _attention_flops(text: Text, tokens: int, length: int) -> int:
    return 4 * tokens * length * text.num_heads * text.head_dim


def cache_bytes_per_token(text: Text) -> int:
    """Bytes of one token's keys and values in all layers, in 16 bits."""
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * _CACHE_ITEMSIZE


def estimate_times(
    manifest: Manifest,
    parameters: Parameters,
    scheme: Scheme,
    device: Device,
    request: Workload,
    *,
    sustained: bool,
) -> Times:
    """The roofline: a stage takes as long as its operations or its bytes, whichever is longer.

    Prefill gives the first token, so it reads the head too. Each further token is a step that reads all
    of the decoder and the filled part of the cache, taken half-way through the answer. Attention and head count
    at the rate of their graph's other products, although they multiply 16 bits in every scheme.

    Args:
        manifest, parameters: the model.
        scheme: its precision.
        device: where it runs.
        request: how many tokens.
        sustained: at the rates that the device reaches in practice, not at those of its data sheet.
    """
    compute_share, bandwidth_share = 1.0, 1.0
    if sustained:
        compute_share, bandwidth_share = device.sustained_compute, device.sustained_bandwidth

    def stage_ms(flops: float, num_bytes: float, *, int8: bool) -> float:
        compute = compute_share * (device.int8_ops if int8 else device.fp16_flops)
        return 1000 * max(flops / compute, num_bytes / (bandwidth_share * device.bandwidth))

    prefix, length = request.prefix, request.prefix + request.new_tokens // 2
    decoder_bytes = parameters.layers * scheme.layers + parameters.head * scheme.head
    cache_bytes = cache_bytes_per_token(manifest.model.text) * length
    vision = stage_ms(vision_flops(manifest.model), parameters.vision * scheme.vision, int8=scheme.int8_vision)
    prefill = stage_ms(decoder_flops(manifest, prefix, prefix), decoder_bytes, int8=scheme.int8_decoder)
    token = stage_ms(decoder_flops(manifest, 1, length), decoder_bytes + cache_bytes, int8=scheme.int8_decoder)
    return Times(vision, prefill, token, vision + prefill + (request.new_tokens - 1) * token)
