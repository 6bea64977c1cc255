"""What `-m` and BUNDLE name: a bundle's folder, or what the exporter's package makes a bundle of.

The runtime knows neither network nor exporter. Another package finds bundles for names by an entry point of the group
`paliedge.bundles`: a function of the name, of what asks the user, and of what reports.
"""

# Tests: tests/cli/test_naming.py.
from __future__ import annotations

import re
import sys
from importlib.metadata import entry_points
from pathlib import Path

import click

from paliedge.errors import MissingExtraError, UsageError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")
_CHECKPOINT_FILES = ("config.json", "adapter_config.json")
_BUNDLE_FILE = "bundle.json"


def find_bundle(name: Path | None, *, yes: bool) -> Path | None:
    """The folder of the bundle that `name` stands for; None stays None, for the shipped one.

    Args:
        name: a bundle's folder, a checkpoint's folder, or a hub id of either.
        yes: make a bundle of a checkpoint without asking.

    Raises:
        MissingExtraError: it is no bundle's folder, and the exporter is not installed.
        UsageError: a bundle would have to be made, and nobody said yes.
    """
    if name is None or not _is_for_the_exporter(name):
        return name
    finder = next(iter(entry_points(group="paliedge.bundles")), None)
    try:
        find = finder.load() if finder else None
    except ModuleNotFoundError as error:
        raise _without_exporter(name, f"no package {error.name}") from error
    if find is None:
        raise _without_exporter(name, "no exporter")
    found: Path = find(str(name), lambda question: _ask(question, yes), lambda line: click.echo(line, err=True))
    return found


def _is_for_the_exporter(name: Path) -> bool:
    try:
        is_bundle, is_there = (name / _BUNDLE_FILE).exists(), name.exists()
    except (OSError, ValueError):  # a name that is too long, or has a NUL in it
        return False
    if is_bundle:
        return False
    if is_there:
        return name.suffix == ".npz" or any(
            next(name.glob(pattern), None) for file in _CHECKPOINT_FILES for pattern in (file, f"checkpoint-*/{file}")
        )
    return bool(_HUB_ID.fullmatch(str(name)))


def _ask(question: str, yes: bool) -> None:
    """Return if the user agrees.

    Raises:
        UsageError: nobody is there to agree.
        click.Abort: the user does not.
    """
    click.echo(question, err=True)
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(
            expected="a yes to making a bundle",
            found="no terminal to ask on",
            action="Add --yes, or make it yourself with `paliedge export`.",
        )
    click.confirm("Go on?", abort=True, err=True)


def _without_exporter(name: Path, found: str) -> MissingExtraError:
    return MissingExtraError(
        expected=f"the packages of the extra 'export', to make a bundle of {name} or to fetch one",
        found=found,
        action='Run `pip install "paliedge[cpu,export]"`, or name the folder of a bundle.',
    )
