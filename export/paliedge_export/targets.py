"""What each target wants of a graph. Targets that want the same share its file.

| target | reader | operators |
|---|---|---|
| cpu | ONNX Runtime 1.23.2 on | opset 20, com.microsoft's attention, sums with norms and integer products |
| jetpack6 | TensorRT 10.3 on | opset 20, attention written out; opset 21 for INT4, which TensorRT 10.0 on reads |
| jetpack7, rtx | TensorRT 10.15 on, TensorRT for RTX | opset 24: Attention, TensorScatter |
"""

# Tests: tests/export/test_tensorrt_operators.py.
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from paliedge.bundle.manifest import Precision

Layout = Literal["contrib", "qdq"]
"""How integer weights are laid out and multiplied: by com.microsoft's operators, or dequantised by ONNX's."""


@dataclass(frozen=True)
class Lowering:
    """One way to write a graph down.

    Attributes:
        opset: of the default domain.
        operators: "contrib" has com.microsoft's attention in the vision encoder, and its sum with a norm in the
            decoder. "primitive" has all written out. "fused" has ONNX's Attention, but not for Gemma 2: TensorRT's
            has no softcap.
        cache_update: "rows", the graph returns new rows; "in_place", TensorScatter writes them.
        accumulate_float32: ask TensorRT to add up float16 products in float32. Not on 10.3, of which
            nobody here knows whether it would keep float32 copies of the weights instead.
        layout: of integer weights. "contrib" computes in float32 beside them and beside float16 ones: ONNX
            Runtime's CPU kernels are fast at that. On ARM, from 1.29 on, they add float16 products up in float16.
    """

    opset: int
    operators: Literal["contrib", "primitive", "fused"]
    cache_update: Literal["rows", "in_place"]
    accumulate_float32: bool
    layout: Layout


_CONTRIB = Lowering(20, "contrib", "rows", accumulate_float32=False, layout="contrib")
_OPSET20 = Lowering(20, "primitive", "rows", accumulate_float32=False, layout="qdq")
_OPSET24 = Lowering(24, "fused", "in_place", accumulate_float32=True, layout="qdq")


@dataclass(frozen=True)
class TargetLowering:
    """The lowering of a target's graphs, and the precisions that its reader has kernels for."""

    lowering: Lowering
    precisions: tuple[Precision, ...]


TARGETS = {
    "cpu": TargetLowering(_CONTRIB, ("fp32", "fp16", "int8", "int4")),
    "jetpack6": TargetLowering(_OPSET20, ("fp16", "bf16", "int8", "int4")),
    "jetpack7": TargetLowering(_OPSET24, ("fp16", "bf16", "int8", "int4")),
    "rtx": TargetLowering(_OPSET24, ("fp16", "bf16", "int8", "int4")),
}
