"""Write the summary, tables and pictures of docs/performance.md from the stored results: `make bench-report`.

    python -m benchmarks.bench_report

What stands between the markers of that page is made here and nowhere else. Every table names the command that made its
figures; a result that is not there is left out, but a table never mixes machines.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.operator_times import GROUPS
from benchmarks.pages import DOCS, table, write_part
from benchmarks.peers.comparisons import compare_engines
from paliedge.bench.plots import plot
from paliedge.bench.record import Record, read_record

RESULTS = Path(__file__).parent / "results"
PAGE, SCRIPT = DOCS / "performance.md", "bench_report"
_SIZES = {
    "shapes": "the shapes model (1.9 million parameters, 112 pixels)",
    "mid": "full width, 6 + 6 layers (224 pixels)",
    "3b": "PaliGemma-3B's size (224 pixels)",
}
_DECODERS = {"mid": "", "3b": "", "mid_without_vnni": ", on a processor without VNNI"}
"""The processor that a decoder's figures are of, where it is another kind than all others."""
_STAGES = ("vision", "prefill", "token", "answer")


def render() -> dict[str, str]:
    """What stands between the markers of each part, by its name."""
    return {name: "\n\n".join(part for make in makers for part in make()) for name, makers in _PARTS.items()}


def main() -> None:
    shutil.rmtree(RESULTS / "plots", ignore_errors=True)
    for model, records in _by_model().items():
        plot(records, RESULTS / "plots" / model)
    for name, content in render().items():
        write_part(PAGE, name, SCRIPT, content)


def _records(pattern: str) -> Iterator[Record]:
    """Of `paliedge bench -o`, by name."""
    for path in sorted(RESULTS.glob(pattern)):
        yield read_record(path)


def _by_model() -> dict[str, list[Record]]:
    """Records of bench_MODEL.json and bench_MODEL_PRECISION.json, by MODEL."""
    found: dict[str, list[Record]] = {}
    for path in sorted(RESULTS.glob("bench_*.json")):
        found.setdefault(path.stem.split("_")[1], []).append(read_record(path))
    return found


def _summary() -> Iterator[str]:
    """What a reader wants to know first: how fast, how much memory, against whom."""
    yield from _our_sizes()
    yield from _against_whom()
    yield from _small_model()
    yield from _predicted()


def _our_sizes() -> Iterator[str]:
    found = _load("peers_3b.json")
    ours = {name: one for name, one in found.get("engines", {}).items() if one["peer"] == "paliedge"}
    if not ours:
        return
    yield (
        f"**How fast, how much memory.** A model of PaliGemma-3B's size on {found['num_threads']} cores of an "
        f"{found['machine']['cpu']}; one picture of 224 pixels, 16 tokens in, 10 out. Its weights are random, so only "
        "time and memory mean anything. Rows with * are of an earlier run:"
    )
    last = max(one["measured"] for one in ours.values())
    rows = [
        [
            name.removeprefix("paliedge ") + ("*" if one["measured"] != last else ""),
            f"{one['answer']:.2f}",
            f"{1000 * one['token']:.0f}",
            f"{one['peak_rss'] / 1e9:.2f}",
        ]
        for name, one in sorted(ours.items(), key=lambda item: float(item[1]["answer"]))
    ]
    yield table(("precision", "an answer, s", "a token, ms", "peak memory, GB"), rows)


