"""The image border: everything that may come in, and everything that must not get through."""

from __future__ import annotations

import io
import os
import random
import struct
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFile

from paliedge.errors import ImageError
from paliedge.inputs.images import load_image

pytestmark = pytest.mark.bare

Bytes = npt.NDArray[np.uint8]

LEAKS = ("0x", "PIL.", "BytesIO", "Error", "Traceback", "struct", "object", "<", "None")
"""What a message of Pillow's, or the repr of an object, would bring along."""


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def quadrants(width: int = 48, height: int = 32) -> Bytes:
    """Four flat quadrants on JPEG's block borders; no two of the eight orientations look alike."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[: height // 2, : width // 3] = (230, 20, 20)
    picture[: height // 2, width // 3 :] = (20, 200, 20)
    picture[height // 2 :, : width // 3] = (20, 20, 220)
    picture[height // 2 :, width // 3 :] = (240, 240, 240)
    return picture


def file_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(image: Image.Image) -> Bytes:
    assert image.mode == "RGB"
    return np.asarray(image)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(width: int, height: int) -> bytes:
    """A few bytes of a PNG that claims to be large."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(100_000))) + png_chunk(b"IEND", b"")


def assert_refused(source: Any, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    error = caught.value
    assert error.exit_code == 5
    assert error.__cause__ is error.__context__, "what a decoder raised is kept"
    assert [leak for leak in LEAKS if leak in str(error)] == []
    return error


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(image: ImageFile.ImageFile) -> None:
        pytest.fail("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)


def test_path_text_bytes_pil_and_array_give_the_same_picture(tmp_path: Path) -> None:
    array = noise(7, 5)
    image = Image.fromarray(array)
    path = tmp_path / "picture.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), image, array):
        assert np.array_equal(pixels(load_image(source)), array)


def test_the_name_of_a_file_says_nothing_about_its_format(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(file_bytes(Image.fromarray(noise(7, 5)), "PNG"))
    assert np.array_equal(pixels(load_image(path)), noise(7, 5))


def test_the_given_pil_image_and_array_stay_as_they_were() -> None:
    array = noise(7, 5)
    image = Image.fromarray(array)
    for source in (image, array):
        load_image(source).paste((0, 0, 0), (0, 0, 7, 5))
    assert np.array_equal(array, noise(7, 5))
    assert np.array_equal(np.asarray(image), noise(7, 5))


def test_a_folder_and_an_address_are_called_by_their_names(tmp_path: Path) -> None:
    assert assert_refused(tmp_path).found == "a folder"
    assert assert_refused(tmp_path / "missing.png").found == "none"
    error = assert_refused("https://me:secret@example.com/x.png")
    assert error.found == "an address"
    assert "secret" not in str(error)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_the_four_formats_are_read(kind: str) -> None:
    picture = pixels(load_image(file_bytes(Image.fromarray(quadrants()), kind, lossless=True)))
    assert np.abs(picture.astype(int) - quadrants()).mean() < 3


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "ICO", "JPEG2000"])
def test_other_formats_are_refused(kind: str) -> None:
    error = assert_refused(file_bytes(Image.fromarray(quadrants()), kind))
    assert error.expected == "a JPEG, PNG, WEBP or BMP image"


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"plain text", b"%PDF-1.7\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_bytes_that_are_no_image_are_refused(content: bytes) -> None:
    assert_refused(content)


def test_bgr_swaps_the_channels_of_an_array_and_keeps_its_alpha() -> None:
    array = noise(6, 4)
    assert np.array_equal(pixels(load_image(array, bgr=True)), array[..., ::-1])
    with_alpha = np.concatenate([array, np.full((4, 6, 1), 255, np.uint8)], axis=-1)
    with_alpha[0, 0, 3] = 0
    picture = pixels(load_image(with_alpha, bgr=True))
    assert tuple(picture[0, 0]) == (255, 255, 255)
    assert np.array_equal(picture[1:], array[1:, :, ::-1])


def test_bgr_with_anything_but_an_array_is_refused(tmp_path: Path) -> None:
    image = Image.fromarray(noise(6, 4))
    for source in (image, file_bytes(image, "PNG"), tmp_path / "picture.png"):
        assert "numpy array" in assert_refused(source, bgr=True).expected


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.zeros((4, 4, 3), np.float32), id="float32"),
        pytest.param(np.zeros((4, 4, 3), np.uint16), id="uint16"),
        pytest.param(np.zeros((4, 4, 3), bool), id="bool"),
        pytest.param(np.zeros((3, 4, 5), np.uint8), id="channels-first"),
        pytest.param(np.zeros((1, 4, 4, 3), np.uint8), id="batch"),
        pytest.param(np.zeros((4, 4, 2), np.uint8), id="two-channels"),
        pytest.param(np.zeros(4, np.uint8), id="one-dimension"),
        pytest.param(np.zeros((), np.uint8), id="scalar"),
        pytest.param(np.zeros((0, 4, 3), np.uint8), id="no-rows"),
        pytest.param(np.zeros((4, 0), np.uint8), id="no-columns"),
    ],
)
def test_arrays_of_another_type_or_shape_are_refused(array: npt.NDArray[Any]) -> None:
    assert str(array.dtype) in assert_refused(array).found


