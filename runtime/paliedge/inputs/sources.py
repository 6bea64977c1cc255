"""What a SOURCE is: files, a list of them, video, a live source, standard input; and the pictures in it, in order.

| SOURCE | pictures |
|---|---|
| a file, a folder, a glob pattern | the file, the folder's pictures, what matches |
| `list.txt` | what it names, a path a line, relative to the list |
| `video.mp4`, .mkv, .avi, .mov, .webm | every frame; also of videos that a pattern or a list names |
| `rtsp://...`, `rtmp://...` | the newest frame, until it ends |
| `/dev/video0`, `v4l2:///dev/video0` | likewise |
| `csi://0` | likewise: a Jetson's CSI camera |
| `-` | the one picture whose bytes come on standard input |

Knows neither models nor the command line.
"""

from __future__ import annotations

import glob
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

from PIL import Image

from paliedge.errors import ImageError, PaliEdgeError, UsageError
from paliedge.inputs.camera import import_gst, read_csi
from paliedge.inputs.images import SUFFIXES
from paliedge.inputs.video import FrameOptions, VideoFrame, import_av, lost, read_stream, read_video

Shot: TypeAlias = "Callable[[], Image.Image] | None"
"""A frame that is turned into a picture only when somebody wants it; None where a source has nothing yet."""
Feed: TypeAlias = "Callable[[], Generator[Shot, None, None]]"
"""Connects to a live source and gives its frames until it ends, raises, or is closed."""

VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm")
WATCHDOG_S = 10.0
"""A live source without a frame for so long is lost."""
MAX_DELAY_S = 30.0
"""The longest wait before connecting again."""
_JOIN_S = 2.0
_MAX_STDIN = 256 * 2**20
_NETWORK = {"rtsp": {"rtsp_transport": "tcp"}, "rtsps": {}, "rtmp": {}, "rtmps": {}}
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL | re.IGNORECASE)
_DEVICE = re.compile(r"/dev/video\d+")


@dataclass(frozen=True)
class Item:
    """One picture of a source, or the error that stands in its place.

    Attributes:
        name: what it is called in the output: the picture's path; `video.mp4#12` for the frame number 12, counted
            from 0; `stdin`.
        picture: what `load_image` takes.
        error: why there is no picture; then `picture` is empty bytes.
        film: the video file or live source that it is a frame of, by its name.
        number: of a film's frame, see `VideoFrame`.
        time_s: of a film's frame, seconds since the first.
    """

    name: str
    picture: Path | bytes | Image.Image = b""
    error: PaliEdgeError | None = None
    film: Path | None = None
    number: int = 0
    time_s: float = 0.0

    @property
    def stem(self) -> str:
        """What a file made from it is called, its film's name where it is a frame; without an ending."""
        path = self.film or Path(self.name)
        return path.stem if self.film is None or _is_video(path) else path.name


class Source:
    """An opened SOURCE: iterate to get its items.

    An iterator that is closed or dropped closes what it reads.

    Attributes:
        paths: its files, which no output may overwrite.
        num_items: how many items there will be; None where only the end tells.
    """

    paths: Sequence[Path] = ()
    num_items: int | None = None

    @property
    def num_dropped(self) -> int:
        """Frames so far that were left out because newer ones came."""
        return 0

    def __iter__(self) -> Generator[Item, None, None]:
        raise NotImplementedError


class Files(Source):
    """Pictures and videos."""

    def __init__(self, paths: Sequence[Path], every: int = 1) -> None:
        self.paths = paths
        self._every = every
        if any(map(_is_video, paths)):
            import_av()
        else:
            self.num_items = len(paths)

    def __iter__(self) -> Generator[Item, None, None]:
        for path in self.paths:
            if _is_video(path):
                yield from _items_from_frames(path, read_video(path, self._every))
            else:
                yield Item(str(path), path)


class StandardInput(Source):
    """The one picture whose bytes come on standard input."""

    num_items = 1

    def __iter__(self) -> Generator[Item, None, None]:
        content = sys.stdin.buffer.read(_MAX_STDIN + 1)
        if 0 < len(content) <= _MAX_STDIN:
            yield Item("stdin", content)
            return
        found = f"more than {_MAX_STDIN // 2**20} MiB" if content else "nothing"
        error = ImageError(
            expected="one picture on standard input", found=found, action="Send it one, as in `... - < picture.jpg`."
        )
        yield Item("stdin", error=error)


