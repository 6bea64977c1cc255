"""How fast is paliedge beside transformers and OpenVINO, on the same weights, pictures and tokens, on this CPU?

    python -m benchmarks.peers.whole_model shapes --work FOLDER
    python -m benchmarks.peers.whole_model mid --work FOLDER
    python -m benchmarks.peers.whole_model 3b --work FOLDER

does all of its own set-up and writes benchmarks/results/peers_SIZE.json. `shapes` is the small model that ships; `3b`
has PaliGemma-3B's size and random weights; `mid` is as wide and 6 + 6 layers deep. Checkpoint, bundles and the
peers' environments are made once and found again. An answer is 10 tokens to one image and 16 prompt tokens;
the same tokens are fed to every engine, and none stops early.

Nothing is timed that does not agree. Every engine says how likely it finds the fed tokens, each behind those before
it, and is held to our fp32 graphs; an engine that runs our graphs also to ONNX Runtime on the same graphs,
where rounding is all that may differ. What fails is named in the results, which are written all the same, and
the script ends with 1. Precisions are compared within their class: fp32, 16-bit, int8, int4; and the fastest of ours
with the fastest of theirs, whatever the class.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import describe_machine
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.peers.comparisons import CLASSES, STAGES, add_speedups, compare_engines
from benchmarks.peers.harness import (
    ROOT,
    TORCH,
    Engine,
    environment,
    first_error,
    probe_bandwidth,
    run_child,
    save_inputs,
    summarise,
    take_turns,
)
from benchmarks.peers.ours import inputs_for
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import MANIFEST
from paliedge.planning.memory import estimate_memory
from paliedge.planning.roofline import count_parameters, scheme_for

SHAPES = ROOT / "benchmarks" / "shapes" / "checkpoint"
RESULTS = ROOT / "benchmarks" / "results"
BOUNDS = {"fp32": 1e-3, "16-bit": 0.25, "int8": 2.0, "int4": 2.5}
"""Nats that a forced token's log-probability may be off from our fp32 graphs'. Integers are coarse, and static scales
meet noise here instead of the pictures that they were calibrated with."""
SAME_GRAPHS_BOUNDS = {"fp32": 1e-3, "16-bit": 0.25, "int8": 0.75, "int4": 0.75}
"""The same for an engine that runs our graphs, from ONNX Runtime on these graphs."""
REDUCED_HEAD_BOUND = 1e-2
"""How much the lead of one location token over another may differ from the whole head's, in nats."""
_CALIBRATION_IMAGES = 4
_REFERENCE = "paliedge fp32"
_INPUTS = "inputs.npz"
_REDUCED, _FAST = "-reduced-head", "-fast-prefill"
_VARIANTS = {_REDUCED: ("--head-vocab", "detect"), _FAST: ("--fast-prefill",)}
"""What a bundle's name ends with, and the options that make such a one."""
_VERSIONS = """import json, sys; from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))"""


class Size(NamedTuple):
    """A model to compare on.

    Attributes:
        num_layers: of both parts of a checkpoint that is made; None, PaliGemma-3B's.
        num_answers: measured in each child.
        num_overhead: answers whose decode steps are looked into; 0 where a step takes too long to see anything else.
        variants: whether our int4 with a reduced head, and with a prefill of its own, take part.
        settle_s: how long a round waits behind the largest models of the one before.
    """

    num_layers: int | None
    num_answers: int
    num_overhead: int
    variants: bool
    settle_s: float


SIZES = {
    "shapes": Size(None, 200, 200, False, 0),
    "mid": Size(6, 5, 5, True, 10),
    "3b": Size(None, 2, 0, True, 30),
}


class Peer(NamedTuple):
    """Requirements of a peer's environment, and whose versions are told."""

    requirements: tuple[str, ...]
    packages: tuple[str, ...]


PEERS = {
    "transformers": Peer((TORCH, "transformers==5.23.0"), ("torch", "transformers", "numpy")),
    "openvino": Peer(("openvino==2026.4.1", "numpy==2.2.6", "msgspec==0.20.0"), ("openvino", "numpy")),
}


@dataclass(frozen=True)
class Contender:
    """An engine that takes part.

    Attributes:
        engine: without what it is asked for, --agree or --answers.
        peer: "paliedge" or one of `PEERS`.
        bundle: name of our export whose graphs it runs; "" for none.
        cache: where it keeps what it compiles; emptied before it first runs, so that this is seen.
    """

    engine: Engine
    peer: str
    bundle: str = ""
    cache: Path | None = None

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def has_reduced_head(self) -> bool:
        """Such an engine does not say what the others do and is compared with none of them."""
        return self.bundle.endswith(_REDUCED)

    def asked(self, *options: str) -> Engine:
        return replace(self.engine, command=(*self.engine.command, *options))


