"""The decoder's graph: Gemma or Gemma 2 with a KV cache and the choice of the next token inside.

One graph serves prefill (S = prefix) and decode (S = 1), unless prefill has one of its own (`add_prefill`).
`position_ids` say how much of the cache is filled. Who stores the new rows depends on the lowering:

- "rows": the cache inputs have whatever length the caller gives them, none (or one hidden row) at
  prefill, the whole fixed capacity afterwards. The graph returns the new rows; the caller stores them.
- "in_place": the cache inputs have the fixed capacity always. TensorScatter writes the new rows at
  their places; each cache output is the whole cache and may lie where its input does.

Who sees whom, for a prefix of 4 (i image, p prompt), 2 generated tokens (g) and a capacity of 8,
written for "rows"; "in_place" has the same squares with the new columns inside the cache:

               cache (keys)       new
              i i p p g . . .      g
    prefill                      i i p p       decode    i i p p g . . .   g
        i                        x x x x           g     x x x x x . . .   x
        i                        x x x x
        p                        x x x x
        p                        x x x x

Rows of a batch may have prefixes of different lengths; what lies behind a row's prefix is padding,
which sees itself and is seen by nothing that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from paliedge.bundle.manifest import Tokens
from paliedge_export.checkpoint.config import ModelConfig, TextConfig
from paliedge_export.checkpoint.safetensors_reader import LM_HEAD
from paliedge_export.graphs.builder import GraphBuilder, layer_output
from paliedge_export.targets import Lowering
from paliedge_export.weights.files import HEAD_SCALES

_MASKED = -1e9
"""Added to a hidden score. Finite, and added once: two infinities would make NaN."""
_MASKED_16_BIT = -3e4
"""The same inside the range of float16, for an operator that adds the mask itself."""
_NEVER = -3e38


LAST_HIDDEN = "last_hidden"
"""The head's input [B, H], inside the graph."""


def add_decoder(
    graph: GraphBuilder,
    config: ModelConfig,
    tokens: Tokens,
    lowering: Lowering,
    capacity: int,
    kept_tokens: Sequence[int] | None = None,
) -> None:
    """The decoder's nodes. A head with only the rows `kept_tokens` puts out their ids all the same.

    Inputs: inputs_embeds [B, S, H] float32; position_ids [B, S] int64, 1-based, consecutive;
    prefix_length [B] int64; allowed_ids [B, 2] int64, first and last id that may win;
    past_key_values.N.key and .value [B, kv heads, P, head_dim], P being `capacity` if "in_place".
    Outputs: next_token [B] int64 after the last token of the prefix (prefill) or of S (decode);
    log_prob [B] float32, its log-probability among all tokens of the head; present.N.key and .value
    [B, kv heads, S, head_dim], the rows of the S new tokens, or the whole cache if "in_place".
    """
    text = config.text
    x = graph.input("inputs_embeds", np.float32, ("batch", "sequence", text.hidden_size))
    positions = graph.input("position_ids", np.int64, ("batch", "sequence"))
    prefix_length = graph.input("prefix_length", np.int64, ("batch",))
    allowed = graph.input("allowed_ids", np.int64, ("batch", 2))
    start = graph.op("Sub", graph.op("Slice", positions, graph.ints(0), graph.ints(1), graph.ints(1)), graph.ints(1))
    if lowering.cache_update == "rows":
        cache: _Cache = _RowCache(graph, text, start)
    else:
        cache = _InPlaceCache(graph, text, start, capacity)
    mask = cache.mask(positions, prefix_length)
    fused = lowering.operators == "fused" and not text.attn_softcap
    if fused:
        mask = graph.compute(graph.op("Max", mask, graph.constant(_MASKED_16_BIT)))
    else:
        mask = graph.op("Unsqueeze", mask, graph.ints(3))
    rotation = _rotation(graph, text, positions)
    attend = _attend_fused if fused else _attend_written_out
    fed = None
    for index in range(text.num_layers):
        x, (query, key, value) = _enter_layer(graph, text, index, x, fed, rotation)
        keys, values = cache.extend(index, "key", key), cache.extend(index, "value", value)
        attended = attend(graph, text, query, keys, values, mask)
        if index + 1 == text.num_layers:  # what follows makes one token, of the last one
            place = _last_place(graph, x, start, prefix_length)
            x, attended = _take(graph, x, place, text.hidden_size), _take(graph, attended, place, text.attention_width)
        x, fed = _leave_layer(graph, text, index, x, attended)
    assert fed
    x = graph.op("Add", x, fed, name=layer_output(_layer_name(text.num_layers - 1)))
    last = graph.op("Squeeze", _norm(graph, text, "language_model.norm", x), graph.ints(1))
    last = graph.op("Identity", last, name=LAST_HIDDEN)
    _choose_token(graph, text, last, tokens, allowed, kept_tokens)


