"""Write a bundle's files: weights, graphs, tokenizer and manifest. Decides nothing, compares nothing."""

# Tests: tests/export/test_exporter.py.
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import onnx

from paliedge import __version__
from paliedge.bundle.digests import describe_file
from paliedge.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Embedding,
    Graph,
    Limits,
    Manifest,
    Model,
    Preprocess,
    Producer,
    Prompts,
    Target,
    Tensor,
    Text,
    Tokens,
    Vision,
    write_manifest,
)
from paliedge.inputs.tokenizer import PromptTokenizer
from paliedge_export.checkpoint.config import ModelConfig
from paliedge_export.checkpoint.safetensors_reader import EMBED_TOKENS, Array
from paliedge_export.graphs.builder import GraphBuilder
from paliedge_export.graphs.decoder import add_decoder, add_prefill
from paliedge_export.graphs.mask_decoder import CODEBOOK, add_mask_decoder, write_mask_weights
from paliedge_export.graphs.vision_encoder import add_vision_encoder
from paliedge_export.targets import TARGETS, Layout, Lowering
from paliedge_export.weights.files import (
    QUANTIZED,
    ROW_SCALES,
    Encoding,
    StoredGraphs,
    Tensors,
    WeightFile,
    write_weights,
)
from paliedge_export.weights.head_vocabulary import HeadVocabulary
from paliedge_export.weights.samples import PROMPTS, Sample, builtin_samples

_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class ModelSource:
    """What is exported: a checkpoint's small files read, and what was asked of the bundle.

    `tokenizer` is the bundle's tokenizer.json, `vocabulary` that of a reduced head, None for all tokens;
    `mask_decoder` the tensors of one, if there is one.
    """

    name: str
    folder: Path
    config: ModelConfig
    tokens: Tokens
    limits: Limits
    tokenizer: bytes
    vocabulary: HeadVocabulary | None
    mask_decoder: Mapping[str, Array] | None
    prompts: Prompts
    preprocess: Preprocess

    @property
    def kept_tokens(self) -> Sequence[int] | None:
        """Ids of a reduced head."""
        return self.vocabulary.token_ids if self.vocabulary else None

    @property
    def words(self) -> Sequence[int]:
        """Ids that an answer may hold: all tokens but the image's, or those of a reduced head."""
        if self.vocabulary:
            return self.vocabulary.token_ids
        return [index for index in range(self.tokens.vocab_size) if index != self.tokens.image]

    @property
    def golden_samples(self) -> list[Sample]:
        """What the golden answers answer: prompts that the head has words for and the limits have room for."""
        prompts = PROMPTS if not self.vocabulary else tuple(f"detect {label}" for label in self.vocabulary.labels[:3])
        tokenizer = PromptTokenizer(self.tokenizer, self.tokens)
        room = self.limits.prefix - self.config.vision.num_image_tokens
        fitting = [prompt for prompt in prompts if len(tokenizer.encode_prefix(prompt)) <= room]
        return builtin_samples(tuple(fitting) or ("ocr",))


StoredByLayout = dict[Layout, StoredGraphs]


def write_all_weights(
    folder: Path, source: ModelSource, tensors: Tensors, targets: Sequence[str], encoding: Encoding
) -> StoredByLayout:
    """Floats once for all targets, integers once a layout."""
    layouts = list(dict.fromkeys(TARGETS[name].lowering.layout for name in targets))
    rows = source.tokens.vocab_size
    if encoding.precision not in QUANTIZED:
        return dict.fromkeys(layouts, write_weights(folder, tensors, source.config, rows, encoding))
    return {
        layout: write_weights(
            folder, tensors, source.config, rows, replace(encoding, layout=layout, with_table=layout == layouts[0])
        )
        for layout in layouts
    }


