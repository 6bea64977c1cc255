"""An evaluation as a table, as JSON, and as the files of a folder."""

# Tests: tests/evaluation/test_evaluation.py.
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from paliedge.errors import OutputError, PaliEdgeError
from paliedge.evaluation.cases import Outcome
from paliedge.evaluation.metrics import cost_efficiency, price_per_image, speed_efficiency
from paliedge.evaluation.tasks import Task

NO_PRICE = "no price given; set --price-per-hour"
_DIGITS = 5


@dataclass(frozen=True)
class Report:
    """What was evaluated, and what came of it.

    Attributes:
        task: what was asked.
        dataset: the data.
        bundle: the bundle's folder.
        checkpoint: what the bundle was exported from.
        bundle_sha256: the digest of the bundle's manifest.
        settings: the options that change the scores, by name.
        outcome: scores and cases; at least one case.
        errors: the pictures that were left out, each with the reason.
        price_per_hour: of the machine, in any currency; None if not told.
    """

    task: Task
    dataset: Path
    bundle: Path
    checkpoint: str
    bundle_sha256: str
    settings: dict[str, Any]
    outcome: Outcome
    errors: tuple[tuple[Path, PaliEdgeError], ...] = ()
    price_per_hour: float | None = None

    @property
    def mean_seconds(self) -> float:
        """Seconds a picture; what efficiencies and prices are made of."""
        return fmean(case.seconds for case in self.outcome.cases)

    @property
    def median_seconds(self) -> float:
        return median(case.seconds for case in self.outcome.cases)

    @property
    def price_per_image(self) -> float | None:
        return None if self.price_per_hour is None else price_per_image(self.mean_seconds, self.price_per_hour)

    @property
    def efficiency(self) -> dict[str, float | None]:
        """For `ocr`: accuracy per second and per price of a picture; the second is None without a price."""
        accuracy = self.outcome.scores.get("accuracy")
        if accuracy is None:
            return {}
        price = self.price_per_image
        return {
            "speed_efficiency": speed_efficiency(accuracy, self.mean_seconds),
            "cost_efficiency": None if price is None else cost_efficiency(accuracy, price),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        content: dict[str, Any] = {
            "task": self.task,
            "dataset": str(self.dataset),
            "bundle": str(self.bundle),
            "checkpoint": self.checkpoint,
            "bundle_sha256": self.bundle_sha256,
            "settings": self.settings,
            "num_images": len(self.outcome.cases),
            "num_failed": len(self.errors),
            "num_cut_off": sum(case.is_cut_off for case in self.outcome.cases),
            "scores": {name: _rounded(value) for name, value in self.outcome.scores.items()},
            "seconds_per_image": {"median": round(self.median_seconds, 6), "mean": round(self.mean_seconds, 6)},
            "price_per_hour": self.price_per_hour,
            "price_per_image": self.price_per_image,
        }
        if self.efficiency:
            content |= {name: _rounded(value) for name, value in self.efficiency.items()}
            content["cost_efficiency_note"] = NO_PRICE if self.price_per_hour is None else None
        content["errors"] = [
            {"source": str(path), "expected": error.expected, "found": error.found, "action": error.action}
            for path, error in self.errors
        ]
        return content

    def to_table(self) -> str:
        """Names and values in two columns."""
        cases = self.outcome.cases
        num_cut_off = sum(case.is_cut_off for case in cases)
        failed = f", {len(self.errors)} failed" if self.errors else ""
        rows = {"task": self.task, "dataset": str(self.dataset), "bundle": str(self.bundle)}
        rows["images"] = f"{len(cases)}{failed}"
        if num_cut_off:
            rows["cut off at the token limit"] = str(num_cut_off)
        for name, value in self.outcome.scores.items():
            rows[_title(name)] = "none: nothing expected" if value is None else f"{value:.4f}"
        rows["seconds per image"] = f"{self.median_seconds:.4f} median, {self.mean_seconds:.4f} mean"
        if self.price_per_image is not None:
            rows["price per image"] = f"{self.price_per_image:.3g}"
        units = {
            "speed_efficiency": "accuracy / (seconds per image)",
            "cost_efficiency": "accuracy / (price per image)",
        }
        for name, value in self.efficiency.items():
            without = NO_PRICE if name == "cost_efficiency" and self.price_per_hour is None else "no time measured"
            rows[_title(name)] = f"none: {without}" if value is None else f"{value:.4g} = {units[name]}"
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def prepare_folder(folder: Path) -> None:
    """Make the folder, before hours of work that it shall hold.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _unwritable(folder, error) from error


def save_report(report: Report, folder: Path) -> list[Path]:
    """Write report.json, predictions.jsonl (a line a picture) and worst.png; returns their paths.

    Raises:
        OutputError: one cannot be written.
    """
    from paliedge.evaluation.pictures import draw_worst

    paths = [folder / name for name in ("report.json", "predictions.jsonl", "worst.png")]
    rows = (json.dumps(case.to_dict(), ensure_ascii=False) for case in report.outcome.cases)
    try:
        paths[0].write_text(json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        paths[1].write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        draw_worst(report.outcome.cases).save(paths[2])
    except OSError as error:
        raise _unwritable(folder, error) from error
    return paths


def _unwritable(folder: Path, error: OSError | ValueError) -> OutputError:
    found = getattr(error, "strerror", None) or "an error of the file system"
    return OutputError(
        expected=f"room and permission to write {folder}",
        found=found,
        action="Name another folder with --save, or make room.",
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)


def _title(name: str) -> str:
    short = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "cer": "CER", "wer": "WER", "anls": "ANLS", "vqa": "VQA"}
    return " ".join(short.get(word, word) for word in name.split("_"))
