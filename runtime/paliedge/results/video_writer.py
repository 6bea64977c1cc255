"""Annotated pictures as a video, each shown at its own time."""

# Tests: tests/inputs/test_video.py.
from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from paliedge.errors import OutputError
from paliedge.inputs.video import import_av, reason_of

_ENCODERS = ("libx264", "libopenh264", "mpeg4")
_TICKS = 60_000
"""Of a written video's clock in a second: whole numbers of them are the frame times of 24, 25, 29.97, 30, 50, 60."""


class VideoWriter:
    """Writes pictures as one MP4 video that shows each at its own time.

    H.264 where this PyAV can encode it, else MPEG-4 part 2. All frames have the first one's size, rounded up to
    even numbers; other pictures are shrunk into it. The times are the source's own, so a file keeps its rate
    and a live source plays as it happened.

    Args:
        path: where; its folder is made, and with the first picture the file.

    Raises:
        MissingExtraError: PyAV is not installed.
        OutputError: it cannot be written; `add` and `close` raise it too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._av = import_av()
        self._stream: Any = None
        self._size_wh = (0, 0)
        self._last_tick, self._step, self._start_s = -1, _TICKS // 10, 0.0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._container = self._av.open(f"file:{path}", "w", format="mp4")
        except (self._av.FFmpegError, OSError) as error:
            raise self._unwritable(error) from error

    def add(self, image: Image.Image, time_s: float) -> None:
        """Append a picture that is shown from `time_s` on, in seconds of any clock."""
        try:
            if self._stream is None:
                self._start_s = time_s
                self._stream = self._add_stream(image.size)
            frame = self._av.VideoFrame.from_image(_fit(image, self._size_wh))
            tick = max(round((time_s - self._start_s) * _TICKS), self._last_tick + 1)
            if self._last_tick >= 0:
                self._step = tick - self._last_tick
            frame.pts, frame.time_base, self._last_tick = tick, Fraction(1, _TICKS), tick
            self._mux(frame)
        except (self._av.FFmpegError, OSError) as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Write the end; without it the file cannot be played."""
        try:
            if self._stream is not None:
                self._mux(None)
        except (self._av.FFmpegError, OSError) as error:
            raise self._unwritable(error) from error
        finally:
            self._container.close()

    def _add_stream(self, size_wh: tuple[int, int]) -> Any:
        self._size_wh = (size_wh[0] + size_wh[0] % 2, size_wh[1] + size_wh[1] % 2)
        name = next(name for name in _ENCODERS if name in self._av.codecs_available)
        options = {"crf": "23", "preset": "veryfast"} if name == "libx264" else {}
        stream = self._container.add_stream(name, rate=25, options=options)
        stream.width, stream.height = self._size_wh
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, _TICKS)
        if name != "libx264":
            stream.codec_context.bit_rate = 8_000_000
            stream.codec_context.qmax = 6
        self._container.start_encoding()  # opens the file: who cannot write should hear it now
        return stream

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            packet.duration = self._step  # counts for the last one; the others last until the next
            self._container.mux(packet)

    def _unwritable(self, error: Any) -> OutputError:
        return OutputError(
            expected=f"room and permission to write {self.path}",
            found=reason_of(error),
            action="Name another folder (--save), or make room.",
        )


def _fit(image: Image.Image, size_wh: tuple[int, int]) -> Image.Image:
    """On white, at the top left; shrunk where it is larger."""
    scale = min(1.0, size_wh[0] / image.width, size_wh[1] / image.height)
    if scale < 1:
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    if image.size == size_wh:
        return image.convert("RGB")
    canvas = Image.new("RGB", size_wh, "white")
    canvas.paste(image, (0, 0))
    return canvas
