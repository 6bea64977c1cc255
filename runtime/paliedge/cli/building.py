"""The verb that builds engines on the machine that will run them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paliedge.cli.options import json_option

if TYPE_CHECKING:
    from paliedge.manifest import Flavour

_MEGABYTE = 1 << 20


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), envvar="PALIEDGE_MODEL")
@click.option(
    "--flavour",
    type=click.Choice(["tensorrt", "rtx"]),
    envvar="PALIEDGE_FLAVOUR",
    show_envvar=True,
    help="TensorRT, or TensorRT for RTX; the first that is installed unless given.",
)
@click.option(
    "--workspace",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    envvar="PALIEDGE_WORKSPACE",
    show_envvar=True,
    help="Megabytes that a kernel may use for itself; on a Jetson they are the model's too.",
)
@click.option(
    "--force", is_flag=True, envvar="PALIEDGE_FORCE", show_envvar=True, help="Build even if such an engine is there."
)
@json_option("The engine as JSON.")
def build(bundle: Path, flavour: Flavour | None, workspace: int, force: bool, as_json: bool) -> None:
    """Build BUNDLE's TensorRT engines for this machine and add them to it.

    They are good for the TensorRT and the GPU that they were built with; `paliedge plan` says beforehand
    what fits. Vision encoder and decoder are built one after the other, each in a process of its own.
    """
    import msgspec

    from paliedge.building import build_engine
    from paliedge.bundle import Bundle

    engine = build_engine(
        bundle,
        flavour,
        workspace=workspace * _MEGABYTE,
        force=force,
        report=lambda line: click.echo(line, err=True),
        on_progress=_show_progress if sys.stderr.isatty() else lambda part, progress: None,
    )
    if as_json:
        click.echo(msgspec.json.encode(engine))
        return
    files = Bundle(bundle, check_hashes=False).manifest.files
    for plan in (engine.vision_encoder, engine.decoder):
        click.echo(f"{bundle / plan.file}: {files[plan.file].size / 1e6:.1f} MB")


def _show_progress(part: str, progress: float) -> None:
    click.echo(f"\r  {part} {progress:4.0%}" + ("\n" if progress >= 1 else ""), err=True, nl=False)


VERBS = (build,)