_OUR_BUNDLES = {"cpu-fp32": "fp32", "cpu-fp16": "16-bit", "cpu-int8": "int8", "cpu-int4": "int4"}
_OPENVINO = (
    ("fp32", "cpu-fp32", "f32"),
    ("16-bit", "cpu-fp32", "bf16"),
    ("16-bit", "cpu-fp16", "f32"),
    ("16-bit", "cpu-fp16", "bf16"),
    *(
        (precision, f"{target}-{precision}", hint)
        for precision in ("int8", "int4")
        for target in ("cpu", "jetpack6")
        for hint in ("f32", "bf16")
    ),
)
"""Class, whose graphs, INFERENCE_PRECISION_HINT. jetpack6's integers stand in the graph as Q/DQ, cpu's in the operators
of com.microsoft, which OpenVINO translates. jetpack7's graphs it cannot load: it has no TensorScatter."""


def list_contenders(size: str, folder: Path, num_threads: int) -> list[Contender]:
    """Everybody who takes part; no environment is made yet, so a peer's interpreter is its name.

    In the order of their turns: rivals of a class follow one another, and small weights come before large ones. Behind
    a process that let go of 12 GB, the next one's first answers took a tenth longer, on a virtual machine.
    """
    threads = ("--threads", str(num_threads))
    everybody = [
        *_our_contenders(folder, threads, SIZES[size].variants),
        *_transformers_contenders(folder, checkpoint_of(size, folder), threads),
        *_openvino_contenders(folder, threads),
    ]
    return sorted(everybody, key=lambda one: -CLASSES.index(one.engine.precision))


def _our_contenders(folder: Path, threads: Sequence[str], variants: bool) -> Iterator[Contender]:
    more = {"cpu-int4" + ending: "int4" for ending in _VARIANTS} if variants else {}
    for bundle, precision in (_OUR_BUNDLES | more).items():
        precision_name, _, variant = bundle.removeprefix("cpu-").partition("-")
        name = f"paliedge {precision_name}" + (f", {variant.replace('-', ' ')}" if variant else "")
        command = (sys.executable, "-m", "benchmarks.peers.ours", str(folder / bundle), *threads)
        yield Contender(Engine(name, precision, command), "paliedge", bundle)


def _transformers_contenders(folder: Path, checkpoint: Path, threads: Sequence[str]) -> Iterator[Contender]:
    start = ("transformers", "-m", "benchmarks.peers.hf", str(checkpoint), str(folder / _INPUTS), *threads)
    for dtype, precision in (("float32", "fp32"), ("bfloat16", "16-bit")):
        command, cache = (*start, "--dtype", dtype), folder / f"inductor-{dtype}"
        yield Contender(Engine(f"transformers {dtype}", precision, command), "transformers")
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
        compiled = Engine(f"transformers compiled {dtype}", precision, (*command, "--compile"), variables)
        yield Contender(compiled, "transformers", cache=cache)


def _openvino_contenders(folder: Path, threads: Sequence[str]) -> Iterator[Contender]:
    for precision, bundle, hint in _OPENVINO:
        start = ("openvino", "-m", "benchmarks.peers.openvino_peer", str(folder / bundle), str(folder / _INPUTS))
        engine = Engine(f"openvino {hint}, {bundle} graphs", precision, (*start, *threads, "--hint", hint))
        yield Contender(engine, "openvino", bundle)


def checkpoint_of(size: str, folder: Path) -> Path:
    return SHAPES if size == "shapes" else folder / "checkpoint"


