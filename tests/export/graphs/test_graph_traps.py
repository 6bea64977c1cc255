"""The places where ports of PaliGemma go wrong, each with a test of its own.

The reference is transformers in float32, called with token_type_ids.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PaliGemmaForConditionalGeneration

from paliedge_export.exporter import export_bundle
from paliedge_export.gate.transformers_model import cache_name, reference_logits
from tests.export.conftest import Tiny
from tests.export.graph_reader import Graphs
from tests.tiny import make_tiny

Array = npt.NDArray[Any]
NUM_IMAGE_TOKENS = 16
SHORT = [2, 300, 301, 4]
LONG = [2, 310, 320, 330, 340, 350, 4]
CONTRIB_OPERATORS = {
    "vision_encoder": {"MultiHeadAttention"},
    "decoder": {"SkipSimplifiedLayerNormalization"},
    "mask_decoder": set(),
}


def assert_near(found: Array, wanted: Array) -> None:
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)


def make_pixels(seed: int = 0, batch: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (batch, 3, 56, 56)).astype(np.float32)


def embed_prefix(graphs: Graphs, ids: Sequence[int], seed: int = 0) -> Array:
    """[1, N + S, H]: an image and a prompt."""
    return np.concatenate([graphs.encode(make_pixels(seed)), graphs.embed([ids])], axis=1)


def ask_reference(
    model: PaliGemmaForConditionalGeneration, graphs: Graphs, ids: list[int], num_tokens: int = 1
) -> Array:
    """Logits [num_tokens, vocabulary] of greedy decoding."""
    tokens = graphs.manifest.tokens
    with torch.no_grad():
        return reference_logits(
            model, torch.from_numpy(make_pixels()), ids, tokens.image, tokens.vocab_size, num_tokens
        )


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def fill_cache(graphs: Graphs, outputs: dict[str, Array], lengths: Sequence[int], capacity: int) -> dict[str, Array]:
    """A cache with each row's first `lengths` places from a prefill and finite rubbish behind them."""
    rng = np.random.default_rng(7)
    cache = {}
    for name, empty in graphs.empty_cache(len(lengths), capacity).items():
        cache[name] = rng.normal(0, 1e3, empty.shape).astype(np.float32)
        for row, length in enumerate(lengths):
            cache[name][row, :, :length] = outputs[name.replace("past_key_values", "present")][row, :, :length]
    return cache


def test_image_features_are_not_divided_by_the_embedding_scale(tiny: Tiny) -> None:
    pixels = make_pixels(batch=2)
    with torch.no_grad():
        wanted = tiny.model.get_image_features(torch.from_numpy(pixels)).pooler_output.numpy()
    found = Graphs(tiny.bundle).encode(pixels)
    assert np.median(found / wanted) == pytest.approx(1, abs=1e-4)
    assert_near(found, wanted)


def test_text_embeddings_are_scaled_once_and_image_features_never(tiny: Tiny) -> None:
    graphs = Graphs(tiny.bundle)
    scale = graphs.manifest.embedding.scale
    assert scale == pytest.approx(graphs.manifest.model.text.hidden_size**0.5)
    with torch.no_grad():
        wanted = tiny.model.get_input_embeddings()(torch.tensor([LONG])).numpy()
    assert_near(graphs.embed([LONG]), wanted)

    logits = ask_reference(tiny.model, graphs, LONG)[0]
    features, text = graphs.encode(make_pixels()), graphs.embed([LONG])

    def error(features: Array, text: Array) -> float:
        embeds = np.concatenate([features, text], axis=1)
        answer = graphs.run(embeds, [embeds.shape[1]])
        return abs(float(answer["log_prob"][0] - log_softmax(logits)[answer["next_token"][0]]))

    assert error(features, text) < 1e-4
    assert error(features / scale, text) > 1e-2
    assert error(features * scale, text) > 1e-2
    assert error(features, text * scale) > 1e-2


def test_the_first_prefix_token_sees_the_last_one(tiny: Tiny) -> None:
    graphs = Graphs(tiny.bundle)
    length = NUM_IMAGE_TOKENS + len(LONG)
    found, other = (graphs.run(embed_prefix(graphs, ids), [length]) for ids in (LONG, [*LONG[:-1], LONG[-1] + 300]))
    for part in ("key", "value"):
        np.testing.assert_array_equal(found[f"present.0.{part}"][:, :, 0], other[f"present.0.{part}"][:, :, 0])
        assert np.abs(found[f"present.1.{part}"][:, :, 0] - other[f"present.1.{part}"][:, :, 0]).max() > 1e-3


