"""What verbs print and save: answers on standard output, everything else on standard error."""

# Tests: tests/cli/test_predict.py.
from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paliedge.errors import PaliEdgeError

if TYPE_CHECKING:
    from PIL import Image

    from paliedge.bundle.manifest import Prompts
    from paliedge.inputs.prompt import Prompt
    from paliedge.results.generation import Generation

    _MakePrompt = Callable[[Prompts], Prompt]


SOME_FAILED = 6
_LOG = logging.getLogger(__name__)


def print_answer(source: str, result: Generation, as_json: bool) -> None:
    """The answer on stdout: a line for each box (its edges, its confidence, the size of its mask), or its text."""
    if as_json:
        click.echo(json.dumps({"source": source, **result.to_dict()}, ensure_ascii=False))
        return
    for found in result.detections:
        numbers = [*(f"{edge:.1f}" for edge in found.box), f"{found.confidence:.2f}"]
        if found.mask:
            numbers.append(f"({found.mask.to_array().sum()} pixels)")
        click.echo(" ".join([f"{source}: {found.label}".rstrip(), *numbers]))
    if not result.detections:
        click.echo(f"{source}: {result.text or '(an empty answer: nothing found)'}")
    warn_of_cut(source, result)


def warn_of_cut(source: str, result: Generation) -> None:
    if result.finish_reason == "length":
        click.echo(f"{source}: the answer was cut off at the token limit", err=True)


def save_picture(image: Image.Image, result: Generation, path: Path) -> None:
    """Write `image` annotated with the answer."""
    save_answer(replace(result, image=image), path)


def save_answer(result: Generation, path: Path) -> None:
    result.save(path)
    click.echo(f"saved {path}", err=True)


def is_terminal() -> bool:
    return sys.stderr.isatty()


def print_error(error: PaliEdgeError, source: str | None = None) -> None:
    """Three lines on stderr: expected, found, what to do."""
    click.echo(f"error: {source + ': ' if source else ''}expected {error.expected}", err=True)
    click.echo(f"       found {error.found}", err=True)
    click.echo(f"       {error.action}", err=True)
    _LOG.info("where it comes from:", exc_info=error)