def prepare(size: str, folder: Path, contenders: Sequence[Contender]) -> None:
    """Checkpoint, bundles and inputs, as far as they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint_of(size, folder)
    calibration = checkpoint / "calibration"
    if not calibration.exists():
        with _timed("checkpoint"):
            make_checkpoint(checkpoint, "paligemma-3b", 224, SIZES[size].num_layers)
        copy_samples(SHAPES / "calibration", calibration, _CALIBRATION_IMAGES)
    wanted = {one.bundle for one in contenders if one.bundle} | {"cpu-fp32"}
    if any("int" in bundle for bundle in wanted):
        wanted.add("cpu-int8")
    for bundle in sorted(wanted, key=lambda name: name != "cpu-int8"):  # the first one calibrates for the others
        if not (folder / bundle / MANIFEST).exists():
            with _timed(bundle):
                subprocess.run(export_command(checkpoint, folder, bundle), check=True, stdout=sys.stderr)
    save_inputs(folder / _INPUTS, inputs_for(Bundle(folder / "cpu-fp32", check_hashes=False).manifest))


def export_command(checkpoint: Path, folder: Path, bundle: str) -> list[str]:
    """The export of one bundle, named TARGET-PRECISION, with the ending of a variant behind it if it is one."""
    target, precision, *_ = bundle.split("-")
    variant = next((options for ending, options in _VARIANTS.items() if bundle.endswith(ending)), ())
    verb = [str(Path(sys.executable).with_name("paliedge")), "export", str(checkpoint), "-o", str(folder / bundle)]
    command = [*verb, "--target", target, "--precision", precision, "--no-compare"]
    if precision in ("int8", "int4") and bundle != "cpu-int8":
        command += ["--calibrate", str(folder / "cpu-int8")]
    return [*command, *variant]


def copy_samples(source: Path, target: Path, num_images: int) -> None:
    """The first pictures of a folder of calibration samples with their prompts, where random weights want no more."""
    lines = (source / "samples.jsonl").read_text().splitlines()
    names = sorted({json.loads(line)["image"] for line in lines})[:num_images]
    target.mkdir()
    for name in names:
        shutil.copy(source / name, target / name)
    kept = [line for line in lines if json.loads(line)["image"] in names]
    (target / "samples.jsonl").write_text("".join(line + "\n" for line in kept))


@contextmanager
def _timed(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    _say(f"{what}: {time.perf_counter() - started:.1f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def make_environments(contenders: Sequence[Contender], failures: dict[str, str]) -> list[Contender]:
    """The contenders with their interpreters; those whose packages cannot be installed are failures."""
    pythons = {"paliedge": sys.executable}
    for peer in dict.fromkeys(one.peer for one in contenders if one.peer in PEERS):
        try:
            with _timed(f"environment of {peer}"):
                pythons[peer] = environment(peer, PEERS[peer].requirements)
        except subprocess.CalledProcessError as error:
            failures |= {one.name: f"no environment: {error}" for one in contenders if one.peer == peer}
    ready = [one for one in contenders if one.peer in pythons]
    return [
        replace(one, engine=replace(one.engine, command=(pythons[one.peer], *one.engine.command[1:]))) for one in ready
    ]


def versions_of(contenders: Sequence[Contender]) -> dict[str, dict[str, str]]:
    """Of the peers' packages, as their own interpreters say."""
    pythons = {one.peer: one.engine.command[0] for one in contenders if one.peer in PEERS}
    return {
        peer: json.loads(subprocess.check_output([python, "-c", _VERSIONS, *PEERS[peer].packages], text=True))
        for peer, python in pythons.items()
    }


def compare_answers(found: Mapping[str, Any], reference: Mapping[str, Any], bound: float) -> dict[str, Any]:
    """Largest difference of log-probabilities, share of equal tokens, and whether that is agreement."""
    if len(found["log_probs"]) != len(reference["log_probs"]):
        raise ValueError(f"{len(found['log_probs'])} log-probabilities instead of {len(reference['log_probs'])}")
    pairs = list(zip(found["log_probs"], reference["log_probs"], strict=True))
    equal = [one == other for one, other in zip(found["chosen"], reference["chosen"], strict=True)]
    differences = [abs(one - other) for one, other in pairs]
    agrees = all(difference <= bound for difference in differences)  # False for one that is no number
    largest = max(differences) if agrees or all(difference == difference for difference in differences) else None
    return {
        "max_difference": None if largest is None else round(largest, 6),
        "bound": bound,
        "equal_tokens": round(sum(equal) / len(equal), 3),
        "agrees": agrees,
    }


