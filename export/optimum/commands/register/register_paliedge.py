"""`optimum-cli export paliedge --model CHECKPOINT OUTPUT`: the verb `paliedge export`, where optimum's users look.

optimum finds this file by its place: `optimum` is a namespace that several distributions fill. What stands behind
OUTPUT are the options of `paliedge export`, which has them alone.
"""

from __future__ import annotations

import argparse
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class PaliEdgeExportCommand(BaseOptimumCLICommand):
    """Hands its arguments to `paliedge export`."""

    COMMAND = CommandInfo(name="paliedge", help="Export PaliGemma and PaliGemma 2 for edge devices, with paliedge.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Add this command's arguments to `parser`."""
        parser.add_argument("-m", "--model", required=True, help="Checkpoint: a folder, a hub id, big_vision's .npz.")
        parser.add_argument("output", help="Folder of the bundle.")
        parser.add_argument("options", nargs=argparse.REMAINDER, help="Options of `paliedge export`: see its --help.")

    def run(self) -> None:
        """Export; ends the process with paliedge's exit code."""
        from paliedge.cli import main

        main(["export", self.args.model, "-o", self.args.output, *self.args.options], prog_name="paliedge")


REGISTER_COMMANDS: list[tuple[type[Any], type[Any]]] = [(PaliEdgeExportCommand, ExportCommand)]
