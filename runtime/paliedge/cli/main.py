"""The group of verbs: how errors leave, and which verbs there are.

Modules that load a model are imported by the verb that needs them, so that `--help` stays fast.
"""

from __future__ import annotations

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


class _Verbs(click.Group):
    """Knows the verbs of installed extensions; turns errors into three lines and an exit code."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*super().list_commands(context), *entry_points(group="paliedge.verbs").names})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        command = super().get_command(context, name)
        if command:
            return command
        for extension in entry_points(group="paliedge.verbs", name=name):
            loaded = extension.load()
            assert isinstance(loaded, click.Command)
            return loaded
        return None

    def invoke(self, context: click.Context) -> object:
        try:
            with _terminable():
                return super().invoke(context)
        except PaliEdgeError as error:
            print_error(error)
            if not isinstance(error, UsageError):
                _name_versions()
            context.exit(error.exit_code)
        except BrokenPipeError:
            raise  # click ends quietly
        except OSError as error:
            print_error(
                OutputError(
                    expected=f"to read or write {error.filename or 'a file'}",
                    found=error.strerror or "an error of the file system",
                    action="Check free space and permissions.",
                )
            )
            context.exit(OutputError.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            context.exit(_INTERRUPTED)
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

    Every option can be set by the environment variable shown beside it.
    Exit codes: 0 ok, 1 run-time error, 2 usage, 3 damaged bundle, 4 bundle does not fit this
    machine, 5 unreadable input, 6 some inputs failed, 130 interrupted.
    """


from paliedge.cli import bench, build, bundles, doctor, evaluate, plan, predict  # noqa: E402  registers the verbs

for _verb in (
    *predict.VERBS,
    *bundles.VERBS,
    *plan.VERBS,
    *build.VERBS,
    *doctor.VERBS,
    *evaluate.VERBS,
    *bench.VERBS,
):
    main.add_command(_verb)