def add_prefill(graph: GraphBuilder, config: ModelConfig) -> None:
    """The nodes that make the cache rows of one request's prefix, and nothing else: the last layer ends with them.

    Inputs: inputs_embeds [B, S, H] float32, position_ids [B, S] int64. Outputs: present.N.key and .value
    [B, kv heads, S, head_dim]. Everything sees everything.
    """
    text = config.text
    x = graph.input("inputs_embeds", np.float32, ("batch", "sequence", text.hidden_size))
    positions = graph.input("position_ids", np.int64, ("batch", "sequence"))
    rotation = _rotation(graph, text, positions)
    fed = None
    for index in range(text.num_layers):
        x, (query, key, value) = _enter_layer(graph, text, index, x, fed, rotation)
        keys, values = _put_out(graph, text, index, "key", key), _put_out(graph, text, index, "value", value)
        if index + 1 < text.num_layers:
            x, fed = _leave_layer(graph, text, index, x, _attend_written_out(graph, text, query, keys, values))


def _layer_name(index: int) -> str:
    return f"language_model.layers.{index}"


def _enter_layer(
    graph: GraphBuilder, text: TextConfig, index: int, x: str, fed: str | None, rotation: tuple[str, str]
) -> tuple[str, tuple[str, str, str]]:
    """The layer's input `x` + `fed` [B, S, H], and the query, key and value that it makes of it, see `_project`."""
    name = f"{_layer_name(index)}.input_layernorm"
    if fed:
        x, normed = _add_and_norm(graph, text, x, fed, name, layer_output(_layer_name(index - 1)))
    else:
        normed = _norm(graph, text, name, x)
    return x, _project(graph, text, f"{_layer_name(index)}.self_attn.qkv_proj", normed, rotation)


def _leave_layer(graph: GraphBuilder, text: TextConfig, index: int, x: str, attended: str) -> tuple[str, str]:
    """What a layer makes of its input `x` [B, S, H] and what its heads saw, [B, S, heads * head_dim].

    In the last layer S is 1. The output is the sum of the two [B, S, H] that this returns: the next norm adds them up.
    """
    name = _layer_name(index)
    attended = graph.linear(attended, f"{name}.self_attn.o_proj", per_token=True)
    if text.post_norms:
        attended = _norm(graph, text, f"{name}.post_attention_layernorm", attended)
    before = "pre_feedforward_layernorm" if text.post_norms else "post_attention_layernorm"
    x, normed = _add_and_norm(graph, text, x, attended, f"{name}.{before}", f"{name}.attended")
    fed = _feed_forward(graph, text, name, normed)
    if text.post_norms:
        fed = _norm(graph, text, f"{name}.post_feedforward_layernorm", fed)
    return x, fed


def _put_out(graph: GraphBuilder, text: TextConfig, index: int, part: str, new: str) -> str:
    """New rows [B, S, kv heads, head_dim] as the output that they are: [B, kv heads, S, head_dim]."""
    name, shape = f"present.{index}.{part}", ("batch", text.num_kv_heads, "sequence", text.head_dim)
    graph.output(graph.compute(_rows(graph, text, new)), name, graph.compute_type, shape)
    return name


class _Cache(Protocol):
    def mask(self, positions: str, prefix_length: str) -> str:
        """[B, 1, S, T] float32, 0 where a query sees a key, else a number that hides it."""
        ...

    def extend(self, index: int, part: str, new: str) -> str:
        """Take the rows [B, S, kv heads, head_dim] of layer `index`; returns all [B, kv heads, T, head_dim]."""
        ...


