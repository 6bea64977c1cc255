"""The verbs that look at pictures."""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paliedge.cli.options import Verb, format_options, load_model, model_options
from paliedge.errors import ImageError, OutputError, PaliEdgeError

if TYPE_CHECKING:
    from PIL import Image

    from paliedge.backends import BackendOptions
    from paliedge.formats import Format, Writer
    from paliedge.model import CaptionStyle, PaliGemma
    from paliedge.prompt import BoxRequest, BoxTask
    from paliedge.results import Generation

    _Answer = Callable[[PaliGemma, Path], Generation]

SOME_FAILED = 6


def _answer_options(verb: Verb) -> Verb:
    verb = model_options(verb)
    verb = click.option(
        "--save",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="PALIEDGE_SAVE",
        show_envvar=True,
        help="Folder for annotated pictures, or for what --format yolo or labelme writes instead.",
    )(verb)
    verb = click.option(
        "--max-new-tokens",
        type=click.IntRange(1),
        envvar="PALIEDGE_MAX_NEW_TOKENS",
        show_envvar=True,
        help="Stop after this many tokens; the bundle's limit unless given.",
    )(verb)
    return format_options(verb)


_lang_option = click.option(
    "--lang", default="en", show_default=True, envvar="PALIEDGE_LANG", show_envvar=True, help="Language code."
)


def _box_options(verb: Verb) -> Verb:
    """What verbs have that answer in boxes."""
    for option in (
        click.option(
            "--conf",
            type=click.FloatRange(0, 1),
            default=0.0,
            envvar="PALIEDGE_CONF",
            show_envvar=True,
            help="Leave out detections whose confidence is lower. It ranks them; it is no probability of being right.",
        ),
        click.option(
            "--free",
            is_flag=True,
            envvar="PALIEDGE_FREE",
            show_envvar=True,
            help="Let the model say whatever it likes; malformed boxes may appear.",
        ),
        click.option(
            "--only-asked",
            is_flag=True,
            envvar="PALIEDGE_ONLY_ASKED",
            show_envvar=True,
            help="No labels but those that are asked for.",
        ),
    ):
        verb = option(verb)
    return verb


@click.command()
@click.argument("source")
@click.argument("labels")
@_box_options
@_answer_options
def detect(
    source: str, labels: str, max_new_tokens: int | None, conf: float, free: bool, only_asked: bool, **rest: Any
) -> None:
    """Find every instance of LABELS, such as "cat ; dog".

    SOURCE is a picture, a folder of pictures or a glob pattern.
    """

    def answer(model: PaliGemma, image: Path) -> Generation:
        found = model.detect(image, labels, max_new_tokens=max_new_tokens, free=free, only_asked=only_asked)
        return found.above(conf)

    _answer_all(source, answer, asked=_asked("detect", labels), free=free, **rest)


@click.command()
@click.argument("source")
@click.argument("labels")
@_box_options
@_answer_options
def segment(
    source: str, labels: str, max_new_tokens: int | None, conf: float, free: bool, only_asked: bool, **rest: Any
) -> None:
    """Find every instance of LABELS with its mask.

    SOURCE is a picture, a folder of pictures or a glob pattern; a label may be a whole phrase. Without a mask
    decoder in the bundle (`paliedge export --mask-decoder`) there are only boxes.
    """

    def answer(model: PaliGemma, image: Path) -> Generation:
        found = model.segment(image, labels, max_new_tokens=max_new_tokens, free=free, only_asked=only_asked)
        return found.above(conf)

    _answer_all(source, answer, asked=_asked("segment", labels), free=free, **rest)


@click.command()
@click.argument("source")
@_lang_option
@click.option(
    "--style",
    type=click.Choice(["caption", "cap", "describe"]),
    default="caption",
    show_default=True,
    envvar="PALIEDGE_STYLE",
    show_envvar=True,
    help="cap and describe are known to pre-trained checkpoints only: as raw as on the web, and longer.",
)
@_answer_options
def caption(source: str, lang: str, style: CaptionStyle, max_new_tokens: int | None, **rest: Any) -> None:
    """Describe each picture in one sentence."""

    def answer(model: PaliGemma, image: Path) -> Generation:
        return model.caption(image, lang, style=style, max_new_tokens=max_new_tokens)

    _answer_all(source, answer, **rest)


@click.command()
@click.argument("source")
@click.argument("question")
@_lang_option
@_answer_options
def ask(source: str, question: str, lang: str, max_new_tokens: int | None, **rest: Any) -> None:
    """Answer QUESTION about each picture."""
    _answer_all(source, lambda model, image: model.ask(image, question, lang, max_new_tokens=max_new_tokens), **rest)


@click.command()
@click.argument("source")
@click.argument("answer")
@_lang_option
@_answer_options
def question(source: str, answer: str, lang: str, max_new_tokens: int | None, **rest: Any) -> None:
    """Ask the question about each picture that has ANSWER; pre-trained checkpoints know how."""
    _answer_all(source, lambda model, image: model.question(image, answer, lang, max_new_tokens=max_new_tokens), **rest)