class Judge:
    """Holds engines to the answers of our own graphs, each of which is asked once.

    Args:
        references: of ours, by the bundle that they run.
        ask: runs a child; another one for tests.
    """

    def __init__(
        self, references: Mapping[str, Contender], ask: Callable[[Engine], dict[str, Any]] = run_child
    ) -> None:
        self._references = references
        self._ask = ask
        self._answers: dict[tuple[str, ...], dict[str, Any]] = {}

    def _answer(self, contender: Contender, option: str) -> dict[str, Any]:
        engine = contender.asked(option)
        if engine.command not in self._answers:
            self._answers[engine.command] = self._ask(engine)
        return self._answers[engine.command]

    def judge(self, contender: Contender) -> dict[str, Any]:
        """How far an engine is from its references, whether it agrees, and what else it told."""
        precision = contender.engine.precision
        if contender.has_reduced_head:
            whole = self._references[contender.bundle.removesuffix(_REDUCED)]
            found, exact = (self._answer(one, "--locations") for one in (contender, whole))
            return {"against": f"{whole.name}, among location tokens"} | compare_answers(
                found, exact, REDUCED_HEAD_BOUND
            )
        found = self._answer(contender, "--agree")
        exact = self._answer(self._references["cpu-fp32"], "--agree")
        verdict = {"against": _REFERENCE} | compare_answers(found, exact, BOUNDS[precision])
        if "compile_s" in found:
            verdict["compile_s"] = round(found["compile_s"], 1)
        if contender.bundle and contender.peer != "paliedge":
            ours = self._answer(self._references[contender.bundle], "--agree")
            same = compare_answers(found, ours, SAME_GRAPHS_BOUNDS[precision])
            verdict["same_graphs_on_onnxruntime"] = same
            verdict["agrees"] = verdict["agrees"] and same["agrees"]
        return verdict


def references_for(folder: Path, contenders: Sequence[Contender], num_threads: int) -> dict[str, Contender]:
    """Our engine for each bundle that any contender runs, those that are only there to be compared with too."""
    found = {}
    for bundle in {one.bundle.removesuffix(_REDUCED) for one in contenders} - {""} | {"cpu-fp32"}:
        command = (sys.executable, "-m", "benchmarks.peers.ours", str(folder / bundle), "--threads", str(num_threads))
        name = _REFERENCE if bundle == "cpu-fp32" else f"paliedge {bundle}"
        found[bundle] = Contender(Engine(name, "", command), "paliedge", bundle)
    return found


def agree(
    contenders: Sequence[Contender], judge: Judge, failures: dict[str, str]
) -> tuple[list[Contender], dict[str, dict[str, Any]]]:
    """Those who may be timed, and every verdict; who disagrees or ends with an error is a failure."""
    verdicts: dict[str, dict[str, Any]] = {}
    for one in contenders:
        if one.cache:
            shutil.rmtree(one.cache, ignore_errors=True)
        started = time.perf_counter()
        try:
            verdict = verdicts[one.name] = judge.judge(one)
        except (RuntimeError, ValueError) as error:  # it ended with an error, or printed what is no answer
            failures[one.name] = first_error(str(error))
        else:
            if not verdict["agrees"]:
                failures[one.name] = f"does not agree: {json.dumps(verdict)}"
        said = failures.get(one.name) or json.dumps(verdicts[one.name])
        _say(f"agreement, {time.perf_counter() - started:.1f} s: {one.name}: {said}")
    return [one for one in contenders if one.name not in failures], verdicts


def describe_bundle(folder: Path) -> dict[str, Any]:
    """Sizes in bytes, on disk and by `paliedge plan`'s arithmetic."""
    manifest = Bundle(folder, check_hashes=False).manifest
    target = next(iter(manifest.targets.values()))
    decoder, vision = (
        sum(manifest.files[name].size for name in graph.weights) for graph in (target.decoder, target.vision_encoder)
    )
    planned = estimate_memory(manifest, count_parameters(manifest), scheme_for(target.precision))
    return {
        "bundle_bytes": sum(file.size for file in manifest.files.values()),
        "decoder_bytes": decoder,
        "vision_bytes": vision,
        "plan_over_files": round((planned.vision + planned.decoder) / (vision + decoder), 4),
    }


def describe_engine(contender: Contender, rounds: Sequence[Mapping[str, Any]], measured: str) -> dict[str, Any]:
    """One engine's figures: seconds, bytes, and medians of each round for what is compared with others.

    `measured`, a time, is the same for those that took turns.
    """
    found = {"precision": contender.engine.precision, "peer": contender.peer} | summarise(rounds)
    by_round = [summarise([one]) for one in rounds]
    found["token_us"] = round(1e6 * found["token"], 1)
    found["first_answer"] = round(statistics.median(one["first_answer"] for one in rounds), 3)
    found["by_round"] = {stage: [one[stage] for one in by_round] for stage in STAGES}
    found["measured"] = measured
    if contender.bundle:
        found["graphs"] = contender.bundle
    if contender.has_reduced_head:
        found["compared"] = False
    if contender.peer == "paliedge":
        found |= describe_bundle(Path(contender.engine.command[3]))
        found["decode_bandwidth"] = round(found["decoder_bytes"] / found["token"])
    return found


