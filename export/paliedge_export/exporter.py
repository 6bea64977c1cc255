"""From a checkpoint to a bundle: calibrate, write, compare, publish in one step.

Weights pass through memory one tensor at a time. Imports neither torch nor transformers.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from paliedge.bundle.digests import describe_file
from paliedge.bundle.golden import GOLDEN, write_golden
from paliedge.bundle.manifest import Limits, Manifest, Precision, Reference, write_manifest
from paliedge.bundle.precision_report import PRECISION_REPORT, PrecisionReport, TargetReport, write_precision_report
from paliedge.bundle.publish import publish_bundle
from paliedge.errors import UsageError
from paliedge_export.checkpoint.generation import read_ends
from paliedge_export.checkpoint.metadata import describe_switches
from paliedge_export.checkpoint.opening import check_rows, open_checkpoint
from paliedge_export.checkpoint.prompts import choose_prompts
from paliedge_export.checkpoint.safetensors_reader import Checkpoint
from paliedge_export.checkpoint.tokenizer import read_tokenizer
from paliedge_export.gate.bfloat16 import emulated
from paliedge_export.gate.compare import MAX_IMAGES, check, compare, find_obstacle, find_wrong_sums
from paliedge_export.gate.golden import golden_from_answers
from paliedge_export.gate.runner import ReferenceRun, Runner, collect_statistics, ignore_outputs
from paliedge_export.gate.sensitivity import NUM_SAMPLES, Trial, keep_worst, rank_layers
from paliedge_export.gate.witness import Witness
from paliedge_export.graphs.mask_decoder import find_mask_decoder, load_mask_decoder
from paliedge_export.options import (
    DEFAULT_MAX_NEW_TOKENS,
    DEFAULT_MAX_PROMPT_TOKENS,
    DEFAULT_QUANTIZATION,
    Quantization,
    check_precision,
    check_quantization,
    find_samples,
    statistics_file,
)
from paliedge_export.targets import TARGETS
from paliedge_export.weights.activations import STATISTICS, Statistics, load_statistics
from paliedge_export.weights.files import QUANTIZED, Encoding, Tensors, quantized_bits
from paliedge_export.weights.head_vocabulary import choose_head_vocabulary
from paliedge_export.weights.linears import Linear, linears
from paliedge_export.weights.samples import CALIBRATE, PLAIN_PICTURES, Sample, SampleFolder
from paliedge_export.weights.smoothing import smooth, unsmoothed
from paliedge_export.writer import (
    ModelSource,
    StoredByLayout,
    add_files,
    write_all_weights,
    write_bundle,
    write_target,
)

_FP32_GRAPHS, _THESE_GRAPHS = "its fp32 graphs", "these graphs"
STAND_IN = "jetpack6"
"""Of the targets whose integers are laid out for TensorRT, the one that every ONNX Runtime runs."""
_ENOUGH_TO_CALIBRATE = 32
_LOG = logging.getLogger(__name__)
_OFF = "left out by --no-compare"

Report = Callable[[str], None]


def export_bundle(
    checkpoint: str,
    output: Path,
    *,
    targets: Sequence[str] = ("cpu",),
    precision: Precision | None = None,
    max_prompt_tokens: int = DEFAULT_MAX_PROMPT_TOKENS,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    quantization: Quantization = DEFAULT_QUANTIZATION,
    mask_decoder: Path | None = None,
    adapters: Sequence[str | Path] = (),
    revision: str | None = None,
    force_base: bool = False,
    prompts: str | None = None,
    max_images: int = 1,
    letterbox: tuple[int, int, int] | None = None,
    compare: bool = True,
    report: Report = _LOG.info,
) -> Manifest:
    """Export `checkpoint` as the bundle `output`.

    One bundle may serve several targets. All have one precision: fp32 for `cpu` alone, fp16 for others,
    unless told. int8 and int4 are calibrated with the fp32 graphs. The last step runs every target's graphs
    with ONNX Runtime against a reference. That is transformers for fp32 where torch is installed, and the fp32
    graphs for any other precision; bf16 is emulated: ONNX Runtime has no kernels for it on a CPU. The manifest
    that it returns says what was measured, and what was not compared and why.

    Args:
        checkpoint: a folder, a hub id, or big_vision's .npz beside a tokenizer.json.
        output: folder of the bundle.
        targets, precision: see above.
        max_prompt_tokens, max_new_tokens, max_images: of a request; image tokens do not count as prompt.
        quantization: how an int8 or int4 bundle is made.
        mask_decoder: big_vision's vae-oid.npz or .safetensors; unless given it is looked for beside the checkpoint.
        adapters, revision, force_base: see `open_checkpoint`.
        prompts: one of `PRESETS` or a JSON file of templates; unless given the checkpoint's name decides.
        letterbox: a colour; pictures are padded with it and not squashed. Roboflow's packages say so themselves.
        compare: run the last step.
        report: gets a line a stage.

    Raises:
        CheckpointError: the checkpoint, the mask decoder or the adapter cannot be read, or is no PaliGemma's.
        PrecisionError: the graphs differ from the reference; nothing is published.
        UsageError: `output` holds something that is no bundle, a target or the model does not take
            the precision, or there is nothing to calibrate with.
    """
    opened = open_checkpoint(checkpoint, adapters, revision=revision, force_base=force_base, report=report)
    chosen = precision or ("fp32" if set(targets) == {"cpu"} else "fp16")
    check_precision(opened.config, targets, chosen)
    check_quantization(chosen, targets, quantization)
    tokenizer = read_tokenizer(opened.folders)
    tokens, notes = read_ends(opened.folders, tokenizer)
    preprocess = opened.read_preprocess()
    for note in (*tokenizer.notes, *notes, *describe_switches(preprocess)):
        report(note)
    check_rows(opened, tokens)
    samples = find_samples(opened.folders, quantization)
    vocabulary = None
    if quantization.head_vocabulary:
        vocabulary = choose_head_vocabulary(quantization.head_vocabulary, tokenizer.content, tokens, samples)
    name = Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint
    prefix = max_prompt_tokens + max_images * opened.config.vision.num_image_tokens
    masks_file = mask_decoder or next(filter(None, map(find_mask_decoder, opened.folders)), None)
    masks = load_mask_decoder(masks_file, tokens.num_segmentations) if masks_file else None
    source = ModelSource(
        name=name,
        folder=opened.folder,
        config=opened.config,
        tokens=tokens,
        tokenizer=tokenizer.content,
        limits=Limits(prefix=prefix, new_tokens=max_new_tokens),
        vocabulary=vocabulary,
        mask_decoder=masks,
        prompts=choose_prompts(prompts, name),
        preprocess=msgspec.structs.replace(preprocess, letterbox=letterbox or preprocess.letterbox),
    )
    with publish_bundle(output) as staging:
        witness = Witness(opened, source, report)
        job = _Job(staging, source, opened, tuple(dict.fromkeys(targets)), chosen, quantization, report, witness)
        return job.run(samples, compare=compare)


def _calibrating(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Those that calibrate and do not judge; none where too few would be left, and then all do both."""
    apart = samples[:-MAX_IMAGES]
    return apart if len(apart) >= _ENOUGH_TO_CALIBRATE else []


