"""The verb `export`. Imports nothing heavy before it runs, so that `paliedge --help` stays fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click

from paliedge.errors import MissingExtraError


@click.command()
@click.argument("checkpoint")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    envvar="PALIEDGE_OUTPUT",
    show_envvar=True,
    help="Folder of the bundle; an older bundle there is replaced once the new one is whole.",
)
@click.option(
    "--target", type=click.Choice(["cpu"]), default="cpu", show_default=True, envvar="PALIEDGE_TARGET", show_envvar=True
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    envvar="PALIEDGE_PRECISION",
    show_envvar=True,
    help="Of stored weights and matrix products.",
)
@click.option(
    "--max-prompt-tokens",
    type=click.IntRange(8),
    default=128,
    show_default=True,
    envvar="PALIEDGE_EXPORT_MAX_PROMPT_TOKENS",
    show_envvar=True,
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    envvar="PALIEDGE_EXPORT_MAX_NEW_TOKENS",
    show_envvar=True,
)
@click.option(
    "--compare/--no-compare",
    default=True,
    envvar="PALIEDGE_COMPARE",
    show_envvar=True,
    help="Run the graphs against the reference before publishing; needs memory for the whole model.",
)
@click.option("--json", "as_json", is_flag=True, envvar="PALIEDGE_JSON", show_envvar=True, help="The report as JSON.")
def export(
    checkpoint: str,
    output: Path,
    target: str,
    precision: Literal["fp32", "fp16"],
    max_prompt_tokens: int,
    max_new_tokens: int,
    compare: bool,
    as_json: bool,
) -> None:
    """Turn CHECKPOINT, a folder or a hub id such as google/paligemma-3b-mix-224, into a bundle."""
    try:
        import msgspec

        from paliedge.manifest import Limits
        from paliedge_export.exporter import export_bundle
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            expected="the packages of the extra 'export'",
            found=f"no package {error.name}",
            action='Run `pip install "paliedge[cpu,export]"`.',
        ) from None
    comparison = export_bundle(
        checkpoint,
        output,
        precision=precision,
        limits=Limits(prefix=max_prompt_tokens, new_tokens=max_new_tokens),
        compare=compare,
        report=lambda line: click.echo(line, err=True),
    )
    if as_json:
        report = msgspec.to_builtins(comparison)
        click.echo(json.dumps({"bundle": str(output), "target": target, "precision": precision, "comparison": report}))
    elif comparison:
        largest = max(comparison.image_features_error, comparison.log_prob_error)
        click.echo(
            f"{output}: max error {largest:.2g}, token match {comparison.token_match:.1%} ({comparison.reference})"
        )
    elif compare:
        click.echo(f'{output}: not compared; the reference for fp32 comes with `pip install "paliedge[reference]"`')
    else:
        click.echo(f"{output}: not compared")
