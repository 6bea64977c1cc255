"""Nothing is timed that does not agree, no failure is lost, and ratios are of what was measured together."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import whole_model
from benchmarks.peers.comparisons import CLASSES, STAGES, compare_engines
from benchmarks.peers.harness import Engine, first_error, load_inputs, run_child, save_inputs, take_turns
from benchmarks.peers.hf import Transformers
from benchmarks.peers.ours import Ours, inputs_for
from benchmarks.peers.whole_model import (
    SIZES,
    Contender,
    Judge,
    agree,
    compare_answers,
    copy_samples,
    export_command,
    list_contenders,
    merge,
    references_for,
)
from paliedge.bundle.bundle import Bundle
from paliedge.model import SHIPPED_BUNDLE
from tests.paths import SHAPES_CHECKPOINT

OURS = (sys.executable, "-m", "benchmarks.peers.ours", str(SHIPPED_BUNDLE), "--threads", "1")
EXACT = {"log_probs": [-1.0, -2.0], "chosen": [7, 8]}
SHORT = {"log_probs": [-1.0], "chosen": [7]}


def answers(offset: float) -> dict[str, Any]:
    return {"log_probs": [-1.0, -2.0 + offset], "chosen": [7, 8]}


def contender(name: str, precision: str = "fp32", peer: str = "transformers", bundle: str = "") -> Contender:
    return Contender(Engine(name, precision, (name,)), peer, bundle)


def judge_that_hears(said: dict[str, Any], references: dict[str, Contender]) -> Judge:
    """`said` is by the first word of a command, and by the first and last where that is not enough."""

    def ask(engine: Engine) -> dict[str, Any]:
        found = said.get(f"{engine.command[0]} {engine.command[-1]}", said.get(engine.command[0]))
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, dict)
        return found

    return Judge(references, ask)


REFERENCES = {"cpu-fp32": contender("ours", peer="paliedge"), "cpu-int4": contender("ours int4", peer="paliedge")}


def test_our_child_measures_and_says_what_it_finds_likely() -> None:
    found = run_child(Engine("ours", "fp32", (*OURS, "--answers", "2")))
    assert len(found["answers"]) == 2
    assert all(0 < one["prefill"] < one["answer"] and len(one["tokens"]) == 9 for one in found["answers"])
    assert found["peak_rss"] > found["anonymous"] > 0
    assert found["first_answer"] > 0
    said = run_child(Engine("ours", "fp32", (*OURS, "--agree")))
    assert len(said["log_probs"]) == 9
    assert said["chosen"] == found["answers"][0]["chosen"]


def test_overhead_is_what_lies_between_the_steps_of_an_answer() -> None:
    found = run_child(Engine("ours", "fp32", (*OURS, "--overhead", "3")))
    assert found["steps"] == 3 * 8  # ten tokens are prefill and nine steps, between which there are eight gaps
    assert 0 < found["outside_us"] < found["step_us"]
    assert found["share"] == pytest.approx(found["outside_us"] / found["step_us"], abs=1e-3)


@pytest.mark.parametrize(
    ("change", "agrees"),
    [
        pytest.param(lambda inputs: {}, True, id="as it is meant to be called"),
        pytest.param(
            lambda inputs: {"token_type_ids": torch.ones_like(inputs["input_ids"])}, False, id="a causal prefix"
        ),
        pytest.param(lambda inputs: {"position_ids": inputs["input_ids"] * 0 + 1}, False, id="other positions"),
    ],
)
def test_transformers_is_held_to_our_graphs(change: Callable[[dict[str, Any]], dict[str, Any]], agrees: bool) -> None:
    inputs = inputs_for(Bundle(SHIPPED_BUNDLE).manifest)
    exact = Ours(SHIPPED_BUNDLE, 1)
    peer = Transformers(SHAPES_CHECKPOINT, inputs, "float32", compiled=False)
    forward = peer._forward
    peer._forward = lambda **given: forward(**given | change(given))
    reference = {"log_probs": exact.log_probs(), "chosen": exact.answer()["chosen"]}
    with torch.no_grad():
        found = {"log_probs": peer.log_probs(), "chosen": peer.answer()["chosen"]}
    assert compare_answers(found, reference, whole_model.BOUNDS["fp32"])["agrees"] is agrees


@pytest.mark.parametrize(
    ("offset", "agrees", "largest"),
    [(0.0, True, 0.0), (0.01, True, 0.01), (-0.02, False, 0.02), (float("nan"), False, None)],
)
def test_agreement_is_within_the_bound(offset: float, agrees: bool, largest: float | None) -> None:
    found = compare_answers(answers(offset), EXACT, 0.015)
    assert found == {"max_difference": largest, "bound": 0.015, "equal_tokens": 1.0, "agrees": agrees}


def test_who_disagrees_or_fails_is_not_timed_and_is_named() -> None:
    error = RuntimeError(
        "peer: x ended with 1\nTraceback (most recent call last):\n  File\nValueError: no such operator"
    )
    said = {"ours": EXACT, "good": answers(0.0005), "off": answers(0.002), "broken": error, "short": SHORT}
    failures: dict[str, str] = {}
    ready, verdicts = agree(
        [contender(name) for name in ("good", "off", "broken", "short")], judge_that_hears(said, REFERENCES), failures
    )
    assert [one.name for one in ready] == ["good"]
    assert failures["broken"] == "ValueError: no such operator"
    assert failures["short"] == "1 log-probabilities instead of 2"
    assert failures["off"].startswith("does not agree")
    assert (verdicts["good"]["max_difference"], verdicts["off"]["agrees"]) == (0.0005, False)


def test_who_runs_our_graphs_is_held_to_onnxruntime_on_them_too() -> None:
    """Further from fp32 than from the same graphs is what integers do; the other way round is another model."""
    said = {"ours": EXACT, "ours int4": answers(2.0), "near": answers(2.1), "other": answers(-0.1)}
    judge = judge_that_hears(said, REFERENCES)
    near, other = (judge.judge(contender(name, "int4", "openvino", "cpu-int4")) for name in ("near", "other"))
    assert near["agrees"]
    assert near["same_graphs_on_onnxruntime"]["max_difference"] == pytest.approx(0.1)
    assert not other["agrees"]


def test_a_reduced_head_is_held_to_the_whole_one_among_location_tokens() -> None:
    reduced = contender("reduced", "int4", "paliedge", "cpu-int4-reduced-head")
    judge = judge_that_hears({"reduced --locations": answers(0.001), "ours int4 --locations": EXACT}, REFERENCES)
    assert judge.judge(reduced)["agrees"]
    judge = judge_that_hears({"reduced --locations": answers(0.1), "ours int4 --locations": EXACT}, REFERENCES)
    assert not judge.judge(reduced)["agrees"]


def test_one_engine_that_fails_does_not_end_the_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"vision": 1.0, "prefill": 1.0, "tokens": [1.0], "answer": 3.0, "chosen": [1]}
    measured = {"load": 1.0, "first_answer": 1.0, "answers": [answer], "peak_rss": 1, "anonymous": 1}
    good = Engine("good", "fp32", (sys.executable, "-c", f"print({json.dumps(json.dumps(measured))})"))
    bad = Engine("bad", "fp32", (sys.executable, "-c", "raise MemoryError('too large')"))
    killed = Engine("killed", "fp32", (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    failures: dict[str, str] = {}
    rounds = take_turns([bad, good, killed], 2, failures=failures)
    assert (len(rounds["good"]), rounds["bad"]) == (2, [])
    assert failures == {"bad": "MemoryError: too large", "killed": "killed: killed by signal 9"}
    with pytest.raises(RuntimeError, match="too large"):
        take_turns([bad], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b ended with -9\n", "a: b ended with -9"),
        ("Traceback (most recent call last):\n  File x\nKeyError: 1\n", "KeyError: 1"),
        (
            "Traceback (most recent call last):\n  File x\nKeyError: 1\n\nDuring handling\n\n"
            "Traceback (most recent call last):\n  File y\nRuntimeError: Exception from core.cpp:\nno rule for X\n",
            "RuntimeError: Exception from core.cpp: no rule for X",
        ),
    ],
)
def test_the_message_of_a_failure_is_found(text: str, message: str) -> None:
    assert first_error(text) == message


def engine(peer: str, precision: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    stages = dict.fromkeys(STAGES, sorted(seconds)[len(seconds) // 2])
    by_round = dict.fromkeys(STAGES, seconds)
    about = {"peer": peer, "precision": precision, "measured": "today", "peak_rss": 100 * len(peer)}
    return about | stages | {"by_round": by_round} | more


def test_ratios_are_of_rounds_in_which_both_took_turns() -> None:
    found = compare_engines(
        {
            "ours": engine("paliedge", "fp32", [1.0, 2.0, 4.0]),
            "ours int8": engine("paliedge", "int8", [0.5, 0.5, 1.0]),
            "ours, reduced": engine("paliedge", "int8", [0.1, 0.1, 0.1], compared=False),
            "slow": engine("transformers", "fp32", [4.0, 6.0, 8.0]),
            "fast": engine("openvino", "fp32", [2.0, 1.0, 3.0]),
            "theirs in 16 bits": engine("transformers", "16-bit", [0.9, 1.0, 1.1]),
        }
    )
    assert set(found["classes"]) == {"fp32"}  # nobody else has a rival
    fp32 = found["classes"]["fp32"]
    assert fp32["theirs"]["slow"]["answer"] == {"ratio": 3.0, "range": [2.0, 4.0]}
    assert fp32["theirs"]["fast"]["answer"] == {"ratio": 0.75, "range": [0.5, 2.0]}
    assert fp32["best"]["answer"]["theirs"] == "fast"
    assert fp32["least_memory"] == {"ours": "ours", "theirs": "fast", "ratio": 1.0}
    assert found["best_against"]["transformers"]["token"] == {
        "ours": "ours int8", "theirs": "theirs in 16 bits", "ratio": 1.8, "range": [1.1, 2.0]
    }  # fmt: skip
    assert found["best_against"]["openvino"]["token"]["theirs"] == "fast"


def test_who_did_not_take_turns_is_not_compared() -> None:
    found = compare_engines(
        {
            "ours, day 1": engine("paliedge", "fp32", [2.0], measured="day 1"),
            "theirs, day 1": engine("openvino", "fp32", [3.0], measured="day 1"),
            "theirs, day 2": engine("transformers", "fp32", [1.0], measured="day 2"),
            "ours, day 2": engine("paliedge", "int8", [0.5], measured="day 2"),
        }
    )
    assert found["classes"]["fp32"]["best"]["answer"]["theirs"] == "theirs, day 1"
    assert set(found["classes"]["fp32"]["theirs"]) == {"theirs, day 1"}
    assert found["best_against"]["transformers"]["answer"]["theirs"] == "theirs, day 2"
    assert set(found["best_against"]) == {"transformers"}


def test_results_of_engines_that_are_not_run_again_are_kept() -> None:
    previous = {"engines": {"a": 1, "b": 2, "c": 3}, "failures": {"c": "x"}, "packages": {"old": {}}}
    found = merge({"engines": {"b": 5}, "agreement": {}, "failures": {}, "packages": {}}, previous, ["b", "c"])
    assert found == {"engines": {"a": 1, "b": 5}, "agreement": {}, "failures": {}, "packages": {"old": {}}}


@pytest.mark.parametrize("size", SIZES)
def test_every_class_has_both_sides_and_every_graph_a_reference(size: str, tmp_path: Path) -> None:
    everybody = list_contenders(size, tmp_path, 2)
    assert len({one.name for one in everybody}) == len(everybody)
    for ours in (True, False):
        assert {one.engine.precision for one in everybody if (one.peer == "paliedge") is ours} == set(CLASSES)
    references = references_for(tmp_path, everybody, 2)
    assert {one.bundle.removesuffix("-reduced-head") for one in everybody if one.bundle} == set(references)


def test_exports_share_the_statistics_of_one(tmp_path: Path) -> None:
    def options(bundle: str) -> list[str]:
        return export_command(Path("checkpoint"), tmp_path, bundle)[5:]

    assert options("cpu-int8") == ["--target", "cpu", "--precision", "int8", "--no-compare"]
    shared = ["--no-compare", "--calibrate", str(tmp_path / "cpu-int8")]
    assert options("jetpack6-int4") == ["--target", "jetpack6", "--precision", "int4", *shared]
    assert options("cpu-int4-reduced-head")[4:] == [*shared, "--head-vocab", "detect"]


def test_a_made_checkpoint_gets_a_few_of_the_shipped_samples(tmp_path: Path) -> None:
    copy_samples(SHAPES_CHECKPOINT / "calibration", tmp_path / "few", 2)
    lines = [json.loads(line) for line in (tmp_path / "few" / "samples.jsonl").read_text().splitlines()]
    assert {one["image"] for one in lines} == {path.name for path in (tmp_path / "few").glob("*.png")}
    assert len(list((tmp_path / "few").glob("*.png"))) == 2
    assert any(one["prefix"].startswith("detect") for one in lines)  # whose labels a reduced head keeps


def test_inputs_are_read_as_they_were_written(tmp_path: Path) -> None:
    inputs = inputs_for(Bundle(SHIPPED_BUNDLE).manifest)
    save_inputs(tmp_path / "inputs.npz", inputs)
    found = load_inputs(tmp_path / "inputs.npz")
    assert (found.pixels == inputs.pixels).all()
    assert (found.prompt, found.forced) == (inputs.prompt, inputs.forced)
