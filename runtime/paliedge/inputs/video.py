"""Video through PyAV (FFmpeg): files read in full, streams and devices read as they come.

Knows neither models nor what a source's name means. PyAV is an extra and is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from paliedge.errors import ImageError, MissingExtraError
from paliedge.inputs.images import MAX_PIXELS

TIMEOUT_S = 10.0
"""How long a live source may take to open, and for each read."""
_MISSING_S = 0.5
"""A file whose frames end earlier than this before its stated end is broken off."""
_FILE_OPTIONS = {  # no playlists: they would make FFmpeg read other files and addresses
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
}


@dataclass(frozen=True)
class VideoFrame:
    """One frame.

    Attributes:
        number: its place among all frames of the source, from 0; those left out and dropped count too.
        time_s: seconds since the first frame; of a live source, when it came.
        image: RGB, upright.
    """

    number: int
    time_s: float
    image: Image.Image


@dataclass(frozen=True)
class FrameOptions:
    """Which frames are taken.

    Attributes:
        every: one in so many.
        buffer: how many of a live source's frames may wait; when more come, the oldest go.
        reconnect: attempts in a row to reach a lost live source; None for no end of them.
    """

    every: int = 1
    buffer: int = 1
    reconnect: int | None = None


def import_av() -> Any:
    """PyAV.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module("av")
    except ImportError as error:
        raise MissingExtraError(
            expected="PyAV, which reads and writes video",
            found="no package `av`",
            action='Run `pip install "paliedge[video]"`.',
        ) from error


def read_video(path: Path, every: int = 1) -> Generator[VideoFrame, None, None]:
    """Each frame of a video file whose number is a multiple of `every`, in order.

    Raises:
        ImageError: no readable video. Damaged or missing frames are told after the last good one.
    """
    av = import_av()
    with _open_video(av, path) as container:
        stream = _video_stream(container, str(path))
        stream.thread_type = "AUTO"
        problems: list[str] = []
        number, start_s, end_s = 0, 0.0, 0.0
        rate = stream.average_rate or 25
        for number, frame in enumerate(_decode(av, container, stream, problems), 1):
            moment_s = float((number - 1) / rate if frame.time is None else frame.time)
            start_s = moment_s if number == 1 else start_s
            end_s = moment_s - start_s + float(frame.duration * frame.time_base if frame.duration else 1 / rate)
            if (number - 1) % every == 0:
                yield VideoFrame(number - 1, max(moment_s - start_s, 0.0), _image_from_frame(frame))
        stated_s = _stated_duration_s(container, stream)
    if not number:
        problems = ["no frame"]
    elif end_s < stated_s - _MISSING_S:
        problems.append(f"an end after {end_s:.1f} of {stated_s:.1f} seconds")
    if problems:
        raise ImageError(
            expected=f"a whole video at {path}", found=" and ".join(problems), action="Copy or record it again."
        )


def _open_video(av: Any, path: Path) -> Any:
    found = "no such file"
    try:
        if path.is_file():
            found = "a file that is damaged, cut off or something else"
            return av.open(f"file:{path}", options=_FILE_OPTIONS)
    except (av.FFmpegError, OSError, ValueError):  # ValueError: a NUL in the name
        pass
    raise ImageError(
        expected=f"a readable MP4, MKV, AVI, MOV or WEBM video at {path}",
        found=found,
        action="Check the path, its permissions, and whether a player can play it.",
    )


def _video_stream(container: Any, name: str) -> Any:
    if not container.streams.video:
        raise ImageError(
            expected=f"a video in {name}", found="other streams, such as sound", action="Name another source."
        )
    return container.streams.video[0]


def _stated_duration_s(container: Any, stream: Any) -> float:
    """How long the video says it is, in seconds; 0 where it does not."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:  # else it may be the sound's
        return float(container.duration) / 1_000_000
    return 0.0


def _decode(av: Any, container: Any, stream: Any, problems: list[str]) -> Iterator[Any]:
    """The decoded frames; what is damaged is left out and named in `problems`."""
    packets, damaged = container.demux(stream), 0
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                break
        except av.FFmpegError as error:
            problems.append(reason_of(error))
            yield from _rest(av, stream)
            break
        try:
            yield from packet.decode()
        except av.FFmpegError:
            damaged += 1
    if damaged:
        problems.append(f"{damaged} damaged packets")


def _rest(av: Any, stream: Any) -> Iterator[Any]:
    """The frames that the decoder still holds."""
    try:
        yield from stream.codec_context.decode(None)
    except av.FFmpegError:
        return


def reason_of(error: Any) -> str:
    """Without the address, which may hold a password."""
    return error.strerror or type(error).__name__


def _image_from_frame(frame: Any) -> Image.Image:
    if frame.width * frame.height > MAX_PIXELS:
        raise ImageError(
            expected=f"frames of at most {MAX_PIXELS // 1_000_000} megapixels",
            found=f"{frame.width} x {frame.height} pixels",
            action="Scale the video down first.",
        )
    image: Image.Image = frame.to_image()
    turned = getattr(frame, "rotation", 0) % 360  # a telephone's, in degrees counter-clockwise; since PyAV 14.1
    return image.rotate(turned, expand=True) if turned else image


def read_stream(
    address: str, form: str | None = None, options: Mapping[str, str] | None = None
) -> Generator[Callable[[], Image.Image], None, None]:
    """The frames of a network address or device, each as what makes its picture.

    Args:
        address: what FFmpeg opens.
        form: FFmpeg's name of the format; for devices.
        options: FFmpeg's options.

    Raises:
        ImageError: it cannot be reached, or stopped with an error.
    """
    av = import_av()
    problems: list[str] = []
    try:
        with av.open(address, format=form, options=dict(options or {}), timeout=(TIMEOUT_S, TIMEOUT_S)) as container:
            for frame in _decode(av, container, _video_stream(container, "the source"), problems):
                yield partial(_image_from_frame, frame)
        if problems:
            raise lost(problems[0])
    except (av.FFmpegError, OSError) as error:
        raise lost(reason_of(error)) from None  # its text holds the address, which may hold a password


def lost(found: str) -> ImageError:
    """The error of a live source that gives no frames (any more)."""
    return ImageError(
        expected="a live source that gives frames",
        found=found,
        action="Check the address, the device and the network; --reconnect says how often to try.",
    )