@dataclass(frozen=True)
class _Job:
    """One export, its stages in order."""

    staging: Path
    source: ModelSource
    checkpoint: Checkpoint
    targets: tuple[str, ...]
    precision: Precision
    quantization: Quantization
    report: Report
    witness: Witness

    def run(self, folder: SampleFolder | None, *, compare: bool) -> Manifest:
        """Calibrate if the precision asks for it, write, compare if that is wanted; returns what was written."""
        quantized = self.precision in QUANTIZED
        known = statistics_file(self.quantization) if quantized else None
        if quantized and not folder and not known:
            raise UsageError(
                expected=f"images to calibrate {self.precision} with",
                found="no --calibrate, and no folder 'calibration' in the checkpoint",
                action=CALIBRATE,
            )
        samples = folder.load() if folder and (quantized or compare) else self.source.golden_samples
        if self.source.vocabulary:
            samples = self.source.vocabulary.restrict(samples)
        judged = samples[-MAX_IMAGES:]
        calibrating = _calibrating(samples) or samples
        statistics = Statistics(f"{len(calibrating)} images of {folder.path.name}" if folder else "")
        if quantized and folder and not folder.has_prompts:
            self.report(f"warning: {folder.path} has no .jsonl with prompts like those to come. {PLAIN_PICTURES}")
        if compare and not folder:
            self.report("without images like those to come, the comparison has only drawn ones")
        if known:
            widths = {linear.name: linear.width for linear in linears(self.source.config)}
            statistics = load_statistics(known, widths)
        reference, golden = None, None
        if compare or (quantized and not known):
            wanted = samples if quantized and not known else judged
            reference, golden = self._refer(wanted, statistics, judge=compare)
        fast = self.quantization.fast_prefill
        encoding = Encoding(self.precision, kept_tokens=self.source.kept_tokens, fast_prefill=fast)
        report = PrecisionReport({})
        tensors: Tensors = self.checkpoint
        if quantized:
            encoding, tensors = self._quantize(statistics, encoding, calibrating[:NUM_SAMPLES], report)
            statistics.save(self.staging / STATISTICS)
        self.report(f"writing {self.precision} graphs for {', '.join(self.targets)}")
        stored = write_all_weights(self.staging, self.source, tensors, self.targets, encoding)
        manifest = write_bundle(self.staging, self.source, stored, self.targets, encoding)
        held = self.witness.said if compare else Reference(not_compared=_OFF)
        manifest = msgspec.structs.replace(manifest, calibration=STATISTICS if quantized else None, reference=held)
        if compare:
            return self._compare(manifest, judged, reference, golden, report, stored, encoding)
        manifest = msgspec.structs.replace(manifest, not_compared=dict.fromkeys(self.targets, _OFF))
        return self._add_report(manifest, report) if quantized else add_files(self.staging, manifest)

    def _refer(
        self, samples: Sequence[Sample], statistics: Statistics, *, judge: bool
    ) -> tuple[ReferenceRun | None, ReferenceRun | None]:
        """The reference's answers to the samples that count and to the golden prompts; fills `statistics` if empty.

        Unless it is to `judge`, samples that do nothing else are left out. A quantised bundle's golden is its own, so
        None; so are both where there is no reference.
        """
        words = self.source.words
        if self.precision == "fp32":
            transformers = self.witness.open(samples)
            if transformers is None:
                return None, None
            if transformers.exact and transformers.config == self.source.config:
                return transformers.answer(samples, words), transformers.answer(self.source.golden_samples, words)
            del transformers  # and its memory
        testimony = self.witness.ask(samples) if judge else None
        if testimony and (self.precision == "fp32" or testimony.config != self.source.config):
            with self._fp32_graphs(self.checkpoint, replace(self.source, config=testimony.config)) as (folder, _):
                self.witness.hold(Runner(folder, "cpu", prepack=False), testimony)
            testimony = None
        if self.precision == "fp32":
            return None, None
        with self._fp32_graphs(self.checkpoint, self.source) as (folder, _):
            if testimony:
                self.witness.hold(Runner(folder, "cpu", prepack=False), testimony)
            collecting = self.precision in QUANTIZED and not statistics.inputs
            runner = Runner(folder, "cpu", statistics=collecting, prepack=False)
            self.report(f"answering {sum(len(one.prompts) for one in samples)} prompts on {len(samples)} images")
            watch = collect_statistics(statistics, {linear.name for linear in linears(self.source.config)})
            runner.answer(samples[:-MAX_IMAGES], _FP32_GRAPHS, watch=watch, report=self.report)
            if _calibrating(samples):
                if not judge:
                    return None, None
                watch = ignore_outputs  # what is judged has no part in what it is judged by
            answers = runner.answer(samples[-MAX_IMAGES:], _FP32_GRAPHS, watch=watch, report=self.report)
            golden = None if self.precision in QUANTIZED else runner.answer(self.source.golden_samples, _FP32_GRAPHS)
            return answers, golden

    @contextmanager
    def _fp32_graphs(self, tensors: Tensors, source: ModelSource) -> Iterator[tuple[Path, StoredByLayout]]:
        """A bundle of float32 graphs for `cpu`, for as long as it is needed."""
        with tempfile.TemporaryDirectory(dir=self.staging) as name:
            self.report("writing fp32 graphs for reference")
            encoding = Encoding("fp32", kept_tokens=source.kept_tokens)
            folder = Path(name)
            stored = write_all_weights(folder, source, tensors, ("cpu",), encoding)
            write_bundle(folder, source, stored, ("cpu",), encoding)
            yield folder, stored

    def _quantize(
        self, statistics: Statistics, encoding: Encoding, samples: Sequence[Sample], report: PrecisionReport
    ) -> tuple[Encoding, Tensors]:
        """Smooth, and find out what to keep in 16 bits if that was asked; `report` takes note."""

        def bits(linear: Linear) -> int:
            return quantized_bits(self.precision, linear.name, linear.width)

        smoothing = unsmoothed(self.checkpoint, statistics)
        if self.quantization.smooth:
            self.report("smoothing the inputs of linear layers")
            smoothing = smooth(self.checkpoint, self.source.config, statistics, bits)
        report.calibrated_with, report.strengths = statistics.source, dict(smoothing.strengths)
        encoding = replace(encoding, inputs=smoothing.inputs)
        budget = self.quantization.sensitivity
        if budget is None:
            return encoding, smoothing.tensors
        lowered = "cpu" if set(self.targets) == {"cpu"} else "jetpack6"  # static activations suffer more
        with self._fp32_graphs(smoothing.tensors, self.source) as (folder, stored):
            trial = Trial(folder, self.source, lowered, stored, samples)
            layout = TARGETS[lowered].lowering.layout
            report.sensitivity = rank_layers(trial, smoothing.tensors, replace(encoding, layout=layout), self.report)
        kept = keep_worst(report.sensitivity, budget)
        return replace(encoding, kept=kept), smoothing.tensors

    def _compare(
        self,
        manifest: Manifest,
        samples: Sequence[Sample],
        reference: ReferenceRun | None,
        golden: ReferenceRun | None,
        report: PrecisionReport,
        stored: StoredByLayout,
        encoding: Encoding,
    ) -> Manifest:
        """Compare each target, write golden and report; targets with the same graphs share one comparison.

        For graphs that this ONNX Runtime cannot run, those of `STAND_IN` on the same weights are compared: a wrong
        weight is found there, too.
        """
        not_compared: dict[str, str] = {}
        done: dict[tuple[str, str], str] = {}
        for name, target in manifest.targets.items():
            files = (target.vision_encoder.file, target.decoder.file)
            if reference is None:
                missing = self.witness.said.not_compared or "transformers in float32 does not fit into memory"
                not_compared[name] = f"there was nothing to compare with: {missing}"
            elif wrong := find_wrong_sums(manifest, name):
                not_compared[name] = wrong
            elif files in done:
                self._share(report, not_compared, done[files], name)
            else:
                done[files] = name
                obstacle = find_obstacle(target)
                standing_in = self._standing_in(manifest, name, stored, encoding) if obstacle else nullcontext(manifest)
                with standing_in as staged:
                    judged, answers = self._judge(staged, name, samples, reference, golden=not golden)
                check(judged, STAND_IN if obstacle else name)
                golden = golden or answers
                if obstacle:
                    found = judged.comparison.describe()
                    not_compared[name] = f"{obstacle}; {STAND_IN}'s on the same weights were compared instead: {found}"
                else:
                    report.targets[name] = judged
        runnable = (name for name, target in manifest.targets.items() if not find_obstacle(target))
        if golden is None and (first := next((name for name in runnable if not find_wrong_sums(manifest, name)), None)):
            golden = Runner(self.staging, first).answer(self.source.golden_samples, _THESE_GRAPHS)
        if golden:
            prompts = self.source.golden_samples[0].prompts
            write_golden(self.staging / GOLDEN, golden_from_answers(prompts, golden, self.source.tokens.eos))
        changed = msgspec.structs.replace(
            manifest,
            comparisons={name: one.comparison for name, one in report.targets.items()},
            not_compared=not_compared,
            golden=GOLDEN if golden else None,
        )
        return self._add_report(changed, report)

    @staticmethod
    def _share(report: PrecisionReport, not_compared: dict[str, str], one: str, other: str) -> None:
        """What is known of a target is known of another with the same graphs."""
        if one in report.targets:
            report.targets[other] = report.targets[one]
        else:
            not_compared[other] = not_compared[one]

    def _judge(
        self, manifest: Manifest, name: str, samples: Sequence[Sample], reference: ReferenceRun, *, golden: bool
    ) -> tuple[TargetReport, ReferenceRun | None]:
        """Compare the target `name`; with `golden` its answers to the golden samples, too."""
        self.report(f"comparing {name} with {reference.reference}")
        precision = manifest.targets[name].precision
        with emulated(self.staging, manifest, name) if precision == "bf16" else nullcontext():
            runner = Runner(self.staging, name)
            judged = compare(runner, samples, reference, self.source.tokens, precision)
        return judged, runner.answer(self.source.golden_samples, _THESE_GRAPHS) if golden else None

    @contextmanager
    def _standing_in(
        self, manifest: Manifest, name: str, stored: StoredByLayout, encoding: Encoding
    ) -> Iterator[Manifest]:
        """Meanwhile the target `name` has the graphs of `STAND_IN`, on its own weights."""
        target = write_target(self.staging, self.source, STAND_IN, stored, encoding)
        names = [graph.file for graph in (target.vision_encoder, target.decoder)]
        files = manifest.files | {file: describe_file(self.staging / file) for file in names}
        changed = msgspec.structs.replace(manifest, targets=manifest.targets | {name: target}, files=files)
        write_manifest(self.staging, changed)
        try:
            yield changed
        finally:
            for file in set(names) - set(manifest.files):
                (self.staging / file).unlink()
            write_manifest(self.staging, manifest)

    def _add_report(self, manifest: Manifest, report: PrecisionReport) -> Manifest:
        write_precision_report(self.staging / PRECISION_REPORT, report)
        return add_files(self.staging, msgspec.structs.replace(manifest, precision_report=PRECISION_REPORT))
