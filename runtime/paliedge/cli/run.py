"""A verb's run over a source: ask about every picture, write each answer, name what failed."""

# Tests: tests/cli/test_predict.py and tests/cli/test_video_verbs.py.
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paliedge.cli.options import load_model, read_prompts
from paliedge.cli.output import SOME_FAILED, is_terminal, print_answer, print_error, save_answer, warn_of_cut
from paliedge.errors import ImageError, OutputError, PaliEdgeError

if TYPE_CHECKING:
    from PIL import Image

    from paliedge.backends.select import BackendOptions
    from paliedge.generation.request import GenerationOptions
    from paliedge.inputs.images import ImageSource
    from paliedge.inputs.prompt import Prompt, PromptMaker
    from paliedge.inputs.sources import Item, Source
    from paliedge.inputs.video import FrameOptions
    from paliedge.results.formats import Format, Writer
    from paliedge.results.generation import Generation
    from paliedge.results.video_writer import VideoWriter


def answer_all(
    source: str,
    make_prompt: Callable[[PromptMaker], Prompt],
    *,
    bundle: Path | None,
    options: BackendOptions,
    generation: GenerationOptions,
    frames: FrameOptions,
    save: Path | None,
    form: Format | None,
    batch: int,
    overlap: bool,
) -> None:
    """Answer for every picture; a bad one is reported and the others are done. `form` None is text."""
    from paliedge.inputs.sources import open_source
    from paliedge.results.formats import FOLDER_FORMATS, open_writer

    prompt = make_prompt(read_prompts(bundle))
    writer = None
    if form:
        writer = open_writer(form, partial(click.echo, nl=False), save, prompt.boxes, free=generation.free)
    items = open_source(source, frames, lambda line: click.echo(line, err=True))
    saver = Saver(save, items, has_boxes=prompt.boxes is not None) if save and form not in FOLDER_FORMATS else None
    run = SourceRun(writer, saver, makes_files=form in FOLDER_FORMATS)
    model = load_model(bundle, options)
    try:
        with closing(iter(items)) as found:
            requests = ((item, image, prompt) for item, image in run.read(found, items.num_items))
            generation = replace(generation, keep_image=save is not None)
            answers = model.generate_batch(requests, generation, batch_size=batch, overlap=overlap)
            with closing(answers):  # type: ignore[type-var]  # it is a generator
                for item, answer in answers:
                    run.take(item, answer)
    finally:  # an error or ctrl-C must not lose the answers so far
        run.finish()
        if items.num_dropped:
            click.echo(f"{items.num_dropped} frames were dropped because newer ones came (--buffer)", err=True)
    if run.errors:
        click.get_current_context().exit(SOME_FAILED if run.num_answers else run.errors[0].exit_code)


class SourceRun:
    """What is done with each picture: write the answer, save the annotated picture.

    Attributes:
        errors: those of pictures, in order.
        num_answers: pictures without an error.
    """

    def __init__(self, writer: Writer | None, saver: Saver | None, *, makes_files: bool) -> None:
        self.errors: list[PaliEdgeError] = []
        self.num_answers = 0
        self._writer, self._saver = writer, saver
        self._makes_files = makes_files

    def read(self, items: Iterable[Item], num_items: int | None) -> Iterator[tuple[Item, ImageSource | PaliEdgeError]]:
        """The pictures to be asked about, or why there is none."""
        show_progress = is_terminal() and num_items not in (None, 1)
        for index, item in enumerate(items, 1):
            if show_progress:
                click.echo(f"[{index}/{num_items}] {item.name}", err=True)
            yield item, item.error or item.picture

    def take(self, item: Item, answer: Generation | PaliEdgeError) -> None:
        """Write the answer, or what is in its place."""
        if isinstance(answer, PaliEdgeError):
            if not item.error and not isinstance(answer, ImageError):  # the next picture's would be the same
                raise answer
            self._fail(item.name, answer)
            return
        try:
            self._write(item, answer)
            if self._saver:
                self._saver.save(item, answer)
            self.num_answers += 1
        except OutputError as error:
            self._fail(item.name, error)

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

    def _write(self, item: Item, answer: Generation) -> None:
        if not self._writer:
            print_answer(item.name, answer, as_json=False)
            return
        is_frame = item.video and self._makes_files  # such a file is named after the frame as a picture
        path = Path(f"{item.stem}-{item.number}.png" if is_frame else item.name)
        self._writer.add(path, answer, item.time_s if item.video else None)
        if not self._writer.reports_errors:
            warn_of_cut(item.name, answer)

    def _fail(self, name: str, error: PaliEdgeError) -> None:
        self.errors.append(error)
        if self._writer and self._writer.reports_errors:
            self._writer.fail(Path(name), error)
        else:
            print_error(error, name)


class Saver:
    """Writes annotated pictures into a folder, and the frames of a video or live source as one video.

    No file of the source and none of this run is overwritten.
    """

    def __init__(self, folder: Path, items: Source, *, has_boxes: bool) -> None:
        self.folder = folder
        self._taken = {path.absolute() for path in items.paths}
        self._has_boxes = has_boxes
        self._video_name: Path | None = None
        self._number = -1
        self._video: VideoWriter | None = None

    def save(self, item: Item, result: Generation) -> None:
        if item.video is None:
            save_answer(result, self._free_name(item.stem, ".png"))
            return
        if item.video != self._video_name or item.number <= self._number:  # a list may name a video twice
            self.close()
            self._video, self._video_name = self._open(item.stem), item.video
        self._number = item.number
        if self._video:
            self._video.add(self._plot(result), item.time_s)

    def close(self) -> None:
        """End the video that is being written."""
        video, self._video, self._video_name = self._video, None, None
        if video:
            video.close()
            click.echo(f"saved {video.path}", err=True)

    def _open(self, stem: str) -> VideoWriter:
        from paliedge.results.video_writer import VideoWriter

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
