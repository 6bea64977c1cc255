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
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from paliedge.errors import ImageError, PaliEdgeError, UsageError
from paliedge.inputs.camera import import_gst, read_csi
from paliedge.inputs.images import SUFFIXES
from paliedge.inputs.live import FrameSource, LiveFrames
from paliedge.inputs.video import FrameOptions, VideoFrame, import_av, read_stream, read_video

VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm")
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
        video: the video file or live source that it is a frame of, by its name.
        number: of a video's frame, see `VideoFrame`.
        time_s: of a video's frame, seconds since the first.
    """

    name: str
    picture: Path | bytes | Image.Image = b""
    error: PaliEdgeError | None = None
    video: Path | None = None
    number: int = 0
    time_s: float = 0.0

    @property
    def stem(self) -> str:
        """What a file made from it is called, its video's name where it is a frame; without an ending."""
        path = self.video or Path(self.name)
        return path.stem if self.video is None or _is_video(path) else path.name


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


def _items_from_frames(video: Path, frames: Generator[VideoFrame, None, None]) -> Generator[Item, None, None]:
    try:
        with closing(frames):
            for frame in frames:
                yield Item(f"{video}#{frame.number}", frame.image, None, video, frame.number, frame.time_s)
    except ImageError as error:
        yield Item(str(video), error=error, video=video)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


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


def _live_feed(scheme: str, source: str, rest: str) -> tuple[str, FrameSource]:
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
        ) from error
    if not found:
        raise ImageError(
            expected=f"pictures at {source}",
            found="none with a name that ends in " + ", ".join(SUFFIXES)
            if path.is_dir()
            else "no match or an empty list",
            action="Check the path or quote the pattern.",
        )
    return found