class _RowCache:
    """Keys are the cache's P places and behind them the S new rows, which are put out."""

    def __init__(self, graph: GraphBuilder, text: TextConfig, start: str) -> None:
        self._graph = graph
        self._text = text
        self._start = start
        self._past = _cache_inputs(graph, text, "capacity")

    def mask(self, positions: str, prefix_length: str) -> str:
        graph, start = self._graph, self._start
        past_place = _places(graph, self._past[0, "key"], axis=2)
        new_place = _places(graph, positions, axis=1)
        query_place = graph.op("Unsqueeze", new_place, graph.ints(1))
        causal = graph.op("LessOrEqual", new_place, query_place)
        place = graph.op("Add", start, new_place)
        in_prefix = graph.op("Less", place, graph.op("Unsqueeze", prefix_length, graph.ints(1)))
        new = graph.op("Or", causal, graph.op("Unsqueeze", in_prefix, graph.ints(1, 2)))
        filled = graph.op("Unsqueeze", graph.op("Less", past_place, start), graph.ints(1, 2))
        past = graph.op("And", filled, graph.op("GreaterOrEqual", query_place, graph.constant(0, np.int64)))
        return _mask(graph, graph.op("Concat", past, new, axis=-1))

    def extend(self, index: int, part: str, new: str) -> str:
        rows = _put_out(self._graph, self._text, index, part, new)
        return self._graph.op("Concat", self._past[index, part], rows, axis=2)


class _InPlaceCache:
    """Keys are the cache's places, the S new rows among them."""

    def __init__(self, graph: GraphBuilder, text: TextConfig, start: str, capacity: int) -> None:
        self._graph = graph
        self._text = text
        self._capacity = capacity
        self._write_index = graph.op("Squeeze", start, graph.ints(1))
        self._past = _cache_inputs(graph, text, capacity)

    def mask(self, positions: str, prefix_length: str) -> str:
        graph = self._graph
        place = graph.constant(np.arange(self._capacity), np.int64)
        query_place = graph.op("Unsqueeze", graph.op("Sub", positions, graph.ints(1)), graph.ints(1, 3))
        causal = graph.op("LessOrEqual", place, query_place)
        in_prefix = graph.op("Less", place, graph.op("Unsqueeze", prefix_length, graph.ints(1, 2, 3)))
        return _mask(graph, graph.op("Or", causal, in_prefix))

    def extend(self, index: int, part: str, new: str) -> str:
        graph, text = self._graph, self._text
        rows = graph.compute(_rows(graph, text, new))
        name = f"present.{index}.{part}"
        graph.op("TensorScatter", self._past[index, part], rows, self._write_index, name=name, axis=-2)
        shape = ("batch", text.num_kv_heads, self._capacity, text.head_dim)
        graph.output(name, name, graph.compute_type, shape)
        return name


def _cache_inputs(graph: GraphBuilder, text: TextConfig, capacity: int | str) -> dict[tuple[int, str], str]:
    shape = ("batch", text.num_kv_heads, capacity, text.head_dim)
    return {
        (index, part): graph.input(f"past_key_values.{index}.{part}", graph.compute_type, shape)
        for index in range(text.num_layers)
        for part in ("key", "value")
    }


def _places(graph: GraphBuilder, x: str, axis: int) -> str:
    """0, 1, ... along an axis of `x`."""
    size = graph.op("Squeeze", graph.op("Shape", x, start=axis, end=axis + 1), graph.ints(0))
    return graph.op("Range", graph.constant(0, np.int64), size, graph.constant(1, np.int64))


def _mask(graph: GraphBuilder, visible: str) -> str:
    return graph.op("Where", visible, graph.constant(0.0), graph.constant(_MASKED))


def _rotation(graph: GraphBuilder, text: TextConfig, positions: str) -> tuple[str, str]:
    """Cosine and sine [B, S, 1, head_dim] of the rotary position embedding, the first half of the sines negative."""
    exponents = np.arange(0, text.head_dim, 2, dtype=np.float32) / np.float32(text.head_dim)
    frequencies = (1.0 / np.float32(text.rope_theta) ** exponents).astype(np.float32)
    places = graph.op("Unsqueeze", graph.op("Cast", positions, to=1), graph.ints(2, 3))
    cosine = graph.op("Cos", graph.op("Mul", places, graph.constant(np.concatenate([frequencies, frequencies]))))
    sine = graph.op("Sin", graph.op("Mul", places, graph.constant(np.concatenate([-frequencies, frequencies]))))
    return cosine, sine


