"""What compares decoding with llama.cpp and onnxruntime-genai, without them: mapping, agreement, ratios."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from transformers import GemmaForCausalLM, PaliGemmaForConditionalGeneration

from benchmarks.peers import decoder_only, genai, harness
from benchmarks.peers.decoder_only import (
    GENAI,
    LLAMA,
    OURS,
    Contender,
    Form,
    compare,
    compare_classes,
    judge,
    make_once,
)
from benchmarks.peers.gemma_checkpoint import write_gemma
from benchmarks.peers.gguf_file import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    gguf_metadata,
    gguf_tensors,
    read_vocabulary,
)
from benchmarks.peers.harness import NUM_TOKENS, Engine
from benchmarks.peers.ours import Ours
from benchmarks.peers.stepping import Fed, FloatArray, forced_log_probs, take_answer
from paliedge.model import SHIPPED_BUNDLE
from tests.tiny import make_tiny

Q8, Q4 = Form(LLAMA, "Q8_0", "int8"), Form(LLAMA, "Q4_0", "int4")
OWN8, OWN4 = Form(OURS, "int8", "int8"), Form(OURS, "int4", "int4")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[PaliGemmaForConditionalGeneration, Path]:
    """A tiny PaliGemma and the folder of its language model."""
    folder = tmp_path_factory.mktemp("peers")
    model = make_tiny(folder / "paligemma", "paligemma")
    write_gemma(folder / "paligemma", folder / "gemma")
    return model, folder / "gemma"


def test_the_language_model_alone_says_the_same(tiny: tuple[PaliGemmaForConditionalGeneration, Path]) -> None:
    """Behind a prefix of one token, for which prefix-LM and causal masks are one."""
    model, folder = tiny
    ids = torch.tensor([[2, 7, 11, 5]])
    alone = GemmaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        wanted = model(input_ids=ids, token_type_ids=torch.tensor([[0, 1, 1, 1]])).logits
        found = alone(input_ids=ids).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_gguf_has_gemmas_tensors(tiny: tuple[PaliGemmaForConditionalGeneration, Path]) -> None:
    """Names as in llama.cpp's converter; norms plus 1; no head beside the table, for they are one."""
    model, folder = tiny
    found = dict(gguf_tensors(folder))
    text = model.model.language_model
    layer = text.layers[1]
    wanted = {
        "token_embd.weight": text.embed_tokens.weight,
        "output_norm.weight": text.norm.weight + 1,
        "blk.1.attn_norm.weight": layer.input_layernorm.weight + 1,
        "blk.1.ffn_norm.weight": layer.post_attention_layernorm.weight + 1,
        "blk.1.attn_q.weight": layer.self_attn.q_proj.weight,
        "blk.1.attn_k.weight": layer.self_attn.k_proj.weight,
        "blk.1.attn_v.weight": layer.self_attn.v_proj.weight,
        "blk.1.attn_output.weight": layer.self_attn.o_proj.weight,
        "blk.1.ffn_gate.weight": layer.mlp.gate_proj.weight,
        "blk.1.ffn_up.weight": layer.mlp.up_proj.weight,
        "blk.1.ffn_down.weight": layer.mlp.down_proj.weight,
    }
    assert len(found) == 2 + 9 * 3
    for name, tensor in wanted.items():
        assert found[name].dtype == (np.float32 if "norm" in name else np.float16)
        np.testing.assert_allclose(found[name], tensor.detach().numpy(), atol=1e-3, err_msg=name)


def test_gguf_has_gemmas_numbers(tiny: tuple[PaliGemmaForConditionalGeneration, Path]) -> None:
    config = json.loads((tiny[1] / "config.json").read_text())
    assert gguf_metadata(config) == {
        "context_length": 8192,
        "embedding_length": 48,
        "block_count": 3,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
    }


