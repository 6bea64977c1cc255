"""The decoder's graph: Gemma or Gemma 2 with a KV cache and the choice of the next token inside.

One graph serves prefill (S = prefix) and decode (S = 1). The cache tensors it reads have whatever
length the caller gives them: none at prefill, the whole fixed capacity afterwards, of which
`position_ids` say how much is filled. It returns the new rows only; the caller stores them.

Who sees whom, for a prefix of 4 (i image, p prompt), 2 generated tokens (g) and a capacity of 8:

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

import numpy as np

from paliedge.manifest import Tokens
from paliedge_export.checkpoint import Checkpoint
from paliedge_export.config import ModelConfig, TextConfig
from paliedge_export.graph import GraphBuilder

_MASKED = -1e9
"""Added to a hidden score. Finite, and added once: two infinities would make NaN."""
_NEVER = -3e38


def add_decoder(graph: GraphBuilder, checkpoint: Checkpoint, config: ModelConfig, tokens: Tokens, head: str) -> None:
    """The decoder's nodes.

    Inputs: inputs_embeds [B, S, H] float32; position_ids [B, S] int64, 1-based, consecutive;
    prefix_length [B] int64; allowed_ids [B, 2] int64, first and last id that may win;
    past_key_values.N.key and .value [B, kv heads, P, head_dim].
    Outputs: next_token [B] int64 after the last token of the prefix (prefill) or of S (decode);
    log_prob [B] float32, its log-probability among all tokens;
    present.N.key and .value [B, kv heads, S, head_dim], the rows of the S new tokens.

    `head` names the output matrix [vocab_size, H].
    """
    text = config.text
    x = graph.input("inputs_embeds", np.float32, ("batch", "sequence", text.hidden_size))
    positions = graph.input("position_ids", np.int64, ("batch", "sequence"))
    prefix_length = graph.input("prefix_length", np.int64, ("batch",))
    allowed = graph.input("allowed_ids", np.int64, ("batch", 2))
    past = [_cache_inputs(graph, text, index) for index in range(text.num_layers)]

    start = graph.op("Sub", graph.op("Slice", positions, graph.ints(0), graph.ints(1), graph.ints(1)), graph.ints(1))
    mask = _attention_mask(graph, start, prefix_length, x, past[0][0])
    rotation = _rotation(graph, text, positions)
    for index in range(text.num_layers):
        name = f"language_model.layers.{index}"
        normed = _norm(graph, checkpoint, text, f"{name}.input_layernorm", x)
        attended = _attend(graph, checkpoint, text, index, normed, mask, rotation, past[index])
        if text.post_norms:
            attended = _norm(graph, checkpoint, text, f"{name}.post_attention_layernorm", attended)
        x = graph.op("Add", x, attended)
        before = "pre_feedforward_layernorm" if text.post_norms else "post_attention_layernorm"
        fed = _feed_forward(graph, checkpoint, name, _norm(graph, checkpoint, text, f"{name}.{before}", x))
        if text.post_norms:
            fed = _norm(graph, checkpoint, text, f"{name}.post_feedforward_layernorm", fed)
        x = graph.op("Add", x, fed)
    last = _last_hidden(graph, x, start, prefix_length)
    last = _norm(graph, checkpoint, text, "language_model.norm", last)
    _choose_token(graph, text, last, head, tokens, allowed)


def _cache_inputs(graph: GraphBuilder, text: TextConfig, index: int) -> tuple[str, str]:
    shape = ("batch", text.num_kv_heads, "capacity", text.head_dim)
    key, value = (
        graph.input(f"past_key_values.{index}.{part}", graph.compute_type, shape) for part in ("key", "value")
    )
    return key, value


def _attention_mask(graph: GraphBuilder, start: str, prefix_length: str, x: str, past_key: str) -> str:
    """[B, 1, S, P + S] float32, 0 where a query sees a key; `start` [B, 1] counts the tokens in the cache."""
    num_past = graph.op("Squeeze", graph.op("Shape", past_key, start=2, end=3))
    num_new = graph.op("Squeeze", graph.op("Shape", x, start=1, end=2))
    zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
    past_place = graph.op("Range", zero, num_past, one)
    new_place = graph.op("Range", zero, num_new, one)
    query_place = graph.op("Unsqueeze", new_place, graph.ints(1))
    causal = graph.op("LessOrEqual", new_place, query_place)
    in_prefix = graph.op("Less", graph.op("Add", start, new_place), graph.op("Unsqueeze", prefix_length, graph.ints(1)))
    in_prefix = graph.op("Unsqueeze", in_prefix, graph.ints(1, 2))
    new = graph.op("Or", causal, in_prefix)
    filled = graph.op("Unsqueeze", graph.op("Less", past_place, start), graph.ints(1, 2))
    past = graph.op("And", filled, graph.op("GreaterOrEqual", query_place, zero))
    visible = graph.op("Concat", past, new, axis=-1)
    return graph.op("Where", visible, graph.constant(0.0), graph.constant(_MASKED))


def _rotation(graph: GraphBuilder, text: TextConfig, positions: str) -> tuple[str, str]:
    """Cosine and sine [B, S, 1, head_dim / 2] of the rotary position embedding."""
    exponents = np.arange(0, text.head_dim, 2, dtype=np.float32) / np.float32(text.head_dim)
    frequencies = (1.0 / np.float32(text.rope_theta) ** exponents).astype(np.float32)
    places = graph.op("Unsqueeze", graph.op("Cast", positions, to=1), graph.ints(2, 3))
    angles = graph.op("Mul", places, graph.constant(frequencies))
    return graph.op("Cos", angles), graph.op("Sin", angles)


def _rotate(graph: GraphBuilder, text: TextConfig, x: str, rotation: tuple[str, str]) -> str:
    """Rotate the first half of each head against the second: x [B, S, heads, head_dim]."""
    cosine, sine = rotation
    first, second = graph.split(x, [text.head_dim // 2] * 2, axis=-1)
    turned_first = graph.op("Sub", graph.op("Mul", first, cosine), graph.op("Mul", second, sine))
    turned_second = graph.op("Add", graph.op("Mul", second, cosine), graph.op("Mul", first, sine))
    return graph.op("Concat", turned_first, turned_second, axis=-1)


def _attend(
    graph: GraphBuilder,
    checkpoint: Checkpoint,
    text: TextConfig,
    index: int,
    x: str,
    mask: str,
    rotation: tuple[str, str],
    past: tuple[str, str],
) -> str:
    """Grouped-query attention over the cache and the new tokens: [B, S, H] -> [B, S, H]."""
    name = f"language_model.layers.{index}.self_attn"
    heads, groups, dim = text.num_heads, text.num_kv_heads, text.head_dim
    weight = np.concatenate([checkpoint[f"{name}.{part}_proj.weight"] for part in "qkv"])
    qkv = graph.linear(x, f"{name}.qkv_proj", weight)
    qkv = graph.op("Reshape", qkv, graph.ints(0, 0, heads + 2 * groups, dim))
    query, key, value = graph.split(qkv, [heads, groups, groups], axis=2)
    query = graph.op("Mul", _rotate(graph, text, query, rotation), graph.constant(text.query_scale))
    key = _rotate(graph, text, key, rotation)
    # Query heads of a group lie behind one another, so that a group is one matrix product.
    query = graph.op("Transpose", query, perm=[0, 2, 1, 3])
    query = graph.compute(graph.op("Reshape", query, graph.ints(0, groups, -1, dim)))
    keys, values = (
        _extend_cache(graph, old, new, f"present.{index}.{part}", text)
        for old, new, part in zip(past, (key, value), ("key", "value"), strict=True)
    )
    scores = graph.matmul(query, graph.op("Transpose", keys, perm=[0, 1, 3, 2]))
    if text.attn_softcap:
        scores = _softcap(graph, scores, text.attn_softcap)
    total = graph.op("Shape", mask, start=2, end=4)
    per_head = graph.op("Concat", graph.ints(0, heads), total, axis=0)
    scores = graph.op("Add", graph.op("Reshape", scores, per_head), mask)
    weights = graph.compute(graph.op("Softmax", scores, axis=-1))
    width = graph.op("Shape", mask, start=3, end=4)
    per_group = graph.op("Concat", graph.ints(0, groups, -1), width, axis=0)
    attended = graph.matmul(graph.op("Reshape", weights, per_group), values)
    length = graph.op("Shape", mask, start=2, end=3)
    attended = graph.op("Reshape", attended, graph.op("Concat", graph.ints(0, heads), length, graph.ints(dim), axis=0))
    attended = graph.op("Transpose", attended, perm=[0, 2, 1, 3])
    attended = graph.op("Reshape", attended, graph.ints(0, 0, heads * dim))
    return graph.linear(attended, f"{name}.o_proj", checkpoint[f"{name}.o_proj.weight"])


def _extend_cache(graph: GraphBuilder, past: str, new: str, name: str, text: TextConfig) -> str:
    """Put new rows [B, S, kv heads, head_dim] out as `name` and behind the cached ones."""
    rows = graph.compute(graph.op("Transpose", new, perm=[0, 2, 1, 3]))
    graph.output(rows, name, graph.compute_type, ("batch", text.num_kv_heads, "sequence", text.head_dim))
    return graph.op("Concat", past, rows, axis=2)


def _feed_forward(graph: GraphBuilder, checkpoint: Checkpoint, name: str, x: str) -> str:
    """Gated tanh-GELU, gate and up fused."""
    weight = np.concatenate([checkpoint[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    fused = graph.linear(x, f"{name}.mlp.gate_up_proj", weight)
    gate, up = graph.split(fused, [len(weight) // 2] * 2, axis=-1)
    product = graph.op("Mul", graph.op("Gelu", gate, approximate="tanh"), up)
    return graph.linear(product, f"{name}.mlp.down_proj", checkpoint[f"{name}.mlp.down_proj.weight"])


def _norm(graph: GraphBuilder, checkpoint: Checkpoint, text: TextConfig, name: str, x: str) -> str:
    """x / rms(x) * (1 + weight); the sum is exact to fold, the reference takes it in float32 too."""
    variance = graph.op("ReduceMean", graph.op("Pow", x, graph.constant(2.0)), graph.ints(-1))
    rms = graph.op("Sqrt", graph.op("Add", variance, graph.constant(text.eps)))
    scale = np.float32(1) + checkpoint[f"{name}.weight"].astype(np.float32)
    return graph.op("Mul", graph.op("Div", x, rms), graph.weight(f"{name}.weight", scale, np.float32))


def _softcap(graph: GraphBuilder, x: str, cap: float) -> str:
    return graph.op("Mul", graph.op("Tanh", graph.op("Div", x, graph.constant(cap))), graph.constant(cap))


def _last_hidden(graph: GraphBuilder, x: str, start: str, prefix_length: str) -> str:
    """[B, H]: the last token of each row's prefix, or of the sequence where the prefix lies in the cache."""
    length = graph.op("Shape", x, start=1, end=2)
    rest = graph.op("Sub", graph.op("Unsqueeze", prefix_length, graph.ints(1)), start)
    count = graph.op("Where", graph.op("Greater", rest, graph.ints(0)), rest, length)
    index = graph.op("Sub", count, graph.ints(1))
    return graph.op("GatherND", x, index, batch_dims=1)


