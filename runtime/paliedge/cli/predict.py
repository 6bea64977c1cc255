"""The verbs that look at pictures."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paliedge.cli.help import command, option
from paliedge.cli.options import Verb, format_options, frame_options, model_options
from paliedge.cli.run import answer_all

if TYPE_CHECKING:
    from paliedge.inputs.prompt import CaptionStyle


def _answer_options(verb: Verb) -> Verb:
    """What every verb has that looks at pictures; the verb gets `generation`, a GenerationOptions."""

    @wraps(verb)
    def collect(
        max_new_tokens: int | None,
        conf: float = 0.0,
        free: bool = False,
        only_requested: bool = False,
        only_asked: bool = False,
        **rest: Any,
    ) -> None:
        from paliedge.generation.request import GenerationOptions

        if only_asked:
            click.echo("note: --only-asked is now called --only-requested", err=True)
        generation = GenerationOptions(
            max_new_tokens=max_new_tokens,
            free=free,
            only_requested=only_requested or only_asked,
            min_confidence=conf,
        )
        verb(generation=generation, **rest)

    collected = frame_options(model_options(collect))
    for add_option in (
        option(
            "--save",
            type=click.Path(path_type=Path, file_okay=False),
            help="Folder for annotated pictures and videos, or for what --format yolo or labelme writes instead.",
            group="Output",
        ),
        option(
            "--max-new-tokens",
            type=click.IntRange(1),
            help="Stop after this many tokens; the bundle's limit unless given.",
            group="What",
        ),
        option(
            "--batch",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Pictures that are decoded together: more a second, each one later. Not for cameras, nor on TensorRT.",
            group="Engine",
        ),
        option(
            "--overlap",
            is_flag=True,
            help="Read and encode the next picture while this one is answered; a camera's frame is then older.",
            group="Engine",
        ),
    ):
        collected = add_option(collected)
    return format_options(collected)  # type: ignore[return-value]  # click has put its options on it


_lang_option = option("--lang", default="en", show_default=True, help="Language code.", group="What")


def _box_options(verb: Verb) -> Verb:
    """What verbs have that can answer in boxes."""
    for add_option in (
        option(
            "--conf",
            type=click.FloatRange(0, 1),
            default=0.0,
            help="Leave out detections whose confidence is lower. It ranks them; it is no probability of being right.",
            group="What",
        ),
        option(
            "--free",
            is_flag=True,
            help="Let the model say whatever it likes; malformed boxes may appear.",
            group="What",
        ),
    ):
        verb = add_option(verb)
    return verb


def _label_options(verb: Verb) -> Verb:
    """What verbs have that are given labels."""
    verb = option("--only-asked", is_flag=True, hidden=True, group="What")(verb)
    return option("--only-requested", is_flag=True, help="No labels but those of LABELS.", group="What")(verb)


@command(
    "paliedge detect photo.jpg 'cat ; dog' -m bundle --save found",
    "paliedge detect /dev/video0 person -m bundle --format jsonl",
    "paliedge detect photos/ car -m bundle --format coco > cars.json",
)
@click.argument("source")
@click.argument("labels")
@_label_options
@_box_options
@_answer_options
def detect(source: str, labels: str, **rest: Any) -> None:
    """Find every instance of LABELS, such as "cat ; dog".

    SOURCE is a picture, a folder of pictures, a glob pattern, a list (.txt), a video or a live source. Live sources
    are rtsp://..., rtmp://..., /dev/video0 and csi://0; - is a picture on standard input.
    """

    answer_all(source, lambda prompts: prompts.detect(labels), **rest)


@command("paliedge segment photo.jpg 'the left chair' -m bundle --save found")
@click.argument("source")
@click.argument("labels")
@_label_options
@_box_options
@_answer_options
def segment(source: str, labels: str, **rest: Any) -> None:
    """Find every instance of LABELS with its mask.

    SOURCE is as for `paliedge detect`; a label may be a whole phrase. Without a mask decoder in the bundle
    (`paliedge export --mask-decoder`) there are only boxes.
    """

    answer_all(source, lambda prompts: prompts.segment(labels), **rest)


@command("paliedge caption photo.jpg -m bundle", "paliedge caption video.mp4 --every 30 --lang de -m bundle")
@click.argument("source")
@_lang_option
@option(
    "--style",
    type=click.Choice(["caption", "cap", "describe"]),
    default="caption",
    show_default=True,
    help="cap and describe are known to pre-trained checkpoints only: as raw as on the web, and longer.",
    group="What",
)
@_answer_options
def caption(source: str, lang: str, style: CaptionStyle, **rest: Any) -> None:
    """Describe each picture in one sentence."""
    answer_all(source, lambda prompts: prompts.caption(lang, style), **rest)


@command("paliedge ask photo.jpg 'how many cars are there?' -m bundle")
@click.argument("source")
@click.argument("question")
@_lang_option
@_answer_options
def ask(source: str, question: str, lang: str, **rest: Any) -> None:
    """Answer QUESTION about each picture."""
    answer_all(source, lambda prompts: prompts.ask(question, lang), **rest)


@command("paliedge question photo.jpg 'two' -m bundle")
@click.argument("source")
@click.argument("answer")
@_lang_option
@_answer_options
def question(source: str, answer: str, lang: str, **rest: Any) -> None:
    """Ask the question about each picture that has ANSWER; pre-trained checkpoints know how."""
    answer_all(source, lambda prompts: prompts.question(answer, lang), **rest)


@command("paliedge ocr 'receipts/*.png' -m bundle --format csv > texts.csv")
@click.argument("source")
@_answer_options
def ocr(source: str, **rest: Any) -> None:
    """Read the text in each picture."""
    answer_all(source, lambda prompts: prompts.ocr(), **rest)


@command("paliedge predict photo.jpg 'caption de' -m bundle")
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