class Live(Source):
    """A network stream or a camera, named without what its address may hold of secrets."""

    def __init__(self, name: Path, frames: LiveFrames) -> None:
        self._name = name
        self._frames = frames

    @property
    def num_dropped(self) -> int:
        return self._frames.num_dropped

    def __iter__(self) -> Generator[Item, None, None]:
        yield from _items_from_frames(self._name, iter(self._frames))


def _items_from_frames(film: Path, frames: Generator[VideoFrame, None, None]) -> Generator[Item, None, None]:
    try:
        with closing(frames):
            for frame in frames:
                yield Item(f"{film}#{frame.number}", frame.image, None, film, frame.number, frame.time_s)
    except ImageError as error:
        yield Item(str(film), error=error, film=film)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


class _Shelf:
    """Where the newest frames wait; shared by the reader that fills it and the one who takes."""

    def __init__(self, options: FrameOptions) -> None:
        self.changed = threading.Condition()
        self.shots: deque[tuple[int, float, Callable[[], Image.Image]]] = deque()
        self.num_dropped = 0
        self._options = options
        self._num_seen = 0

    def put(self, shot: Callable[[], Image.Image], moment_s: float) -> None:
        """Keep the frame unless it is left out; under `changed`."""
        number = self._num_seen
        self._num_seen += 1
        if number % self._options.every:
            return
        if len(self.shots) >= self._options.buffer:
            self.shots.popleft()
            self.num_dropped += 1
        self.shots.append((number, moment_s, shot))
        self.changed.notify_all()


class _Reader(threading.Thread):
    """One connection to a live source, read as fast as it gives frames."""

    def __init__(self, feed: Feed, shelf: _Shelf) -> None:
        super().__init__(name="paliedge-reader", daemon=True)  # a device that hangs must not keep the program
        self.error: PaliEdgeError | None = None
        self.last_s = time.monotonic()
        self._feed = feed
        self._shelf = shelf
        self._is_stopped = False

    def run(self) -> None:
        error: PaliEdgeError = lost("its end")
        try:
            with closing(self._feed()) as shots:
                for shot in shots:
                    if not self._keep(shot):
                        return
        except PaliEdgeError as problem:
            error = problem
        except Exception as problem:  # a thread has nobody to raise to
            error = lost(f"{type(problem).__name__} in the reader")
        with self._shelf.changed:
            self.error = self.error or error
            self._shelf.changed.notify_all()

    def _keep(self, shot: Shot) -> bool:
        with self._shelf.changed:
            if self._is_stopped:
                return False
            if shot:
                self.last_s = time.monotonic()
                self._shelf.put(shot, self.last_s)
            return True

    def stop(self) -> None:
        """Let the thread end at its next frame, and wait for that a little."""
        with self._shelf.changed:
            self._is_stopped = True
        self.join(_JOIN_S)