def _choose_token(graph: GraphBuilder, text: TextConfig, hidden: str, head: str, tokens: Tokens, allowed: str) -> None:
    """Logits over the real vocabulary, the best allowed one and its log-probability among all."""
    if graph.compute_type == np.float32:
        logits = graph.op("Gemm", hidden, head, transB=1)
    else:
        logits = graph.op("Cast", graph.op("Gemm", graph.compute(hidden), head, transB=1), to=1)
    if text.final_softcap:
        logits = _softcap(graph, logits, text.final_softcap)
    logits = graph.op("Identity", logits, name="logits")
    ids = graph.op("Range", *(graph.constant(value, np.int64) for value in (0, tokens.vocab_size, 1)))
    if tokens.image < tokens.vocab_size:  # a fine-tune added tokens behind the image token
        is_image = graph.op("Equal", ids, graph.constant(tokens.image, np.int64))
        logits = graph.op("Where", is_image, graph.constant(_NEVER), logits)
    first, last = graph.split(allowed, [1, 1], axis=1)
    inside = graph.op("And", graph.op("GreaterOrEqual", ids, first), graph.op("LessOrEqual", ids, last))
    winner = graph.op("ArgMax", graph.op("Where", inside, logits, graph.constant(_NEVER)), axis=1, keepdims=1)
    score = graph.op("GatherElements", logits, winner, axis=1)
    log_prob = graph.op("Sub", score, graph.op("ReduceLogSumExp", logits, graph.ints(1), keepdims=1))
    graph.output(graph.op("Squeeze", winner, graph.ints(1)), "next_token", np.int64, ("batch",))
    graph.output(graph.op("Squeeze", log_prob, graph.ints(1)), "log_prob", np.float32, ("batch",))