def test_a_generated_token_alters_nothing_before_it(tiny: Tiny) -> None:
    """Two generated tokens behind the prefix in one run: what stands before each stays as it was."""
    graphs = Graphs(tiny.bundle)
    prefix = embed_prefix(graphs, SHORT)
    length = prefix.shape[1]
    alone = graphs.run(prefix, [length])
    one, two = (
        graphs.run(np.concatenate([prefix, graphs.embed([ids])], axis=1), [length]) for ids in ([400], [400, 500])
    )
    for name in (name for name in alone if name.startswith("present.")):
        assert_near(one[name][:, :, :length], alone[name])
        assert_near(two[name][:, :, : length + 1], one[name])


def test_a_generated_token_sees_the_whole_prefix_and_those_before_it(tiny: Tiny) -> None:
    graphs = Graphs(tiny.bundle)
    prefix = embed_prefix(graphs, SHORT)
    length = prefix.shape[1]
    outputs = graphs.run(prefix, [length])
    cache = fill_cache(graphs, outputs, [length], length + 4)
    token = graphs.embed([[int(outputs["next_token"][0])]])
    plain = graphs.run(token, [length], start=[length], past=cache)["log_prob"][0]
    for place in (0, NUM_IMAGE_TOKENS - 1, length - 1):
        changed = {name: array.copy() for name, array in cache.items()}
        for array in changed.values():
            array[:, :, place] = -array[:, :, place]
        assert graphs.run(token, [length], start=[length], past=changed)["log_prob"][0] != plain, place


def test_positions_count_from_one_at_prefill_and_go_on_at_decode(tiny: Tiny) -> None:
    """Keys of the first layer carry nothing but the embedding and its position."""
    graphs = Graphs(tiny.bundle)
    prefix = embed_prefix(graphs, SHORT)
    length = prefix.shape[1]
    image = graphs.manifest.tokens.image
    ids = torch.tensor([[image] * NUM_IMAGE_TOKENS + SHORT])
    named = cache_name(tiny.model)
    with torch.no_grad():
        output = tiny.model(
            input_ids=ids,
            pixel_values=torch.from_numpy(make_pixels()),
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),
            use_cache=True,
        )
        tiny.model(
            input_ids=torch.tensor([[400]]),
            attention_mask=torch.ones((1, length + 1), dtype=torch.long),
            token_type_ids=torch.ones((1, 1), dtype=torch.long),
            use_cache=True,
            **{named: output[named]},
        )
    wanted = output[named].layers[0].keys.numpy()
    outputs = graphs.run(prefix, [length])
    cache = fill_cache(graphs, outputs, [length], length + 3)
    decoded = graphs.run(graphs.embed([[400]]), [length], start=[length], past=cache)
    assert_near(outputs["present.0.key"], wanted[:, :, :length])
    assert_near(decoded["present.0.key"][:, :, 0], wanted[:, :, length])


@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
def test_rows_that_are_no_tokens_never_win(family: str, tmp_path: Path) -> None:
    """In the hub's checkpoints <image> and the padding behind it are noise; here it is loud noise."""
    folder = tmp_path / "checkpoint"
    make_tiny(folder, family)
    tensors = load_file(folder / "model.safetensors")
    table = tensors["language_model.model.embed_tokens.weight"]
    first = json.loads((folder / "config.json").read_text())["image_token_index"]
    table[first:] *= 100 / table[first:].abs().mean()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    export_bundle(str(folder), tmp_path / "bundle", compare=False)
    graphs = Graphs(tmp_path / "bundle")
    assert graphs.manifest.tokens.vocab_size == first < len(table)
    model = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        everything = reference_logits(
            model, torch.from_numpy(make_pixels()), SHORT, first, len(table), num_new_tokens=1
        )[0]
    assert everything.argmax() >= first
    answer = graphs.run(embed_prefix(graphs, SHORT), [NUM_IMAGE_TOKENS + len(SHORT)], allowed=(0, 2**31))
    assert answer["next_token"][0] == everything[:first].argmax()
    assert answer["log_prob"][0] == pytest.approx(log_softmax(everything[:first]).max(), abs=1e-4)


