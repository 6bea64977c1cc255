"""Decoding without an image: our decoder beside llama.cpp and onnxruntime-genai, on the same weights.

    python -m benchmarks.peers.decoder_only mid --work FOLDER     # 6 of PaliGemma-3B's 18 layers
    python -m benchmarks.peers.decoder_only 3b --work FOLDER      # all of them; 35 GB of disk, 24 GB of memory

makes the checkpoint, our bundles, the peers' environments and their files, what is not there yet, and writes
benchmarks/results/peers_decoder_SIZE.json. Agreement comes first: who gives the forced tokens other
log-probabilities than our float32 graphs is recorded and not timed, and the script ends with 1.
The prefix of that is bos alone, for which the causal mask of these peers and ours are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.machine import describe_machine
from benchmarks.peers import genai, llama_cpp
from benchmarks.peers.gemma_checkpoint import write_gemma
from benchmarks.peers.harness import (
    NUM_TOKENS,
    ROOT,
    Engine,
    environment,
    first_error,
    probe_bandwidth,
    run_child,
    summarise,
    take_turns,
)
from benchmarks.peers.ours import inputs_for
from paliedge.bundle.bundle import Bundle

SIZES = {"mid": 6, "3b": 18}
"""Layers of the decoder."""
NUM_PREFIX = 272
NUM_AGREED = 33
"""Tokens of the answer whose log-probabilities are compared, the first one's not among them."""
LARGEST, USUAL = "largest", "root_mean_square"
BOUNDS = {"fp32": (LARGEST, 2e-2), "16-bit": (LARGEST, 2e-2), "int8": (USUAL, 0.4), "int4": (USUAL, 0.9)}
"""Nats that forced tokens' log-probabilities may be off our float32 graphs, and by which statistic.

Exact forms say whether a graph is right. Quantised ones of random weights are noisy, and more so with more layers:
measured with 6 on Q4_0, noise is 0.3, another base of the rotations makes it 0.4, a norm without its 1 0.6, all
norms 1.0. So these bounds find only what is broken.
"""
RESULTS = ROOT / "benchmarks" / "results"
DECLARED = {
    "vision": "left out on both sides",
    "mask": "peers are causal; ours sees the whole prefix, as PaliGemma does: as many products, half of the scores "
    "of the 272 tokens' attention hidden in theirs. With a prefix of bos alone, where agreement is measured, the "
    "masks are the same",
    "head": "logits of the last token only, everywhere; ours chooses the token in the graph, the peers' logits are "
    "searched by numpy, inside the time of a step",
    "cache": "512 places in the peers' caches, of which llama.cpp reads those in use; ours reads all of its own",
    "ratios": "the peer's over ours: above 1 ours is faster or smaller",
    "memory": "peak_rss counts pages of mapped weight files, anonymous does not",
    "builder": "onnxruntime-genai's builder adds 1 to norm weights in the checkpoint's bfloat16, which rounds them: "
    "which its fp32 form shows. That form is asked at mid only, for its memory; the builder's steps are the same",
    "bytes_per_token": "weights that a decode step reads, by file; the KV cache is below 1 % of them",
}


class Form(NamedTuple):
    """One engine's form of the weights: `name` as the engine calls it, `precision` the class it is compared in."""

    engine: str
    name: str
    precision: str

    @property
    def title(self) -> str:
        return f"{self.engine} {self.name}"

    @property
    def timed(self) -> bool:
        """Exact forms only say whether a graph is right."""
        return self.precision in ("int8", "int4")


OURS, LLAMA, GENAI = "paliedge", "llama.cpp", "onnxruntime-genai"
REFERENCE = Form(OURS, "fp32", "fp32")
FORMS = (
    Form(OURS, "int8", "int8"),
    Form(OURS, "int4", "int4"),
    Form(LLAMA, "F16", "16-bit"),
    Form(LLAMA, "Q8_0", "int8"),
    Form(LLAMA, "Q4_0", "int4"),
    Form(LLAMA, "Q4_0 pure", "int4"),
    Form(GENAI, "fp32", "fp32"),
    Form(GENAI, "int8", "int8"),
    Form(GENAI, "int4", "int4"),
)
TOO_LARGE = {"3b": (Form(GENAI, "fp32", "fp32"), Form(GENAI, "int8", "int8"))}
"""Their builder or graph wants more memory at this size than 24 GB (15 GB for int8's 6 layers); mid asks them."""


