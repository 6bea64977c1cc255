"""Write the tables of docs/precision.md from the stored results.

    python -m benchmarks.precision_table

What stands between the markers of that page is made here and nowhere else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.pages import DOCS, table, write_part

RESULTS = Path(__file__).parent / "results"
_SPEED = "peers_3b.json"
PAGE = DOCS / "precision.md"
PART, SCRIPT = "precision tables", "precision_table"


def _load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def quality_table() -> str:
    """The shapes model in every precision and lowering."""
    rows = []
    for one in _load("shapes_precisions.json")["exports"]:
        scores, gate = one["scores"], one["gate"]
        rows.append(
            [
                f"{_variant(one)}, `{one['target']}`",
                f"{one['bundle_bytes'] / 1e6:.1f}",
                f"{scores['detect_ap50']:.4f}",
                f"{scores['segment_mean_iou']:.3f}",
                f"{scores['caption_exact_match']:.3f}",
                f"{scores['counting_and_colour']:.3f}",
                f"{scores['ocr_character_error_rate']:.3f}",
                f"{gate['last_hidden']['mean']:.4f}",
            ]
        )
    head = (
        "precision, target",
        "bundle, MB",
        "AP50",
        "masks, IoU",
        "caption, exact",
        "answers right",
        "OCR, error rate",
        "cosine of last states",
    )
    return table(head, rows)


def _variant(one: dict[str, Any]) -> str:
    budget = f" with `--sensitivity {100 * one['sensitivity']:.0f}`" if one["sensitivity"] else ""
    vision = f" behind {one['vision']}'s vision encoder" if one["vision"] != one["precision"] else ""
    return f"{one['precision']}{budget}{vision}"


def _bandwidth() -> float:
    """Bytes a second that the machine reads: by the probe's median, or by the engine that reads faster than that."""
    found = _load(_SPEED)
    ours = (one for one in found["engines"].values() if one["peer"] == "paliedge")
    return float(max(found["read_bandwidth"], *(one["decode_bandwidth"] for one in ours)))


def speed_table() -> str:
    """PaliGemma-3B's size on the CPU; rivals stand in the performance section."""
    engines = {name: one for name, one in _load(_SPEED)["engines"].items() if one["peer"] == "paliedge"}
    last = max(one["measured"] for one in engines.values())
    rows = []
    for name, one in engines.items():
        low, high = one["answer_range"]
        rows.append(
            [
                name + ("*" if one["measured"] != last else ""),
                f"{one['bundle_bytes'] / 1e9:.2f}",
                f"{one['vision']:.2f}",
                f"{one['prefill']:.2f}",
                f"{1000 * one['token']:.0f}",
                f"{one['answer']:.2f} ({low:.2f} to {high:.2f})",
                f"{one['speedup_over_best_transformers']:.2f}" if "speedup_over_best_transformers" in one else "-",
                f"{one['decoder_bytes'] / 1e9:.2f}",
                f"{one['decode_bandwidth'] / 1e9:.1f}",
                f"{one['decode_bandwidth'] / _bandwidth():.0%}",
                f"{one['peak_rss'] / 1e9:.1f}",
            ]
        )
    head = (
        *("engine", "bundle, GB", "vision, s", "prefill, s", "a token, ms", "10 tokens, s", "times faster"),
        *("read a token, GB", "decode, GB/s", "of the machine's", "peak resident, GB"),
    )
    return table(head, rows)


def engine_table() -> str:
    """Engines of PaliGemma-3B's decoder, built by TensorRT for RTX."""
    found = _load("rtx_build_precisions.json")["builds"]
    whole = {
        one["target"]: one["engine_bytes"] for one in _load("rtx_build.json")["builds"] if one["part"] == "decoder"
    }
    rows = [
        [
            f"{one['precision']}, `{one['target']}`",
            f"{one['engine_bytes'] / 1e9:.3f}",
            f"{one['engine_bytes'] / whole[one['target']]:.3f}",
            f"{one['engine_per_weight']:.4f}",
        ]
        for one in found
        if one["part"] == "decoder"
    ]
    return table(("decoder engine", "GB", "over fp16's engine", "over its weights"), rows)


def render() -> str:
    """All that stands between the markers."""
    return "\n\n".join(
        (
            "**Quality.** The shapes model on 500 held-out scenes, by `python -m benchmarks.shapes.precisions`. Its "
            "decoder was trained with weights rounded to 4 bits. int4 may cost other models of its size more; "
            "`--sensitivity` is for those. 16 bits in the vision encoder change nothing.",
            quality_table(),
            "**Speed.** PaliGemma-3B's size with random weights, 224 pixels, 16 prompt tokens, two shared cores. "
            "Medians of an interleaved run, by `python -m benchmarks.peers.whole_model 3b --work FOLDER`.\n\n"
            '- "Times faster" is against transformers\' fastest answer.\n'
            f'- "Of the machine\'s" is the share of {_bandwidth() / 1e9:.1f} GB/s, the most that an engine read, or a '
            "probe between them (its median).\n"
            "- Engines with * took turns in an earlier run, with its own transformers.",
            speed_table(),
            "**Engines** of that size, both profiles, by `python -m benchmarks.rtx_build`:",
            engine_table(),
        )
    )


def main() -> None:
    write_part(PAGE, PART, SCRIPT, render())


if __name__ == "__main__":
    main()
