"""The verbs that look at pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paliedge.cli.options import Verb, format_options, frame_options, model_options
from paliedge.cli.run import answer_all

if TYPE_CHECKING:
    from paliedge.bundle.manifest import Prompts
    from paliedge.inputs.prompt import BoxTask, CaptionStyle, Prompt

    _MakePrompt = Callable[[Prompts], Prompt]


def _answer_options(verb: Verb) -> Verb:
    verb = frame_options(model_options(verb))
    verb = click.option(
        "--save",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="PALIEDGE_SAVE",
        show_envvar=True,
        help="Folder for annotated pictures and videos, or for what --format yolo or labelme writes instead.",
    )(verb)
    verb = click.option(
        "--max-new-tokens",
        type=click.IntRange(1),
        envvar="PALIEDGE_MAX_NEW_TOKENS",
        show_envvar=True,
        help="Stop after this many tokens; the bundle's limit unless given.",
    )(verb)
    verb = click.option(
        "--batch",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        envvar="PALIEDGE_BATCH",
        show_envvar=True,
        help="Pictures that are decoded together: more a second, each one later. Not for cameras, nor on TensorRT.",
    )(verb)
    verb = click.option(
        "--overlap",
        is_flag=True,
        envvar="PALIEDGE_OVERLAP",
        show_envvar=True,
        help="Read and encode the next picture while this one is answered; a camera's frame is then older.",
    )(verb)
    return format_options(verb)


_lang_option = click.option(
    "--lang", default="en", show_default=True, envvar="PALIEDGE_LANG", show_envvar=True, help="Language code."
)


def _box_options(verb: Verb) -> Verb:
    """What verbs have that can answer in boxes."""
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
    ):
        verb = option(verb)
    return verb


_only_asked_option = click.option(
    "--only-asked",
    is_flag=True,
    envvar="PALIEDGE_ONLY_ASKED",
    show_envvar=True,
    help="No labels but those that are asked for.",
)


@click.command()
@click.argument("source")
@click.argument("labels")
@_only_asked_option
@_box_options
@_answer_options
def detect(source: str, labels: str, **rest: Any) -> None:
    """Find every instance of LABELS, such as "cat ; dog".

    SOURCE is a picture, a folder of pictures, a glob pattern, a list (.txt), a video, - for a picture on standard
    input, or a live source: rtsp://..., rtmp://..., /dev/video0, csi://0.
    """

    _answer_boxes(source, "detect", labels, **rest)


@click.command()
@click.argument("source")
@click.argument("labels")
@_only_asked_option
@_box_options
@_answer_options
def segment(source: str, labels: str, **rest: Any) -> None:
    """Find every instance of LABELS with its mask.

    SOURCE is as for `paliedge detect`; a label may be a whole phrase. Without a mask decoder in the bundle
    (`paliedge export --mask-decoder`) there are only boxes.
    """

    _answer_boxes(source, "segment", labels, **rest)


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
def caption(source: str, lang: str, style: CaptionStyle, **rest: Any) -> None:
    """Describe each picture in one sentence."""
    from paliedge.inputs.prompt import caption_prompt

    answer_all(source, lambda prompts: caption_prompt(prompts, lang, style), **rest)


@click.command()
@click.argument("source")
@click.argument("question")
@_lang_option
@_answer_options
def ask(source: str, question: str, lang: str, **rest: Any) -> None:
    """Answer QUESTION about each picture."""
    from paliedge.inputs.prompt import answer_prompt

    answer_all(source, lambda prompts: answer_prompt(prompts, question, lang), **rest)


@click.command()
@click.argument("source")
@click.argument("answer")
@_lang_option
@_answer_options
def question(source: str, answer: str, lang: str, **rest: Any) -> None:
    """Ask the question about each picture that has ANSWER; pre-trained checkpoints know how."""
    from paliedge.inputs.prompt import question_prompt

    answer_all(source, lambda prompts: question_prompt(prompts, answer, lang), **rest)


@click.command()
@click.argument("source")
@_answer_options
def ocr(source: str, **rest: Any) -> None:
    """Read the text in each picture."""
    from paliedge.inputs.prompt import ocr_prompt

    answer_all(source, ocr_prompt, **rest)


@click.command()
@click.argument("source")
@click.argument("prompt")
@_box_options
@_answer_options
def predict(source: str, prompt: str, **rest: Any) -> None:
    """Answer a free PROMPT in the model's own words, such as "caption de".

    --conf and --free are for one that begins with detect or segment.
    """
    from paliedge.inputs.prompt import free_prompt

    answer_all(source, lambda prompts: free_prompt(prompt), **rest)


VERBS = (detect, segment, caption, ask, question, ocr, predict)


def _answer_boxes(source: str, task: BoxTask, labels: str, **rest: Any) -> None:
    from paliedge.inputs.prompt import box_prompt

    answer_all(source, lambda prompts: box_prompt(prompts, task, labels), **rest)
