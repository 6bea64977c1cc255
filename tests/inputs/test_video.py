"""Video files in and out through PyAV: every frame, in order, at its time; damage is told, not hidden."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from paliedge.errors import ImageError, MissingExtraError, OutputError
from paliedge.inputs.video import _decode, _image_from_frame, import_av, read_stream, read_video
from paliedge.results.video_writer import VideoWriter

RATE = 10


def picture(number: int, size_wh: tuple[int, int] = (64, 48)) -> Image.Image:
    """A grey picture whose brightness is its number."""
    return Image.new("RGB", size_wh, (8 * number,) * 3)


def number_of(image: Image.Image) -> int:
    return round(float(np.asarray(image).mean()) / 8)


def write_video(path: Path, num_frames: int, rate: Fraction | int = RATE, codec: str = "mpeg4") -> Path:
    """A video of numbered pictures, by PyAV alone; every frame can be read without the others."""
    with av.open(str(path), "w", options={"movflags": "+faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 1
        for number in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(number))))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".mov", ".webm"])
def test_every_frame_comes_in_order_with_its_time(suffix: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"v{suffix}", 12, codec="libvpx" if suffix == ".webm" else "mpeg4")
    frames = list(read_video(path))
    assert [frame.number for frame in frames] == list(range(12))
    assert [number_of(frame.image) for frame in frames] == list(range(12))
    assert [frame.time_s for frame in frames] == pytest.approx([number / RATE for number in range(12)], abs=0.002)
    assert frames[0].image.mode == "RGB"
    assert frames[0].image.size == (64, 48)


def test_every_nth_frame_keeps_its_own_number(tmp_path: Path) -> None:
    frames = list(read_video(write_video(tmp_path / "v.mp4", 12), every=5))
    assert [(frame.number, number_of(frame.image)) for frame in frames] == [(0, 0), (5, 5), (10, 10)]
    assert [frame.time_s for frame in frames] == pytest.approx([0, 0.5, 1])


def test_a_name_with_a_colon_is_a_file_and_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "v.mp4", 2).rename(tmp_path / "http:v.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(list(read_video(Path("http:v.mp4")))) == 2


def test_a_playlist_that_calls_itself_a_video_is_not_followed(tmp_path: Path) -> None:
    write_video(tmp_path / "real.mp4", 2)
    (tmp_path / "v.mp4").write_text("ffconcat version 1.0\nfile real.mp4\n")
    with pytest.raises(ImageError, match="something else"):
        list(read_video(tmp_path / "v.mp4"))


def numbers_until_error(path: Path, words: str) -> list[int]:
    numbers: list[int] = []
    with pytest.raises(ImageError, match=words):
        numbers.extend(number_of(frame.image) for frame in read_video(path))
    return numbers


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_video_cut_off_gives_what_was_read_and_an_error(suffix: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"v{suffix}", 30)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    numbers = numbers_until_error(path, "whole video")
    assert 3 < len(numbers) < 25  # how many of a broken file FFmpeg's versions give differs
    assert numbers == list(range(len(numbers)))


def test_damage_in_the_middle_costs_its_own_frames_only(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 20, codec="libx264")
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        position, size = packets[9].pos, packets[9].size
    assert position is not None
    content = bytearray(path.read_bytes())
    content[position : position + size] = b"\xff" * size
    path.write_bytes(content)
    assert numbers_until_error(path, "damaged") == [*range(9), *range(10, 20)]


def test_a_failed_connection_costs_no_frame_in_the_decoder() -> None:
    def demux(stream: object) -> Iterator[object]:
        yield SimpleNamespace(decode=lambda: ["first"])
        raise av.FFmpegError(5, "Input/output error")

    stream = SimpleNamespace(codec_context=SimpleNamespace(decode=lambda packet: ["second"]))
    problems: list[str] = []
    assert list(_decode(av, SimpleNamespace(demux=demux), stream, problems)) == ["first", "second"]
    assert problems == ["Input/output error"]


@pytest.mark.parametrize("content", [b"", b"no video", None])
def test_what_is_no_video_is_an_error(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(ImageError, match="no such file" if content is None else "something else"):
        list(read_video(tmp_path / "v.mp4"))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ImageError, match="sound"):
        list(read_video(tmp_path / "v.mp4"))


class Frame:
    """What PyAV gives for a telephone's video, and for one that is too large."""

    def __init__(self, size_wh: tuple[int, int], rotation: int) -> None:
        self.width, self.height = size_wh
        self.rotation = rotation

    def to_image(self) -> Image.Image:
        image = Image.new("RGB", (self.width, self.height))
        image.putpixel((0, 0), (255, 255, 255))
        return image


@pytest.mark.parametrize(
    ("rotation", "corner"), [(0, (0, 0)), (90, (0, 3)), (-90, (1, 0)), (180, (3, 1)), (-180, (3, 1))]
)
def test_frames_are_turned_upright(rotation: int, corner: tuple[int, int]) -> None:
    image = _image_from_frame(Frame((4, 2), rotation))
    assert image.size == ((4, 2) if rotation % 180 == 0 else (2, 4))
    assert image.getpixel(corner) == (255, 255, 255)


