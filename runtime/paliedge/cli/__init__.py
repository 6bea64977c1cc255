"""The command `paliedge`. Verbs of other packages join through the entry-point group `paliedge.verbs`."""

from paliedge.cli.main import main

__all__ = ["main"]