@dataclass(frozen=True)
class Contender:
    """An engine that is ready to run.

    Attributes:
        form: which.
        command: the child's.
        agreed: inputs and their number for agreement, added to the command.
        timed: the same for the timed answers.
        describe: gives `bytes_per_token` and `tensors`, which says what has which type.
    """

    form: Form
    command: tuple[str, ...]
    agreed: tuple[str, ...]
    timed: tuple[str, ...]
    describe: Callable[[], dict[str, Any]]

    def engine(self, num_threads: int) -> Engine:
        return self._engine(*self.timed, "--threads", str(num_threads))

    def agree(self, num_threads: int) -> dict[str, Any]:
        return run_child(self._engine(*self.agreed, "--threads", str(num_threads), "--agree"))

    def _engine(self, *options: str) -> Engine:
        return Engine(self.form.title, self.form.precision, (*self.command, *options))


def make_once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, made under another name first, so that what is there is whole."""
    if not path.exists():
        print(f"making {path}", file=sys.stderr, flush=True)
        partial = path.with_name(f"partial-{path.name}")
        shutil.rmtree(partial, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(partial)
        partial.rename(path)
    return path


def run(*command: str | Path) -> str:
    """Run from the repository's root with our packages in sight; what it prints."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "runtime"), str(ROOT / "export")])
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True
    )
    return done.stdout.decode()


class Workshop:
    """Everything that a comparison needs, made in `folder` when it is asked for.

    What only agreement needs is removed behind it: at full size float32 graphs are 12 GB.
    """

    def __init__(self, folder: Path, num_layers: int, num_threads: int) -> None:
        self.folder = folder
        self.num_threads = num_threads
        self._num_layers = num_layers

    def checkpoint(self) -> Path:
        options = ("--model", "paligemma-3b", "--layers", str(self._num_layers))
        module = "benchmarks.make_checkpoint"
        return make_once(
            self.folder / "checkpoint", lambda path: run(sys.executable, "-m", module, path, *options)
        )  # fmt: skip

    def bundle(self, precision: str) -> Path:
        return make_once(self.folder / precision, lambda path: self._export(path, precision))

    def gemma(self) -> Path:
        return make_once(self.folder / "gemma", lambda path: write_gemma(self.checkpoint(), path))

    def gguf(self, form: str) -> Path:
        return make_once(self.folder / f"{form.replace(' ', '-')}.gguf", lambda path: self._write_gguf(path, form))

    def genai(self, form: str) -> Path:
        return make_once(
            self.folder / f"genai-{form}",
            lambda path: run(genai_python(), "-m", "benchmarks.peers.genai", self.gemma(), "--build", form, path),
        )

    def fed(self, num_tokens: int, num_prefix: int) -> Path:
        """The inputs of `ours --tokens --prefix` as a file for the peers."""
        manifest = Bundle(self.bundle("int4"), check_hashes=False).manifest
        inputs = inputs_for(manifest, num_tokens, num_prefix)
        path = self.folder / f"fed-{num_prefix}.json"
        fed = {"prompt": inputs.prompt, "forced": inputs.forced, "num_rows": manifest.tokens.vocab_size}
        path.write_text(json.dumps(fed))
        return path

    def forget(self, *names: str) -> None:
        """Remove what can be made again."""
        for name in names:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _export(self, path: Path, precision: str) -> None:
        checkpoint, options = self.checkpoint(), ["--precision", precision]
        if precision != "fp32":
            options += ["--calibrate", str(make_once(self.folder / "images", write_images))]
        program = "from paliedge.cli import main; main()"
        run(sys.executable, "-c", program, "export", checkpoint, "-o", path, *options, "--no-compare")

    def _write_gguf(self, path: Path, form: str) -> None:
        if form == "F16":
            run(llama_python(), "-m", "benchmarks.peers.gguf_file", self.gemma(), path)
        else:
            run(llama_python(), "-m", "benchmarks.peers.llama_cpp", self.gguf("F16"), "--quantize", form, path)


def write_images(folder: Path) -> None:
    """Noise for the calibration: with random weights a picture is no better."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        Image.fromarray(rng.integers(0, 256, (224, 224, 3), np.uint8)).save(folder / f"{index}.png")


def llama_python() -> str:
    return environment("llama_cpp", llama_cpp.REQUIREMENTS, llama_cpp.VARIABLES)


def genai_python() -> str:
    return environment("genai", genai.REQUIREMENTS)


def describe_ours(folder: Path) -> dict[str, Any]:
    """The decoder's weight files, whose names say what is in them."""
    manifest = Bundle(folder, check_hashes=False).manifest
    (target,) = manifest.targets.values()
    sizes = {name: manifest.files[name].size for name in target.decoder.weights}
    return {"bytes_per_token": sum(sizes.values()), "tensors": sizes}