def test_every_row_has_a_text(tmp_path: Path) -> None:
    added = [{"id": 0, "content": "<pad>", "special": True}, {"id": 2, "content": "<loc0000>", "special": False}]
    (tmp_path / "t.json").write_text(json.dumps({"model": {"vocab": {"<pad>": 0, "a": 1}}, "added_tokens": added}))
    texts, kinds = read_vocabulary(tmp_path / "t.json", 4)
    assert texts == ["<pad>", "a", "<loc0000>", "[PAD3]"]
    assert kinds == [CONTROL, NORMAL, USER_DEFINED, UNUSED]


@pytest.mark.parametrize(("family", "tied"), [("paligemma2", True), ("paligemma", False)])
def test_other_checkpoints_are_refused(family: str, tied: bool, tmp_path: Path) -> None:
    make_tiny(tmp_path / "other", family, tied=tied)
    with pytest.raises(ValueError, match="PaliGemma 1 with a tied head"):
        write_gemma(tmp_path / "other", tmp_path / "gemma")


class Scripted:
    """Logits [4] behind each step, one after the other; remembers what it was fed."""

    def __init__(self, *logits: Sequence[float]) -> None:
        self._logits = logits
        self.fed: list[list[int]] = []

    def reset(self) -> None:
        self.fed = []

    def step(self, ids: Sequence[int]) -> FloatArray:
        self.fed.append(list(ids))
        return np.array(self._logits[len(self.fed) - 1], np.float32)


def test_tokens_are_forced_and_rows_behind_the_tokens_have_no_say() -> None:
    """The fourth row is no token: the largest logit there is neither chosen nor in the sum."""
    engine = Scripted([0, 0, 1, 50], [2, 0, 0, 50], [0, 3, 0, 50])
    fed = Fed([2, 9], [1, 0], 3)
    answer = take_answer(engine, fed)
    assert answer["chosen"] == [2, 0, 1]
    assert len(answer["tokens"]) == 2
    assert engine.fed == [[2, 9], [1], [0]]
    assert forced_log_probs(engine, fed) == pytest.approx([-np.log(2 + np.e), 2 - np.log(np.exp(2) + 2)])
    assert engine.fed == [[2, 9], [1]]


def said(*log_probs: float) -> dict[str, Any]:
    return {"log_probs": list(log_probs), "chosen": [1, 2, 3], "described": {"bytes_per_token": 10}}


@pytest.mark.parametrize(
    ("precision", "found", "agrees"),
    [
        pytest.param("16-bit", said(-1.0, -2.0), True, id="the same"),
        pytest.param("16-bit", said(-1.0, -2.015), True, id="inside"),
        pytest.param("16-bit", said(-1.0, -2.03), False, id="one token outside"),
        pytest.param("int4", said(-1.0, -2.03), True, id="inside a looser bound"),
        pytest.param("int4", said(-1.0, -5.0), False, id="a wrong graph"),
        pytest.param("int4", said(-1.0, float("nan")), False, id="no number"),
        pytest.param("int4", said(-1.0), False, id="a token short"),
    ],
)
def test_who_is_off_does_not_agree(precision: str, found: dict[str, Any], agrees: bool) -> None:
    judged = judge(precision, found, said(-1.0, -2.0), None)
    assert judged["agrees"] is agrees
    assert judged["bound"] == dict([decoder_only.BOUNDS[precision]])


def test_a_peer_is_compared_with_ours_of_its_class_too() -> None:
    judged = judge("int8", said(-1.0, -2.1), said(-1.0, -2.0), said(-1.0, -2.05))
    assert judged["off_ours_of_its_class"]["largest"] == pytest.approx(0.05)
    assert judged["largest"] == pytest.approx(0.1)
    assert judged["same_choices"] == "3 of 3"