def measure_overheads(contenders: Sequence[Contender], num_answers: int) -> dict[str, dict[str, Any]]:
    """What our own code costs a decode step, see `benchmarks.peers.ours.measure_overhead`."""
    ours = [one for one in contenders if one.peer == "paliedge" and num_answers and not one.has_reduced_head]
    found = {one.name: run_child(one.asked("--overhead", str(num_answers))) for one in ours}
    for name, overhead in found.items():
        _say(f"overhead: {name}: {json.dumps(overhead)}")
    return found


def measure_size(
    contenders: Sequence[Contender], size: Size, num_rounds: int, num_threads: int, failures: dict[str, str]
) -> dict[str, Any]:
    """Conditions and figures of the contenders, who take turns."""
    load, bandwidths = os.getloadavg()[0], list[float]()
    asked = [one.asked("--answers", str(size.num_answers)) for one in contenders]
    rounds = take_turns(
        asked, num_rounds, lambda: bandwidths.append(probe_bandwidth(num_threads)), failures, size.settle_s
    )
    bandwidths = bandwidths or [probe_bandwidth(num_threads)]
    timed = [one for one in contenders if one.name not in failures]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    engines = {one.name: describe_engine(one, rounds[one.name], now) for one in timed}
    for name, overhead in measure_overheads(timed, size.num_overhead).items():
        engines[name]["overhead"] = overhead
    return {
        "read_bandwidth": statistics.median(bandwidths),
        "read_bandwidth_range": [min(bandwidths), max(bandwidths)],
        "load_average_before": load,
        "load_average_after": os.getloadavg()[0],
        "num_threads": num_threads,
        "num_rounds": num_rounds,
        "engines": engines,
    }


def merge(found: dict[str, Any], previous: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """`found` with what was known before of engines other than `names`, which were run now."""
    for part in ("engines", "agreement", "failures"):
        kept = {name: one for name, one in previous.get(part, {}).items() if name not in names}
        found[part] = kept | found[part]
    found["packages"] = {**previous.get("packages", {}), **found["packages"]}
    return found


def run(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All stages in order; what is found."""
    folder, num_threads = (arguments.work / size).resolve(), arguments.threads
    chosen = [
        one
        for one in list_contenders(size, folder, num_threads)
        if not arguments.engines or any(part in one.name for part in arguments.engines)
    ]
    failures: dict[str, str] = {}
    prepare(size, folder, chosen)
    ready = make_environments(chosen, failures)
    judge = Judge(references_for(folder, ready, num_threads))
    agreed, verdicts = agree(ready, judge, failures)
    asked = SIZES[size]._replace(num_answers=arguments.answers or SIZES[size].num_answers)
    measured = measure_size(agreed, asked, arguments.rounds, num_threads, failures)
    add_speedups(measured["engines"])
    found = measured | {"agreement": verdicts, "failures": failures, "packages": versions_of(ready)}
    if arguments.reuse and arguments.results.exists():
        found = merge(found, json.loads(arguments.results.read_text()), [one.name for one in chosen])
    for name, one in found["engines"].items():
        if compile_s := found["agreement"].get(name, {}).get("compile_s"):
            one["compile"] = {"cold_s": compile_s, "cached_s": one["first_answer"]}
    return {"size": size, "machine": describe_machine(), **found, "comparisons": compare_engines(found["engines"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and bundles; 45 GB for 3b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, help="of each child, behind one that warms up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--engines", action="append", default=[], help="only those whose name has this in it")
    parser.add_argument("--reuse", action="store_true", help="keep what the results have of engines that are not run")
    parser.add_argument("--results", type=Path, help="benchmarks/results/peers_SIZE.json unless given")
    arguments = parser.parse_args()
    arguments.results = arguments.results or RESULTS / f"peers_{arguments.size}.json"
    found = run(arguments.size, arguments)
    arguments.results.write_text(json.dumps(found, indent=2) + "\n")
    _say(json.dumps(found["comparisons"]["best_against"], indent=2))
    if found["failures"]:
        raise SystemExit("".join(f"{name}: {reason}\n" for name, reason in found["failures"].items()))


if __name__ == "__main__":
    main()
