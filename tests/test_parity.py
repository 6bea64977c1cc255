"""The exported graphs and the runtime give what transformers gives, step by step.

transformers is always called with token_type_ids; without them its prefix mask is causal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from benchmarks.shapes.scenes import HELD_OUT_SEED, make_scene
from paliedge import GenerationOptions, PaliGemma
from paliedge.backends.ort import OrtSession
from paliedge.bundle.bundle import Bundle
from paliedge.generation.embedding import EmbeddingTable
from paliedge.inputs.images import load_image
from paliedge.inputs.preprocess import Preprocessor
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge_export.exporter import export_bundle
from paliedge_export.gate.transformers_model import reference_logits
from paliedge_export.targets import TARGETS
from tests.paths import SHAPES_CHECKPOINT
from tests.tiny import make_tiny

NUM_TOKENS = 48
FP32_TOLERANCE = 1e-4
FP16_TOLERANCE = 3e-2
TIE = 1e-3
PROMPTS = ("caption en", "detect red circle ; blue square", "answer en how many stars are there?", "ocr", "a", "DE 7")
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "paligemma-mqa": ("paligemma", {"num_heads": 4, "num_kv_heads": 1}),
    "paligemma-mha-wide-heads": ("paligemma", {"num_heads": 2, "num_kv_heads": 2, "head_dim": 32}),
    "paligemma-untied": ("paligemma", {"num_heads": 3, "num_kv_heads": 1, "tied": False}),
    "paligemma2-gqa": ("paligemma2", {"num_heads": 4, "num_kv_heads": 2}),
    "paligemma2-softcaps-that-bite": (
        "paligemma2",
        {"num_kv_heads": 1, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 2.0},
    ),
    "paligemma2-28b-query-scale": (
        "paligemma2",
        {"num_heads": 8, "num_kv_heads": 4, "head_dim": 8, "query_pre_attn_scalar": 9},
    ),
}
IGNORE_NUMPY_COPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""transformers' processor turns torch tensors into arrays in a way that numpy 2 warns of."""
NUM_IMAGES = 4
"""24 pairs a layout, 72 a family."""


@dataclass(frozen=True)
class Pair:
    """One question and the reference's greedy answer: logits [NUM_TOKENS, vocabulary]."""

    image: npt.NDArray[np.uint8]
    prompt: str
    logits: npt.NDArray[np.float32]

    @property
    def tokens(self) -> list[int]:
        return [int(token) for token in self.logits.argmax(-1)]


@dataclass(frozen=True)
class Subject:
    """An exported model and the reference's answers."""

    bundle: Bundle
    model: PaliGemma
    pairs: list[Pair]


class LogitsReader:
    """The bundle's decoder with its inner tensor `logits` as an output, for this test alone."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        manifest = bundle.manifest
        target = manifest.targets["cpu"]
        self._manifest = manifest
        for path in bundle.folder.iterdir():
            (folder / path.name).symlink_to(path)
        graph = onnx.load(bundle.path(target.decoder.file), load_external_data=False)
        graph.graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None))
        merged = folder / "with_logits.onnx"
        onnx.save(graph, merged)
        for name in target.decoder.weights:  # ONNX Runtime refuses linked weights
            (folder / name).unlink()
            (folder / name).write_bytes(bundle.path(name).read_bytes())
        self._decoder = ort.InferenceSession(merged, providers=["CPUExecutionProvider"])
        self._vision = ort.InferenceSession(bundle.path(target.vision_encoder.file), providers=["CPUExecutionProvider"])
        self._preprocess = Preprocessor(manifest.preprocess, manifest.model.vision.image_size)
        self._tokenizer = PromptTokenizer(bundle.path(manifest.tokenizer), manifest.tokens)
        self._embed = EmbeddingTable(bundle)

    def read(self, pair: Pair) -> npt.NDArray[np.float32]:
        """Logits of prefill and of every decode step, the reference's tokens being fed in."""
        pixels = self._preprocess(load_image(pair.image))
        features = self._vision.run(None, {"pixel_values": pixels})[0][0]
        prefix = np.concatenate([features, self._embed(self._tokenizer.encode_prefix(pair.prompt))])
        text = self._manifest.model.text
        past = {
            f"past_key_values.{index}.{part}": np.zeros((1, text.num_kv_heads, 0, text.head_dim), np.float32)
            for index in range(text.num_layers)
            for part in ("key", "value")
        }
        names = ["logits", *(name.replace("past_key_values", "present") for name in past)]
        rows, embeds, start = [], prefix, 1
        for token in (*pair.tokens[:-1], None):
            outputs = self._decoder.run(
                names,
                {
                    "inputs_embeds": embeds[None],
                    "position_ids": np.arange(start, start + len(embeds))[None],
                    "prefix_length": np.array([len(prefix)]),
                    "allowed_ids": np.array([[0, self._manifest.tokens.vocab_size - 1]]),
                    **past,
                },
            )
            rows.append(outputs[0][0])
            past = {
                name: np.concatenate([old, new], axis=2)
                for (name, old), new in zip(past.items(), outputs[1:], strict=True)
            }
            start += len(embeds)
            if token is not None:
                embeds = self._embed([token])
        return np.stack(rows)