def test_quantised_forms_of_a_wrong_graph_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own bounds are loose; the exact form's is not."""
    exact = Form(LLAMA, "F16", "16-bit")
    answers = {decoder_only.REFERENCE: said(-1.0), OWN8: said(-1.01), exact: said(-1.1), Q8: said(-1.1)}
    monkeypatch.setattr(
        decoder_only, "question", lambda _, form: (answers[form], contender(form) if form.timed else None)
    )
    known, agreeing = decoder_only.agree_all(decoder_only.Workshop(tmp_path, 1, 1), [OWN8, exact, Q8])
    assert [one.form for one in agreeing] == [OWN8]
    assert not known["llama.cpp Q8_0"]["agreement"]["agrees"]


def contender(form: Form) -> Contender:
    return Contender(form, ("engine",), ("few",), ("many",), dict)


def test_who_disagrees_or_fails_is_recorded_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {decoder_only.REFERENCE: said(-1.0), OWN8: said(-1.01), Q8: said(-4.0), Q4: said(-1.2)}

    def question(_: object, form: Form) -> tuple[dict[str, Any], Contender | None]:
        if form.engine == GENAI:
            raise RuntimeError("no such operator")
        return answers[form], contender(form)

    monkeypatch.setattr(decoder_only, "question", question)
    broken = Form(GENAI, "int8", "int8")
    shop = decoder_only.Workshop(tmp_path, 1, 1)
    known, agreeing = decoder_only.agree_all(shop, [OWN8, Q8, Q4, broken])
    assert [one.form for one in agreeing] == [OWN8, Q4]
    assert {title: one["agreement"]["agrees"] for title, one in known.items()} == {
        "paliedge int8": True,
        "llama.cpp Q8_0": False,
        "llama.cpp Q4_0": True,
        "onnxruntime-genai int8": False,
    }
    assert known[broken.title]["error"] == "no such operator"


def test_disagreement_ends_with_1_behind_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"llama.cpp Q8_0": {"precision": "int8", "agreement": {"agrees": False}}}
    monkeypatch.setattr(decoder_only, "agree_all", lambda *_: (known, []))
    monkeypatch.setattr("sys.argv", ["", "mid", "--work", str(tmp_path), "--results", str(tmp_path), "--threads", "1"])
    with pytest.raises(SystemExit) as stopped:
        decoder_only.main()
    assert stopped.value.code
    written = json.loads((tmp_path / "peers_decoder_mid.json").read_text())
    assert written["engines"] == known
    assert written["ratios"] == {}


def test_ours_has_no_vision_encoder_beside_peers_without_one() -> None:
    alone, whole = Ours(SHIPPED_BUNDLE, 1, num_prefix=4), Ours(SHIPPED_BUNDLE, 1)
    assert alone._session._graphs.vision is None
    assert whole._session._graphs.vision is not None
    assert len(alone.answer()["chosen"]) == len(whole.answer()["chosen"]) == NUM_TOKENS


def test_a_form_asks_with_few_tokens_and_answers_with_many() -> None:
    assert contender(Q8).engine(2).command == ("engine", "many", "--threads", "2")
    assert contender(Q8).engine(2).name == "llama.cpp Q8_0"
    assert [form for form in decoder_only.FORMS if not form.timed] == [
        Form(LLAMA, "F16", "16-bit"),
        Form(GENAI, "fp32", "fp32"),
    ]