def _against_whom() -> Iterator[str]:
    engines = _load("peers_3b.json").get("engines", {})
    found = compare_engines(engines)
    lines = [f"- {peer}: {_ratio(best['answer'])}." for peer, best in found["best_against"].items()]
    for precision, one in found["classes"].items():
        best, memory = one["best"]["answer"], one["least_memory"]
        if best["range"][0] <= 1:
            lines.append(
                f"- {'Level' if best['range'][1] >= 1 else 'Behind'} in {precision}: {_ratio(best)}. The smallest "
                f"peer, {memory['theirs']}, takes {memory['ratio']:.2f} times the memory of {memory['ours']}."
            )
    if lines:
        yield "**Against whom**, whole answers, best against best:"
        yield "\n".join(lines)
    rows = [
        [*pair.split(" / "), *(f"{one[what]['ratio']:.2f}" for what in ("decode", "prefill", "peak_rss"))]
        for pair, one in _load("peers_decoder_3b.json").get("ratios", {}).items()
    ]
    if rows:
        yield "The decoder alone, theirs over ours; above 1 ours is faster, or smaller:"
        yield table(("theirs", "ours", "a token", "prefill", "peak memory"), rows)


def _small_model() -> Iterator[str]:
    for record in _records("bench_shapes.json"):
        yield (
            f"**The shapes model** (1.9 million parameters) answers in {record.runs[0].latency.p50:.1f} ms, on "
            f"{_machine(record)}."
        )


def _predicted() -> Iterator[str]:
    rows = [one for one in _load("jetson_floors.json").get("rows", []) if one["device"].startswith("Jetson")]
    if rows:
        yield (
            "**On a Jetson** nothing was measured. Arithmetic alone predicts, for an answer of the same length at 3B "
            "(seconds, and GB of memory):"
        )
        devices = dict.fromkeys(one["device"] for one in rows)
        by_place = {(one["device"], one["precision"]): one for one in rows}
        precisions = ("fp16", "int8", "int4")
        cells = [
            [device, *(_prediction(by_place.get((device, precision))) for precision in precisions)]
            for device in devices
        ]
        yield table(("board", *precisions), cells)


def _prediction(one: dict[str, Any] | None) -> str:
    if one is None:
        return "does not fit"
    return f"{one['sustained_ms']['answer'] / 1000:.2f} s, {one['memory_bytes'] / 1e9:.1f} GB"


def _ours() -> Iterator[str]:
    """`paliedge bench` of each stored record."""
    rows = [row for record in _records("bench_*.json") for row in _bench_rows(record)]
    if not rows:
        return
    yield (
        "## Our own benchmark\n\n"
        "Medians (and p90) in milliseconds. Of several batches the smallest and the largest stand here, the others in "
        "the pictures. The commands:\n\n"
        "- The shapes model: `paliedge bench --scenario single-stream --scenario multi-stream --scenario offline "
        "--batch 1,2,4,8 --fps 30 --duration 8 -o benchmarks/results/bench_shapes.json`. For `bench_shapes_int8.json` "
        "and `bench_shapes_int4.json` the same with `-m` a bundle of that precision.\n"
        '- PaliGemma-3B\'s size: `paliedge bench runtime/paliedge/scenes --prompt "caption en" --max-new-tokens 10 '
        "--scenario single-stream --runs 10 -m BUNDLE -o benchmarks/results/bench_3b_int8.json`. For "
        "`bench_3b_int4.json` the same with a bundle of `--precision int4 --fast-prefill`."
    )
    yield table(_BENCH_HEAD, rows)
    yield "\n".join(f"![{name}](../benchmarks/results/plots/{name}.png)" for name in _drawn())


def _warnings() -> Iterator[str]:
    """What `bench` said against its own figures."""
    lines = [
        f"- {_machine(record)}, {record.subject.bundle} {record.subject.precision}: {text}"
        for pattern in ("bench_*.json", "boards/*.json")
        for record in _records(pattern)
        for text in record.warnings
    ]
    yield "\n".join(lines) if lines else "None."


_BENCH_HEAD = (
    *("machine", "bundle", "scenario", "first token", "a token", "answer", "answers/s"),
    *("MFU of prefill", "MBU of a token", "peak RSS, GB", "load, s", "answers as exported"),
)


def _drawn() -> list[str]:
    plots = RESULTS / "plots"
    drawn = (path for model in _by_model() for path in sorted(plots.glob(f"{model}/*.png")))
    return [str(path.relative_to(plots).with_suffix("")) for path in drawn]


