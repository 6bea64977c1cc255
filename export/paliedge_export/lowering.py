"""What each target wants of a graph. Targets that want the same share its file.

| target | reader | operators |
|---|---|---|
| cpu | ONNX Runtime 1.23.2 on | opset 20, and com.microsoft's attention in the vision encoder |
| jetpack6 | TensorRT 10.3 on | opset 20, attention written out |
| jetpack7, rtx | TensorRT 10.15 on, TensorRT for RTX | opset 24: Attention, TensorScatter |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from paliedge.manifest import Precision


@dataclass(frozen=True)
class Lowering:
    """One way to write a graph down.

    Attributes:
        name: what its file is called after.
        opset: of the default domain.
        attention: "contrib", com.microsoft's operator; "primitive", written out; "fused", ONNX's
            Attention. Gemma 2 is always written out: TensorRT's Attention has no softcap.
        cache_update: "rows", the graph returns new rows; "in_place", TensorScatter writes them.
        accumulate_float32: ask TensorRT to add up float16 products in float32. Not on 10.3, of which
            nobody here knows whether it would keep float32 copies of the weights instead.
    """

    name: str
    opset: int
    attention: Literal["contrib", "primitive", "fused"]
    cache_update: Literal["rows", "in_place"]
    accumulate_float32: bool


_CONTRIB = Lowering("cpu", 20, "contrib", "rows", accumulate_float32=False)
_OPSET20 = Lowering("opset20", 20, "primitive", "rows", accumulate_float32=False)
_OPSET24 = Lowering("opset24", 24, "fused", "in_place", accumulate_float32=True)


@dataclass(frozen=True)
class TargetLowering:
    """The lowerings of a target's two graphs, and the precisions that its reader has kernels for."""

    vision_encoder: Lowering
    decoder: Lowering
    precisions: tuple[Precision, ...]


TARGETS = {
    "cpu": TargetLowering(_CONTRIB, _OPSET20, ("fp32", "fp16")),
    "jetpack6": TargetLowering(_OPSET20, _OPSET20, ("fp16", "bf16")),
    "jetpack7": TargetLowering(_OPSET24, _OPSET24, ("fp16", "bf16")),
    "rtx": TargetLowering(_OPSET24, _OPSET24, ("fp16", "bf16")),
}