def one_round(token: float, prefill: float, peak: int) -> dict[str, Any]:
    answer = {"vision": 0.0, "prefill": prefill, "tokens": [token, token, 9.0], "answer": 1.0}
    return {"load": 1.0, "first_answer": 1.0, "answers": [answer], "peak_rss": peak, "anonymous": peak // 2}


def test_ratios_are_of_medians_with_their_range_over_rounds() -> None:
    """The machine halves its speed in the second round; the ratio of that round does not notice."""
    peer = [one_round(0.2, 3.0, 600), one_round(0.4, 6.0, 600), one_round(0.3, 3.0, 600)]
    own = [one_round(0.1, 2.0, 300), one_round(0.2, 4.0, 300), one_round(0.1, 2.0, 300)]
    found = compare(peer, own)
    assert found["decode"] == {"ratio": 3.0, "range": [2.0, 3.0]}
    assert found["prefill"] == {"ratio": 1.5, "range": [1.5, 1.5]}
    assert found["peak_rss"]["ratio"] == found["anonymous"]["ratio"] == 2.0


def test_who_fails_in_its_turn_is_recorded_and_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_child(engine: Engine) -> dict[str, Any]:
        if engine.name == Q8.title:
            raise RuntimeError("Traceback\n  somewhere\nMemoryError: none left")
        return one_round(0.1, 1.0, 100)

    monkeypatch.setattr(harness, "run_child", run_child)
    monkeypatch.setattr(decoder_only, "probe_bandwidth", lambda _: 30e9)
    timed = decoder_only.time_all([contender(form) for form in (OWN8, OWN4, Q8, Q4)], 2, 1)
    assert timed["failures"] == {"llama.cpp Q8_0": "MemoryError: none left"}
    assert set(timed["engines"]) == {"paliedge int8", "paliedge int4", "llama.cpp Q4_0"}
    assert set(timed["ratios"]) == {"llama.cpp Q4_0 / paliedge int4"}
    assert timed["read_gb_per_s"] == {"median": 30.0, "range": [30.0, 30.0]}


def test_only_equal_classes_are_compared() -> None:
    rounds = {form.title: [one_round(0.1, 1.0, 100)] for form in (OWN8, OWN4, Q8, Q4)}
    assert set(compare_classes([OWN8, OWN4, Q8, Q4], rounds)) == {
        "llama.cpp Q8_0 / paliedge int8",
        "llama.cpp Q4_0 / paliedge int4",
    }
    assert compare_classes([OWN8, Q4], rounds) == {}, "ours of that class did not agree"


def test_achieved_bandwidth_is_a_steps_bytes_over_its_time(tmp_path: Path) -> None:
    known = {"llama.cpp Q8_0": {"bytes_per_token": 2_000_000_000}}
    timed = {"engines": {"llama.cpp Q8_0": {"token": 0.1}}, "ratios": {}}
    decoder_only.write_result(tmp_path / "result.json", known, timed, size="mid")
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["engines"]["llama.cpp Q8_0"]["decode_gb_per_s"] == 20.0
    assert written["size"] == "mid"
    assert "mask" in written["declared"]


def test_what_is_half_made_is_made_again(tmp_path: Path) -> None:
    def break_off(path: Path) -> None:
        path.mkdir()
        (path / "half").touch()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        make_once(tmp_path / "bundle", break_off)
    assert not (tmp_path / "bundle").exists()
    made = make_once(tmp_path / "bundle", lambda path: path.mkdir())
    assert list(made.iterdir()) == []
    assert make_once(made, break_off) == made


def test_a_steps_bytes_leave_out_what_is_looked_up(tmp_path: Path) -> None:
    """Table and rotations are read by row; a table that is the head counts as the head."""
    sizes = {"table": (64, 4), "cos_cache": (32, 4), "head": (4, 8), "norm": (4,)}
    initializers = [
        helper.make_tensor(name, TensorProto.FLOAT, shape, np.zeros(shape, np.float32).tobytes(), raw=True)
        for name, shape in sizes.items()
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embeds"], name="/model/embed_tokens/Gather"),
        helper.make_node("GroupQueryAttention", ["embeds", "cos_cache"], ["attended"], name="/model/layers.0/attn"),
        helper.make_node("SimplifiedLayerNormalization", ["attended", "norm"], ["normed"], name="/model/norm"),
        helper.make_node("MatMulNBits", ["normed", "head"], ["logits"], name="/lm_head/MatMul", bits=8, block_size=32),
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "graph", [], [], initializers)), tmp_path / "model.onnx")
    assert genai.describe(tmp_path) == {
        "bytes_per_token": 4 * (4 * 8 + 4),
        "tensors": {"table Gather float32": 1, "head MatMulNBits 8 bits block 32": 1},
    }
