"""From a checkpoint to a bundle: graphs, table, tokenizer and manifest, published in one step.

Weights pass through memory one tensor at a time. Imports neither torch nor transformers.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
from paliedge_export.checkpoint import EMBED_TOKENS, LM_HEAD, Array, Checkpoint
from paliedge_export.compare import check_comparison, compare_with_golden, make_golden
from paliedge_export.config import ModelConfig, read_config
from paliedge_export.decoder import add_decoder
from paliedge_export.golden import GOLDEN, Golden, write_golden
from paliedge_export.graph import GraphBuilder, WeightFile
from paliedge_export.hub import find_checkpoint
from paliedge_export.metadata import read_preprocess, read_tokens
from paliedge_export.reference import make_reference_golden
from paliedge_export.vision_encoder import add_vision_encoder

Precision = Literal["fp32", "fp16"]
DTYPES: dict[Precision, Literal["float32", "float16"]] = {"fp32": "float32", "fp16": "float16"}
DEFAULT_LIMITS = Limits(prefix=128, new_tokens=256)
"""Here `prefix` counts the prompt alone; the manifest's adds the image tokens."""
_TOKENIZER = "tokenizer.json"
_GEMMA2_27B_WIDTH = 4608
_ROWS_AT_A_TIME = 8192

Report = Callable[[str], None]


def export_bundle(
    checkpoint: str,
    output: Path,
    *,
    precision: Precision = "fp32",
    limits: Limits = DEFAULT_LIMITS,
    compare: bool = True,
    report: Report = lambda line: None,
) -> Comparison | None:
    """Export `checkpoint` (a folder or a hub id) as the bundle `output` for the target `cpu`.

    The last step runs the graphs against a reference: transformers for fp32 where torch is
    installed, the fp32 graphs for any other precision. Returns what it measured, or None where there
    was nothing to compare with or `compare` is off. `report` gets a line a stage.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is no PaliGemma.
        PrecisionError: the graphs differ from the reference; nothing is published.
        UsageError: `output` holds something that is no bundle, or the model must not be fp16.
    """
    folder = find_checkpoint(checkpoint)
    config = read_config(folder)
    _check_precision(config, precision)
    name = folder.resolve().name if Path(checkpoint).exists() else checkpoint
    source = _Source(name, folder, config, read_tokens(folder), limits)
    tensors = Checkpoint(folder, config)
    _check_rows(tensors, source.tokens)
    with publish_bundle(output) as staging:
        report(f"writing {precision} graphs")
        manifest = _write_bundle(staging, source, tensors, precision)
        if not compare:
            return None
        golden = _reference_golden(staging, source, tensors, precision, report)
        comparison = None
        if golden:
            report(f"comparing with {golden.reference}")
            comparison = compare_with_golden(staging, golden)
            check_comparison(comparison, precision)
        else:
            golden = make_golden(staging, "these graphs")
        write_golden(staging / GOLDEN, golden)
        _write_manifest(staging, msgspec.structs.replace(manifest, golden=GOLDEN, comparison=comparison))
    return comparison


@dataclass(frozen=True)
class _Source:
    name: str
    folder: Path
    config: ModelConfig
    tokens: Tokens
    limits: Limits


def _check_precision(config: ModelConfig, precision: Precision) -> None:
    if precision == "fp16" and config.text.hidden_size >= _GEMMA2_27B_WIDTH:
        raise UsageError(
            expected="a precision with the range of float32 for PaliGemma 2 28B",
            found="fp16, in which Gemma 2 27B is known to go wrong",
            action="Export it with --precision fp32.",
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
            _write_bundle(Path(folder), source, tensors, "fp32")
            return make_golden(Path(folder), "its fp32 graphs")
    try:
        report("running transformers to compare with")
        return make_reference_golden(source.folder)
    except ModuleNotFoundError:
        return None


def _write_bundle(folder: Path, source: _Source, tensors: Checkpoint, precision: Precision) -> Manifest:
    """All files of a bundle but its golden."""
    config, tokens = source.config, source.tokens
    dtype = DTYPES[precision]
    rows = tokens.vocab_size
    table = head = _write_rows(folder / f"embed_tokens.{precision}.weights", tensors, EMBED_TOKENS, rows, dtype)
    if not _head_is_table(tensors, rows):
        head = _write_rows(folder / f"lm_head.{precision}.weights", tensors, LM_HEAD, rows, dtype)
    shutil.copyfile(source.folder / _TOKENIZER, folder / _TOKENIZER)

    def add_decoder_with_head(graph: GraphBuilder) -> None:
        shape = (rows, config.text.hidden_size)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        add_decoder(graph, tensors, config, tokens, graph.external(LM_HEAD, dtype, shape, head, 0, size))

    vision = _write_graph(folder, "vision_encoder", precision, lambda graph: add_vision_encoder(graph, tensors, config))
    decoder = _write_graph(folder, "decoder", precision, add_decoder_with_head)
    manifest = Manifest(
        format_version=1,
        producer=Producer(paliedge=__version__, onnx=onnx.__version__, checkpoint=source.name),
        model=_describe_model(config),
        preprocess=read_preprocess(source.folder, config.vision.image_size),
        tokens=tokens,
        prompts=Prompts(),
        limits=msgspec.structs.replace(source.limits, prefix=source.limits.prefix + config.vision.num_image_tokens),
        embedding=Embedding(
            file=table, dtype=dtype, rows=rows, scale=float(np.sqrt(np.float32(config.text.hidden_size)))
        ),
        targets={"cpu": Target(precision=precision, cache_update="rows", vision_encoder=vision, decoder=decoder)},
        engines=(),
        tokenizer=_TOKENIZER,
        golden=None,
        comparison=None,
        files={},
    )
    return _write_manifest(folder, manifest)


def _write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Add the files that are new in `folder` to the manifest and write it."""
    files = dict(manifest.files)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != MANIFEST and path.name not in files:
            files[path.name] = describe_file(path)
    manifest = msgspec.structs.replace(manifest, files=files)
    write_manifest(folder, manifest)
    return manifest


def _write_rows(path: Path, tensors: Checkpoint, name: str, rows: int, dtype: str) -> str:
    """The rows of real tokens; those behind them are noise."""

    with WeightFile(path) as file:
        file.append(piece.astype(dtype) for piece in _pieces(tensors, name, rows))
    return path.name


def _head_is_table(tensors: Checkpoint, rows: int) -> bool:
    """Whether the rows of real tokens are the same: like transformers, a head that differs is no tied one.

    That holds whatever config.json says: old checkpoints store a copy of the table, some fine-tunes
    a head of their own without saying so.
    """
    return LM_HEAD not in tensors or all(
        np.array_equal(head, table)
        for head, table in zip(_pieces(tensors, LM_HEAD, rows), _pieces(tensors, EMBED_TOKENS, rows), strict=True)
    )


def _pieces(tensors: Checkpoint, name: str, rows: int) -> Iterator[Array]:
    """The first `rows` rows of a matrix, some at a time."""
    for start in range(0, rows, _ROWS_AT_A_TIME):
        yield tensors.rows(name, start, min(start + _ROWS_AT_A_TIME, rows))


def _write_graph(folder: Path, name: str, precision: Precision, add: Callable[[GraphBuilder], None]) -> Graph:
    with WeightFile(folder / f"{name}.{precision}.weights") as weights:
        graph = GraphBuilder(name, weights, DTYPES[precision])
        add(graph)
    model = graph.build()
    path = folder / f"{name}.cpu.onnx"
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
