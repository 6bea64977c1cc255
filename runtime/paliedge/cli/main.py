"""The group of verbs: how errors leave, and which verbs there are.

Modules that load a model are imported by the verb that needs them, so that `--help` stays fast.
"""

# Tests: tests/cli/test_bundles.py and tests/cli/test_predict.py.
from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from types import FrameType

import click

from paliedge.cli.output import print_error
from paliedge.errors import OutputError, PaliEdgeError, UsageError

_INTERRUPTED = 130
_LOG = logging.getLogger(__name__)


def _log_to_stderr(context: click.Context, parameter: click.Parameter, value: int) -> None:
    """What modules log, from `-v` on what they do, from `-vv` on everything."""
    if value:
        logger = logging.getLogger("paliedge")
        logger.setLevel(logging.INFO if value == 1 else logging.DEBUG)
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        context.find_root().call_on_close(lambda: logger.removeHandler(handler))  # behind the last error


_VERBOSE = click.Option(
    ["-v", "--verbose"],
    count=True,
    expose_value=False,
    is_eager=True,
    callback=_log_to_stderr,
    envvar="PALIEDGE_VERBOSE",
    help="Say more: what is done, and the cause of an error; twice, everything.",
)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, by which systemd and docker stop a run, ends what runs inside as Ctrl-C does, with all files closed."""
    if threading.current_thread() is not threading.main_thread():  # the only one that signals can be given to
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever forwards it sends it twice
    raise KeyboardInterrupt


_SECTIONS = {
    "Begin": ("demo", "doctor"),
    "Make a bundle": ("export", "info", "plan", "build", "verify", "push", "cache"),
    "Ask about pictures": ("detect", "segment", "caption", "ask", "question", "ocr", "predict"),
    "Measure": ("eval", "bench"),
}
"""The verbs in the order of a journey; those of other extensions come last."""


class _Verbs(click.Group):
    """Knows the verbs of installed extensions; turns errors into three lines and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        known = [name for names in _SECTIONS.values() for name in names]
        there = {*super().list_commands(ctx), *entry_points(group="paliedge.verbs").names}
        return [*(name for name in known if name in there), *sorted(there - set(known))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        for extension in entry_points(group="paliedge.verbs", name=cmd_name) if command is None else ():
            command = extension.load()
        if command and _VERBOSE not in command.params:
            command.params.append(_VERBOSE)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        sections = {title: [name for name in listed if name in names] for title, listed in _SECTIONS.items()}
        sections["Others"] = [name for name in names if not any(name in listed for listed in _SECTIONS.values())]
        for title, listed in sections.items():
            commands = ((name, self.get_command(ctx, name)) for name in listed)
            rows = [(name, command.get_short_help_str(90)) for name, command in commands if command]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> object:
        try:
            with _terminable():
                return super().invoke(ctx)
        except PaliEdgeError as error:
            print_error(error)
            if not isinstance(error, UsageError):
                _name_versions()
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            raise  # click ends quietly
        except OSError as error:
            print_error(
                OutputError(
                    expected=f"room and permission to read or write {error.filename or 'a file'}",
                    found=error.strerror or "an error of the file system",
                    action="Check free space and permissions.",
                )
            )
            ctx.exit(OutputError.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(_INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:  # a fault of ours, or of a package that we were never tested with
            _name_versions()
            raise


def _name_versions() -> None:
    """What may be behind an error: packages of versions that are not allowed."""
    from paliedge.diagnostics.installed import find_outside

    for outside in find_outside():
        click.echo(f"note: found {outside}, which may be the cause. {outside.action}", err=True)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="paliedge")
def main() -> None:
    """PaliGemma on edge devices: detect, caption, answer, read text.

    `paliedge VERB --help` has examples.

    \b
    Exit codes:
    - 0 ok, 1 run-time error, 2 usage
    - 3 damaged bundle, 4 bundle does not fit this machine
    - 5 unreadable input, 6 some inputs failed, 130 interrupted
    """


from paliedge.cli import bench, build, bundles, cache, demo, doctor, evaluate, plan, predict  # noqa: E402  registers the verbs

for _verb in (
    *predict.VERBS,
    *bundles.VERBS,
    *plan.VERBS,
    *build.VERBS,
    *doctor.VERBS,
    *evaluate.VERBS,
    *bench.VERBS,
    *cache.VERBS,
    *demo.VERBS,
):
    main.add_command(_verb)