def _bench_rows(record: Record) -> Iterator[list[str]]:
    subject, accuracy = record.subject, record.accuracy
    loads = [one.engine for one in record.cold_starts]
    batches = {run.batch for run in record.runs}
    for run in record.runs:
        if run.batch not in (min(batches), max(batches)):
            continue
        prefill, token = run.stages.get("prefill"), run.stages.get("token")
        yield [
            _machine(record),
            f"{subject.bundle} {subject.precision}, `{subject.target}`",
            run.name,
            _median(run.stages["ttft"].wall),
            _median(token.wall) if token else "-",
            _median(run.latency),
            f"{run.answers_per_s:.2f}",
            f"{prefill.mfu:.0%}" if prefill and prefill.mfu else "-",
            f"{token.mbu:.0%}" if token and token.mbu else "-",
            f"{record.memory.peak_rss / 1e9:.2f}",
            f"{median(loads):.2f} ({min(loads):.2f} to {max(loads):.2f})" if loads else "-",
            f"{accuracy.num_equal} of {accuracy.num_answers}" if accuracy else "-",
        ]


def _median(found: Any) -> str:
    return f"{found.p50:.2f}" + (f" ({found.p90:.2f})" if found.p90 is not None else "")


def _peers() -> Iterator[str]:
    """Whole models, a table a size."""
    for size, title in _SIZES.items():
        found = _load(f"peers_{size}.json")
        if found:
            last = max(one["measured"] for one in found["engines"].values())
            yield (
                f"## Whole models: {title}\n\n"
                f"Whole answers of 10 tokens to 16 and an image, in seconds, on {found['machine']['cpu']}. Medians of "
                f"{found['num_rounds']} rounds in which the engines took turns; those with * did so in an earlier run. "
                f"By `python -m benchmarks.peers.whole_model {size} --work FOLDER "
                f"--threads {found['num_threads']} --rounds {found['num_rounds']}`:"
            )
            yield table(
                ("engine", "class", *_STAGES, "range of answers", "peak RSS, GB", "off fp32, nats"),
                [
                    _peer_row(name + ("*" if one["measured"] != last else ""), one, found["agreement"][name])
                    for name, one in _by_class(found["engines"])
                ],
            )
            yield from _ratios(compare_engines(found["engines"]), found["failures"])
            yield from _overheads(found["engines"])


def _by_class(engines: dict[str, Any]) -> list[tuple[str, Any]]:
    order = ("fp32", "16-bit", "int8", "int4")
    return sorted(engines.items(), key=lambda item: (order.index(item[1]["precision"]), item[1]["answer"]))


def _peer_row(name: str, one: dict[str, Any], agreement: dict[str, Any]) -> list[str]:
    low, high = one["answer_range"]
    times = [f"{one[stage]:.4g}" for stage in _STAGES]
    about = [f"{low:.3g} to {high:.3g}", f"{one['peak_rss'] / 1e9:.2f}", f"{agreement['max_difference']:.3g}"]
    return [name, one["precision"], *times, *about]


def _ratios(comparisons: dict[str, Any], failures: dict[str, str]) -> Iterator[str]:
    lines = []
    for precision, one in comparisons["classes"].items():
        memory = one["least_memory"]
        lines.append(
            f"- {precision}, whole answer: {_ratio(one['best']['answer'])}; least memory: {memory['theirs']} takes "
            f"{memory['ratio']:.2f} times as much as {memory['ours']}"
        )
    for peer, best in comparisons["best_against"].items():
        lines.append(f"- best against best, {peer}: {_ratio(best['answer'])}")
    lines += [f"- not measured: {name}: {reason}" for name, reason in failures.items()]
    yield "\n".join(lines)