def prepare(shop: Workshop, form: Form) -> Contender:
    """Make what a contender needs."""
    if form.engine == OURS:
        return _prepare_ours(shop.bundle(form.name), form)
    feds = (shop.fed(NUM_AGREED, 1), shop.fed(NUM_TOKENS, NUM_PREFIX))
    agreed, timed = (("--fed", str(fed)) for fed in feds)
    if form.engine == LLAMA:
        python, path = llama_python(), str(shop.gguf(form.name))
        command: tuple[str, ...] = (python, "-m", "benchmarks.peers.llama_cpp", path)
        describe: tuple[str, ...] = (python, "-m", "benchmarks.peers.gguf_file", path, "--describe")
    else:
        command = (genai_python(), "-m", "benchmarks.peers.genai", str(shop.genai(form.name)))
        describe = (*command, "--describe")
    return Contender(form, command, agreed, timed, lambda: json.loads(run(*describe).splitlines()[-1]))


def _prepare_ours(bundle: Path, form: Form) -> Contender:
    return Contender(
        form,
        (sys.executable, "-m", "benchmarks.peers.ours", str(bundle)),
        ("--prefix", "1", "--tokens", str(NUM_AGREED)),
        ("--prefix", str(NUM_PREFIX), "--tokens", str(NUM_TOKENS)),
        lambda: describe_ours(bundle),
    )


def question(shop: Workshop, form: Form) -> tuple[dict[str, Any], Contender | None]:
    """What a contender says and what it is made of.

    Exact forms are asked once in the life of the folder, since what they need is removed behind them.
    """
    if form.timed:
        contender = prepare(shop, form)
        return ask(contender, shop.num_threads), contender

    def write(path: Path) -> None:
        path.write_text(json.dumps(ask(prepare(shop, form), shop.num_threads)))

    path = make_once(shop.folder / f"said-{form.engine}-{form.name}.json", write)
    found: dict[str, Any] = json.loads(path.read_text())
    return found, None


def ask(contender: Contender, num_threads: int) -> dict[str, Any]:
    return {"described": contender.describe(), **contender.agree(num_threads)}


def distance(found: Sequence[float], wanted: Sequence[float]) -> dict[str, Any]:
    """The largest and the usual difference of log-probabilities, in nats; a number that is none is infinitely off."""
    if len(found) != len(wanted):
        return {LARGEST: float("inf"), USUAL: float("inf")}
    off = np.nan_to_num(np.abs(np.subtract(found, wanted)), nan=np.inf)
    return {LARGEST: round(float(off.max()), 6), USUAL: round(float(np.sqrt((off**2).mean())), 6)}


