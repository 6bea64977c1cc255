"""The decoder's graph: Gemma or Gemma 2 with a KV cache and the choice of the next token inside.

One graph serves prefill (S = prefix) and decode (S = 1), unless prefill has one of its own (`add_prefill`).
`position_ids` say how much of the cache is filled. Who stores the new rows depends on the lowering:

- "rows": the cache inputs have whatever length the caller gives them, none (or one hidden row) at
  prefill, the whole fixed capacity afterwards. The graph returns the new rows; the caller stores them.
- "in_place": the cache inputs have the fixed capacity always. TensorScatter writes the new rows at
  their positions; each cache output is the whole cache and may lie where its input does.

Who sees whom, for a prefix of 4 (i image, p prompt), 2 generated tokens (g) and a capacity of 8.
It is drawn for "rows"; "in_place" has the same squares with the new columns inside the cache:

               cache (keys)       new
              i i p p g . . .      g
    prefill                      i i p p       decode    i i p p g . . .   g
        i                        x x x x           g     x x x x x . . .   x
        i                        x x x x
        p                        x x x x
        p                        x x x x

Rows of a batch may have prefixes of different lengths. What lies behind a row's prefix is padding: it
sees itself, and nothing that counts sees it.
"""

# Tests: tests/test_parity.py and tests/export/graphs/test_graph_traps.py.
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paliedge.bundle.manifest import Tokens
from paliedge_export.checkpoint.config import ModelConfig, TextConfig
from paliedge_export.checkpoint.safetensors_reader import LM_HEAD
from paliedge_export.graphs.attention import (
    MASKED_16_BIT,
    _softcap,
    attend_fused,
    attend_written_out,
    project,
    rotation_of,
)
from paliedge_export.graphs.builder import GraphBuilder, layer_output
from paliedge_export.graphs.kv_cache import Cache, InPlaceCache, RowCache, put_out
from paliedge_export.targets import Lowering
from paliedge_export.weights.files import HEAD_SCALES

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

    Inputs:

    - inputs_embeds [B, S, H] float32
    - position_ids [B, S] int64, 1-based, consecutive
    - prefix_length [B] int64
    - allowed_ids [B, 2] int64, first and last id that may win
    - past_key_values.N.key and .value [B, kv heads, P, head_dim], P being `capacity` if "in_place"

    Outputs:

    - next_token [B] int64, after the last token of the prefix (prefill) or of S (decode)
    - log_prob [B] float32, its log-probability among all tokens of the head
    - present.N.key and .value [B, kv heads, S, head_dim], rows of the S new tokens, or the whole cache if "in_place"
    """
    text = config.text
    x = graph.input("inputs_embeds", np.float32, ("batch", "sequence", text.hidden_size))
    positions = graph.input("position_ids", np.int64, ("batch", "sequence"))
    prefix_length = graph.input("prefix_length", np.int64, ("batch",))
    allowed = graph.input("allowed_ids", np.int64, ("batch", 2))
    start = graph.op("Sub", graph.op("Slice", positions, graph.ints(0), graph.ints(1), graph.ints(1)), graph.ints(1))
    if lowering.cache_update == "rows":
        cache: Cache = RowCache(graph, text, start)
    else:
        cache = InPlaceCache(graph, text, start, capacity)
    mask = cache.mask(positions, prefix_length)
    fused = lowering.operators == "fused" and not text.attn_softcap
    if fused:
        mask = graph.compute(graph.op("Max", mask, graph.constant(MASKED_16_BIT)))
    else:
        mask = graph.op("Unsqueeze", mask, graph.ints(3))
    rotation = rotation_of(graph, text, positions)
    attend = attend_fused if fused else attend_written_out
    fed = None
    for index in range(text.num_layers):
        x, (query, key, value) = _enter_layer(graph, text, index, x, fed, rotation)
        keys, values = cache.extend(index, "key", key), cache.extend(index, "value", value)
        attended = attend(graph, text, query, keys, values, mask)
        if index + 1 == text.num_layers:  # what follows makes one token, of the last one
            last = _last_index(graph, x, start, prefix_length)
            x, attended = _take(graph, x, last, text.hidden_size), _take(graph, attended, last, text.attention_width)
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
    rotation = rotation_of(graph, text, positions)
    fed = None
    for index in range(text.num_layers):
        x, (query, key, value) = _enter_layer(graph, text, index, x, fed, rotation)
        keys, values = put_out(graph, text, index, "key", key), put_out(graph, text, index, "value", value)
        if index + 1 < text.num_layers:
            x, fed = _leave_layer(graph, text, index, x, attend_written_out(graph, text, query, keys, values))


def _layer_name(index: int) -> str:
    return f"language_model.layers.{index}"


def _enter_layer(
    graph: GraphBuilder, text: TextConfig, index: int, x: str, fed: str | None, rotation: tuple[str, str]
) -> tuple[str, tuple[str, str, str]]:
    """The layer's input `x` + `fed` [B, S, H], and the query, key and value that it makes of it, see `project`."""
    name = f"{_layer_name(index)}.input_layernorm"
    if fed:
        x, normed = _add_and_norm(graph, text, x, fed, name, layer_output(_layer_name(index - 1)))
    else:
        normed = _norm(graph, text, name, x)
    return x, project(graph, text, f"{_layer_name(index)}.self_attn.qkv_proj", normed, rotation)


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


def _last_index(graph: GraphBuilder, x: str, start: str, prefix_length: str) -> str:
    """Where in x [B, S, H] the last token of each row's prefix is, or of S if the prefix is cached: [B, 1, 1]."""
    length = graph.op("Shape", x, start=1, end=2)
    rest = graph.op("Sub", graph.op("Unsqueeze", prefix_length, graph.ints(1)), start)
    count = graph.op("Where", graph.op("Greater", rest, graph.ints(0)), rest, length)
    return graph.op("Unsqueeze", graph.op("Sub", count, graph.ints(1)), graph.ints(2))


def _take(graph: GraphBuilder, x: str, index: str, width: int) -> str:
    """The vectors of x [B, S, width] at `index` [B, 1, 1]: [B, 1, width]."""
    return graph.op("GatherElements", x, graph.op("Expand", index, graph.ints(1, 1, width)), axis=1)


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
