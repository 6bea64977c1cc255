"""What a SOURCE string means, and live sources: the newest frame, lost and found again, no thread left."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from paliedge.errors import ImageError, MissingExtraError, PaliEdgeError, UsageError
from paliedge.inputs import sources
from paliedge.inputs.camera import read_csi
from paliedge.inputs.live import FrameThunk, LiveFrames
from paliedge.inputs.sources import Item, Live, find_files, open_source
from paliedge.inputs.video import FrameOptions, lost
from tests.inputs.test_video import number_of, picture, write_video


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "paliedge-reader"]


def names(source: object) -> list[str]:
    return [item.name for item in open_source(str(source))]


def test_a_folder_gives_its_pictures_sorted_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", "notes.txt", "c.webp", "d.mp4"):
        (tmp_path / name).touch()
    assert [path.name for path in find_files(str(tmp_path))] == ["a.jpeg", "b.PNG", "c.webp"]
    assert open_source(str(tmp_path)).num_items == 3


def test_a_pattern_may_cross_folders(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "x.png").touch()
    assert [path.name for path in find_files(f"{tmp_path}/**/*.png")] == ["x.png"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "x[1].png").touch()
    assert find_files(str(tmp_path / "x[1].png")) == [tmp_path / "x[1].png"]


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="none with a name"):
        find_files(str(tmp_path))


def test_a_list_names_files_relative_to_itself_videos_too(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 2)
    (tmp_path / "list.txt").write_text("sub/b.png\r\n\n  a.png \nv.mp4\n/absent/c.png", encoding="utf-8-sig")
    videos = [f"{tmp_path}/v.mp4#0", f"{tmp_path}/v.mp4#1"]
    assert names(tmp_path / "list.txt") == [f"{tmp_path}/sub/b.png", f"{tmp_path}/a.png", *videos, "/absent/c.png"]


@pytest.mark.parametrize(
    ("content", "words"), [(b"\n \n", "empty list"), (b"\xff\xfe\x00", "cannot be read"), (None, "No such")]
)
def test_a_list_without_names_is_an_error(content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ImageError, match=words):
        open_source(str(tmp_path / "list.txt"))


@pytest.mark.parametrize(("content", "found"), [(b"\x89PNG", None), (b"", "nothing"), (b"x" * 9, "more than")])
def test_standard_input_is_one_picture(content: bytes, found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAX_STDIN", 8)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    (item,) = open_source("-")
    assert (item.name, item.stem) == ("stdin", "stdin")
    assert item.picture == (b"" if found else content)
    assert (item.error.found if item.error else None) == found or (found and found in str(item.error))


def test_a_video_gives_every_nth_frame_with_name_and_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 5)
    items = list(open_source(str(path), FrameOptions(every=2)))
    assert [item.name for item in items] == [f"{path}#0", f"{path}#2", f"{path}#4"]
    assert [item.time_s for item in items] == pytest.approx([0, 0.2, 0.4])
    assert {(item.video, item.stem) for item in items} == {(path, "v")}


def test_a_bad_video_costs_only_itself(tmp_path: Path) -> None:
    for name, num_frames in (("a.mp4", 2), ("c.mp4", 1)):
        write_video(tmp_path / name, num_frames)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    items = list(open_source(f"{tmp_path}/*.mp4"))
    assert [Path(item.name).name for item in items] == ["a.mp4#0", "a.mp4#1", "b.mp4", "c.mp4#0"]
    assert [isinstance(item.error, ImageError) for item in items] == [False, False, True, False]


@pytest.mark.parametrize("source", ["v.mp4", "rtsp://host/x", "/dev/video0"])
def test_a_missing_package_is_told_before_anything_is_read(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"paliedge\[video\]"):
        open_source(source)


@pytest.mark.parametrize(
    "source", ["http://host/x.jpg", "csi://front", "csi://", "v4l2://video0", "rtsp://", "file:///x"]
)
def test_addresses_that_are_not_known_say_which_are(source: str) -> None:
    with pytest.raises(UsageError, match="csi://0"):
        open_source(source)


@pytest.mark.parametrize(
    ("source", "name", "address", "form"),
    [
        ("rtsp://user:secret@cam:554/live/main?key=secret", "cam:554/live/main#0", None, None),
        ("RTMP://10.0.0.2", "10.0.0.2#0", None, None),
        ("/dev/video2", "video2#0", "/dev/video2", "v4l2"),
        ("v4l2:///dev/v4l/by-id/cam", "cam#0", "/dev/v4l/by-id/cam", "v4l2"),
    ],
)
def test_live_sources_are_named_without_secrets(
    source: str, name: str, address: str | None, form: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []

    def read(*arguments: object) -> Generator[FrameThunk, None, None]:
        opened.extend(arguments)
        yield partial(picture, 3)

    monkeypatch.setattr(sources, "read_stream", read)
    items = list(open_source(source, FrameOptions(reconnect=0)))
    assert [item.name for item in items] == [name, name.removesuffix("#0")]
    assert isinstance(items[0].picture, Image.Image)
    assert items[1].error is not None
    assert "secret" not in str(items)
    assert opened[:2] == [address or source, form]


def test_the_stem_of_a_live_source_keeps_its_dots() -> None:
    assert Item("10.0.0.2#1", video=Path("10.0.0.2")).stem == "10.0.0.2"


class FakeSource:
    """A live source: each connection does what its script says, the last one again and again."""

    def __init__(self, *scripts: Callable[[], Iterator[FrameThunk]]) -> None:
        self.scripts = scripts
        self.num_connections = 0
        self.num_closed = 0

    def __call__(self) -> Generator[FrameThunk, None, None]:
        script = self.scripts[min(self.num_connections, len(self.scripts) - 1)]
        self.num_connections += 1
        try:
            yield from script()
        finally:
            self.num_closed += 1


def fail() -> Iterator[FrameThunk]:
    raise lost("connection refused")
    yield


def frames_of(*numbers: int) -> Callable[[], Iterator[FrameThunk]]:
    return lambda: (partial(picture, number) for number in numbers)


def endless() -> Iterator[FrameThunk]:
    number = 0
    while True:
        yield partial(picture, number % 30)
        number += 1
        time.sleep(0.002)


def live(source: FakeSource, watchdog_s: float = 5, **options: Any) -> tuple[LiveFrames, list[str], list[float]]:
    lines: list[str] = []
    waits: list[float] = []
    frames = LiveFrames(source, FrameOptions(**options), lines.append, watchdog_s=watchdog_s, sleep=waits.append)
    return frames, lines, waits


def test_a_slow_taker_gets_the_newest_frame_others_are_counted() -> None:
    frames, _, _ = live(source := FakeSource(endless))
    iterator = iter(frames)
    numbers = []
    for _ in range(4):
        time.sleep(0.1)
        num_seen = frames._shelf._num_seen
        frame = next(iterator)
        assert frame.number >= num_seen - 1
        assert number_of(frame.image) == frame.number % 30
        numbers.append(frame.number)
    iterator.close()
    assert [later - sooner > 5 for sooner, later in pairwise(numbers)] == [True] * 3
    assert frames.num_dropped >= numbers[-1] - 3
    assert source.num_closed == 1


def test_a_longer_buffer_keeps_the_newest_few_in_order() -> None:
    is_taken, is_given = threading.Event(), threading.Event()

    def burst() -> Iterator[FrameThunk]:
        yield partial(picture, 0)
        is_taken.wait(5)
        for number in range(1, 11):
            yield partial(picture, number)
        is_given.set()
        while True:
            time.sleep(0.002)
            yield None

    frames, _, _ = live(FakeSource(burst), buffer=3, every=2)
    iterator = iter(frames)
    assert next(iterator).number == 0
    is_taken.set()
    assert is_given.wait(5)
    assert [number_of(next(iterator).image) for _ in range(3)] == [6, 8, 10]
    iterator.close()
    assert frames.num_dropped == 2


def test_a_lost_source_is_reached_again_and_the_wait_grows() -> None:
    frames, lines, waits = live(source := FakeSource(fail, fail, frames_of(7), fail), buffer=5, reconnect=6)
    got: list[int] = []
    with pytest.raises(ImageError, match="connection refused"):
        got.extend(number_of(frame.image) for frame in frames)
    assert got == [7]
    assert waits == [1, 2, 1, 2, 4, 8, 16, 30]
    assert source.num_connections == source.num_closed == 2 + 1 + 6
    assert lines[0] == "source lost: connection refused; connecting again in 1 s"
    assert "the end of the stream" in lines[2]


def test_without_a_limit_there_is_always_another_attempt() -> None:
    frames, _, waits = live(FakeSource(*[fail] * 50, frames_of(1)))
    assert number_of(next(iter(frames)).image) == 1
    assert len(waits) == 50


def test_numbers_and_times_go_on_after_a_loss() -> None:
    frames, _, _ = live(FakeSource(frames_of(1, 2), frames_of(3, 4), fail), buffer=9, reconnect=0)
    taken = list(Live(Path("cam"), frames))
    assert [item.name for item in taken] == ["cam#0", "cam#1", "cam"]
    frames, _, _ = live(FakeSource(frames_of(1, 2), frames_of(3, 4), fail), buffer=9, reconnect=1)
    taken = list(Live(Path("cam"), frames))
    assert [item.number for item in taken[:4]] == [0, 1, 2, 3]
    assert [item.time_s for item in taken[:4]] == sorted(item.time_s for item in taken[:4])
    assert taken[0].time_s == 0


def test_a_source_that_gives_no_frame_is_lost() -> None:
    hang = threading.Event()

    def stall() -> Iterator[FrameThunk]:
        hang.wait(5)
        yield partial(picture, 9)

    frames, lines, _ = live(FakeSource(stall, frames_of(4)), watchdog_s=0.05)
    iterator = iter(frames)
    releaser = threading.Timer(0.3, hang.set)
    releaser.start()
    frame = next(iterator)
    iterator.close()
    releaser.join()
    assert number_of(frame.image) == 4
    assert "no frame for" in lines[0]


def test_what_no_reconnect_can_mend_ends_it_at_once() -> None:
    def missing() -> Iterator[FrameThunk]:
        raise MissingExtraError(expected="a", found="b", action="c")
        yield

    frames, lines, _ = live(FakeSource(missing))
    with pytest.raises(MissingExtraError):
        next(iter(frames))
    assert not lines


def test_an_unforeseen_error_of_the_reader_hangs_no_taker() -> None:
    def broken() -> Iterator[FrameThunk]:
        raise ZeroDivisionError
        yield

    frames, _, _ = live(FakeSource(broken), reconnect=0)
    with pytest.raises(PaliEdgeError, match="ZeroDivisionError"):
        next(iter(frames))


def test_an_iterator_that_is_dropped_stops_its_reader() -> None:
    source = FakeSource(endless)
    iterator = iter(Live(Path("cam"), live(source)[0]))
    next(iterator)
    assert [thread.name for thread in threading.enumerate()].count("paliedge-reader") == 1
    del iterator
    assert source.num_closed == 1


class FakeGst(ModuleType):
    """As much of GStreamer as a camera of 2 x 1 pixels needs; `samples` None is a pull without a frame."""

    State = SimpleNamespace(PLAYING="playing", NULL="null")
    MapFlags = SimpleNamespace(READ=1)
    MessageType = SimpleNamespace(ERROR=2)

    def __init__(self, samples: list[bytes | None], error: str | None = None) -> None:
        super().__init__("gi.repository.Gst")
        self.samples = samples
        self.error = error
        self.states: list[str] = []
        self.description = ""

    def init(self, arguments: object) -> None:
        assert arguments is None

    def parse_launch(self, description: str) -> FakeGst:
        self.description = description
        return self

    def set_state(self, state: str) -> None:
        self.states.append(state)

    def get_by_name(self, name: str) -> FakeGst:
        assert f"name={name}" in self.description
        return self

    def get_bus(self) -> FakeGst:
        return self

    def emit(self, name: str, wait_ns: int) -> Any:
        assert (name, wait_ns > 0) == ("try-pull-sample", True)
        if not self.samples or (content := self.samples.pop(0)) is None:
            return None
        size = {"width": 2, "height": 1}
        mapped = SimpleNamespace(data=memoryview(content))
        buffer = SimpleNamespace(map=lambda flags: (True, mapped), unmap=lambda info: None)
        caps = SimpleNamespace(get_structure=lambda index: SimpleNamespace(get_value=size.__getitem__))
        return SimpleNamespace(get_caps=lambda: caps, get_buffer=lambda: buffer)

    def pop_filtered(self, kind: int) -> Any:
        failed = self.error and not self.samples
        return SimpleNamespace(parse_error=lambda: (self.error, "details")) if failed else None

    def get_property(self, name: str) -> bool:
        assert name == "eos"
        return not self.samples


def install(gst: FakeGst, monkeypatch: pytest.MonkeyPatch) -> None:
    gi = ModuleType("gi")
    monkeypatch.setattr(gi, "require_version", lambda name, version: None, raising=False)
    for name, module in {"gi": gi, "gi.repository": ModuleType("gi.repository"), "gi.repository.Gst": gst}.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_a_csi_camera_gives_rgb_and_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    gst = FakeGst([None, bytes([1, 2, 3, 255, 4, 5, 6, 255])])
    install(gst, monkeypatch)
    first, *rest = open_source("csi://1", FrameOptions(reconnect=0))
    assert first.name == "csi1#0"
    assert isinstance(first.picture, Image.Image)
    assert first.picture.tobytes() == bytes([1, 2, 3, 4, 5, 6])
    assert [item.error is None for item in rest] == [False]
    assert "sensor-id=1 " in gst.description
    assert gst.states == ["playing", "null"]


def test_a_camera_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    gst = FakeGst([], "no cameras available")
    install(gst, monkeypatch)
    with pytest.raises(ImageError, match="no cameras available"):
        list(read_csi(0))
    assert gst.states == ["playing", "null"]


def test_without_gstreamer_the_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gi", None)
    with pytest.raises(MissingExtraError, match="python3-gi"):
        open_source("csi://0")