def test_grey_arrays_and_views_that_are_not_contiguous_are_read() -> None:
    grey = noise(6, 4, 1)
    for array in (grey, grey[..., 0]):
        assert np.array_equal(pixels(load_image(array)), np.repeat(grey, 3, axis=-1))
    assert np.array_equal(pixels(load_image(noise(6, 4)[::-1, ::2])), noise(6, 4)[::-1, ::2])


# By the EXIF standard: the side of the upright picture at which the stored row 0 and column 0 lie.
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored_from_upright(upright: Bytes, orientation: int) -> Image.Image:
    sides = ORIENTATIONS[orientation]
    if "bottom" in sides:
        upright = upright[::-1]
    if "right" in sides:
        upright = upright[:, ::-1]
    if sides[0] in ("left", "right"):
        upright = upright.transpose(1, 0, 2)
    return Image.fromarray(np.ascontiguousarray(upright))


def exif_with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_stand_upright_whatever_their_exif_orientation(orientation: int, kind: str) -> None:
    stored = stored_from_upright(quadrants(), orientation)
    picture = pixels(
        load_image(file_bytes(stored, kind, exif=exif_with_orientation(orientation), quality=95, lossless=True))
    )
    assert picture.shape == quadrants().shape
    assert np.abs(picture.astype(int) - quadrants()).mean() < 3


def test_a_picture_is_not_turned_again_when_it_is_loaded_again() -> None:
    content = file_bytes(stored_from_upright(quadrants(), 6), "PNG", exif=exif_with_orientation(6))
    opened = load_image(Image.open(io.BytesIO(content)))
    assert np.array_equal(pixels(load_image(opened)), quadrants())


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_are_passed_over(orientation: int) -> None:
    content = file_bytes(Image.fromarray(quadrants()), "PNG", exif=exif_with_orientation(orientation))
    assert np.array_equal(pixels(load_image(content)), quadrants())


@pytest.mark.parametrize(
    "odd_entry",
    [
        pytest.param(struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0"), id="text-for-a-resolution"),
        pytest.param(struct.pack("<HHIi", 0x0100, 9, 1, -5), id="negative-width"),
        pytest.param(struct.pack("<HHII", 0x8769, 4, 1, 0xFFFFFFF0), id="folder-behind-the-end"),
        pytest.param(struct.pack("<HHII", 0x9C9B, 99, 1, 0), id="unknown-type"),
    ],
)
def test_odd_metadata_costs_neither_the_picture_nor_its_orientation(odd_entry: bytes) -> None:
    entries = [odd_entry, struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)]
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    content = file_bytes(stored_from_upright(quadrants(), 6), "PNG", exif=exif)
    assert np.array_equal(pixels(load_image(content)), quadrants())


