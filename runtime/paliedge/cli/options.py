"""Options that several verbs share. Imports nothing heavy, so that `--help` stays fast."""

# Tests: tests/cli/test_predict.py.
from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from paliedge.cli.help import option
from paliedge.errors import UsageError

if TYPE_CHECKING:
    from paliedge.backends.select import Backend, BackendOptions, OnMismatch
    from paliedge.inputs.prompt import PromptMaker
    from paliedge.model import PaliGemma

FORMATS = ("text", "json", "jsonl", "csv", "coco", "yolo", "labelme")
"""What `--format` takes: `text` and those of `paliedge.results.formats`, which is too heavy to import here."""
Verb = TypeVar("Verb", bound=Callable[..., None])


def json_option(help_text: str) -> Callable[[Verb], Verb]:
    """`--json`, which the verb gets as `as_json`."""
    return option("--json", "as_json", is_flag=True, help=help_text, group="Output")


def format_options(verb: Verb) -> Verb:
    """`--format` and its short form `--json`, which the verb gets as `form`; None for text."""

    @wraps(verb)
    def collect(form: str, as_json: bool, **rest: Any) -> None:
        if as_json and form not in ("text", "jsonl"):
            raise UsageError(
                expected="one format; `--json` is `--format jsonl`",
                found=f"`--json` and `--format {form}`",
                action="Leave out one of the two (or unset PALIEDGE_JSON).",
            )
        verb(form="jsonl" if as_json else None if form == "text" else form, **rest)

    format_option = option(
        "--format",
        "form",
        type=click.Choice(FORMATS),
        default="text",
        show_default=True,
        help="How answers are written; yolo and labelme make a file a picture in the folder of --save.",
        group="Output",
    )
    return json_option("One JSON object a picture; short for --format jsonl.")(format_option(collect))  # type: ignore[return-value]


def frame_options(verb: Verb) -> Verb:
    """`--every` and its like, which the verb gets as `frames`, a FrameOptions."""

    @wraps(verb)
    def collect(every: int, buffer: int, reconnect: int | None, **rest: Any) -> None:
        from paliedge.inputs.video import FrameOptions

        verb(frames=FrameOptions(every, buffer, reconnect), **rest)

    for add_option in (
        option(
            "--reconnect",
            type=click.IntRange(0),
            help="Attempts in a row to reach a lost live source, 1, 2 ... 30 seconds apart; without end unless given.",
            group="Source",
        ),
        option(
            "--buffer",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="How many frames of a live source may wait for the model; when more come, the oldest go.",
            group="Source",
        ),
        option(
            "--every",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Take one in so many frames of a video or live source.",
            group="Source",
        ),
    ):
        collect = add_option(collect)
    return collect  # type: ignore[return-value]  # click has put its options on it


def backend_options(verb: Verb) -> Verb:
    """`--backend` and its like, which the verb gets as `options`, a BackendOptions."""

    @wraps(verb)
    def collect(
        threads: int, backend: Backend, on_mismatch: OnMismatch, sequential: bool, cuda_graph: bool, **rest: Any
    ) -> None:
        from paliedge.backends.select import BackendOptions

        verb(options=BackendOptions(backend, on_mismatch, threads, cuda_graph, sequential), **rest)

    for add_option in (
        option(
            "--backend",
            type=click.Choice(["auto", "tensorrt", "rtx", "onnxruntime", "cuda", "cpu"]),
            default="auto",
            show_default=True,
            help="What runs the model; auto takes the first that works, onnxruntime its CUDA or else its CPU provider.",
            group="Engine",
        ),
        option(
            "--on-mismatch",
            type=click.Choice(["error", "rebuild", "fallback"]),
            default="error",
            show_default=True,
            help="If the bundle's engines are for another TensorRT or GPU; fallback is ONNX Runtime.",
            group="Engine",
        ),
        option(
            "--sequential",
            is_flag=True,
            help="Keep one TensorRT engine in memory at a time; see `paliedge plan`.",
            group="Engine",
        ),
        option(
            "--cuda-graph/--no-cuda-graph",
            default=True,
            help="Replay each decode step as one CUDA graph.",
            group="Engine",
        ),
        option(
            "--threads",
            type=click.IntRange(0),
            default=0,
            help="Threads of ONNX Runtime's operators; 0 takes every core, and one for a model of a few megabytes.",
            group="Engine",
        ),
    ):
        collect = add_option(collect)
    return collect  # type: ignore[return-value]  # click has put its options on it


def _find_bundle(verb: Verb) -> Verb:
    """What turns the name that a user gave into the verb's `bundle`, a folder or None."""

    @wraps(verb)
    def collect(bundle: Path | None, yes: bool, **rest: Any) -> None:
        from paliedge.cli.naming import find_bundle

        verb(bundle=find_bundle(bundle, yes=yes), **rest)

    return option(
        "-y",
        "--yes",
        is_flag=True,
        help="Export a checkpoint that stands in a bundle's place without asking.",
        group="Engine",
    )(collect)  # type: ignore[return-value]  # click has put its option on it


def bundle_argument(verb: Verb) -> Verb:
    """BUNDLE, as the folder that it names."""
    add = click.argument("bundle", required=False, type=click.Path(path_type=Path), envvar="PALIEDGE_MODEL")
    return add(_find_bundle(verb))


def model_options(verb: Verb) -> Verb:
    """`-m` and the backend's options."""
    return option(
        "-m",
        "--model",
        "bundle",
        type=click.Path(path_type=Path),
        help="Bundle folder, or a hub id of one; a checkpoint is exported once into the user's cache. Without it the "
        "shipped shapes model.",
        group="Engine",
    )(_find_bundle(backend_options(verb)))


def read_prompts(bundle: Path | None) -> PromptMaker:
    """What makes the bundle's prompts, before its files are checked and loaded."""
    from paliedge.bundle.bundle import read_manifest
    from paliedge.inputs.prompt import PromptMaker
    from paliedge.model import SHIPPED_BUNDLE

    return PromptMaker(read_manifest(bundle or SHIPPED_BUNDLE).prompts)


def load_model(bundle: Path | None, options: BackendOptions) -> PaliGemma:
    """The bundle's model; says which, if it is the shipped one, and what runs it."""
    from paliedge.model import SHIPPED_BUNDLE, PaliGemma

    if bundle is None:
        click.echo("no -m BUNDLE given: using the shapes model that ships with paliedge", err=True)
    return PaliGemma.load(bundle or SHIPPED_BUNDLE, options, report=lambda line: click.echo(line, err=True))
