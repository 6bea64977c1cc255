"""Where the project's parts lie."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SHAPES_CHECKPOINT = ROOT / "benchmarks" / "shapes" / "checkpoint"