def test_the_image_token_never_wins_where_a_fine_tune_added_tokens_behind_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    make_tiny(folder, "paligemma")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    image = tokenizer.get_vocab()["<image>"]
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = load_file(folder / "model.safetensors")
    table = tensors["language_model.model.embed_tokens.weight"]
    table[image + 1] = table[3] * 100
    table[image] = table[image + 1] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    export_bundle(str(folder), tmp_path / "bundle", compare=False)
    graphs = Graphs(tmp_path / "bundle")
    assert graphs.manifest.tokens.vocab_size == image + 2
    length = NUM_IMAGE_TOKENS + len(SHORT)
    for sign in (1, -1):  # one of the two makes the planted logits the largest
        found = graphs.run(sign * embed_prefix(graphs, SHORT), [length], allowed=(0, 2**31))
        assert found["next_token"][0] != image
    only = graphs.run(embed_prefix(graphs, SHORT), [length], allowed=(image, image + 1))
    assert only["next_token"][0] == image + 1


def test_allowed_ids_restrict_the_winner_but_not_its_probability(tiny: Tiny) -> None:
    graphs = Graphs(tiny.bundle)
    logits = ask_reference(tiny.model, graphs, LONG)[0]
    tokens = graphs.manifest.tokens
    first, last = tokens.first_location, tokens.first_location + tokens.num_locations - 1
    best = int(logits.argmax())
    ranges = [(first, last), (best + 1, best + 40), (best - 40, best - 1), (best + 7, best + 7)]
    for low, high in ranges:
        answer = graphs.run(embed_prefix(graphs, LONG), [NUM_IMAGE_TOKENS + len(LONG)], allowed=(low, high))
        winner = int(answer["next_token"][0])
        assert winner == low + logits[low : high + 1].argmax()
        assert answer["log_prob"][0] == pytest.approx(log_softmax(logits)[winner], abs=1e-4)


def test_rows_with_prefixes_of_different_lengths_answer_as_if_alone(tiny: Tiny) -> None:
    graphs = Graphs(tiny.bundle)
    prompts = (LONG, SHORT, [2, 4])
    prefixes = [embed_prefix(graphs, ids, seed)[0] for seed, ids in enumerate(prompts)]
    lengths = [len(prefix) for prefix in prefixes]
    padded = np.random.default_rng(1).normal(0, 30, (len(prefixes), max(lengths) + 2, prefixes[0].shape[1]))
    for row, prefix in enumerate(prefixes):
        padded[row, : len(prefix)] = prefix
    batch = graphs.run(padded, lengths)
    batch_cache = fill_cache(graphs, batch, lengths, max(lengths) + 5)
    batch_next = graphs.run(
        graphs.embed([[int(token)] for token in batch["next_token"]]), lengths, start=lengths, past=batch_cache
    )
    assert len(set(batch["log_prob"])) == len(prefixes)
    for row, prefix in enumerate(prefixes):
        alone = graphs.run(prefix[None], [len(prefix)])
        cache = fill_cache(graphs, alone, [len(prefix)], len(prefix))
        token = graphs.embed([[int(alone["next_token"][0])]])
        alone_next = graphs.run(token, [len(prefix)], start=[len(prefix)], past=cache)
        for found, wanted in ((batch, alone), (batch_next, alone_next)):
            assert found["next_token"][row] == wanted["next_token"][0]
            assert found["log_prob"][row] == pytest.approx(wanted["log_prob"][0], abs=1e-4)


def test_decoding_with_rubbish_behind_the_filled_cache_is_the_references(tiny: Tiny) -> None:
    graphs = Graphs(tiny.bundle)
    logits = ask_reference(tiny.model, graphs, SHORT, num_tokens=4)
    length = NUM_IMAGE_TOKENS + len(SHORT)
    answer = graphs.run(embed_prefix(graphs, SHORT), [length])
    cache = fill_cache(graphs, answer, [length], length + 6)
    for step, row in enumerate(logits):
        assert answer["next_token"][0] == row.argmax()
        assert answer["log_prob"][0] == pytest.approx(log_softmax(row).max(), abs=1e-4)
        token = graphs.embed([[int(row.argmax())]])
        answer = graphs.run(token, [length], start=[length + step], past=cache)
        for name, array in cache.items():
            array[:, :, length + step] = answer[name.replace("past_key_values", "present")][:, :, 0]


