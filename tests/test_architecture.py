"""The runtime stands alone: every module of it imports with the heavy packages out of reach."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import paliedge

FORBIDDEN = ("torch", "transformers", "onnx", "paliedge_export", "safetensors", "huggingface_hub", "ml_dtypes", "peft")

BLOCKED_IMPORT = """
import importlib, sys
for name in {forbidden!r}:
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(name)
"""

REAL_DETECTION = """
import sys
import paliedge
from paliedge.cli.bundles import DEMO_SCENES
model = paliedge.PaliGemma.load()
assert model.detect(sorted(DEMO_SCENES.glob("*.png"))[0], ["red circle", "blue square"]).token_ids is not None
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_every_runtime_module_imports_without_the_forbidden_ones() -> None:
    modules = [module.name for module in pkgutil.walk_packages(paliedge.__path__, "paliedge.")]
    assert len(modules) > 15
    run_python(BLOCKED_IMPORT.format(forbidden=FORBIDDEN, modules=modules))


def test_blocking_a_module_that_is_needed_fails() -> None:
    """The test above can fail: numpy is needed."""
    code = BLOCKED_IMPORT.format(forbidden=("numpy",), modules=["paliedge.model"])
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode != 0


def test_a_real_detection_loads_neither_torch_nor_onnx() -> None:
    loaded = set(run_python(REAL_DETECTION).split())
    assert "onnxruntime" in loaded
    assert not loaded & set(FORBIDDEN)
