"""What can be evaluated, and which packages its metrics need: the extra `eval`, which answering pictures does not."""

# Tests: tests/evaluation/test_evaluation.py.
from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from paliedge.errors import MissingExtraError

Task = Literal["detect", "segment", "caption", "vqa", "ocr"]
BOX_TASKS = ("detect", "segment")
TEXT_TASKS = ("caption", "vqa", "ocr")


def require_packages(task: str) -> None:
    """See that what the metrics of `task` need is installed, before anything slow is done.

    Raises:
        MissingExtraError: it is not.
    """
    needed = ("pycocotools",) if task in BOX_TASKS else ("jiwer", "rapidfuzz")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            expected=f"{' and '.join(needed)}, for the metrics of {task}",
            found=f"no package {' or '.join(missing)}",
            action='Run `pip install "paliedge[eval]"`.',
        )
