"""The pages' figures are the stored ones, and the stored ones are what the project asks for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_report, precision_table
from benchmarks.pages import markers, read_part
from paliedge.bundle.bundle import Bundle
from paliedge.model import SHIPPED_BUNDLE
from tests.docs.pages import PAGES, README, name_of
from tests.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"
_FIGURE = re.compile(r"^\| (.+?) \| ([\d.]+)( [a-zA-Z%]+)? \| `(\w+\.json)` `([^`]+)` \|$")
_UNITS = {"": 1.0, " s": 1.0, " ms": 1e-3, " GB": 1e9, " MB": 1e6, " %": 0.01}


def figure_rows(page: Path) -> list[str]:
    """The rows of a page's tables whose last column is `from`."""
    tables = re.findall(r"^\|[^\n]* from \|\n\|[-| ]+\|\n((?:\|[^\n]*\n)+)", page.read_text(), re.MULTILINE)
    return [row for rows in tables for row in rows.splitlines()]


def stored(file: str, place: str) -> float:
    value: Any = json.loads((RESULTS / file).read_text())
    for key in place.split("/"):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return float(value)


@pytest.mark.parametrize("page", [page for page in PAGES if figure_rows(page)], ids=name_of)
def test_the_figures_are_the_stored_ones(page: Path) -> None:
    """Each number in a table with a `from` column stands in that JSON file."""
    for row in figure_rows(page):
        found = _FIGURE.match(row)
        assert found, row
        name, figure, unit, file, place = found.groups("")
        digits = len(figure.partition(".")[2])
        assert round(stored(file, place) / _UNITS[unit], digits) == float(figure), name


def test_the_pages_have_such_figures() -> None:
    assert len(figure_rows(README)) == 4
    assert sum(len(figure_rows(page)) for page in PAGES) >= 44


def test_the_precision_tables_are_made_from_the_stored_results() -> None:
    page = precision_table.PAGE.read_text()
    assert read_part(page, precision_table.PART, precision_table.SCRIPT) == precision_table.render()


@pytest.mark.parametrize("part", bench_report.render())
def test_the_performance_page_is_made_from_the_stored_results(part: str) -> None:
    page = bench_report.PAGE.read_text()
    assert read_part(page, part, bench_report.SCRIPT) == bench_report.render()[part]


def test_the_performance_page_begins_with_what_a_reader_wants_and_ends_with_warnings() -> None:
    page = bench_report.PAGE.read_text()
    begin, end = markers("summary", bench_report.SCRIPT)[0], markers("warnings", bench_report.SCRIPT)[1]
    assert page.startswith(f"# Performance\n\n{begin}\n")
    assert page.endswith(f"{end}\n")


def test_a_page_without_the_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="end of tables"):
        read_part("# A page\n", "tables", "bench_report")


def test_no_precision_costs_more_than_it_may() -> None:
    exports = json.loads((RESULTS / "shapes_precisions.json").read_text())["exports"]
    assert {(one["target"], one["precision"]) for one in exports} >= {
        (target, precision) for target in ("cpu", "jetpack6", "jetpack7") for precision in ("fp16", "int8", "int4")
    }
    assert all(one["scores"]["num_scenes"] == 500 for one in exports)
    exact = next(one["scores"] for one in exports if one["precision"] == "fp32")
    for one in exports:
        allowed = 0.02 if one["precision"] == "int4" else 0.01
        assert one["scores"]["detect_ap50"] >= exact["detect_ap50"] - allowed
        assert one["scores"]["caption_exact_match"] >= exact["caption_exact_match"] - 0.02


def test_bundles_are_as_small_and_as_planned() -> None:
    engines = json.loads((RESULTS / "peers_3b.json").read_text())["engines"]
    for name, largest in (("paliedge int8", 3.2e9), ("paliedge int4", 2.6e9)):
        assert engines[name]["bundle_bytes"] <= largest
        assert abs(engines[name]["plan_over_files"] - 1) <= 0.05
    reduced, whole = (engines[name]["decoder_bytes"] for name in ("paliedge int4, reduced head", "paliedge int4"))
    assert reduced < 0.7 * whole


def test_the_scores_are_those_of_the_shipped_bundle() -> None:
    scores = json.loads((RESULTS / "shapes_quality.json").read_text())
    assert scores["bundle"] == Bundle(SHIPPED_BUNDLE).manifest.sha256


def test_the_scores_are_what_the_project_asks_of_them() -> None:
    """Masks that can be used, and a confidence that ranks boxes better than none does."""
    scores = json.loads((RESULTS / "shapes_quality.json").read_text())["scores"]
    assert scores["num_scenes"] == 500
    assert scores["segment_mean_iou"] >= 0.8
    assert scores["segment_mean_iou_only_asked"] >= 0.8
    assert scores["detect_ap50"] > scores["detect_ap50_unscored"]
