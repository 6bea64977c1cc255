"""The verb `cache`: what paliedge keeps for itself, and how to be rid of it."""

# Tests: tests/bundle/test_cache.py.
from __future__ import annotations

import json
from typing import Literal

import click

from paliedge.cli.help import command
from paliedge.cli.options import json_option


@command("paliedge cache list", "paliedge cache clear")
@click.argument("action", type=click.Choice(["list", "clear"]))
@json_option("What is or was there, as a list of objects with name, size and path.")
def cache(action: Literal["list", "clear"], as_json: bool) -> None:
    """Show or remove what the user's cache has: bundles made of checkpoints, notes on verified files.

    Downloads lie in the hub client's own cache, which `hf cache` shows.
    """
    from paliedge.bundle.cache import cache_root, clear_cache, list_cache

    entries = clear_cache() if action == "clear" else list_cache()
    if as_json:
        rows = [{"name": entry.name, "size": entry.size, "path": str(entry.path)} for entry in entries]
        click.echo(json.dumps(rows))
        return
    for entry in entries:
        click.echo(f"{entry.size / 1e6:10.1f} MB  {entry.name}")
    total = sum(entry.size for entry in entries) / 1e6
    click.echo(f"{total:10.1f} MB  {'removed from' if action == 'clear' else 'in'} {cache_root()}")


VERBS = (cache,)
