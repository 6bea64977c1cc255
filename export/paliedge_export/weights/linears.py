"""The linear layers of a model by name: what graphs multiply with, what reads the same input, what makes it.

Query, key and value are one matrix. Gate and up are two: one product as wide as both takes ONNX Runtime's
CPU kernels a tenth longer (benchmarks/cpu_products.py), and its result is cut on one core.

A layer's input channels may be divided by any number if its weight's rows are multiplied by it. What makes
the channel is then divided: a norm's weight, or the output rows of the linear layer before. Only a GELU
between the two forbids it.
"""

# Tests: tests/export/weights/test_smoothing.py.
from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import NamedTuple

from paliedge_export.checkpoint.config import ModelConfig


class Linear(NamedTuple):
    """One linear layer as the graphs have it, or two that read the same input.

    Attributes:
        matrices: by its name in the graphs, the checkpoint's weights [out, in] that each is made of.
        width: its input channels, K.
        producers: the checkpoint's tensors whose first axis makes its input; empty if none can be scaled.
        shares: each producing channel feeds so many channels of the input (grouped-query attention).
        groups: key-value heads, where `shares` is more than one.
    """

    matrices: Mapping[str, tuple[str, ...]]
    width: int
    producers: tuple[str, ...]
    shares: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        """That of its first matrix: it stands for all in statistics and reports."""
        return next(iter(self.matrices))

    @property
    def weights(self) -> tuple[str, ...]:
        """The checkpoint's weights of all matrices."""
        return tuple(chain(*self.matrices.values()))


def linears(config: ModelConfig) -> Iterator[Linear]:
    """Every linear layer of the encoder's and the decoder's blocks, in order.

    The patch embedding and the projector are not among them: together they are 0.1 % of the weights, and
    stand where an error meets every token.
    """
    yield from vision_linears(config)
    yield from text_linears(config)


def vision_linears(config: ModelConfig) -> Iterator[Linear]:
    """Those of the encoder."""
    width, inner = config.vision.hidden_size, config.vision.intermediate_size
    for index in range(config.vision.num_layers):
        layer = f"vision_tower.encoder.layers.{index}"
        attention = f"{layer}.self_attn"
        qkv = tuple(f"{attention}.{part}_proj.weight" for part in "qkv")
        value = (f"{attention}.v_proj.weight", f"{attention}.v_proj.bias")
        for name, weights, size, producers in (
            ("self_attn.qkv_proj", qkv, width, _norm(f"{layer}.layer_norm1")),
            ("self_attn.out_proj", (f"{attention}.out_proj.weight",), width, value),
            ("mlp.fc1", (f"{layer}.mlp.fc1.weight",), width, _norm(f"{layer}.layer_norm2")),
            ("mlp.fc2", (f"{layer}.mlp.fc2.weight",), inner, ()),
        ):
            yield Linear({f"{layer}.{name}": weights}, size, producers)


def _norm(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


def text_linears(config: ModelConfig) -> Iterator[Linear]:
    """Those of the decoder."""
    text = config.text
    shares = text.num_heads // text.num_kv_heads
    before = "pre_feedforward_layernorm" if text.post_norms else "post_attention_layernorm"
    for index in range(text.num_layers):
        layer = f"language_model.layers.{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        qkv = tuple(f"{attention}.{part}_proj.weight" for part in "qkv")
        gate_and_up = {f"{mlp}.{part}_proj": (f"{mlp}.{part}_proj.weight",) for part in ("gate", "up")}
        yield Linear({f"{attention}.qkv_proj": qkv}, text.hidden_size, (f"{layer}.input_layernorm.weight",))
        yield Linear(
            {f"{attention}.o_proj": (f"{attention}.o_proj.weight",)},
            text.attention_width,
            (f"{attention}.v_proj.weight",),
            shares,
            text.num_kv_heads,
        )
        yield Linear(gate_and_up, text.hidden_size, (f"{layer}.{before}.weight",))
        yield Linear(
            {f"{mlp}.down_proj": (f"{mlp}.down_proj.weight",)},
            text.intermediate_size,
            (f"{mlp}.up_proj.weight",),
        )