def _overheads(engines: dict[str, Any]) -> Iterator[str]:
    """What our own code adds to a decode step, where that can be seen."""
    ours = {name: one["overhead"] for name, one in engines.items() if "overhead" in one}
    if ours:
        parts = (f"{one['outside_us']:.0f} of {one['step_us']:.0f} ({name})" for name, one in ours.items())
        yield "Microseconds of a decode step outside the engine's own run: " + ", ".join(parts) + "."


def _ratio(best: dict[str, Any]) -> str:
    low, high = best["range"]
    return f"{best['ours']} is {best['ratio']:.2f} times ({low:.2f} to {high:.2f}) as fast as {best['theirs']}"


def _decoders() -> Iterator[str]:
    """Decoders alone, beside runtimes that know no PaliGemma."""
    for name, processor in _DECODERS.items():
        found = _load(f"peers_decoder_{name}.json")
        if found:
            size = found["size"]
            yield (
                f"## The decoder alone, {found['layers']} layers{processor}\n\n"
                f"{found['prefix']} tokens in, {found['tokens']} out, no image, on {found['machine']['cpu']}. The mask "
                "is causal in the peers, prefix-LM in ours. By `python -m benchmarks.peers.decoder_only "
                f"{size} --work FOLDER --rounds {found['rounds']}`:"
            )
            engines = {name: one for name, one in found["engines"].items() if "token" in one}
            head = (
                "engine",
                "class",
                "prefill, s",
                "a token, ms",
                "range",
                "reads a token, GB",
                "GB/s",
                "peak RSS, GB",
            )
            yield table((*head, "off fp32, nats"), [_decoder_row(name, one) for name, one in engines.items()])
            lines = [
                f"- {pair}: decode {_spread(one['decode'])}, prefill {_spread(one['prefill'])}, "
                f"memory {_spread(one['peak_rss'])}"
                for pair, one in found["ratios"].items()
            ]
            lines += [f"- not at this size, it wants more memory than there is: {one}" for one in found["too_large"]]
            yield "\n".join(lines)


def _decoder_row(name: str, one: dict[str, Any]) -> list[str]:
    low, high = (1000 * seconds for seconds in one["token_range"])
    return [
        name,
        one["precision"],
        f"{one['prefill']:.3g}",
        f"{1000 * one['token']:.1f}",
        f"{low:.1f} to {high:.1f}",
        f"{one['bytes_per_token'] / 1e9:.2f}",
        f"{one['decode_gb_per_s']:.1f}",
        f"{one['peak_rss'] / 1e9:.2f}",
        f"{one['agreement']['largest']:.3g}",
    ]


def _spread(one: dict[str, Any]) -> str:
    low, high = one["range"]
    return f"{one['ratio']:.2f} ({low:.2f} to {high:.2f})"


def _scaling() -> Iterator[str]:
    found = _load("scaling.json")
    if found:
        steps = "; ".join(
            "{} {:.3f} ({:.3f} to {:.3f})".format(precision, one["late_over_early"], *one["late_over_early_range"])
            for precision, one in found["precisions"].items()
        )
        yield (
            f"## How cost grows\n\n{found['model']}, on {found['machine']['cpu']}, by `python -m benchmarks.scaling "
            f"--work FOLDER --rounds {found['num_rounds']}`. A decode step behind 90 tokens over one behind 5 takes "
            f"{steps} times as long. Vision and prefill together:"
        )
        rows = [
            [
                precision,
                str(one["image_size"]),
                f"{one['flops'] / 1e12:.2f}",
                f"{one['seconds']:.2f}",
                f"{one['flops'] / one['seconds'] / 1e9:.0f}",
                f"{one['over_flops']:.2f}",
            ]
            for precision, both in found["precisions"].items()
            for one in both["sizes"]
        ]
        head = ("precision", "pixels", "operations, 10^12", "seconds", "10^9 operations/s", "over what operations say")
        yield table(head, rows)