def scene_images(count: int) -> list[npt.NDArray[np.uint8]]:
    return [make_scene(HELD_OUT_SEED + 10_000 + index).image for index in range(count)]


def answer_with_reference(
    model: PaliGemmaForConditionalGeneration, bundle: Bundle, images: list[npt.NDArray[np.uint8]]
) -> list[Pair]:
    manifest = bundle.manifest
    preprocess = Preprocessor(manifest.preprocess, manifest.model.vision.image_size)
    tokenizer = PromptTokenizer(bundle.path(manifest.tokenizer), manifest.tokens)
    pairs = []
    with torch.no_grad():
        for image in images:
            pixels = torch.from_numpy(preprocess(Image.fromarray(image)))
            for prompt in PROMPTS:
                prefix = tokenizer.encode_prefix(prompt)
                vocab_size = manifest.tokens.vocab_size
                logits = reference_logits(model, pixels, prefix, manifest.tokens.image, vocab_size, NUM_TOKENS)
                pairs.append(Pair(image, prompt, logits))
    return pairs


@pytest.fixture(scope="module", params=LAYOUTS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    family, options = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("tiny")
    model = make_tiny(folder / "checkpoint", family, **options)
    export_bundle(str(folder / "checkpoint"), folder / "bundle")
    bundle = Bundle(folder / "bundle")
    return Subject(
        bundle, PaliGemma.load(bundle.folder), answer_with_reference(model, bundle, scene_images(NUM_IMAGES))
    )


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("shapes")
    export_bundle(str(SHAPES_CHECKPOINT), folder / "bundle", compare=False)
    bundle = Bundle(folder / "bundle")
    model = PaliGemmaForConditionalGeneration.from_pretrained(SHAPES_CHECKPOINT, dtype=torch.float32).eval()
    return Subject(bundle, PaliGemma.load(bundle.folder), answer_with_reference(model, bundle, scene_images(10)))


def check_logits(subject: Subject, folder: Path, tolerance: float) -> None:
    reader = LogitsReader(subject.bundle, folder)
    for pair in subject.pairs:
        found = reader.read(pair)
        error = np.abs(found - pair.logits).max(-1)
        assert (error <= tolerance * np.abs(pair.logits).max(-1)).all(), (pair.prompt, error.argmax(), error.max())
        if tolerance == FP32_TOLERANCE:  # all of NUM_TOKENS, past end-of-sequence too
            margins = np.diff(np.sort(pair.logits)[:, -2:])[:, 0]
            assert ((found.argmax(-1) == pair.tokens) | (margins < TIE)).all(), pair.prompt


def check_tokens(subject: Subject, tolerance: float = 0.0, max_ties: int | None = None) -> None:
    """Equal up to end-of-sequence, unless the first difference is a tie of the reference's own.

    `tolerance` widens a tie to twice that share of the largest logit: both of two candidates may be off.
    """
    num_ties = 0
    eos = subject.bundle.manifest.tokens.eos
    for pair in subject.pairs:
        wanted = pair.tokens
        wanted = wanted[: wanted.index(eos)] if eos in wanted else wanted
        found = list(
            subject.model.generate(
                pair.image, pair.prompt, options=GenerationOptions(max_new_tokens=NUM_TOKENS, free=True)
            ).token_ids
        )
        if found != wanted:
            first = next(
                (place for place, both in enumerate(zip(found, wanted, strict=False)) if both[0] != both[1]),
                min(len(found), len(wanted)),
            )
            second_best, best = np.sort(pair.logits[first])[-2:]
            margin = max(TIE, 2 * tolerance * float(np.abs(pair.logits[first]).max()))
            assert best - second_best < margin, (pair.prompt, first, found, wanted)
            num_ties += 1
    allowed = len(subject.pairs) // (2 if tolerance else 10) if max_ties is None else max_ties
    assert num_ties <= allowed


def test_the_references_answers_depend_on_image_and_prompt(tiny: Subject) -> None:
    answers = {tuple(pair.tokens) for pair in tiny.pairs}
    assert len(answers) == len(tiny.pairs)
    echoes = [np.mean(np.diff(pair.tokens) == 0) for pair in tiny.pairs]
    assert np.mean(echoes) < 0.3


def test_tiny_logits_are_the_references(tiny: Subject, tmp_path: Path) -> None:
    check_logits(tiny, tmp_path, FP32_TOLERANCE)


def test_tiny_tokens_are_the_references(tiny: Subject) -> None:
    check_tokens(tiny)


def test_tiny_fp16_logits_are_near_the_references(tiny: Subject, tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    source = tiny.bundle.folder.parent / "checkpoint"
    export_bundle(str(source), tmp_path / "bundle", precision="fp16")
    half = Subject(Bundle(tmp_path / "bundle"), tiny.model, tiny.pairs)
    check_logits(half, tmp_path / "graphs", FP16_TOLERANCE)


@pytest.mark.opset24
@pytest.mark.parametrize("target", ["jetpack6", "jetpack7"])
def test_tensorrts_graphs_give_the_references_tokens(
    target: str, tiny: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, which no TensorRT target is exported in, their logic is held to float32's tolerance."""
    source = tiny.bundle.folder.parent / "checkpoint"
    for precision, tolerance in (("fp32", 0.0), ("fp16", FP16_TOLERANCE)):
        chosen = replace(TARGETS[target], precisions=("fp32", "fp16"))
        monkeypatch.setitem(TARGETS, target, chosen)
        export_bundle(str(source), tmp_path / precision, targets=[target], precision=precision)  # type: ignore[arg-type]
        bundle = Bundle(tmp_path / precision)
        assert bundle.manifest.comparisons[target].token_match > 0.9
        model = PaliGemma(bundle, OrtSession(bundle, target))
        check_tokens(Subject(bundle, model, tiny.pairs[:: NUM_IMAGES - 1]), tolerance)


def test_jetpack_7_and_desktop_gpus_share_their_graphs(tiny: Subject, tmp_path: Path) -> None:
    """So that what holds for one of them holds for the other."""
    source = tiny.bundle.folder.parent / "checkpoint"
    targets = ("cpu", "jetpack6", "jetpack7", "rtx")
    manifest = export_bundle(str(source), tmp_path / "bundle", targets=targets, precision="fp16", compare=False)
    assert manifest.targets["jetpack7"] == manifest.targets["rtx"]
    weights = {graph.weights for target in manifest.targets.values() for graph in (target.decoder,)}
    assert len(weights) == 1
    assert len(list((tmp_path / "bundle").glob("*.weights"))) == len(list(tiny.bundle.folder.glob("*.weights")))


@pytest.mark.opset24(always=True)
def test_shapes_tokens_of_tensorrts_graphs_are_the_references(shapes: Subject, tmp_path: Path) -> None:
    export_bundle(str(SHAPES_CHECKPOINT), tmp_path / "bundle", targets=["jetpack6", "jetpack7"], compare=False)
    bundle = Bundle(tmp_path / "bundle")
    for target in bundle.manifest.targets:
        check_tokens(
            Subject(bundle, PaliGemma(bundle, OrtSession(bundle, target)), shapes.pairs[:24]),
            FP16_TOLERANCE,
            max_ties=3,  # location targets were spread over neighbouring bins, whose scores are near
        )


def test_shapes_logits_are_the_references(shapes: Subject, tmp_path: Path) -> None:
    check_logits(shapes, tmp_path, FP32_TOLERANCE)


def test_shapes_tokens_are_the_references(shapes: Subject) -> None:
    check_tokens(shapes)


@IGNORE_NUMPY_COPY
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_whole_pipeline_is_transformers_own(prompt: str) -> None:
    """Nothing of ours on the other side: its processor makes pixels and ids, its `generate` the answer."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(SHAPES_CHECKPOINT, dtype=torch.float32).eval()
    processor = PaliGemmaProcessor.from_pretrained(SHAPES_CHECKPOINT, backend="pil")
    ours = PaliGemma.load()
    for image in scene_images(5):
        inputs = processor(images=Image.fromarray(image), text=f"<image>{prompt}", return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        expected = generated[0, inputs["input_ids"].shape[1] :].tolist()
        eos = ours.manifest.tokens.eos
        expected = expected[: expected.index(eos)] if eos in expected else expected
        assert (
            list(
                ours.generate(image, prompt, options=GenerationOptions(max_new_tokens=NUM_TOKENS, free=True)).token_ids
            )
            == expected
        )


@IGNORE_NUMPY_COPY
def test_the_reference_harness_agrees_with_transformers_own_generate() -> None:
    """`reference_logits` steps by hand; here transformers' processor and `generate` answer instead."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(SHAPES_CHECKPOINT, dtype=torch.float32).eval()
    processor = PaliGemmaProcessor.from_pretrained(SHAPES_CHECKPOINT, backend="pil")
    image = Image.fromarray(scene_images(1)[0])
    inputs = processor(images=image, text="<image>detect red circle", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    expected = generated[0, inputs["input_ids"].shape[1] :].tolist()
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    ids = inputs["input_ids"][0].tolist()
    with torch.no_grad():
        prefix = [token for token in ids if token != image_token]
        logits = reference_logits(model, inputs["pixel_values"], prefix, image_token, image_token, NUM_TOKENS)
    assert logits.argmax(-1).tolist()[: len(expected)] == expected