class LiveFrames:
    """The frames of a live source: the newest, however slow they are taken; a lost source is reached again.

    Waits 1, 2, 4 ... 30 seconds before each further attempt; a frame sets that back to 1.

    Args:
        feed: connects to the source.
        options: which frames are taken, and how often a lost source is tried.
        report: gets a line when the source is lost.
        watchdog_s: a source without a frame for so long is lost; in seconds.
        sleep: waits for seconds.
    """

    def __init__(
        self,
        feed: Feed,
        options: FrameOptions,
        report: Callable[[str], None],
        *,
        watchdog_s: float = WATCHDOG_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._feed = feed
        self._options = options
        self._report = report
        self._watchdog_s = watchdog_s
        self._sleep = sleep
        self._shelf = _Shelf(options)

    @property
    def num_dropped(self) -> int:
        """Frames that nobody took because newer ones came."""
        return self._shelf.num_dropped

    def __iter__(self) -> Generator[VideoFrame, None, None]:
        """Frames until the attempts are used up.

        Raises:
            ImageError: the source is lost for good.
            MissingExtraError: what reads it is not installed.
        """
        failures, start_s = 0, None
        while True:
            reader = _Reader(self._feed, self._shelf)
            reader.start()
            try:
                while taken := self._take(reader):
                    number, moment_s, shot = taken
                    start_s = moment_s if start_s is None else start_s
                    failures = 0
                    yield VideoFrame(number, moment_s - start_s, shot())
            finally:
                reader.stop()
            error = reader.error or lost("its end")
            if not isinstance(error, ImageError) or failures == self._options.reconnect:
                raise error
            delay_s = min(2.0**failures, MAX_DELAY_S)
            failures += 1
            self._report(f"source lost: {error.found}; connecting again in {delay_s:.0f} s")
            self._sleep(delay_s)

    def _take(self, reader: _Reader) -> tuple[int, float, Callable[[], Image.Image]] | None:
        """The oldest frame that waits, else the next to come; None when the reader has lost the source."""
        with self._shelf.changed:
            while not self._shelf.shots:
                quiet_s = time.monotonic() - reader.last_s
                if not reader.error and quiet_s >= self._watchdog_s:
                    reader.error = lost(f"no frame for {self._watchdog_s:.0f} s")
                if reader.error:
                    return None
                self._shelf.changed.wait(self._watchdog_s - quiet_s)
            return self._shelf.shots.popleft()


DEFAULT_FRAMES = FrameOptions()


def open_source(
    source: str, options: FrameOptions = DEFAULT_FRAMES, report: Callable[[str], None] = lambda line: None
) -> Source:
    """What `source` names; see the table above.

    Args:
        source: a path, a pattern, an address or `-`.
        options: which frames are taken of videos and live sources.
        report: gets a line when a live source is lost.

    Raises:
        ImageError: there is no such folder, list or match. A file that is missing or bad is the error of its item.
        MissingExtraError: it is a video or live, and what reads these is not installed.
        UsageError: an address of a kind that is not known.
    """
    if source == "-":
        return StandardInput()
    if _DEVICE.fullmatch(source):
        source = f"v4l2://{source}"
    if address := _SCHEME.fullmatch(source):
        name, feed = _live_feed(address[1].lower(), source, address[2])
        return Live(Path(name), LiveFrames(feed, options, report))
    return Files(find_files(source), options.every)


def _live_feed(scheme: str, source: str, rest: str) -> tuple[str, Feed]:
    """A name for files and output, and what connects."""
    if scheme == "csi" and rest.isascii() and rest.isdigit():
        import_gst()
        return f"csi{int(rest)}", partial(read_csi, int(rest))
    if scheme == "v4l2" and rest.startswith("/"):
        import_av()
        return Path(rest).name or "v4l2", partial(read_stream, rest, "v4l2")
    if scheme in _NETWORK and rest.strip("/"):
        import_av()
        return _name_of(source), partial(read_stream, source, None, _NETWORK[scheme])
    raise UsageError(
        expected="a file, or rtsp://HOST/..., rtmp://HOST/..., v4l2:///dev/video0 or csi://0",
        found=f"an address that begins with {scheme}://",
        action="Save the picture or video and name its file, or take one of these.",
    )


def _name_of(address: str) -> str:
    """Host and path: neither user and password nor the query, which may be a key."""
    parts = urlsplit(address)
    return "/".join([parts.netloc.rpartition("@")[2], *filter(None, parts.path.split("/"))]) or parts.scheme


def find_files(source: str) -> list[Path]:
    """The files that a path, a pattern or a list names; of a folder the pictures, sorted.

    Raises:
        ImageError: there is none.
    """
    path = Path(source)
    try:
        if path.is_dir():
            found = sorted(item for item in path.iterdir() if item.suffix.lower() in SUFFIXES)
        elif glob.has_magic(source) and not path.exists():
            found = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
        elif path.suffix.lower() == ".txt":
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            found = [path.parent / line.strip() for line in lines if line.strip()]
        else:
            found = [path]
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it, a list that is no text
        raise ImageError(
            expected=f"pictures at {source[:200]}",
            found=getattr(error, "strerror", None) or "a name or a list that cannot be read",
            action="Check the path and its permissions.",
        ) from None
    if not found:
        raise ImageError(
            expected=f"pictures at {source}",
            found="none with a name that ends in " + ", ".join(SUFFIXES)
            if path.is_dir()
            else "no match or an empty list",
            action="Check the path or quote the pattern.",
        )
    return found