def on_white(colour: npt.NDArray[Any], alpha: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    share = alpha[..., None] / 255
    composited: npt.NDArray[np.float64] = colour * share + 255 * (1 - share)
    return composited


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "PIL", "array"])
def test_rgba_is_composited_on_white(kind: str) -> None:
    array = noise(16, 16, 4)
    array[0, :, 3] = 0
    array[1, :, 3] = 255
    image = Image.fromarray(array)
    source: Any = image if kind == "PIL" else array
    if kind in ("PNG", "WEBP"):
        source = file_bytes(image, kind, lossless=True, exact=True)
    assert np.abs(pixels(load_image(source)) - on_white(array[..., :3], array[..., 3])).max() <= 1


def test_grey_with_alpha_is_composited_on_white() -> None:
    array = noise(16, 16, 2)
    picture = pixels(load_image(file_bytes(Image.fromarray(array, "LA"), "PNG")))
    assert np.abs(picture - on_white(np.repeat(array[..., :1], 3, axis=-1), array[..., 1])).max() <= 1


def test_transparent_palette_entries_are_composited_on_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    picture = pixels(load_image(file_bytes(image, "PNG", transparency=bytes([0, 128, 255]))))
    expected = on_white(np.array([[10, 20, 30], [200, 100, 0], [0, 0, 255]]), np.array([0, 128, 255]))
    assert np.abs(picture[0] - expected).max() <= 1


def test_an_opaque_palette_gives_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([1, 0])
    assert pixels(load_image(file_bytes(image, "PNG"))).tolist() == [[[200, 100, 0], [10, 20, 30]]]


@pytest.mark.parametrize(
    ("image", "transparency"),
    [
        pytest.param(Image.fromarray(np.array([[[9, 8, 7], [9, 8, 6]]], np.uint8)), (9, 8, 7), id="rgb"),
        pytest.param(Image.fromarray(np.array([[7, 6]], np.uint8)), 7, id="grey"),
        pytest.param(Image.fromarray(np.array([[7 << 8, 6 << 8]], np.uint16)), 7 << 8, id="16-bit-grey"),
    ],
)
def test_the_colour_that_a_png_calls_transparent_becomes_white(image: Image.Image, transparency: Any) -> None:
    picture = pixels(load_image(file_bytes(image, "PNG", transparency=transparency)))
    assert picture[0, 0].tolist() == [255, 255, 255]
    assert picture[0, 1, 2] == 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_grey_files_give_three_equal_channels(kind: str) -> None:
    grey = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 8, axis=0)
    picture = pixels(load_image(file_bytes(Image.fromarray(grey), kind, quality=100)))
    assert np.abs(picture.astype(int) - grey[..., None]).max() <= 2
    assert np.array_equal(picture[..., 0], picture[..., 2])


def test_black_and_white_files_are_read() -> None:
    picture = pixels(load_image(file_bytes(Image.fromarray(np.array([[True, False]])), "PNG")))
    assert picture.tolist() == [[[255] * 3, [0] * 3]]


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    picture = pixels(load_image(file_bytes(Image.fromarray(values), "PNG")))
    assert np.array_equal(picture, np.repeat((values >> 8)[..., None], 3, axis=-1))


def test_cmyk_jpeg_gives_the_printed_colours() -> None:
    image = Image.new("CMYK", (32, 16), (255, 0, 0, 0))
    image.paste((0, 0, 255, 0), (0, 0, 16, 16))
    picture = pixels(load_image(file_bytes(image, "JPEG", quality=95))).astype(int)
    assert np.abs(picture[8, 4] - (255, 255, 0)).max() < 12
    assert np.abs(picture[8, 28] - (0, 255, 255)).max() < 12


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize(
    "size_wh",
    [(8000, 4001), (32_000_001, 1), (1, 32_000_001), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)],
)
def test_more_than_32_megapixels_are_refused_on_the_header(size_wh: tuple[int, int]) -> None:
    error = assert_refused(png_bomb(*size_wh))
    assert error.expected == "an image of at most 32 megapixels"


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP"])
def test_whole_files_over_32_megapixels_are_refused_before_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("L", (8000, 4001))
    content = file_bytes(image, kind, lossless=True, quality=0, method=0)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    assert "8000 x 4001" in assert_refused(content).found


