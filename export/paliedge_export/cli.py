"""The verbs `export` and `push`. Imports nothing heavy before they run, so that `paliedge --help` stays fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paliedge.cli.help import command, option
from paliedge.errors import MissingExtraError

if TYPE_CHECKING:
    from paliedge.bundle.manifest import Manifest, Precision


def _read_colour(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int, int] | None:
    if value is None:
        return None
    from PIL import ImageColor

    try:
        red, green, blue = ImageColor.getrgb(value)[:3]
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no colour such as black or #727272") from error
    return red, green, blue


@command(
    "paliedge export google/paligemma-3b-mix-224 -o bundle --target jetpack6",
    "paliedge export my-fine-tune -o bundle --target jetpack6 --precision int4 --calibrate photos/",
    "paliedge export google/paligemma-3b-pt-224 --lora adapter -o bundle",
)
@click.argument("checkpoint")
@option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the bundle; an older bundle there is replaced once the new one is whole.",
    group="Output",
)
@option(
    "--target",
    "targets",
    type=click.Choice(["cpu", "jetpack6", "jetpack7", "rtx"]),
    multiple=True,
    default=["cpu"],
    show_default=True,
    help="Give it several times for a bundle that serves several; they share their weights.",
    group="Graphs",
)
@option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]),
    help="Of stored weights and matrix products; fp32 for cpu alone, else fp16, unless told.",
    group="Graphs",
)
@option(
    "--calibrate",
    type=click.Path(path_type=Path),
    help="Images for int8 and int4, and for the comparison: a folder, with the .jsonl of a fine-tune (image, prefix, "
    "suffix) if there is one; or a bundle, whose statistics are taken again. Without it the checkpoint's own folder "
    "'calibration'.",
    group="Comparison",
)
@option(
    "--sensitivity",
    type=click.FloatRange(0, 100),
    metavar="PERCENT",
    help="For int8 and int4: quantise each linear layer alone and rank them by the error. The worst stay in 16 bits "
    "while the layers' weights grow by at most this much; 0 only ranks. Takes two prompts a layer.",
    group="Comparison",
)
@option(
    "--head-vocab",
    metavar="FILE|detect",
    help="Keep only what detecting and segmenting needs in the output head: the labels in FILE, one a line, or with "
    "'detect' those that the calibration prompts ask for. Other tasks are then refused.",
    group="Graphs",
)
@option(
    "--fast-prefill",
    is_flag=True,
    help="For int4 and cpu: the decoder's layers in 8 bits, too, which images and prompts go through faster. The "
    "bundle and its memory are about twice as large.",
    group="Graphs",
)
@option(
    "--prompts",
    metavar="NAME|FILE",
    help="The prompts that CHECKPOINT was trained with: mix, docvqa, chartqa, pope, scienceqa, ai2d, aokvqa-mc, "
    'refcoco-seg, or a JSON file of templates such as {"answer": "{question}"}. Unless given its name decides.',
    group="Model",
)
@option(
    "--lora",
    "adapters",
    multiple=True,
    metavar="ADAPTER[:WEIGHT]",
    help="A PEFT adapter (LoRA, rsLoRA, DoRA), a folder or a hub id, merged into CHECKPOINT's weights before anything "
    "else; several are merged in their order.",
    group="Model",
)
@option(
    "--revision", help="Branch, tag or commit of a hub id, such as bfloat16; ID@REVISION is the same.", group="Model"
)
@option("--force-base", is_flag=True, help="Merge an adapter that names another base model.", group="Model")
@option(
    "--mask-decoder",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="big_vision's vae-oid.npz, or the same as .safetensors, for masks; without it such a file beside CHECKPOINT.",
    group="Model",
)
@option(
    "--max-prompt-tokens",
    type=click.IntRange(8),
    default=128,
    show_default=True,
    envvar="PALIEDGE_EXPORT_MAX_PROMPT_TOKENS",
    group="Graphs",
)
@option(
    "--max-images",
    type=click.IntRange(1, 16),
    default=1,
    show_default=True,
    envvar="PALIEDGE_EXPORT_MAX_IMAGES",
    help="Of one prompt, such as two pictures to compare or frames of a video; each takes room in the KV cache.",
    group="Graphs",
)
@option(
    "--letterbox",
    metavar="COLOUR",
    callback=_read_colour,
    envvar="PALIEDGE_EXPORT_LETTERBOX",
    help="For a fine-tune that was trained on letterboxed pictures: pad them with COLOUR (black, #727272) instead of "
    "squashing them; boxes are mapped back.",
    group="Model",
)
@option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    envvar="PALIEDGE_EXPORT_MAX_NEW_TOKENS",
    group="Graphs",
)
@option(
    "--compare/--no-compare",
    default=True,
    help="Run the graphs against the reference before publishing; needs memory for the whole model.",
    group="Comparison",
)
@option("--json", "as_json", is_flag=True, help="The report as JSON.", group="Output")
def export(
    checkpoint: str,
    output: Path,
    targets: tuple[str, ...],
    precision: Precision | None,
    calibrate: Path | None,
    sensitivity: float | None,
    head_vocab: str | None,
    fast_prefill: bool,
    mask_decoder: Path | None,
    adapters: tuple[str, ...],
    revision: str | None,
    force_base: bool,
    prompts: str | None,
    max_prompt_tokens: int,
    max_images: int,
    letterbox: tuple[int, int, int] | None,
    max_new_tokens: int,
    compare: bool,
    as_json: bool,
) -> None:
    """Turn CHECKPOINT, a folder or a hub id such as google/paligemma-3b-mix-224, into a bundle.

    It may be big_vision's .npz, too, with PaliGemma's tokenizer.json in the same folder.
    """
    try:
        import msgspec

        from paliedge_export.exporter import export_bundle
        from paliedge_export.options import Quantization
    except ModuleNotFoundError as error:
        raise _without_extra(error) from error
    manifest = export_bundle(
        checkpoint,
        output,
        targets=targets,
        precision=precision,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        quantization=Quantization(
            calibrate, None if sensitivity is None else sensitivity / 100, head_vocab, fast_prefill
        ),
        mask_decoder=mask_decoder,
        adapters=adapters,
        revision=revision,
        force_base=force_base,
        prompts=prompts,
        max_images=max_images,
        letterbox=letterbox,
        compare=compare,
        report=lambda line: click.echo(line, err=True),
    )
    if compare:
        for name, reason in manifest.not_compared.items():
            click.echo(f"warning: the graphs for {name} were not compared: {reason}", err=True)
    if as_json:
        kept = {
            name: msgspec.to_builtins(getattr(manifest, name)) for name in ("comparisons", "not_compared", "reference")
        }
        chosen = next(iter(manifest.targets.values())).precision
        click.echo(json.dumps({"bundle": str(output), "targets": list(manifest.targets), "precision": chosen, **kept}))
        return
    for name in manifest.targets:
        click.echo(f"{output}: {name}: {_describe(manifest, name)}")


@command("paliedge push bundle me/paligemma-3b-parts-int8", "paliedge push bundle me/parts --private")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repository")
@option("--private", is_flag=True, help="Make a new repository private.", group="Output")
@option(
    "--license",
    default="gemma",
    show_default=True,
    help="The licence of the checkpoint's weights, as the hub names it; gemma brings its notice.",
    group="Output",
)
def push(bundle: Path, repository: str, private: bool, license: str) -> None:
    """Upload BUNDLE to REPOSITORY on the Hugging Face hub, such as me/my-bundle; `-m me/my-bundle` runs it.

    Its hashes are verified first, and a model card is written from its manifest. Whatever is derived from Gemma's
    weights stays under Gemma's terms.
    """
    try:
        from paliedge_export.sharing.pushing import push_bundle
    except ModuleNotFoundError as error:
        raise _without_extra(error) from error
    click.echo(
        push_bundle(
            bundle, repository, private=private, license=license, report=lambda line: click.echo(line, err=True)
        )
    )


def _without_extra(error: ModuleNotFoundError) -> MissingExtraError:
    return MissingExtraError(
        expected="the packages of the extra 'export'",
        found=f"no package {error.name}",
        action='Run `pip install "paliedge[cpu,export]"`.',
    )


def _describe(manifest: Manifest, target: str) -> str:
    if target in manifest.not_compared:
        return f"not compared: {manifest.not_compared[target]}"
    return manifest.comparisons[target].describe()