def test_a_frame_too_large_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageError, match="megapixels"):
        _image_from_frame(Frame((8000, 5000), 0))


def test_a_stream_gives_frames_and_its_error_keeps_the_password(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mkv", 4)
    assert [number_of(shot()) for shot in read_stream(str(path))] == [0, 1, 2, 3]
    with pytest.raises(ImageError, match="live source") as caught:
        list(read_stream("rtmp://user:secret@127.0.0.1:9/live"))
    assert "secret" not in str(caught.value)


def serve_rtsp(listener: socket.socket, transport_stream: bytes) -> None:
    """An RTSP server for one client: the video in RTP packets, interleaved with the answers on one TCP connection."""
    session = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"
    connection, _ = listener.accept()
    with connection, connection.makefile("rwb") as stream:
        request = ""
        while line := stream.readline().decode():
            request += line
            if line != "\r\n":
                continue
            method, number = request.split()[0], request.split("CSeq: ")[1].split()[0]
            request = ""
            head = f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\nSession: 1\r\n"
            if method == "DESCRIBE":
                head += f"Content-Type: application/sdp\r\nContent-Length: {len(session)}\r\n\r\n{session}"
            elif method == "SETUP":
                head += "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n\r\n"
            else:
                head += "Public: DESCRIBE, SETUP, PLAY, TEARDOWN\r\n\r\n"
            stream.write(head.encode())
            if method == "PLAY":
                size = 7 * 188
                for place, start in enumerate(range(0, len(transport_stream), size)):
                    packet = struct.pack(">BBHII", 0x80, 33, place, place * 900, 1) + transport_stream[start:][:size]
                    stream.write(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
                stream.flush()
                return
            stream.flush()


def test_an_rtsp_stream_is_read_over_tcp(tmp_path: Path) -> None:
    content = write_video(tmp_path / "v.ts", 12, rate=25, codec="mpeg2video").read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve_rtsp, args=(listener, content), daemon=True)
        server.start()
        address = f"rtsp://127.0.0.1:{listener.getsockname()[1]}/x"
        numbers = []
        for shot in read_stream(address, None, {"rtsp_transport": "tcp"}):
            assert shot is not None
            numbers.append(number_of(shot()))
        server.join(5)
    assert numbers == list(range(11))  # the twelfth's end is never marked


def test_without_pyav_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r'pip install "paliedge\[video\]"'):
        import_av()


def written(path: Path, pictures: Sequence[Image.Image], times_s: Sequence[float]) -> None:
    writer = VideoWriter(path)
    for image, time_s in zip(pictures, times_s, strict=True):
        writer.add(image, time_s)
    writer.close()


@pytest.mark.parametrize("encoders", [("libx264", "mpeg4"), ("none", "mpeg4")])
@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001)])
def test_a_written_video_has_the_rate_of_its_times(
    encoders: tuple[str, ...], rate: Fraction | int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paliedge.results.video_writer._ENCODERS", encoders)
    written(tmp_path / "new" / "v.mp4", [picture(number) for number in range(12)], [7 + n / rate for n in range(12)])
    with av.open(str(tmp_path / "new" / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == {"libx264": "h264"}.get(encoders[0], "mpeg4")
        assert stream.average_rate == rate
        assert stream.frames == 12
    frames = list(read_video(tmp_path / "new" / "v.mp4"))
    assert [number_of(frame.image) for frame in frames] == list(range(12))
    assert [frame.time_s for frame in frames] == pytest.approx([float(n / rate) for n in range(12)], abs=1e-4)


def test_a_written_video_keeps_uneven_times_and_never_goes_back(tmp_path: Path) -> None:
    written(tmp_path / "v.mp4", [picture(number) for number in range(4)], [0, 0.1, 0.1, 2])
    assert [frame.time_s for frame in read_video(tmp_path / "v.mp4")] == pytest.approx([0, 0.1, 0.1, 2], abs=1e-3)


def test_pictures_of_other_sizes_are_fitted_into_the_first_ones(tmp_path: Path) -> None:
    sizes = [(65, 47), (130, 94), (20, 20)]
    written(tmp_path / "v.mp4", [Image.new("RGB", size, "red") for size in sizes], [0, 1, 2])
    images = [np.asarray(frame.image) for frame in read_video(tmp_path / "v.mp4")]
    assert [image.shape for image in images] == [(48, 66, 3)] * 3
    is_red = [np.asarray(image[..., 1] < 128).mean() * 66 * 48 for image in images]
    assert is_red == pytest.approx([65 * 47, 65 * 47, 400], rel=0.1)


def test_a_writer_without_frames_leaves_no_file(tmp_path: Path) -> None:
    VideoWriter(tmp_path / "v.mp4").close()
    assert not list(tmp_path.iterdir())


def test_where_no_video_can_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "v.mp4").mkdir()
    with pytest.raises(OutputError, match="permission to write"):
        VideoWriter(tmp_path / "file" / "v.mp4")
    writer = VideoWriter(tmp_path / "v.mp4")
    with pytest.raises(OutputError, match="permission to write"):
        writer.add(picture(0), 0)
