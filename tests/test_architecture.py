"""The runtime stands alone, and loads what it needs and no more; every module has a test that holds it."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import paliedge
from tests.paths import ROOT

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
from paliedge.cli.demo import DEMO_SCENES
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


OPENED = """
import sys
from paliedge import PaliGemma
with PaliGemma.load():
    print(*sys.modules)
"""
NOT_TO_OPEN = {
    *("paliedge.backends.trt.build", "paliedge.backends.trt.builder_process", "paliedge.bundle.publish"),
    *("paliedge.planning.roofline", "paliedge.planning.devices", "paliedge.bench", "paliedge.cli"),
    *("paliedge.diagnostics", "paliedge.evaluation", "subprocess", "multiprocessing"),
}


def test_opening_a_model_loads_no_builder_no_device_table_and_no_subprocess() -> None:
    loaded = set(run_python(OPENED).split())
    assert {"paliedge.model", "paliedge.backends.ort"} <= loaded
    assert sorted(loaded & NOT_TO_OPEN) == []


def test_importing_the_package_takes_no_time_of_its_own() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "import paliedge"]
    times = []
    for _ in range(5):
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stderr.splitlines()
        (line,) = (line for line in lines if line.split("|")[-1].strip() == "paliedge")
        times.append(int(line.split("|")[1]) / 1000)
    assert min(times) < 50, "milliseconds, with all that it imports"


def test_the_public_names_are_all_that_is_shown_and_all_are_there() -> None:
    assert dir(paliedge) == sorted(paliedge.__all__)
    for name in paliedge.__all__:
        assert getattr(paliedge, name) is not None
    defined = re.findall(r"^class (\w+Error)\(", (ROOT / "runtime/paliedge/errors.py").read_text(), re.MULTILINE)
    assert set(defined) <= set(paliedge.__all__), "every error is public"


def test_the_module_is_the_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "paliedge", "--version"], check=True, capture_output=True, text=True)
    assert shown.stdout == f"paliedge, version {paliedge.__version__}\n"


USERS_SCRIPT = """
from paliedge import BackendOptions, EncodedImage, Generation, GenerationOptions, ImageSet
from paliedge import PaliEdgeError, PaliGemma, Prompt

model = PaliGemma.load("bundle", backend="onnxruntime", threads=2)
other = PaliGemma.load("bundle", BackendOptions(backend="cpu"))
options = GenerationOptions(max_new_tokens=32, only_requested=True)
answer: Generation = model.detect("photo.jpg", ["cat", "dog"], options)
for detection in answer.detections:
    label: str = detection.label
    x1, y1, x2, y2 = detection.box
    right: float = x2
encoded: EncodedImage = model.encode("photo.jpg")
prompt: Prompt = model.prompts.segment("cat")
for piece in model.stream(encoded, prompt, options):
    text: str = piece.text
for key, found in model.generate_batch([("a", "a.jpg", "caption en"), ("b", ImageSet("b.jpg", "c.jpg"), prompt)]):
    name: str = key
    if isinstance(found, PaliEdgeError):
        print(found.action)
    else:
        print(found.text, found.boxes.xyxy.shape)
answer.plot().save("found.png")
wrong: int = answer.text
model.ask("photo.jpg", question=3)
"""


def test_a_users_script_sees_types_everywhere(tmp_path: Path) -> None:
    """The last two lines are wrong on purpose: with types missing nothing would be said of them."""
    script = tmp_path / "script.py"
    script.write_text(USERS_SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(tmp_path / "cache")]
    result = subprocess.run([*command, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = [line.split(":")[1] for line in result.stdout.splitlines()]
    last = len(USERS_SCRIPT.splitlines())
    assert lines == [str(last - 1), str(last)], result.stdout + result.stderr


def test_every_module_has_its_test_file_or_says_which_one_holds_it() -> None:
    for package, tests in (("runtime/paliedge", "tests"), ("export/paliedge_export", "tests/export")):
        for path in (ROOT / package).rglob("*.py"):
            if path.name.startswith("__"):
                continue
            inside = path.relative_to(ROOT / package)
            named = re.findall(r"^# Tests: (.*)\.$", path.read_text(), re.MULTILINE)
            files = re.findall(r"tests/[\w/]+\.py", " ".join(named)) or [f"{tests}/{inside.parent}/test_{path.stem}.py"]
            for file in files:
                assert (ROOT / file).is_file(), f"{inside}: no {file}; give it one, or name the test that holds it"