def _overlap() -> Iterator[str]:
    found = _load("overlap.json")
    if found:
        yield (
            "## Overlap\n\n`--overlap` encodes the next picture while this one is answered. On "
            f"{found['machine']['cpu']}, by `python -m benchmarks.overlap BUNDLE ...`:"
        )
        rows = [
            [
                f"{one['precision']}, {one['bundle_bytes'] / 1e9:.2g} GB",
                f"{1000 * one['seconds_a_picture']:.1f}",
                f"{1000 * one['seconds_a_picture_overlapped']:.1f}",
                "{:.2f} ({:.2f} to {:.2f})".format(one["speedup"], *one["speedup_range"]),
            ]
            for one in found["bundles"]
        ]
        yield table(("bundle", "a picture, ms", "overlapped, ms", "times as many pictures"), rows)


def _operators() -> Iterator[str]:
    found = _load("operator_times.json")
    if found:
        yield (
            "## Where the time goes\n\nBy ONNX Runtime's profiler, for bundles that miss a target or come near it. On "
            f"{found['machine']['cpu']}, by `python -m benchmarks.operator_times BUNDLE ...`:"
        )
        rows = [
            [
                f"{one['precision']}{', fast prefill' if one['fast_prefill'] else ''}",
                f"{one['image_size']}, {one['layers'][0]} + {one['layers'][1]} layers",
                stage,
                f"{part['seconds']:.3g}",
                str(part["num_operators"]),
                *(f"{share:.0%}" for share in part["groups"].values()),
                ", ".join(f"{name.split(',')[0]} {share:.0%}" for name, share in list(part["operators"].items())[:3]),
            ]
            for one in found["bundles"]
            for stage, part in one["stages"].items()
        ]
        head = ("bundle", "pixels, size", "stage", "seconds", "operators", *GROUPS, "most")
        yield table(head, rows)


def _jetsons() -> Iterator[str]:
    found = _load("jetson_floors.json")
    if found:
        yield (
            "## Jetsons: predictions\n\n**None of these devices has run it.** Milliseconds of one answer (16 tokens "
            f"in, 10 out) at {found['model']}, 3B. The floor is what a data sheet's bandwidth and operations allow. "
            "The predictions are at the rates that such devices are seen to keep. By `python -m "
            "benchmarks.jetson_floors BUNDLE`:"
        )
        rows = [
            [
                one["device"],
                one["precision"],
                f"{one['floor_ms']['answer']:.0f}",
                f"{one['sustained_ms']['answer']:.0f}",
                f"{one['sustained_ms']['vision'] + one['sustained_ms']['prefill']:.0f}",
                f"{one['sustained_ms']['token']:.1f}",
                f"{one['memory_bytes'] / 1e9:.1f}",
            ]
            for one in found["rows"]
        ]
        head = ("device", "precision", "floor", "predicted", "predicted first token", "predicted token", "memory, GB")
        yield table(head, rows)


def _boards() -> Iterator[str]:
    rows = [row for record in _records("boards/*.json") for row in _bench_rows(record)]
    yield (
        "## Contribute a board's figures\n\n"
        "Run `paliedge bench -m BUNDLE -o benchmarks/results/boards/NAME.json` on the quiet board, in its fastest "
        "power mode. Open a pull request with that file alone. `make bench-report` takes it into this page."
        + (" So far:" if rows else " So far there is none.")
    )
    if rows:
        yield table(_BENCH_HEAD, rows)


_PARTS = {
    "summary": (_summary,),
    "tables": (_ours, _peers, _decoders, _operators, _scaling, _overlap, _jetsons, _boards),
    "warnings": (_warnings,),
}


def _machine(record: Record) -> str:
    facts = record.conditions
    gpu = "" if "on the CPU" in record.subject.backend.split(" (")[0] else facts.get("gpu", "")
    name = facts.get("board") or gpu or facts.get("processor", "an unknown processor")
    return ", ".join(part for part in (f"{name} ({facts.get('cores', '?')} cores)", facts.get("power mode")) if part)


def _load(name: str) -> dict[str, Any]:
    path = RESULTS / name
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


if __name__ == "__main__":
    main()