def write_bundle(
    folder: Path, source: ModelSource, stored: StoredByLayout, targets: Sequence[str], encoding: Encoding
) -> Manifest:
    """Graphs on the weights that are `stored` in `folder`, tokenizer and manifest."""
    (folder / _TOKENIZER).write_bytes(source.tokenizer)
    tensors_of_first = next(iter(stored.values())).decoder
    table = tensors_of_first[EMBED_TOKENS]
    mask_decoder = _write_mask_decoder(folder, source.mask_decoder) if source.mask_decoder else None
    written = {name: write_target(folder, source, name, stored, encoding) for name in targets}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        producer=Producer(paliedge=__version__, onnx=onnx.__version__, checkpoint=source.name),
        model=_describe_model(source.config),
        preprocess=source.preprocess,
        tokens=source.tokens,
        prompts=source.prompts,
        limits=source.limits,
        embedding=Embedding(
            file=table.file,
            dtype=table.dtype.name,
            rows=source.tokens.vocab_size,
            scale=float(np.sqrt(np.float32(source.config.text.hidden_size))),
            row_scales=tensors_of_first[ROW_SCALES].file if ROW_SCALES in tensors_of_first else None,
        ),
        targets={name: msgspec.structs.replace(one, mask_decoder=mask_decoder) for name, one in written.items()},
        engines=(),
        tokenizer=_TOKENIZER,
        golden=None,
        comparisons={},
        not_compared={},
        vocabulary=source.vocabulary.describe() if source.vocabulary else None,
        calibration=None,
        precision_report=None,
        files={},
    )
    return add_files(folder, manifest)


def add_files(folder: Path, manifest: Manifest) -> Manifest:
    """Add the files that are new in `folder` to the manifest and write it."""
    files = dict(manifest.files)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != MANIFEST and path.name not in files:
            files[path.name] = describe_file(path)
    return write_manifest(folder, msgspec.structs.replace(manifest, files=files))


def write_target(folder: Path, source: ModelSource, name: str, stored: StoredByLayout, encoding: Encoding) -> Target:
    """A target's own graphs; a file that another target has written alike is written again, the same."""
    lowering = TARGETS[name].lowering
    vision, decoder, prefill = stored[lowering.layout]
    compute_type = encoding.dtype
    if lowering.layout == "contrib":
        compute_type = np.dtype(np.float32)
    capacity = source.limits.capacity

    def add_vision(graph: GraphBuilder) -> None:
        add_vision_encoder(graph, source.config, lowering)

    def add_text(graph: GraphBuilder) -> None:
        add_decoder(graph, source.config, source.tokens, lowering, capacity, source.kept_tokens)

    fast = None
    if prefill:
        builder = GraphBuilder("prefill", lowering, prefill, compute_type)
        fast = _write_graph(folder, builder, lambda graph: add_prefill(graph, source.config))
    return Target(
        precision=encoding.precision,
        cache_update=lowering.cache_update,
        vision_encoder=_write_graph(folder, GraphBuilder("vision_encoder", lowering, vision, compute_type), add_vision),
        decoder=_write_graph(folder, GraphBuilder("decoder", lowering, decoder, compute_type), add_text),
        mask_decoder=None,
        prefill=fast,
        independent_rows=not (encoding.precision == "int8" and lowering.layout == "contrib"),
    )


def _write_mask_decoder(folder: Path, tensors: Mapping[str, Array]) -> Graph:
    """One graph, in float32 and by the oldest opset: good for every target."""
    with WeightFile(folder / "mask_decoder.fp32.weights") as file:
        write_mask_weights(file, tensors)
    lowering = TARGETS["jetpack6"].lowering
    graph = GraphBuilder("mask_decoder", lowering, file.tensors, np.float32)
    return _write_graph(folder, graph, lambda graph: add_mask_decoder(graph, tensors[CODEBOOK].shape[1]))


def _write_graph(folder: Path, graph: GraphBuilder, add: Callable[[GraphBuilder], None]) -> Graph:
    add(graph)
    model = graph.build()
    path = folder / f"{graph.name}.{_kind(graph.lowering, model)}.onnx"
    onnx.save_model(model, path)
    return Graph(
        file=path.name,
        weights=tuple(sorted(graph.weight_files)),
        inputs=tuple(_describe_tensor(info) for info in model.graph.input),
        outputs=tuple(_describe_tensor(info) for info in model.graph.output),
    )


def _kind(lowering: Lowering, model: onnx.ModelProto) -> str:
    """Targets whose graphs are the same share a file."""
    if lowering.layout == "contrib":
        return "cpu"
    return f"opset{next(opset.version for opset in model.opset_import if not opset.domain)}"


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
