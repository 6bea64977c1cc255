"""The verb that builds engines on the machine that will run them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paliedge.cli.help import command, option
from paliedge.cli.options import json_option

if TYPE_CHECKING:
    from paliedge.bundle.manifest import Flavour

_MEGABYTE = 1 << 20


@command("paliedge build bundle", "paliedge build bundle --flavour rtx")
@click.argument("bundle", type=click.Path(path_type=Path), envvar="PALIEDGE_MODEL")
@option(
    "--flavour",
    type=click.Choice(["tensorrt", "rtx"]),
    help="TensorRT, or TensorRT for RTX; the first that is installed unless given.",
    group="Engine",
)
@option(
    "--workspace",
    type=click.IntRange(1),
    help="Megabytes that a kernel may use for itself; 1024, or more for large pictures, unless given.",
    group="Engine",
)
@option("--force", is_flag=True, help="Build even if such an engine is there.", group="Output")
@json_option("The engine as JSON.")
def build(bundle: Path, flavour: Flavour | None, workspace: int | None, force: bool, as_json: bool) -> None:
    """Build BUNDLE's TensorRT engines for this machine and add them to it.

    They are good for the TensorRT and the GPU that they were built with; `paliedge plan` says beforehand
    what fits. Vision encoder and decoder are built one after the other, each in a process of its own.
    """
    import msgspec

    from paliedge.backends.trt.build import build_engine
    from paliedge.bundle.bundle import Bundle

    with _Status() as status:
        engine = build_engine(
            bundle,
            flavour,
            workspace=workspace * _MEGABYTE if workspace else None,
            force=force,
            report=status.report,
            on_progress=status.show_progress,
        )
    if as_json:
        click.echo(msgspec.json.encode(engine))
        return
    files = Bundle(bundle, check_hashes=False).manifest.files
    for plan in filter(None, (engine.vision_encoder, engine.decoder, engine.mask_decoder)):
        click.echo(f"{bundle / plan.file}: {files[plan.file].size / 1e6:.1f} MB")


class _Status:
    """Lines on stderr; on a terminal, below them, how far the build is."""

    def __init__(self) -> None:
        self._shows_progress = sys.stderr.isatty()
        self._in_line = False

    def __enter__(self) -> _Status:
        return self

    def __exit__(self, *reason: object) -> None:
        self._end_line()

    def report(self, line: str) -> None:
        self._end_line()
        click.echo(line, err=True)

    def show_progress(self, part: str, progress: float) -> None:
        if self._shows_progress:
            click.echo(f"\r  {part} {progress:4.0%}", err=True, nl=False)
            self._in_line = True

    def _end_line(self) -> None:
        """The builder's last step need not be the one that makes a hundred."""
        if self._in_line:
            click.echo(err=True)
            self._in_line = False


VERBS = (build,)
