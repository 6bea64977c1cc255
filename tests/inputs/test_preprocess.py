"""pixel_values against the processor that PaliGemma checkpoints name, bit for bit."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from paliedge.bundle.manifest import Preprocess
from paliedge.inputs.images import load_image
from paliedge.inputs.preprocess import Preprocessor

Resample = Literal["bicubic", "bilinear"]
RESAMPLE: tuple[Resample, ...] = ("bicubic", "bilinear")
HALF = (0.5, 0.5, 0.5)


def reference(image: Image.Image, resample: Resample, size: int, mean: Any = HALF, std: Any = HALF) -> npt.NDArray[Any]:
    processor = SiglipImageProcessorPil(
        size={"height": size, "width": size},
        image_mean=list(mean),
        image_std=list(std),
        resample={"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[resample],
        do_convert_rgb=True,
    )
    return np.asarray(processor(images=image, return_tensors="np")["pixel_values"])


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    shape = (height, width, channels)
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, shape, dtype=np.uint8))


def gradients(width: int, height: int) -> Image.Image:
    """Smooth areas and hard edges, of which bicubic overshoots."""
    bands = [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L").rotate(90)]
    image = Image.merge("RGB", bands).resize((width, height))
    image.paste((255, 0, 255), (width // 3, height // 3, width // 2 + 1, height // 2 + 1))
    return image


def assert_bit_for_bit(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    assert actual.dtype == expected.dtype == np.float32
    assert np.array_equal(actual, expected)


@pytest.mark.parametrize("resample", RESAMPLE)
@pytest.mark.parametrize("size_wh", [(224, 224), (640, 480), (97, 311), (1, 50), (50, 1), (1, 1), (1500, 90)])
def test_any_size_and_aspect_matches_transformers(size_wh: tuple[int, int], resample: Resample) -> None:
    preprocess = Preprocessor(Preprocess(resample=resample, mean=HALF, std=HALF), 224)
    for image in (noise(*size_wh), gradients(*size_wh)):
        pixel_values = preprocess(load_image(image))
        assert pixel_values.shape == (1, 3, 224, 224)
        assert_bit_for_bit(pixel_values, reference(image, resample, 224))


@pytest.mark.parametrize("image_size", [56, 448, 896])
def test_each_model_size_matches_transformers(image_size: int) -> None:
    preprocess = Preprocessor(Preprocess(resample="bicubic", mean=HALF, std=HALF), image_size)
    image = noise(333, 250)
    assert_bit_for_bit(preprocess(image), reference(image, "bicubic", image_size))


@pytest.mark.parametrize("resample", RESAMPLE)
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1"])
def test_any_mode_matches_transformers(mode: str, resample: Resample) -> None:
    image = noise(61, 37, 4).convert(mode)
    preprocess = Preprocessor(Preprocess(resample=resample, mean=HALF, std=HALF), 56)
    # To RGB by us: before 5.21 transformers laid what is transparent over another colour.
    colours = load_image(image)
    assert_bit_for_bit(preprocess(colours), reference(colours, resample, 56))


@pytest.mark.parametrize(("mode", "white"), [("RGBA", (255, 255, 255, 0)), ("LA", (255, 0))])
def test_what_is_transparent_keeps_its_colour(mode: str, white: tuple[int, ...]) -> None:
    """As Pillow's own conversion has it, and transformers from 5.21 on."""
    picture = np.asarray(load_image(Image.new(mode, (4, 3), white)))
    assert np.array_equal(picture, np.full((3, 4, 3), 255))


def test_every_byte_of_each_channel_is_normalised_as_transformers_does() -> None:
    """Mean and standard deviation of their own a channel, so that no two channels can be mixed up."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values, values.T, 255 - values], axis=-1))
    preprocess = Preprocessor(Preprocess(resample="bicubic", mean=mean, std=std), 16)
    assert_bit_for_bit(preprocess(image), reference(image, "bicubic", 16, mean, std))


def letterboxed(size: int = 40, colour: tuple[int, int, int] = (10, 200, 30)) -> Preprocessor:
    return Preprocessor(Preprocess(resample="bicubic", mean=HALF, std=HALF, letterbox=colour), size)


@pytest.mark.parametrize(
    ("size_wh", "frame"),
    [
        ((80, 40), (0, 0.25, 1, 0.75)),
        ((40, 80), (0.25, 0, 0.75, 1)),
        ((33, 33), (0, 0, 1, 1)),
        ((4000, 1), (0, 0.475, 1, 0.5)),
    ],
)
def test_a_letterboxed_picture_keeps_its_proportions_in_its_frame(
    size_wh: tuple[int, int], frame: tuple[float, float, float, float]
) -> None:
    preprocess = letterboxed()
    assert preprocess.content_box(size_wh) == pytest.approx(frame)
    square = np.asarray(preprocess.fit(Image.new("RGB", size_wh, (250, 0, 0))))
    x1, y1, x2, y2 = (round(40 * edge) for edge in frame)
    assert (square[y1:y2, x1:x2] == (250, 0, 0)).all()
    outside = np.ones((40, 40), bool)
    outside[y1:y2, x1:x2] = False
    assert (square[outside] == (10, 200, 30)).all()
    assert preprocess(Image.new("RGB", size_wh)).shape == (1, 3, 40, 40)


def test_a_squashed_picture_fills_the_square() -> None:
    preprocess = Preprocessor(Preprocess(resample="bicubic", mean=HALF, std=HALF), 40)
    assert preprocess.content_box((80, 40)) == (0, 0, 1, 1)
    assert (np.asarray(preprocess.fit(Image.new("RGB", (80, 40), (250, 0, 0)))) == (250, 0, 0)).all()
