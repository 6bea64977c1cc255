"""The verbs on video, live sources, lists and standard input, run as a user runs them, on the shipped shapes bundle."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from benchmarks.shapes.scenes import HELD_OUT_SEED, make_scene
from paliedge.cli import main
from paliedge.inputs import sources
from paliedge.inputs.live import FrameThunk
from paliedge.inputs.video import read_video
from paliedge.model import PaliGemma
from tests.inputs.test_video import write_video

SCENES = [Image.fromarray(make_scene(HELD_OUT_SEED + seed).image) for seed in range(5)]
LABELS = "red circle ; blue square ; green star"


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(item) for item in arguments], input=stdin)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five scenes at 4 frames a second."""
    path = tmp_path_factory.mktemp("video") / "scenes.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 112, 112, "yuv420p"
        stream.codec_context.bit_rate = 8_000_000
        for scene in SCENES:
            container.mux(stream.encode(av.VideoFrame.from_image(scene)))
        container.mux(stream.encode(None))
    return path


def rows_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_detect_on_a_video_answers_every_frame_and_saves_an_annotated_one(video: Path, tmp_path: Path) -> None:
    result = run("detect", video, LABELS, "--json", "--save", tmp_path)
    rows = rows_of(result)
    assert result.exit_code == 0
    assert [row["source"] for row in rows] == [f"{video}#{number}" for number in range(5)]
    assert [row["time_s"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert sum(len(row["detections"]) for row in rows) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["scenes.mp4"]
    assert f"saved {tmp_path / 'scenes.mp4'}" in result.stderr
    with av.open(str(tmp_path / "scenes.mp4")) as container:
        assert container.streams.video[0].average_rate == 4
    frames = list(read_video(tmp_path / "scenes.mp4"))
    assert len(frames) == 5
    for frame, scene, row in zip(frames, SCENES, rows, strict=True):
        plain = scene.resize(frame.image.size, Image.Resampling.LANCZOS)
        difference = np.abs(np.asarray(frame.image).astype(int) - np.asarray(plain)).max(axis=2)
        assert frame.image.size == (560, 560)
        assert ((difference > 100).mean() > 0.005) == bool(row["detections"])  # its boxes, and on no other frame


def test_every_second_frame_keeps_the_playing_time(video: Path, tmp_path: Path) -> None:
    result = run("caption", video, "--every", 2, "--save", tmp_path)
    assert [line.split(": ")[0] for line in result.stdout.splitlines()] == [f"{video}#{number}" for number in (0, 2, 4)]
    frames = list(read_video(tmp_path / "scenes.mp4"))
    assert [frame.time_s for frame in frames] == pytest.approx([0, 0.5, 1])


def test_saving_beside_the_video_spares_it(video: Path, tmp_path: Path) -> None:
    (tmp_path / "scenes.mp4").write_bytes(video.read_bytes())
    assert run("ocr", tmp_path / "scenes.mp4", "--every", 4, "--save", tmp_path).exit_code == 0
    assert (tmp_path / "scenes.mp4").read_bytes() == video.read_bytes()
    assert len(list(read_video(tmp_path / "scenes-2.mp4"))) == 2


def test_a_list_mixes_pictures_and_videos_and_each_is_saved_as_what_it_is(video: Path, tmp_path: Path) -> None:
    for number in range(2):
        SCENES[number].save(tmp_path / f"{number}.png")
    (tmp_path / "list.txt").write_text(f"0.png\n{video}\nabsent.png\n{video}\n1.png\n")
    result = run("detect", tmp_path / "list.txt", LABELS, "--every", 4, "--json", "--save", tmp_path / "out")
    rows = rows_of(result)
    assert result.exit_code == 6
    names = ["0.png", "scenes.mp4#0", "scenes.mp4#4", "absent.png", "scenes.mp4#0", "scenes.mp4#4", "1.png"]
    assert [Path(row["source"]).name for row in rows] == names
    assert ["error" in row for row in rows] == [name == "absent.png" for name in names]
    saved = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert saved == ["0.png", "1.png", "scenes-2.mp4", "scenes.mp4"]
    for name in ("scenes.mp4", "scenes-2.mp4"):
        assert len(list(read_video(tmp_path / "out" / name))) == 2


def test_a_video_that_breaks_off_gives_6_and_what_was_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mkv", 30)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = run("caption", path, "--every", 5, "--save", tmp_path / "out")
    assert result.exit_code == 6
    assert f"error: {path}: expected a whole video" in result.stderr
    assert len(result.stdout.splitlines()) == len(list(read_video(tmp_path / "out" / "v.mp4"))) > 1


def test_a_file_that_is_no_video_gives_5(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"no video")
    result = run("caption", tmp_path / "v.mp4", "--save", tmp_path / "out")
    assert result.exit_code == 5
    assert not (tmp_path / "out").exists()


def test_label_files_are_named_after_their_frames(video: Path, tmp_path: Path) -> None:
    assert run("detect", video, LABELS, "--every", 3, "--format", "yolo", "--save", tmp_path).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"classes.txt", "scenes-0.txt", "scenes-3.txt"}


def test_a_picture_comes_on_standard_input(tmp_path: Path) -> None:
    SCENES[0].save(tmp_path / "x.png")
    result = run("caption", "-", "--save", tmp_path / "out", stdin=(tmp_path / "x.png").read_bytes())
    assert result.exit_code == 0
    assert result.stdout.startswith("stdin: ")
    assert (tmp_path / "out" / "stdin.png").is_file()
    assert run("caption", "-", stdin=b"no picture").exit_code == 5
    assert run("caption", "-", stdin=b"").exit_code == 5


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live source that is much faster than the model, without end."""

    def read(*arguments: object) -> Generator[FrameThunk, None, None]:
        for number in range(10**6):
            yield partial(SCENES.__getitem__, number % 5)
            time.sleep(0.001)

    monkeypatch.setattr(sources, "read_stream", read)


@pytest.fixture
def interruptible() -> Generator[None, None, None]:
    """A job in a script's background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("camera", "interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_live_source_with_a_playable_video(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = PaliGemma._encode, []

    def interrupt_at_the_fourth(*arguments: Any, **options: Any) -> object:
        calls.append(arguments)
        if len(calls) == 4:
            signal.raise_signal(number)
        return encode(*arguments, **options)

    monkeypatch.setattr(PaliGemma, "_encode", interrupt_at_the_fourth)
    result = run("detect", "rtsp://me:secret@cam/door", LABELS, "--format", "json", "--save", tmp_path)
    assert result.exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [row["source"].split("#")[0] for row in json.loads(result.stdout)] == ["cam/door"] * 3
    assert "frames were dropped because newer ones came" in result.stderr
    assert "interrupted" in result.stderr
    assert "secret" not in result.output
    frames = list(read_video(tmp_path / "door.mp4"))
    assert len(frames) == 3
    assert 0 < frames[1].time_s < frames[2].time_s < 30
    assert "paliedge-reader" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(("options", "numbers"), [([], [0, 8]), (["--buffer", 3], [0, 6, 7, 8])])
def test_the_newest_frames_wait_for_the_model_as_many_as_the_buffer_holds(
    options: list[object], numbers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_asked, is_given = threading.Event(), threading.Event()
    encode = PaliGemma._encode

    def read(*arguments: object) -> Generator[FrameThunk, None, None]:
        for number in range(9):
            yield partial(SCENES.__getitem__, number % 5)
            assert is_asked.wait(20)
        is_given.set()

    def wait(*arguments: Any, **options: Any) -> object:
        is_asked.set()
        assert is_given.wait(20)
        return encode(*arguments, **options)

    monkeypatch.setattr(sources, "read_stream", read)
    monkeypatch.setattr(PaliGemma, "_encode", wait)
    result = run("caption", "rtsp://cam/door", "--reconnect", 0, "--json", *options)
    rows = rows_of(result)
    assert [row["source"] for row in rows if "error" not in row] == [f"cam/door#{number}" for number in numbers]
    assert f"{9 - len(numbers)} frames were dropped" in result.stderr


def test_a_live_source_that_is_not_there_ends_after_the_allowed_attempts(tmp_path: Path) -> None:
    result = run("caption", "/dev/video99", "--reconnect", 0, "--save", tmp_path)
    assert result.exit_code == 5
    assert "error: video99: expected a live source" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--every", 0], ["--buffer", 0], ["--reconnect", -1]])
def test_numbers_that_make_no_sense_are_refused(options: list[object], video: Path) -> None:
    assert run("caption", video, *options).exit_code == 2
