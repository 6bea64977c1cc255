"""The verb `doctor`: what this machine has, and what to do about what it lacks."""

from __future__ import annotations

import json
from pathlib import Path

import click

from paliedge.cli.help import command
from paliedge.cli.options import json_option

_MARKS = {"ok": "ok", "note": "--", "problem": "!!"}


@command("paliedge doctor", "paliedge doctor bundle --json > report.json")
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@json_option("The findings as JSON, to go with a report.")
@click.pass_context
def doctor(context: click.Context, bundles: tuple[Path, ...], as_json: bool) -> None:
    """Look at this machine, and whether BUNDLES run on it; without BUNDLES, the shipped one.

    Ends with 1 if one of them cannot run.
    """
    from paliedge.diagnostics.doctor import examine
    from paliedge.model import SHIPPED_BUNDLE

    findings = examine(bundles or (SHIPPED_BUNDLE,))
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings]))
    else:
        width = max(len(finding.topic) for finding in findings if not finding.topic.startswith("bundle"))
        for finding in findings:
            click.echo(f"{_MARKS[finding.status]}  {finding.topic:<{width}}  {finding.value}")
            if finding.action:
                click.echo(f"    {'':<{width}}  {finding.action}")
    if any(finding.status == "problem" for finding in findings):
        context.exit(1)


VERBS = (doctor,)
