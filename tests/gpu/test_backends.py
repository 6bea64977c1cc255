"""`make test-gpu`: build, run and compare with whatever engine is importable on a machine with a GPU.

For every backend and model: tokens as the same graphs give on the CPU, a CUDA graph against none, a
thousand decode steps without growth. A backend that is not installed is written down as refused, with
the reason; that none is there is a failure.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from paliedge import PaliGemma
from paliedge.backends.select import Backend, BackendOptions
from paliedge.backends.trt.build import build_engine
from paliedge.bundle.bundle import Bundle
from paliedge.diagnostics.selfcheck import NUM_DECODES, check_run
from paliedge.errors import EngineMismatchError, MissingExtraError, PaliEdgeError
from paliedge.inputs.images import load_image
from paliedge.model import SHIPPED_BUNDLE
from paliedge_export.exporter import export_bundle
from tests.gpu.conftest import Record

GPU_BACKENDS = [name for name in get_args(Backend) if name not in ("auto", "cpu")]
PROMPTS = ("caption en", "detect red circle ; blue square", "answer en how many stars are there?", "ocr")
SCENES = sorted((SHIPPED_BUNDLE.parent / "scenes").glob("*.png"))
TIE = 0.1
"""Nats: two kernels may order two candidates differently that are this near."""


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_backend_builds_runs_and_agrees(
    backend: Backend, checkpoint: Path, tmp_path: Path, record: list[Record]
) -> None:
    run: Record = {"backend": backend, "checkpoint": checkpoint.name}
    record.append(run)
    folder = tmp_path / "bundle"
    targets = ["cpu", "jetpack6", "jetpack7", "rtx"]
    export_bundle(str(checkpoint), folder, targets=targets, precision="fp16")
    try:
        if backend in ("tensorrt", "rtx"):
            engine = build_engine(folder, backend)
            run["engine"] = f"{engine.flavour} {engine.version} from {engine.target}"
        options = BackendOptions(backend)
        model = PaliGemma.load(folder, options)
    except (MissingExtraError, EngineMismatchError) as error:  # not here, or not for this GPU
        run["refused"] = str(error)
        return
    except PaliEdgeError as error:
        run["refused"] = str(error)
        raise
    run |= compare_tokens(model, PaliGemma.load(folder, BackendOptions("cpu")))
    model.close()
    run["check"] = check_run(Bundle(folder), options, NUM_DECODES).to_dict()


def compare_tokens(model: PaliGemma, reference: PaliGemma) -> Record:
    """Equal answers, or a first difference between candidates of about the same probability."""
    equal, ties = 0, 0
    for path in SCENES:
        image = load_image(path)
        for prompt in PROMPTS:
            found, wanted = model.generate(image, prompt), reference.generate(image, prompt)
            if found.token_ids == wanted.token_ids:
                equal += 1
                continue
            pairs = zip(found.token_ids, wanted.token_ids, strict=False)
            first = next((place for place, both in enumerate(pairs) if both[0] != both[1]), None)
            assert first is not None, (prompt, found.text, wanted.text)
            assert abs(found.log_probs[first] - wanted.log_probs[first]) < TIE, (prompt, found.text, wanted.text)
            ties += 1
    return {"answers_equal": equal, "answers_left_at_a_tie": ties}