def _rotate(graph: GraphBuilder, text: TextConfig, x: str, rotation: tuple[str, str]) -> str:
    """Rotate the first half of each head against the second: x [B, S, heads, head_dim]."""
    cosine, sine = rotation
    first, second = graph.split(x, [text.head_dim // 2] * 2, axis=-1)
    swapped = graph.op("Concat", second, first, axis=-1)
    return graph.op("Add", graph.op("Mul", x, cosine), graph.op("Mul", swapped, sine))


def _project(
    graph: GraphBuilder, text: TextConfig, name: str, x: str, rotation: tuple[str, str]
) -> tuple[str, str, str]:
    """Query, key and value [B, S, heads, head_dim], the first two rotated."""
    heads, groups = text.num_heads, text.num_kv_heads
    qkv = graph.op("Reshape", graph.linear(x, name), graph.ints(0, 0, heads + 2 * groups, text.head_dim))
    query_and_key, value = graph.split(qkv, [heads + groups, groups], axis=2)
    query, key = graph.split(_rotate(graph, text, query_and_key, rotation), [heads, groups], axis=2)
    return query, key, value


def _rows(graph: GraphBuilder, text: TextConfig, x: str) -> str:
    """Keys or values as a cache holds them: [B, S, kv heads, head_dim] -> [B, kv heads, S, head_dim]."""
    if text.num_kv_heads > 1:
        return graph.op("Transpose", x, perm=[0, 2, 1, 3])
    return graph.op("Reshape", x, graph.ints(0, 1, -1, text.head_dim))  # needs no copy


def _by_group(graph: GraphBuilder, text: TextConfig, x: str) -> str:
    """Queries [B, S, heads, head_dim] -> [B, kv heads, S * heads / kv heads, head_dim]: a matrix product a group."""
    groups, dim = text.num_kv_heads, text.head_dim
    if groups > 1:
        x = graph.op("Reshape", x, graph.ints(0, 0, groups, -1, dim))
        x = graph.op("Transpose", x, perm=[0, 2, 1, 3, 4])
    return graph.op("Reshape", x, graph.ints(0, groups, -1, dim))


def _attend_fused(graph: GraphBuilder, text: TextConfig, query: str, keys: str, values: str, mask: str) -> str:
    """ONNX's operator, which every TensorRT from 10.15 on has kernels for: -> [B, S, heads * head_dim]."""
    query = graph.op("Mul", query, graph.constant(text.query_scale))
    query = graph.compute(graph.op("Transpose", query, perm=[0, 2, 1, 3]))
    attended = graph.cast(graph.op("Attention", query, keys, values, mask, scale=1.0), np.float32)
    attended = graph.op("Transpose", attended, perm=[0, 2, 1, 3])
    return graph.op("Reshape", attended, graph.ints(0, 0, text.attention_width))


def _attend_written_out(
    graph: GraphBuilder, text: TextConfig, query: str, keys: str, values: str, mask: str | None = None
) -> str:
    """Grouped-query attention in matrix products, softcap and softmax in float32; mask [B, 1, S, 1, T]."""
    groups, dim = text.num_kv_heads, text.head_dim
    shared = text.num_heads // groups
    query = graph.compute(graph.op("Mul", _by_group(graph, text, query), graph.constant(text.query_scale)))
    scores = graph.matmul(query, graph.op("Transpose", keys, perm=[0, 1, 3, 2]))
    if text.attn_softcap:
        scores = _softcap(graph, scores, text.attn_softcap)
    if mask:
        width = graph.op("Shape", mask, start=4, end=5)
        per_head = graph.op("Concat", graph.ints(0, groups, -1, shared), width, axis=0)
        scores = graph.op("Add", graph.op("Reshape", scores, per_head), mask)
    weights = graph.compute(graph.op("Softmax", scores, axis=-1))
    if mask:
        weights = graph.op("Reshape", weights, graph.op("Concat", graph.ints(0, groups, -1), width, axis=0))
    attended = graph.matmul(weights, values)
    if groups > 1:
        attended = graph.op("Reshape", attended, graph.ints(0, groups, -1, shared, dim))
        attended = graph.op("Transpose", attended, perm=[0, 2, 1, 3, 4])
    return graph.op("Reshape", attended, graph.ints(0, -1, text.attention_width))


def _feed_forward(graph: GraphBuilder, text: TextConfig, name: str, x: str) -> str:
    """Gated tanh-GELU."""
    gate = graph.linear(x, f"{name}.mlp.gate_proj")
    up = graph.linear(x, f"{name}.mlp.up_proj", beside=f"{name}.mlp.gate_proj")
    product = graph.op("Mul", graph.op("Gelu", gate, approximate="tanh"), up)
    return graph.linear(product, f"{name}.mlp.down_proj", per_token=True)


def _add_and_norm(graph: GraphBuilder, text: TextConfig, x: str, branch: str, name: str, total: str) -> tuple[str, str]:
    """x + branch, called `total`, and its norm, all [B, S, H]."""
    if graph.lowering.operators != "contrib":
        x = graph.op("Add", x, branch, name=total)
        return x, _norm(graph, text, name, x)
    inputs = x, branch, graph.weight(f"{name}.weight")
    kind, outputs = "SkipSimplifiedLayerNormalization", (f"{name}.normed", "", "", total)
    graph.ops(kind, inputs, outputs, domain="com.microsoft", epsilon=text.eps)
    return total, outputs[0]


def _norm(graph: GraphBuilder, text: TextConfig, name: str, x: str) -> str:
    """x / rms(x) * weight; the stored weight has Gemma's 1 added."""
    variance = graph.op("ReduceMean", graph.op("Pow", x, graph.constant(2.0)), graph.ints(-1))
    rms = graph.op("Sqrt", graph.op("Add", variance, graph.constant(text.eps)))
    return graph.op("Mul", graph.op("Div", x, rms), graph.weight(f"{name}.weight"))


def _softcap(graph: GraphBuilder, x: str, cap: float) -> str:
    return graph.op("Mul", graph.op("Tanh", graph.op("Div", x, graph.constant(cap))), graph.constant(cap))


def _last_place(graph: GraphBuilder, x: str, start: str, prefix_length: str) -> str:
    """Where in x [B, S, H] the last token of each row's prefix is, or of S if the prefix is cached: [B, 1, 1]."""
    length = graph.op("Shape", x, start=1, end=2)
    rest = graph.op("Sub", graph.op("Unsqueeze", prefix_length, graph.ints(1)), start)
    count = graph.op("Where", graph.op("Greater", rest, graph.ints(0)), rest, length)
    return graph.op("Unsqueeze", graph.op("Sub", count, graph.ints(1)), graph.ints(2))


def _take(graph: GraphBuilder, x: str, place: str, width: int) -> str:
    """The vectors of x [B, S, width] at `place` [B, 1, 1]: [B, 1, width]."""
    return graph.op("GatherElements", x, graph.op("Expand", place, graph.ints(1, 1, width)), axis=1)


def _choose_token(
    graph: GraphBuilder, text: TextConfig, hidden: str, tokens: Tokens, allowed: str, kept_tokens: Sequence[int] | None
) -> None:
    """Logits over the head's tokens, the best allowed one and its log-probability among all."""
    logits = graph.head(hidden, LM_HEAD, HEAD_SCALES)
    if text.final_softcap:
        logits = _softcap(graph, logits, text.final_softcap)
    logits = graph.op("Identity", logits, name="logits")
    if kept_tokens is None:
        ids = graph.op("Range", *(graph.constant(value, np.int64) for value in (0, tokens.vocab_size, 1)))
    else:
        ids = graph.ints(*kept_tokens)
    if kept_tokens is None and tokens.image < tokens.vocab_size:  # a fine-tune added tokens behind the image token
        is_image = graph.op("Equal", ids, graph.constant(tokens.image, np.int64))
        logits = graph.op("Where", is_image, graph.constant(_NEVER), logits)
    first, last = graph.split(allowed, [1, 1], axis=1)
    inside = graph.op("And", graph.op("GreaterOrEqual", ids, first), graph.op("LessOrEqual", ids, last))
    winner = graph.op("ArgMax", graph.op("Where", inside, logits, graph.constant(_NEVER)), axis=1, keepdims=1)
    score = graph.op("GatherElements", logits, winner, axis=1)
    # Written out: not every reader's ReduceLogSumExp takes the largest logit away before it exponentiates.
    largest = graph.op("ReduceMax", logits, graph.ints(1), keepdims=1)
    total = graph.op("ReduceSum", graph.op("Exp", graph.op("Sub", logits, largest)), graph.ints(1), keepdims=1)
    log_prob = graph.op("Sub", graph.op("Sub", score, largest), graph.op("Log", total))
    winner = graph.op("Squeeze", winner, graph.ints(1))
    if kept_tokens is not None:
        winner = graph.op("Gather", ids, winner)
    graph.output(winner, "next_token", np.int64, ("batch",))
    graph.output(graph.op("Squeeze", log_prob, graph.ints(1)), "log_prob", np.float32, ("batch",))
