"""Engines that took turns, side by side: times theirs over ours, memory, and the best of both."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

STAGES = ("vision", "prefill", "token", "answer")
CLASSES = ("fp32", "16-bit", "int8", "int4")
_OURS = "paliedge"


def compare_pair(engines: Mapping[str, Any], ours: str, theirs: str, stage: str) -> dict[str, Any]:
    """How many times as long they take: the median and the range of rounds, in each of which the two took turns."""
    pairs = zip(engines[ours]["by_round"][stage], engines[theirs]["by_round"][stage], strict=False)
    ratios = [b / a for a, b in pairs if a]
    return {"ratio": round(statistics.median(ratios), 3), "range": [round(min(ratios), 3), round(max(ratios), 3)]}


def compare_engines(engines: Mapping[str, Any]) -> dict[str, Any]:
    """Theirs over ours within each class of precision; and of the best of ours and of each peer, whatever the class.

    Only engines that took turns are compared: of a class those of the last run that has both sides, of all those of
    the very last run.
    """
    able = {name: one for name, one in engines.items() if one.get("compared", True)}
    classes: dict[str, Any] = {}
    for precision in CLASSES:
        ours, theirs = _last_rivals({name: one for name, one in able.items() if one["precision"] == precision})
        if ours:
            classes[precision] = {
                "ours": ours[0],
                "theirs": {name: _compare_all(able, ours[0], name) for name in theirs},
                "best": _best_against_best(able, ours, theirs),
                "least_memory": _least_memory(able, ours, theirs),
            }
    best, last = {}, max((one["measured"] for one in engines.values()), default="")
    for peer in dict.fromkeys(one["peer"] for one in engines.values() if one["peer"] != _OURS):
        ours, theirs = (
            [name for name, one in able.items() if (one["peer"], one["measured"]) == (side, last)]
            for side in (_OURS, peer)
        )
        if ours and theirs:
            best[peer] = _best_against_best(able, ours, theirs)
    return {"classes": classes, "best_against": best}


def _last_rivals(engines: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of ours and of theirs in the last run that has both."""
    for run in sorted({one["measured"] for one in engines.values()}, reverse=True):
        names = [name for name, one in engines.items() if one["measured"] == run]
        ours = [name for name in names if engines[name]["peer"] == _OURS]
        if 0 < len(ours) < len(names):
            return ours, [name for name in names if name not in ours]
    return [], []


def _compare_all(engines: Mapping[str, Any], ours: str, theirs: str) -> dict[str, Any]:
    found: dict[str, Any] = {stage: compare_pair(engines, ours, theirs, stage) for stage in STAGES}
    return found | {"peak_rss": round(engines[theirs]["peak_rss"] / engines[ours]["peak_rss"], 3)}


def _least_memory(engines: Mapping[str, Any], ours: Sequence[str], theirs: Sequence[str]) -> dict[str, Any]:
    """Peak resident memory of the smallest on both sides, theirs over ours."""
    mine, other = (min(names, key=lambda name: float(engines[name]["peak_rss"])) for names in (ours, theirs))
    ratio = round(engines[other]["peak_rss"] / engines[mine]["peak_rss"], 3)
    return {"ours": mine, "theirs": other, "ratio": ratio}


def _best_against_best(engines: Mapping[str, Any], ours: Sequence[str], theirs: Sequence[str]) -> dict[str, Any]:
    found = {}
    for stage in STAGES:
        mine, other = (min(names, key=lambda name: float(engines[name][stage])) for names in (ours, theirs))
        found[stage] = {"ours": mine, "theirs": other} | compare_pair(engines, mine, other, stage)
    return found


def add_speedups(engines: Mapping[str, Any]) -> None:
    """Over the fastest answer of transformers, in whatever precision, eager or compiled."""
    answers = [one["answer"] for one in engines.values() if one["peer"] == "transformers"]
    for one in engines.values() if answers else ():
        one["speedup_over_best_transformers"] = round(min(answers) / one["answer"], 2)