def test_pil_images_and_arrays_over_32_megapixels_are_refused() -> None:
    assert "8000 x 4001" in assert_refused(Image.new("1", (8000, 4001))).found
    assert "8000 x 4001" in assert_refused(np.broadcast_to(np.uint8(0), (4001, 8000, 3))).found


def test_exactly_32_megapixels_are_read() -> None:
    assert load_image(Image.new("1", (8000, 4000))).size == (8000, 4000)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_files_are_refused(kind: str, share: float, tmp_path: Path) -> None:
    content = file_bytes(Image.fromarray(noise(64, 64)), kind)
    path = tmp_path / "cut"
    path.write_bytes(content[: int(len(content) * share)])
    assert str(path) in assert_refused(path).found


def test_an_empty_pil_image_is_refused() -> None:
    assert_refused(Image.new("RGB", (0, 4)))


@pytest.mark.parametrize("name", ["missing.png", "", ".", "na\0me.png", "lone\udcffsurrogate.png", "x" * 300])
def test_paths_without_a_readable_file_are_refused(name: str, tmp_path: Path) -> None:
    for source in (tmp_path / name, f"{tmp_path}{os.sep}{name}"):
        assert assert_refused(source).expected.startswith("a readable image file at")


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    content = bytearray(rng.choice(seeds))
    way = rng.randrange(5)
    if way == 0:
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif way == 1:
        del content[rng.randrange(len(content)) :]
    elif way == 2:
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(min(64, len(content)))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif way == 3:
        other = rng.choice(seeds)
        content[rng.randrange(len(content)) :] = other[rng.randrange(len(other)) :]
    else:
        start = rng.randrange(len(content))
        content[start : start + rng.randint(1, 32)] = rng.randbytes(rng.randint(0, 32))
    return bytes(content)


def test_3000_damaged_files_give_a_picture_or_an_image_error_in_time() -> None:
    picture = Image.fromarray(noise(24, 16))
    exif = exif_with_orientation(6)
    seeds = [
        file_bytes(picture, "JPEG", exif=exif),
        file_bytes(picture, "JPEG", progressive=True),
        file_bytes(picture.convert("CMYK"), "JPEG"),
        file_bytes(picture, "PNG", exif=exif),
        file_bytes(picture.quantize(16), "PNG", transparency=bytes(8)),
        file_bytes(Image.fromarray(noise(24, 16, 2).view(np.uint16)[..., 0]), "PNG", transparency=7),
        file_bytes(picture, "WEBP", exif=exif),
        file_bytes(Image.fromarray(noise(24, 16, 4)), "WEBP", lossless=True),
        file_bytes(picture, "BMP"),
        file_bytes(picture.quantize(16), "BMP"),
    ]
    rng = random.Random(0)
    outcomes: Counter[str] = Counter()
    for number in range(3000):
        content = mutated(rng, seeds)
        started = time.process_time()
        try:
            load_image(content)
            outcomes["picture"] += 1
        except ImageError:
            outcomes["refused"] += 1
        except Exception as error:
            pytest.fail(f"mutation {number} raised {type(error).__name__}: {error}")
        assert time.process_time() - started < 2, f"mutation {number} took too long"
    assert outcomes["picture"] > 300
    assert outcomes["refused"] > 1000


@pytest.mark.parametrize("source", [3, None, {"image": 1}])
def test_what_is_no_picture_at_all_is_named(source: Any) -> None:
    with pytest.raises(ImageError, match=type(source).__name__):
        load_image(source)