@click.command()
@click.argument("source")
@_answer_options
def ocr(source: str, max_new_tokens: int | None, **rest: Any) -> None:
    """Read the text in each picture."""
    _answer_all(source, lambda model, image: model.ocr(image, max_new_tokens=max_new_tokens), **rest)


@click.command()
@click.argument("source")
@click.argument("prompt")
@_answer_options
def predict(source: str, prompt: str, max_new_tokens: int | None, **rest: Any) -> None:
    """Answer a free PROMPT in the model's own words, such as "caption de"."""
    from paliedge.prompt import find_box_request

    def answer(model: PaliGemma, image: Path) -> Generation:
        return model.generate(image, prompt, max_new_tokens=max_new_tokens)

    _answer_all(source, answer, asked=find_box_request(prompt), **rest)


VERBS = (detect, segment, caption, ask, question, ocr, predict)


def find_sources(source: str) -> list[Path]:
    """The pictures that SOURCE names, sorted.

    Raises:
        ImageError: there is none.
    """
    from paliedge.images import SUFFIXES

    path = Path(source)
    try:
        if path.is_dir():
            found = sorted(item for item in path.iterdir() if item.suffix.lower() in SUFFIXES)
        elif glob.has_magic(source) and not path.exists():
            found = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
        else:
            found = [path]
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it
        raise ImageError(
            expected=f"pictures at {source[:200]}",
            found=getattr(error, "strerror", None) or "a name that cannot be",
            action="Check the path and its permissions.",
        ) from None
    if not found:
        raise ImageError(
            expected=f"pictures at {source}",
            found="none with a name that ends in " + ", ".join(SUFFIXES) if path.is_dir() else "no match",
            action="Check the path or quote the pattern.",
        )
    return found


def _asked(task: BoxTask, labels: str) -> BoxRequest:
    from paliedge.prompt import BoxRequest, split_labels

    return BoxRequest(task, split_labels(labels))


def _answer_all(
    source: str,
    answer: _Answer,
    *,
    bundle: Path | None,
    options: BackendOptions,
    save: Path | None,
    form: Format | None,
    asked: BoxRequest | None = None,
    free: bool = False,
) -> None:
    """Answer for every picture; a bad one is reported and the others are done.

    `form` None is text; `asked` are the boxes that are asked for, if any.
    """
    from paliedge.formats import FOLDER_FORMATS, open_writer

    writer = open_writer(form, partial(click.echo, nl=False), save, asked, free=free) if form else None
    paths = find_sources(source)
    model = load_model(bundle, options)
    taken: set[Path] = {path.absolute() for path in paths}
    show_progress = len(paths) > 1 and _is_terminal()
    errors: list[PaliEdgeError] = []
    try:
        for index, path in enumerate(paths, 1):
            if show_progress:
                click.echo(f"[{index}/{len(paths)}] {path}", err=True)
            try:
                result = answer(model, path)
                _write(path, result, writer)
                if save and form not in FOLDER_FORMATS:
                    _save(result, _free_name(save, path, taken))
            except (ImageError, OutputError) as error:
                errors.append(error)
                _write_error(path, error, writer)
    finally:  # an error or ctrl-C must not lose the answers so far
        if writer:
            writer.finish()
    if errors:
        click.get_current_context().exit(SOME_FAILED if len(errors) < len(paths) else errors[0].exit_code)


def _write(source: Path, result: Generation, writer: Writer | None) -> None:
    if not writer:
        print_answer(str(source), result, as_json=False)
        return
    writer.add(source, result)
    if not writer.tells_errors:
        _warn_of_cut(str(source), result)


def _write_error(source: Path, error: PaliEdgeError, writer: Writer | None) -> None:
    if writer and writer.tells_errors:
        writer.fail(source, error)
    else:
        from paliedge.cli.main import print_error

        print_error(error, str(source))


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
        click.echo(f"{source}: {result.text or 'nothing found'}")
    _warn_of_cut(source, result)


def _warn_of_cut(source: str, result: Generation) -> None:
    if result.finish_reason == "length":
        click.echo(f"{source}: the answer was cut off at the token limit", err=True)


def save_picture(image: Image.Image, result: Generation, path: Path) -> None:
    """Write `image` annotated with the answer."""
    _save(replace(result, image=image), path)


def _save(result: Generation, path: Path) -> None:
    result.save(path)
    click.echo(f"saved {path}", err=True)


def _is_terminal() -> bool:
    return sys.stderr.isatty()


def _free_name(folder: Path, source: Path, taken: set[Path]) -> Path:
    """A name for the picture made from `source`; neither a source nor another picture of this run."""
    for number in range(1, len(taken) + 2):
        name = f"{source.stem}.png" if number == 1 else f"{source.stem}-{number}.png"
        if (path := (folder / name).absolute()) not in taken:
            break
    taken.add(path)
    return folder / name
