"""From a checkpoint to a bundle: graphs, table, tokenizer and manifest, published in one step.

Weights pass through memory one tensor at a time. Imports neither torch nor transformers.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx

from paliedge import __version__
from paliedge.bundle import describe_file
from paliedge.errors import CheckpointError, UsageError
from paliedge.manifest import (
    MANIFEST,
    Comparison,
    Embedding,
    Graph,
    Limits,
    Manifest,
    Model,
    Precision,
    Producer,
    Prompts,
    Target,
    Tensor,
    Text,
    Tokens,
    Vision,
    write_manifest,
)
from paliedge.publish import publish_bundle
from paliedge_export.bfloat16 import emulated
from paliedge_export.checkpoint import EMBED_TOKENS, LM_HEAD, Checkpoint
from paliedge_export.compare import check_comparison, compare_with_golden, find_obstacle, make_golden
from paliedge_export.config import ModelConfig, read_config
from paliedge_export.decoder import add_decoder
from paliedge_export.golden import GOLDEN, Golden, write_golden
from paliedge_export.graph import GraphBuilder
from paliedge_export.hub import find_checkpoint
from paliedge_export.lowering import TARGETS, Lowering
from paliedge_export.metadata import read_preprocess, read_tokens
from paliedge_export.reference import make_reference_golden
from paliedge_export.vision_encoder import add_vision_encoder
from paliedge_export.weights import DTYPES, Stored, write_weights

DEFAULT_LIMITS = Limits(prefix=128, new_tokens=256)
"""Here `prefix` counts the prompt alone; the manifest's adds the image tokens."""
_TOKENIZER = "tokenizer.json"
_GEMMA2_27B_WIDTH = 4608

Report = Callable[[str], None]


def export_bundle(
    checkpoint: str,
    output: Path,
    *,
    targets: Sequence[str] = ("cpu",),
    precision: Precision | None = None,
    limits: Limits = DEFAULT_LIMITS,
    compare: bool = True,
    report: Report = lambda line: None,
) -> Manifest:
    """Export `checkpoint` (a folder or a hub id) as the bundle `output`, for one target or several.

    All targets have one precision and so one set of weights: fp32 for `cpu` alone, fp16 for others,
    unless told. The last step runs every target's graphs with ONNX Runtime against a reference:
    transformers for fp32 where torch is installed, the fp32 graphs for any other precision (bf16 is
    emulated, ONNX Runtime has no kernels for it on a CPU). The
    manifest that it returns says what was measured, and what was not compared and why. `report`
    gets a line a stage.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is no PaliGemma.
        PrecisionError: the graphs differ from the reference; nothing is published.
        UsageError: `output` holds something that is no bundle, or a target or the model does not
            take the precision.
    """
    folder = find_checkpoint(checkpoint)
    config = read_config(folder)
    order = _Order(tuple(dict.fromkeys(targets)), precision or ("fp32" if set(targets) == {"cpu"} else "fp16"))
    _check_precision(config, order)
    name = folder.resolve().name if Path(checkpoint).exists() else checkpoint
    prefix = limits.prefix + config.vision.num_image_tokens
    source = _Source(name, folder, config, read_tokens(folder), msgspec.structs.replace(limits, prefix=prefix))
    tensors = Checkpoint(folder, config)
    _check_rows(tensors, source.tokens)
    with publish_bundle(output) as staging:
        report(f"writing {order.precision} graphs for {', '.join(order.targets)}")
        manifest = _write_bundle(staging, source, tensors, order)
        if not compare:
            not_compared = dict.fromkeys(order.targets, "the comparison was off")
            return _write_manifest(staging, msgspec.structs.replace(manifest, not_compared=not_compared))
        golden = _reference_golden(staging, source, tensors, order.precision, report)
        manifest = _compare_targets(staging, manifest, golden, report)
        write_golden(staging / GOLDEN, golden or make_golden(staging, "these graphs", order.targets[0]))
        return _write_manifest(staging, msgspec.structs.replace(manifest, golden=GOLDEN))


@dataclass(frozen=True)
class _Order:
    targets: tuple[str, ...]
    precision: Precision


@dataclass(frozen=True)
class _Source:
    name: str
    folder: Path
    config: ModelConfig
    tokens: Tokens
    limits: Limits


def _check_precision(config: ModelConfig, order: _Order) -> None:
    for name in order.targets:
        if order.precision not in TARGETS[name].precisions:
            raise UsageError(
                expected=f"{' or '.join(TARGETS[name].precisions)} for the target '{name}'",
                found=order.precision,
                action="Name another --precision, or export this target into a bundle of its own.",
            )
    if order.precision == "fp16" and config.text.hidden_size >= _GEMMA2_27B_WIDTH:
        raise UsageError(
            expected="a precision with the range of float32 for PaliGemma 2 28B",
            found="fp16, in which Gemma 2 27B is known to go wrong",
            action="Export it with --precision fp32, or bf16 for TensorRT.",
        )


def _check_rows(tensors: Checkpoint, tokens: Tokens) -> None:
    for name in (EMBED_TOKENS, LM_HEAD):
        if name in tensors and tensors.shape(name)[0] < tokens.vocab_size:
            raise CheckpointError(
                expected=f"a row of '{name}' for each of the tokenizer's {tokens.vocab_size} tokens",
                found=f"{tensors.shape(name)[0]} rows",
                action="Take tokenizer.json from the checkpoint that yours was trained from.",
            )


