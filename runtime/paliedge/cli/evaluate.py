"""The verb `eval`: how good a bundle is on data with known answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paliedge.cli.help import command, option
from paliedge.cli.options import Verb, json_option, load_model, model_options
from paliedge.cli.output import SOME_FAILED

if TYPE_CHECKING:
    from paliedge.backends.select import BackendOptions
    from paliedge.errors import PaliEdgeError
    from paliedge.evaluation.cases import Outcome
    from paliedge.evaluation.tasks import Task
    from paliedge.model import PaliGemma


def _scope_options(verb: Verb) -> Verb:
    """What is asked, of how much of the data."""
    for add_option in (
        option(
            "--lang", default="en", show_default=True, help="Language code of captions without a prompt.", group="What"
        ),
        option(
            "--one-by-one",
            is_flag=True,
            help="Boxes: a prompt for each category; without it one for all.",
            group="What",
        ),
        option(
            "--labels",
            type=click.Choice(["all", "present"]),
            default="all",
            show_default=True,
            help="Boxes: ask for all categories of the dataset, or for those that the image has.",
            group="What",
        ),
        option("--limit", type=click.IntRange(1), help="Only the first images.", group="Source"),
        option(
            "--task",
            type=click.Choice(["detect", "segment", "caption", "vqa", "ocr"]),
            required=True,
            help="What the data asks for.",
            group="What",
        ),
    ):
        verb = add_option(verb)
    return verb


@command(
    "paliedge eval coco/ --task detect -m bundle --limit 100",
    "paliedge eval invoices.jsonl --task ocr -m bundle",
    name="eval",
)
@click.argument("dataset", type=click.Path(path_type=Path))
@_scope_options
@option(
    "--price-per-hour",
    type=click.FloatRange(0, min_open=True),
    help="What an hour of this machine costs, in any currency.",
    group="Output",
)
@model_options
@option(
    "--save",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for report.json, predictions.jsonl and worst.png.",
    group="Output",
)
@json_option("The report as JSON.")
def evaluate(
    dataset: Path,
    task: Task,
    bundle: Path | None,
    options: BackendOptions,
    price_per_hour: float | None,
    save: Path | None,
    as_json: bool,
    **scope: Any,
) -> None:
    """Score a bundle on DATASET, whose answers are known, and time it.

    For detect and segment DATASET is a folder with COCO annotations, or their .json file. For other tasks it is
    a .jsonl file, or a folder with one. Its objects have `image`, `suffix` (or `answers`) and, if need be,
    `prefix`. Needs `pip install "paliedge[eval]"`.
    """
    from paliedge.evaluation.report import Report, prepare_folder, save_report
    from paliedge.evaluation.tasks import require_packages
    from paliedge.model import SHIPPED_BUNDLE

    require_packages(task)
    if save:
        prepare_folder(save)
    context, watcher = click.get_current_context(), _Watcher()
    settings = _settings(context, task, scope)
    model, outcome = _evaluate(dataset, task, bundle, options, watcher, **scope)
    if not outcome.cases:
        context.exit(watcher.errors[0][1].exit_code)
    manifest = model.manifest
    report = Report(
        task,
        dataset,
        bundle or SHIPPED_BUNDLE,
        manifest.producer.checkpoint,
        manifest.sha256,
        settings,
        outcome,
        tuple(watcher.errors),
        price_per_hour,
    )
    click.echo(json.dumps(report.to_dict(), ensure_ascii=False) if as_json else report.to_table())
    if save:
        for path in save_report(report, save):
            click.echo(f"saved {path}", err=True)
    if watcher.errors:
        context.exit(SOME_FAILED)


def _settings(context: click.Context, task: Task, scope: dict[str, Any]) -> dict[str, Any]:
    """Those of the options in `scope` that bear on `task`.

    Raises:
        UsageError: one that does not was given on the command line.
    """
    from click.core import ParameterSource

    from paliedge.errors import UsageError

    tasks = {"labels": ("detect", "segment"), "one_by_one": ("detect", "segment"), "lang": ("caption",)}
    others = [name for name in scope if task not in tasks.get(name, (task,))]
    for name in others:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(
                expected=f"--{name.replace('_', '-')} with --task {' or '.join(tasks[name])}",
                found=f"--task {task}",
                action="Leave it out.",
            )
    return {name: value for name, value in scope.items() if name not in others}


def _evaluate(
    dataset: Path,
    task: Task,
    bundle: Path | None,
    options: BackendOptions,
    watcher: _Watcher,
    *,
    labels: str,
    one_by_one: bool,
    lang: str,
    limit: int | None,
) -> tuple[PaliGemma, Outcome]:
    """Read the data, then load the model, then ask."""
    from paliedge.evaluation.datasets import open_coco, open_texts
    from paliedge.evaluation.detection import Question, check_masks, evaluate_detection
    from paliedge.evaluation.texts import default_prompt, evaluate_texts

    if task == "detect" or task == "segment":
        coco = open_coco(dataset, masks=task == "segment")
        model = load_model(bundle, options)
        if task == "segment":
            check_masks(model.manifest)
        question = Question(task, labels == "present", one_by_one, model.manifest.prompts)
        return model, evaluate_detection(model, coco, question, watcher, limit)
    examples = open_texts(dataset, needs_prompt=task == "vqa")[:limit]
    model = load_model(bundle, options)
    prompt = default_prompt(task, model.manifest.prompts, lang)
    return model, evaluate_texts(model, examples, task, prompt, watcher)


class _Watcher:
    """Tells progress on a terminal, and every error; keeps the errors."""

    def __init__(self) -> None:
        self.errors: list[tuple[Path, PaliEdgeError]] = []
        self._shows_progress = _is_terminal()

    def started(self, number: int, total: int, source: Path) -> None:
        if self._shows_progress:
            click.echo(f"[{number}/{total}] {source}", err=True)

    def failed(self, source: Path, error: PaliEdgeError) -> None:
        from paliedge.cli.output import print_error

        self.errors.append((source, error))
        print_error(error, str(source))


def _is_terminal() -> bool:
    return sys.stderr.isatty()


VERBS = (evaluate,)