def test_the_sliding_window_of_paligemma_2_is_ignored(tmp_path: Path) -> None:
    """PaliGemma was trained without one; transformers' would cut the cache at 896 pixels."""
    for window in (4, 4096):
        make_tiny(tmp_path / f"{window}", "paligemma2", sliding_window=window)
        export_bundle(str(tmp_path / f"{window}"), tmp_path / f"bundle-{window}", compare=False)
    for name in ("decoder.cpu.onnx", "decoder.fp32.weights"):
        assert (tmp_path / "bundle-4" / name).read_bytes() == (tmp_path / "bundle-4096" / name).read_bytes()


def test_paligemma_2_caps_every_layers_scores_and_the_logits(paligemma: Tiny, paligemma2: Tiny) -> None:
    for tiny, extra in ((paligemma, 0), (paligemma2, 1)):
        graphs = Graphs(tiny.bundle)
        num_layers = graphs.manifest.model.text.num_layers
        kinds = Counter(node.op_type for node in graphs.decoder_model.graph.node)
        assert kinds["Softmax"] == num_layers
        assert kinds["Tanh"] == extra * (num_layers + 1)


def test_final_softcap_counts_in_the_log_probability(tmp_path: Path) -> None:
    """tanh leaves the winner as it is, so that only the probability tells."""
    found = {}
    for cap in (1.0, 30.0):
        model = make_tiny(tmp_path / f"{cap}", "paligemma2", final_logit_softcapping=cap)
        export_bundle(str(tmp_path / f"{cap}"), tmp_path / f"bundle-{cap}", compare=False)
        graphs = Graphs(tmp_path / f"bundle-{cap}")
        answer = graphs.run(embed_prefix(graphs, LONG), [NUM_IMAGE_TOKENS + len(LONG)])
        wanted = log_softmax(ask_reference(model, graphs, LONG)[0]).max()
        assert answer["log_prob"][0] == pytest.approx(wanted, abs=1e-4)
        found[cap] = float(answer["log_prob"][0])
    assert found[1.0] < found[30.0] - 1e-3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graphs_use_what_the_oldest_readers_take(precision: str, tiny: Tiny, tmp_path: Path) -> None:
    bundle = tiny.bundle
    if precision == "fp16":
        export_bundle(str(tiny.checkpoint), tmp_path / "bundle", precision="fp16", compare=False)
        bundle = tmp_path / "bundle"
    for path in sorted(bundle.glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(str(path))
        opsets = {opset.domain: opset.version for opset in model.opset_import}
        assert opsets.pop("") == 20
        assert set(opsets) <= {"com.microsoft"}
        assert model.ir_version == 10
        contrib = {node.op_type for node in model.graph.node if node.domain}
        assert contrib == CONTRIB_OPERATORS[model.graph.name]


def test_weights_lie_at_page_boundaries_and_the_tied_head_is_the_embedding_table(tiny: Tiny) -> None:
    graphs = Graphs(tiny.bundle)
    places: dict[str, list[tuple[int, int]]] = {}
    for model in (graphs.vision_model, graphs.decoder_model):
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in tensor.external_data}
                assert int(where["offset"]) % 4096 == 0, tensor.name
                places.setdefault(where["location"], []).append((int(where["offset"]), int(where["length"])))
    table = graphs.manifest.embedding.file
    assert places.pop(table) == [(0, (tiny.bundle / table).stat().st_size)]
    assert len(places) == 2
    for file, spans in places.items():
        ends = [offset + length for offset, length in sorted(spans)]
        assert all(end <= start for end, (start, _) in zip(ends, sorted(spans)[1:], strict=False)), file
        assert ends[-1] == (tiny.bundle / file).stat().st_size


def test_the_graphs_stand_alone_in_another_folder(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.bundle, tmp_path / "elsewhere")
    prefix = embed_prefix(Graphs(tmp_path / "elsewhere"), SHORT)
    np.testing.assert_array_equal(prefix, embed_prefix(Graphs(tiny.bundle), SHORT))