def _reference_golden(
    staging: Path, source: _Source, tensors: Checkpoint, precision: Precision, report: Report
) -> Golden | None:
    if precision != "fp32":
        with tempfile.TemporaryDirectory(dir=staging) as folder:
            report("writing fp32 graphs to compare with")
            _write_bundle(Path(folder), source, tensors, _Order(("cpu",), "fp32"))
            return make_golden(Path(folder), "its fp32 graphs", "cpu")
    try:
        report("running transformers to compare with")
        return make_reference_golden(source.folder)
    except ModuleNotFoundError:
        return None


def _compare_targets(staging: Path, manifest: Manifest, golden: Golden | None, report: Report) -> Manifest:
    """Compare each target; those with the same graphs share one comparison."""
    if golden is None:
        reason = "there was nothing to compare with: torch is not installed"
        return msgspec.structs.replace(manifest, not_compared=dict.fromkeys(manifest.targets, reason))
    comparisons: dict[str, Comparison] = {}
    not_compared: dict[str, str] = {}
    done: dict[tuple[str, str], str] = {}
    for name, target in manifest.targets.items():
        files = (target.vision_encoder.file, target.decoder.file)
        if obstacle := find_obstacle(target):
            not_compared[name] = obstacle
            continue
        if files in done:
            comparisons[name] = comparisons[done[files]]
            continue
        report(f"comparing {name} with {golden.reference}")
        with emulated(staging, manifest, name) if target.precision == "bf16" else nullcontext():
            comparisons[name] = compare_with_golden(staging, golden, name)
        check_comparison(comparisons[name], target.precision)
        done[files] = name
    return msgspec.structs.replace(manifest, comparisons=comparisons, not_compared=not_compared)


def _write_bundle(folder: Path, source: _Source, tensors: Checkpoint, order: _Order) -> Manifest:
    """All files of a bundle but its golden."""
    config, tokens, limits = source.config, source.tokens, source.limits
    stored = write_weights(folder, tensors, config, tokens.vocab_size, order.precision)
    shutil.copyfile(source.folder / _TOKENIZER, folder / _TOKENIZER)
    table = stored[1][EMBED_TOKENS]
    manifest = Manifest(
        format_version=1,
        producer=Producer(paliedge=__version__, onnx=onnx.__version__, checkpoint=source.name),
        model=_describe_model(config),
        preprocess=read_preprocess(source.folder, config.vision.image_size),
        tokens=tokens,
        prompts=Prompts(),
        limits=limits,
        embedding=Embedding(
            file=table.file,
            dtype=table.dtype.name,
            rows=tokens.vocab_size,
            scale=float(np.sqrt(np.float32(config.text.hidden_size))),
        ),
        targets=_write_graphs(folder, source, stored, order),
        engines=(),
        tokenizer=_TOKENIZER,
        golden=None,
        comparisons={},
        not_compared={},
        files={},
    )
    return _write_manifest(folder, manifest)


def _write_graphs(folder: Path, source: _Source, stored: tuple[Stored, Stored], order: _Order) -> dict[str, Target]:
    """The graphs of every target; those that two targets want alike are written once."""
    config = source.config
    capacity = source.limits.capacity

    def add_vision(graph: GraphBuilder, lowering: Lowering) -> None:
        add_vision_encoder(graph, config, lowering)

    def add_decoder_graph(graph: GraphBuilder, lowering: Lowering) -> None:
        add_decoder(graph, config, source.tokens, lowering, capacity)

    targets = {}
    for name in order.targets:
        chosen = TARGETS[name]
        targets[name] = Target(
            precision=order.precision,
            cache_update=chosen.decoder.cache_update,
            vision_encoder=_write_graph(
                folder, "vision_encoder", chosen.vision_encoder, stored[0], order.precision, add_vision
            ),
            decoder=_write_graph(folder, "decoder", chosen.decoder, stored[1], order.precision, add_decoder_graph),
        )
    return targets


def _write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Add the files that are new in `folder` to the manifest and write it."""
    files = dict(manifest.files)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != MANIFEST and path.name not in files:
            files[path.name] = describe_file(path)
    return write_manifest(folder, msgspec.structs.replace(manifest, files=files))


def _write_graph(
    folder: Path,
    name: str,
    lowering: Lowering,
    stored: Stored,
    precision: Precision,
    add: Callable[[GraphBuilder, Lowering], None],
) -> Graph:
    graph = GraphBuilder(
        name, lowering.opset, stored, DTYPES[precision], accumulate_float32=lowering.accumulate_float32
    )
    add(graph, lowering)
    model = graph.build()
    path = folder / f"{name}.{lowering.name}.onnx"
    onnx.save_model(model, path)
    return Graph(
        file=path.name,
        weights=tuple(sorted(graph.weight_files)),
        inputs=tuple(_describe_tensor(info) for info in model.graph.input),
        outputs=tuple(_describe_tensor(info) for info in model.graph.output),
    )


def _describe_tensor(info: onnx.ValueInfoProto) -> Tensor:
    kind = info.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return Tensor(
        name=info.name,
        dtype=dtype.name,
        shape=tuple(size.dim_param or size.dim_value for size in kind.shape.dim),
    )


def _describe_model(config: ModelConfig) -> Model:
    vision, text = config.vision, config.text
    return Model(
        family=config.family,
        vision=Vision(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            num_layers=vision.num_layers,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_image_tokens=vision.num_image_tokens,
        ),
        text=Text(
            num_layers=text.num_layers,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_heads=text.num_heads,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
        ),
    )
