"""The verbs about bundles: what is in one, is it whole, show me."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paliedge.cli.help import command, option
from paliedge.cli.options import backend_options, bundle_argument, json_option, load_model

if TYPE_CHECKING:
    from paliedge.backends.select import BackendOptions
    from paliedge.bundle.bundle import Bundle
    from paliedge.bundle.manifest import Manifest
    from paliedge.diagnostics.selfcheck import RunReport


@command("paliedge info bundle", "paliedge info bundle --precision-report")
@bundle_argument
@option(
    "--precision-report",
    is_flag=True,
    help="What the export's comparison measured: layers, answers, and the sensitivity ranking if there is one.",
    group="Output",
)
@json_option("The answer as JSON.")
def info(bundle: Path | None, precision_report: bool, as_json: bool) -> None:
    """Say what a bundle holds; without BUNDLE, the shipped one."""
    import msgspec

    from paliedge.bundle.bundle import Bundle
    from paliedge.model import SHIPPED_BUNDLE

    opened = Bundle(bundle or SHIPPED_BUNDLE, check_hashes=False)
    manifest = opened.manifest
    if precision_report:
        _print_precision_report(opened, as_json=as_json)
        return
    if as_json:
        click.echo(msgspec.json.encode(manifest))
        return
    vision, text, limits = manifest.model.vision, manifest.model.text, manifest.limits
    rows = {
        "bundle": str(bundle or SHIPPED_BUNDLE),
        "checkpoint": f"{manifest.producer.checkpoint} ({manifest.model.family})",
        "exported by": f"paliedge {manifest.producer.paliedge}",
        "vision": f"{vision.image_size} x {vision.image_size} pixels, {vision.num_image_tokens} tokens, "
        f"{vision.num_layers} layers of width {vision.hidden_size}",
        "decoder": f"{text.num_layers} layers of width {text.hidden_size}, "
        f"{text.num_heads} heads on {text.num_kv_heads} KV heads",
        "limits": f"{limits.prefix - vision.num_image_tokens} prompt tokens, {limits.new_tokens} new tokens",
        **_describe_answers(manifest),
    }
    for name, target in sorted(manifest.targets.items()):
        names = {manifest.embedding.file} | target.weights
        size = sum(manifest.files[name].size for name in names) / 1e6
        twice = ", the decoder's twice for a fast prefill" if target.prefill else ""
        rows[f"target {name}"] = f"{target.precision}, {size:.1f} MB of weights{twice}"
        if name in manifest.comparisons:
            rows[f"  {name} compared"] = manifest.comparisons[name].describe()
        else:
            rows[f"  {name} compared"] = f"no: {manifest.not_compared[name]}"
    if manifest.reference:
        said = manifest.reference
        rows["checked by"] = f"{said.name}: {said.compared}" if said.name else f"nobody else: {said.not_compared}"
    for engine in manifest.engines:
        rows[f"engine {engine.flavour}"] = (
            f"{engine.version} for compute capability {engine.compute_capability}, {engine.precision}, "
            f"from {engine.target}'s graphs"
        )
    for name, value in rows.items():
        click.echo(f"{name:<18} {value}")


def _describe_answers(manifest: Manifest) -> dict[str, str]:
    """What the bundle can say, and in answer to what."""
    from paliedge.bundle.manifest import Prompts

    has_masks = all(target.mask_decoder for target in manifest.targets.values())
    rows = {"masks": "decoded" if has_masks else "left as codes: exported without a mask decoder"}
    if manifest.vocabulary:
        labels = ", ".join(manifest.vocabulary.labels)
        rows["reduced head"] = f"{manifest.vocabulary.num_tokens} tokens: boxes, segments and {labels}"
    templates = [(name, getattr(manifest.prompts, name)) for name in Prompts.__struct_fields__]
    special = [f"{name}: {text!r}" for name, text in templates if text != getattr(Prompts(), name)]
    if special:
        rows["prompts"] = ", ".join(special)
    if manifest.preprocess.letterbox:
        rows["pictures"] = "letterboxed"
    return rows


def _print_precision_report(bundle: Bundle, *, as_json: bool) -> None:
    from paliedge.bundle.precision_report import encode_precision_report, load_precision_report
    from paliedge.errors import UsageError

    report = load_precision_report(bundle)
    if report is None:
        raise UsageError(
            expected="a bundle that was compared when it was exported",
            found=f"{bundle.folder}, which was not",
            action="Export it again without --no-compare.",
        )
    if as_json:
        click.echo(encode_precision_report(report), nl=False)
        return
    if report.calibrated_with:
        click.echo(f"calibrated with {report.calibrated_with}")
    for target, found in report.targets.items():
        click.echo(f"{target}, {found.precision}: {found.comparison.describe()}")
        for layer, cosine in found.layers.items():
            click.echo(f"  {cosine:.6f}  behind {layer}")
        for row in found.answers:
            first = "" if row.first_difference is None else f", first difference at {row.first_difference}"
            click.echo(
                f"  {row.hidden_cosine:.6f}  {row.image}: {row.prompt}: "
                f"{row.token_match:.1%} of the tokens of '{row.reference}'{first}"
            )
    for target, reason in bundle.manifest.not_compared.items():
        click.echo(f"{target}: not compared: {reason}")
    for linear in report.sensitivity:
        kept = ", kept in 16 bits" if linear.kept else ""
        click.echo(f"  {linear.error:.2e}  {linear.name} in {linear.bits} bits alone{kept}")


@command("paliedge verify bundle", "paliedge verify bundle --run")
@bundle_argument
@option(
    "--run",
    is_flag=True,
    help="Also compare with and without a CUDA graph, and decode a thousand tokens to see that memory stays.",
    group="What",
)
@backend_options
@json_option("The answer as JSON.")
def verify(bundle: Path | None, run: bool, options: BackendOptions, as_json: bool) -> None:
    """Read every file of a bundle again, then let this machine repeat its golden answers."""
    from paliedge.bundle.bundle import Bundle
    from paliedge.diagnostics.selfcheck import check_run
    from paliedge.diagnostics.verify import verify_golden
    from paliedge.model import SHIPPED_BUNDLE

    opened = Bundle(bundle or SHIPPED_BUNDLE, check_hashes=False)
    opened.verify_hashes()
    checked = check_run(opened, options) if run else None
    if checked:
        golden, arithmetic = checked.golden, checked.arithmetic
    else:
        model = load_model(opened.folder, options)
        golden, arithmetic = verify_golden(opened, model), list(model.arithmetic)
    if as_json:
        report = {"bundle": str(opened.folder), "num_files": len(opened.manifest.files), "arithmetic": arithmetic}
        click.echo(
            json.dumps(
                report | {"golden": golden._asdict() if golden else None, "run": checked.to_dict() if checked else None}
            )
        )
        return
    click.echo(f"{opened.folder}: {len(opened.manifest.files)} files as exported")
    if golden:
        click.echo(f"{golden.num_equal} of {golden.num_answers} golden answers equal, {golden.num_ties} left at a tie")
    else:
        click.echo("this bundle has no golden answers: it was exported without a comparison (--no-compare)")
    for line in arithmetic:
        click.echo(line)
    if checked:
        _print_run(checked)


def _print_run(checked: RunReport) -> None:
    click.echo(checked.backend)
    if checked.graph_equal:
        click.echo("the same answers with a CUDA graph as without")
    growth = f"{checked.host_growth} bytes on the host"
    if checked.gpu_growth is not None:
        growth += f", {checked.gpu_growth} on the GPU"
    click.echo(f"{checked.num_decodes} decode steps: memory grew by {growth}")
    click.echo(
        f"ms: vision {checked.vision_ms:.2f}, prefill {checked.prefill_ms:.2f} (median)"
        + (f", a token {checked.decode_ms:.2f} (median)" if checked.decode_ms is not None else "")
    )


VERBS = (info, verify)
