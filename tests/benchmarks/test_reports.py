"""What the page on performance says is what the results say, and scripts that judge growth can say no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_report, operator_times
from benchmarks.jetson_floors import floors
from benchmarks.overlap import make_pictures, measure
from benchmarks.peers.comparisons import STAGES
from benchmarks.scaling import flatness, growth, operations
from paliedge.bench.record import write_record
from paliedge.bundle.bundle import Bundle
from paliedge.model import SHIPPED_BUNDLE
from paliedge.planning.roofline import decoder_flops, vision_flops
from tests.bench.test_record import make_record


def test_a_step_that_grows_with_the_answer_is_seen() -> None:
    def rounds(last: float) -> list[dict[str, Any]]:
        times = [0.1 + (last - 0.1) * place / 99 for place in range(100)]
        return [{"answers": [{"tokens": times}] * 2}] * 3

    assert flatness(rounds(0.1))["late_over_early"] == pytest.approx(1.0)
    assert flatness(rounds(0.2))["late_over_early"] > 1.5


def test_growth_beyond_the_operations_is_seen() -> None:
    found = growth({224: 1.0, 448: 4.0, 896: 40.0}, {224: 10, 448: 40, 896: 200})
    assert [one["over_flops"] for one in found] == [1.0, 1.0, 2.0]


def test_overlap_is_measured_on_the_same_pictures() -> None:
    found = measure(SHIPPED_BUNDLE, make_pictures(4, 64), 0, 1, 4)
    ratio = found["seconds_a_picture"] / found["seconds_a_picture_overlapped"]
    assert found["speedup"] == pytest.approx(ratio, abs=0.01)
    assert found["speedup_range"] == [found["speedup"]] * 2


def test_operators_are_told_apart_by_stage_and_group() -> None:
    found = operator_times.measure(SHIPPED_BUNDLE, 1)["stages"]
    assert list(found) == ["vision", "prefill", "token"]
    for stage in found.values():
        assert sum(stage["groups"].values()) == pytest.approx(1, abs=0.01)
        assert stage["groups"]["linear layers"] > 0.1
    assert "MultiHeadAttention, attention" in found["vision"]["operators"]
    assert found["token"]["seconds"] < found["prefill"]["seconds"]
    assert operator_times.group_of("MatMul", 2) == "attention"
    assert operator_times.group_of("MatMul", 1) == "linear layers"


def test_operations_are_those_of_vision_and_prefill() -> None:
    manifest = Bundle(SHIPPED_BUNDLE).manifest
    assert operations(manifest) == vision_flops(manifest.model) + decoder_flops(
        manifest, 80, 80
    )  # 64 patches, 16 words


def test_floors_lie_below_what_boards_are_seen_to_keep() -> None:
    rows = floors(Bundle(SHIPPED_BUNDLE).manifest)
    assert {row["precision"] for row in rows} == {"fp16", "int8", "int4"}
    assert all(row["floor_ms"]["answer"] < row["sustained_ms"]["answer"] for row in rows)


def test_the_page_holds_every_record_and_says_what_was_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_report, "RESULTS", tmp_path)
    assert "So far there is none" in bench_report.render()["tables"]
    write_record(make_record(), tmp_path / "bench_3b.json")
    write_record(make_record(token=7.0), tmp_path / "boards" / "orin.json")
    engines = {
        name: {
            "peer": name.split()[0],
            "precision": name.split()[1],
            **dict.fromkeys(STAGES, seconds),
            "by_round": {stage: [seconds - 0.5, seconds, 2 * seconds] for stage in STAGES},
            "answer_range": [seconds, 2 * seconds],
            "peak_rss": 10**9 * seconds,
            "measured": day,
        }
        for name, seconds, day in (
            ("paliedge int8", 1.5, "day 2"),
            ("openvino int8", 3.0, "day 2"),
            ("transformers fp32", 6.0, "day 1"),
        )
    }
    peers = {
        "num_rounds": 3,
        "num_threads": 2,
        "machine": {"cpu": "a processor"},
        "engines": engines,
        "agreement": {name: {"max_difference": 0.125} for name in engines},
        "failures": {"rival int4": "cannot load it"},
    }
    (tmp_path / "peers_3b.json").write_text(json.dumps(peers))
    sizes = [{"image_size": 896, "flops": 2 * 10**12, "seconds": 4.0, "over_flops": 1.25}]
    one = {"late_over_early": 1.5, "late_over_early_range": [1.25, 1.75], "sizes": sizes}
    about = {"model": "a model", "machine": {"cpu": "a processor"}, "num_rounds": 1}
    scaling = about | {"precisions": {"int8": one, "fp32": one}}
    (tmp_path / "scaling.json").write_text(json.dumps(scaling))
    overlapped = measure(SHIPPED_BUNDLE, make_pictures(4, 64), 0, 1, 4)
    (tmp_path / "overlap.json").write_text(json.dumps(about | {"bundles": [overlapped]}))
    parts = bench_report.render()
    assert "| int8 | 1.50 | 1500 | 1.50 |" in parts["summary"]
    assert parts["warnings"].count(": not quiet") == 2
    page = parts["tables"]
    assert "int8 1.500 (1.250 to 1.750); fp32 1.500 (1.250 to 1.750) times as long" in page
    assert "| fp32 | 896 | 2.00 | 4.00 | 500 | 1.25 |" in page
    assert f"| {overlapped['speedup']:.2f} (" in page
    assert page.count("| bundle int8, `cpu` |") == 2
    assert "| openvino int8 | int8 | 3 | 3 | 3 | 3 | 3 to 6 | 3.00 | 0.125 |" in page
    assert "| transformers fp32* | fp32 | 6 | 6 | 6 | 6 | 6 to 12 | 6.00 | 0.125 |" in page
    faster = "paliedge int8 is 2.00 times (2.00 to 2.50) as fast as openvino int8"
    assert f"- int8, whole answer: {faster}; least memory: openvino int8 takes 2.00 times as much as" in page
    assert f"- best against best, openvino: {faster}" in page
    assert "best against best, transformers" not in page  # they took no turns
    assert "not measured: rival int4: cannot load it" in page
    token = make_record(token=7.0).runs[0].stages["token"].wall
    last = next(line for line in page.splitlines()[::-1] if "| bundle int8" in line)
    assert last.startswith("| a board's (")
    assert f"| {token.p50:.2f} ({token.p90:.2f}) |" in last
