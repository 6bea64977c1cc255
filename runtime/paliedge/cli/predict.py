"""The verbs that look at pictures."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paliedge.cli.options import Verb, format_options, frame_options, load_model, model_options
from paliedge.errors import ImageError, OutputError, PaliEdgeError

if TYPE_CHECKING:
    from PIL import Image

    from paliedge.backends.select import BackendOptions
    from paliedge.bundle.manifest import Prompts
    from paliedge.inputs.images import ImageSource
    from paliedge.inputs.prompt import BoxTask, CaptionStyle, Prompt
    from paliedge.inputs.sources import Item, Source
    from paliedge.inputs.video import FrameOptions, VideoWriter
    from paliedge.results.formats import Format, Writer
    from paliedge.results.generation import Generation

    _MakePrompt = Callable[[Prompts], Prompt]

SOME_FAILED = 6


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

    _answer_all(source, lambda prompts: caption_prompt(prompts, lang, style), **rest)


@click.command()
@click.argument("source")
@click.argument("question")
@_lang_option
@_answer_options
def ask(source: str, question: str, lang: str, **rest: Any) -> None:
    """Answer QUESTION about each picture."""
    from paliedge.inputs.prompt import answer_prompt

    _answer_all(source, lambda prompts: answer_prompt(prompts, question, lang), **rest)


@click.command()
@click.argument("source")
@click.argument("answer")
@_lang_option
@_answer_options
def question(source: str, answer: str, lang: str, **rest: Any) -> None:
    """Ask the question about each picture that has ANSWER; pre-trained checkpoints know how."""
    from paliedge.inputs.prompt import question_prompt

    _answer_all(source, lambda prompts: question_prompt(prompts, answer, lang), **rest)


@click.command()
@click.argument("source")
@_answer_options
def ocr(source: str, **rest: Any) -> None:
    """Read the text in each picture."""
    from paliedge.inputs.prompt import ocr_prompt

    _answer_all(source, ocr_prompt, **rest)


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

    _answer_all(source, lambda prompts: free_prompt(prompt), **rest)


VERBS = (detect, segment, caption, ask, question, ocr, predict)


def _answer_boxes(source: str, task: BoxTask, labels: str, **rest: Any) -> None:
    from paliedge.inputs.prompt import box_prompt

    _answer_all(source, lambda prompts: box_prompt(prompts, task, labels), **rest)


def _answer_all(
    source: str,
    make_prompt: _MakePrompt,
    *,
    bundle: Path | None,
    options: BackendOptions,
    frames: FrameOptions,
    save: Path | None,
    form: Format | None,
    max_new_tokens: int | None,
    batch: int,
    overlap: bool,
    conf: float = 0.0,
    free: bool = False,
    only_asked: bool = False,
) -> None:
    """Answer for every picture; a bad one is reported and the others are done. `form` None is text."""
    from paliedge.bundle.manifest import Prompts
    from paliedge.inputs.sources import open_source
    from paliedge.results.formats import FOLDER_FORMATS, open_writer

    boxes = make_prompt(Prompts()).boxes  # the same whatever the bundle's own words are
    writer = open_writer(form, partial(click.echo, nl=False), save, boxes, free=free) if form else None
    items = open_source(source, frames, lambda line: click.echo(line, err=True))
    saver = _Saver(save, items, has_boxes=boxes is not None) if save and form not in FOLDER_FORMATS else None
    run = _Run(writer, saver, conf, makes_files=form in FOLDER_FORMATS)
    model = load_model(bundle, options)
    try:
        with closing(iter(items)) as found:
            answers = model.generate_batch(
                run.read(found, items.num_items, make_prompt(model.manifest.prompts)),
                batch_size=batch,
                overlap=overlap,
                on_error=run.fail_next,
                max_new_tokens=max_new_tokens,
                free=free,
                only_asked=only_asked,
            )
            with closing(answers):  # type: ignore[type-var]  # it is a generator
                for answer in answers:
                    run.take(answer)
    finally:  # an error or ctrl-C must not lose the answers so far
        run.finish()
        if items.num_dropped:
            click.echo(f"{items.num_dropped} frames were dropped because newer ones came (--buffer)", err=True)
    if run.errors:
        click.get_current_context().exit(SOME_FAILED if run.num_answers else run.errors[0].exit_code)


class _Run:
    """What is done with each picture: send it, write the answer, save the annotated picture.

    Attributes:
        errors: those of pictures, in order.
        num_answers: pictures without an error.
    """

    def __init__(self, writer: Writer | None, saver: _Saver | None, conf: float, *, makes_files: bool) -> None:
        self.errors: list[PaliEdgeError] = []
        self.num_answers = 0
        self._writer, self._saver = writer, saver
        self._conf = conf
        self._makes_files = makes_files
        self._sent: deque[Item] = deque()

    def read(
        self, items: Iterable[Item], num_items: int | None, prompt: Prompt
    ) -> Iterator[tuple[ImageSource, Prompt]]:
        """The pictures of `items`, to be asked about."""
        show_progress = _is_terminal() and num_items not in (None, 1)
        for index, item in enumerate(items, 1):
            if show_progress:
                click.echo(f"[{index}/{num_items}] {item.name}", err=True)
            self._sent.append(item)
            if item.error:
                self._report_errors()
            else:
                yield item.picture, prompt
        self._report_errors()

    def take(self, answer: Generation) -> None:
        """The answer to the first picture that has none."""
        item = self._sent.popleft()
        result = answer.above(self._conf)
        try:
            self._write(item, result)
            if self._saver:
                self._saver.save(item, result)
            self.num_answers += 1
        except OutputError as error:
            self._fail(item.name, error)
        self._report_errors()

    def fail_next(self, error: PaliEdgeError) -> None:
        """The first picture that has no answer gets none."""
        if not isinstance(error, ImageError):  # the next picture's would be the same
            raise error
        self._fail(self._sent.popleft().name, error)
        self._report_errors()

    def _report_errors(self) -> None:
        """Those of the source, as far as the pictures before them are done."""
        while self._sent and (error := self._sent[0].error):
            self._fail(self._sent.popleft().name, error)

    def finish(self) -> None:
        """Close what is written; of an interrupted run too."""
        try:
            if self._saver:
                try:
                    self._saver.close()
                except OutputError as error:
                    self._fail(str(self._saver.folder), error)
        finally:
            if self._writer:
                self._writer.finish()

    def _write(self, item: Item, result: Generation) -> None:
        if not self._writer:
            print_answer(item.name, result, as_json=False)
            return
        is_frame = item.film and self._makes_files  # such a file is named after the frame as a picture
        path = Path(f"{item.stem}-{item.number}.png" if is_frame else item.name)
        self._writer.add(path, result, item.time_s if item.film else None)
        if not self._writer.tells_errors:
            _warn_of_cut(item.name, result)

    def _fail(self, name: str, error: PaliEdgeError) -> None:
        self.errors.append(error)
        if self._writer and self._writer.tells_errors:
            self._writer.fail(Path(name), error)
        else:
            from paliedge.cli.main import print_error

            print_error(error, name)


class _Saver:
    """Writes annotated pictures into a folder, and the frames of a video or live source as one video.

    No file of the source and none of this run is overwritten.
    """

    def __init__(self, folder: Path, items: Source, *, has_boxes: bool) -> None:
        self.folder = folder
        self._taken = {path.absolute() for path in items.paths}
        self._has_boxes = has_boxes
        self._film: Path | None = None
        self._number = -1
        self._video: VideoWriter | None = None

    def save(self, item: Item, result: Generation) -> None:
        if item.film is None:
            _save(result, self._free_name(item.stem, ".png"))
            return
        if item.film != self._film or item.number <= self._number:  # a list may name a video twice
            self.close()
            self._video, self._film = self._open(item.stem), item.film
        self._number = item.number
        if self._video:
            self._video.add(self._plot(result), item.time_s)

    def close(self) -> None:
        """End the video that is being written."""
        video, self._video, self._film = self._video, None, None
        if video:
            video.close()
            click.echo(f"saved {video.path}", err=True)

    def _open(self, stem: str) -> VideoWriter:
        from paliedge.inputs.video import VideoWriter

        return VideoWriter(self._free_name(stem, ".mp4"))

    def _plot(self, result: Generation) -> Image.Image:
        """As `Generation.plot`, but without a strip of text below where boxes were asked for and there are none."""
        from paliedge.results.draw import draw_detections

        if self._has_boxes and result.image:
            return draw_detections(result.image, result.detections)
        return result.plot()

    def _free_name(self, stem: str, suffix: str) -> Path:
        number, name = 1, f"{stem}{suffix}"
        while (path := (self.folder / name).absolute()) in self._taken:
            number += 1
            name = f"{stem}-{number}{suffix}"
        self._taken.add(path)
        return self.folder / name


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
        click.echo(f"{source}: {result.text or '(an empty answer: nothing found)'}")
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