def judge(
    precision: str, found: Mapping[str, Any], reference: Mapping[str, Any], rival: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How far a contender is off our float32 graphs, and off ours of its class; `agrees` if it may be timed.

    Args:
        precision: its class, which says how much may be.
        found: what it printed: `log_probs` and `chosen`.
        reference: the same of our float32 graphs.
        rival: the same of ours in its class.
    """
    off = distance(found["log_probs"], reference["log_probs"])
    same = [one == other for one, other in zip(found["chosen"], reference["chosen"], strict=False)]
    statistic, bound = BOUNDS[precision]
    judged = {**off, "bound": {statistic: bound}, "agrees": off[statistic] <= bound}
    judged["same_choices"] = f"{sum(same)} of {len(reference['chosen'])}"
    if rival:
        judged["off_ours_of_its_class"] = distance(found["log_probs"], rival["log_probs"])
    return judged


def agree_all(shop: Workshop, forms: Sequence[Form]) -> tuple[dict[str, dict[str, Any]], list[Contender]]:
    """What is known of every contender before it is timed, and those that may be.

    A contender that cannot be made or run is recorded with its error. Where an exact form is
    off, so is its engine's graph, and quantised forms of the same engine are not timed either.
    """
    reference, _ = question(shop, REFERENCE)
    shop.forget("fp32")
    known: dict[str, dict[str, Any]] = {}
    agreeing: list[Contender] = []
    rivals: dict[str, Mapping[str, Any]] = {}
    wrong: set[str] = set()
    for form in forms:
        record: dict[str, Any] = {"precision": form.precision}
        known[form.title] = record
        try:
            said, contender = question(shop, form)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            record |= {"agreement": {"agrees": False}, "error": first_error(str(error))}
            continue
        judged = judge(form.precision, said, reference, rivals.get(form.precision))
        judged["agrees"] = judged["agrees"] and form.engine not in wrong
        if form.engine == OURS:
            rivals[form.precision] = said
        if not form.timed and not judged["agrees"]:
            wrong.add(form.engine)
        record |= {"agreement": judged, **said["described"]}
        record |= {key: said[key] for key in ("packages", "about") if said.get(key)}
        print(form.title, json.dumps(judged), file=sys.stderr, flush=True)
        if contender and judged["agrees"]:
            agreeing.append(contender)
    shop.forget("gemma", "F16.gguf", "genai-fp32")
    return known, agreeing


def medians(one: Mapping[str, Any]) -> dict[str, float]:
    """What is compared, of one round: seconds and bytes."""
    found = summarise([one])
    return {"decode": found["token"], "prefill": found["prefill"], "peak_rss": one["peak_rss"]} | {
        "anonymous": one["anonymous"]
    }


def compare(peer: Sequence[Mapping[str, Any]], rival: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The peer's medians over ours, with the range over rounds of the same index."""
    pairs = [(medians(one), medians(other)) for one, other in zip(peer, rival, strict=True)]
    found = {}
    for name in pairs[0][0]:
        middle = [statistics.median(pair[index][name] for pair in pairs) for index in (0, 1)]
        ratios = [one[name] / other[name] for one, other in pairs]
        found[name] = {
            "ratio": round(middle[0] / middle[1], 3), "range": [round(min(ratios), 3), round(max(ratios), 3)]
        }  # fmt: skip
    return found


def compare_classes(
    forms: Sequence[Form], rounds: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Every peer with ours of the same class, if ours is there."""
    own = {form.precision: form.title for form in forms if form.engine == OURS}
    return {
        f"{form.title} / {own[form.precision]}": compare(rounds[form.title], rounds[own[form.precision]])
        for form in forms
        if form.precision in own and form.engine != OURS
    }


def time_all(contenders: Sequence[Contender], num_rounds: int, num_threads: int) -> dict[str, Any]:
    """Rounds of all contenders, with the machine's bandwidth between them; who fails is not compared."""
    load, failures = os.getloadavg(), dict[str, str]()
    bandwidths: list[float] = []
    engines = [one.engine(num_threads) for one in contenders]
    rounds = take_turns(engines, num_rounds, lambda: bandwidths.append(probe_bandwidth(num_threads)), failures)
    rounds = {name: found for name, found in rounds.items() if name not in failures}
    return {
        "load_average": {"before": load, "after": os.getloadavg()},
        "read_gb_per_s": _spread([bandwidth / 1e9 for bandwidth in bandwidths]),
        "engines": {name: summarise(found) for name, found in rounds.items()},
        "failures": failures,
        "ratios": compare_classes([one.form for one in contenders if one.form.title in rounds], rounds),
    }  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and range; nothing of nothing."""
    if not values:
        return {}
    return {"median": round(statistics.median(values), 2), "range": [round(min(values), 2), round(max(values), 2)]}


def write_result(path: Path, known: dict[str, dict[str, Any]], timed: dict[str, Any], **head: Any) -> None:
    """Everything in one file; achieved bandwidths are a step's bytes over its median time."""
    engines = timed.pop("engines")
    for name, found in engines.items():
        achieved = round(known[name]["bytes_per_token"] / found["token"] / 1e9, 2)
        known[name] |= {**found, "decode_gb_per_s": achieved}
    result = {**head, "machine": describe_machine(), "declared": DECLARED, **timed, "engines": known}
    path.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--work", type=Path, required=True, help="what is made on the way; can be used again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    shop = Workshop(arguments.work.absolute(), SIZES[arguments.size], arguments.threads)
    too_large = TOO_LARGE.get(arguments.size, ())
    forms = [form for form in FORMS if form not in too_large]
    known, agreeing = agree_all(shop, forms)
    timed = time_all(agreeing, arguments.rounds, arguments.threads)
    path = arguments.results / f"peers_decoder_{arguments.size}.json"
    head: dict[str, Any] = {
        "size": arguments.size,
        "layers": SIZES[arguments.size],
        "prefix": NUM_PREFIX,
        "tokens": NUM_TOKENS,
    }
    head["too_large"] = [form.title for form in too_large]
    write_result(path, known, timed, **head, threads=arguments.threads, rounds=arguments.rounds)
    untimed = [name for name, one in known.items() if not one["agreement"]["agrees"]] + list(timed["failures"])
    print(f"{path}; left out: {', '.join(untimed) or 'none'}")
    sys.exit(bool(untimed))


if __name__ == "__main__":
    main()
