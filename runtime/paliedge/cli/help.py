"""How verbs and their options are declared, so that `--help` is short: options in groups, examples at the end.

Each option has a twin in the environment, `PALIEDGE_` and its name, which `--help` says once.
"""

# Tests: tests/cli/test_bundles.py.
from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

GROUPS = ("What", "Source", "Model", "Graphs", "Comparison", "Measure", "Output", "Engine")
"""In the order of `--help`; options of none of them come last."""
Verb = TypeVar("Verb", bound=Callable[..., None])


class GroupedOption(click.Option):
    """An option that `--help` lists in its group."""

    def __init__(self, *names: Any, group: str, **settings: Any) -> None:
        kind = settings.get("type")
        if isinstance(kind, click.IntRange | click.FloatRange):
            settings.setdefault("metavar", "N" if isinstance(kind, click.IntRange) else "X")
        super().__init__(*names, **settings)
        self.group = group

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Without the range, which an error names when it matters."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class VerbCommand(click.Command):
    """A verb whose help has a section a group, and examples."""

    def __init__(self, *arguments: Any, examples: tuple[str, ...] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {group: [] for group in (*GROUPS, "Other")}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record:
                sections[getattr(parameter, "group", "Other")].append(record)
        for group, records in sections.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{example}\n")
        formatter.write_paragraph()
        formatter.write_text("Each option can be set by a variable: --max-new-tokens by PALIEDGE_MAX_NEW_TOKENS.")


def command(*examples: str, name: str | None = None) -> Callable[[Callable[..., None]], click.Command]:
    """The decorator of a verb; `examples` are whole command lines."""
    return click.command(name, cls=VerbCommand, examples=examples)


def option(*names: str, group: str, **settings: Any) -> Callable[[Verb], Verb]:
    """`click.option` in one of `GROUPS`, with its twin in the environment."""
    long = next(name for name in names if name.startswith("--")).split("/")[0]
    settings.setdefault("envvar", "PALIEDGE_" + long[2:].replace("-", "_").upper())
    return click.option(*names, cls=GroupedOption, group=group, **settings)
