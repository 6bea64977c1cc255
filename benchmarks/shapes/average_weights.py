"""The mean of checkpoints that were trained on from one another: often better than each of them.

    python -m benchmarks.shapes.average_weights BEFORE AFTER -o benchmarks/shapes/checkpoint

The output folder keeps its other files; only model.safetensors is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def average(checkpoints: Sequence[Path], output: Path) -> None:
    """Write the mean of the checkpoints' tensors, in their own type.

    Raises:
        ValueError: their tensors have other names or shapes.
    """
    loaded = [load_file(folder / WEIGHTS) for folder in checkpoints]
    first = loaded[0]
    for folder, tensors in zip(checkpoints, loaded, strict=True):
        if {name: tensor.shape for name, tensor in tensors.items()} != {name: one.shape for name, one in first.items()}:
            raise ValueError(f"{folder} has other tensors than {checkpoints[0]}")
    means = {
        name: (sum(tensors[name].float() for tensors in loaded) / len(loaded)).to(tensor.dtype)
        for name, tensor in first.items()
    }
    save_file(means, output / WEIGHTS, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    average(arguments.checkpoints, arguments.output)


if __name__ == "__main__":
    main()
