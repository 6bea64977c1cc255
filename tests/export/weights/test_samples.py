"""A user's folder of pictures, with or without the JSONL of a fine-tune, becomes samples, the same each time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paliedge.errors import ImageError, UsageError
from paliedge_export.weights.samples import DEFAULT_PROMPTS, MAX_IMAGES, PROMPTS_PER_IMAGE, open_samples

Line = Mapping[str, object]


def paint(path: Path, red: int = 0) -> None:
    """A small picture that is known by its red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (red, 10, 20)).save(path)


def red_of(image: Image.Image) -> int:
    return int(np.asarray(image)[0, 0, 0])


def line(image: str, prefix: str, suffix: str = "") -> Line:
    return {"image": image, "prefix": prefix, "suffix": suffix}


def write_lines(path: Path, *lines: Line) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_images_without_jsonl_get_the_default_prompts(tmp_path: Path) -> None:
    for red, name in enumerate(("z.png", "a.JPG", "deep/er/c.webp", "deep/b.bmp", "e.jpeg")):
        paint(tmp_path / name, 40 * red)
    for name in ("notes.txt", "deep/labels.json", "picture.gif", "png"):
        (tmp_path / name).write_text("no picture")
    folder = open_samples(tmp_path)
    samples = folder.load()
    assert [sample.name for sample in samples] == ["a.JPG", "b.bmp", "c.webp", "e.jpeg", "z.png"]
    assert [round(red_of(sample.image) / 40) for sample in samples] == [1, 3, 2, 4, 0]
    assert {sample.prompts for sample in samples} == {DEFAULT_PROMPTS}
    assert list(folder.all_prompts()) == []


def test_a_jsonl_gives_each_image_its_first_distinct_prompts(tmp_path: Path) -> None:
    for red, name in enumerate(("one.png", "sub/two.png", "unused.png")):
        paint(tmp_path / name, 40 * red)
    write_lines(
        tmp_path / "train.jsonl",
        line("sub/two.png", "detect cat", "<loc0001>"),
        line("one.png", "ocr", "A"),
        line("one.png", "ocr", "B"),
        line("one.png", "caption en", "C"),
        line("one.png", "detect dog", "D"),
    )
    (tmp_path / "sub" / "more.jsonl").write_text('\n  \n{"image": "two.png", "prefix": "answer", "suffix": "E"}\n\n')
    folder = open_samples(tmp_path)
    samples = folder.load()
    assert [(sample.name, red_of(sample.image)) for sample in samples] == [("one.png", 0), ("two.png", 40)]
    one, two = (sample.prompts for sample in samples)
    assert one == ("ocr", "caption en", "detect dog")[:PROMPTS_PER_IMAGE]
    assert sorted(two) == ["answer", "detect cat"]  # whichever file is read first
    assert sorted(folder.all_prompts()) == ["answer", "caption en", "detect cat", "detect dog", "ocr", "ocr"]


def test_blank_jsonl_files_leave_the_images_as_they_are(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (sample,) = open_samples(tmp_path).load()
    assert sample.prompts == DEFAULT_PROMPTS


@pytest.mark.parametrize(
    "count",
    [
        MAX_IMAGES,
        2 * MAX_IMAGES,
        2 * MAX_IMAGES - 1,
    ],
)
def test_a_large_folder_gives_images_from_all_over_it(count: int, tmp_path: Path) -> None:
    for index in range(count):
        paint(tmp_path / f"{index:03}.png")
    places = [int(sample.name[:3]) for sample in open_samples(tmp_path).load()]
    assert places == sorted(set(places))
    assert len(places) == MAX_IMAGES
    quarters = np.histogram(places, np.linspace(0, count, 5))[0]
    assert quarters.min() >= MAX_IMAGES / 4 - 1


@pytest.mark.parametrize("with_lines", [False, True])
def test_samples_are_the_same_whatever_order_a_folder_is_listed_in(
    with_lines: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, name in enumerate(("b.png", "a/c.png", "a.png")):
        paint(tmp_path / name, index)
    if with_lines:
        for name in ("y", "x", "z"):
            write_lines(tmp_path / f"{name}.jsonl", line("b.png", f"detect {name}"), line("a.png", f"segment {name}"))
    found = []
    for backwards in (False, True):

        def rglob(folder: Path, pattern: str, backwards: bool = backwards) -> Iterator[Path]:
            ending = pattern.removeprefix("*")
            paths = (Path(where) / name for where, _, names in os.walk(folder) for name in names)
            yield from sorted((path for path in paths if path.name.endswith(ending)), reverse=backwards)

        monkeypatch.setattr(Path, "rglob", rglob)
        opened = open_samples(tmp_path)
        samples = [(one.name, red_of(one.image), one.prompts) for one in opened.load()]
        found.append((samples, list(opened.all_prompts())))
    assert len(found[0][0]) == (2 if with_lines else 3)
    assert found[0] == found[1]


def test_a_folder_that_is_called_like_an_image_is_none(tmp_path: Path) -> None:
    paint(tmp_path / "scan.png" / "page.png")
    assert [sample.name for sample in open_samples(tmp_path).load()] == ["page.png"]


def test_a_folder_that_holds_no_sample_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    for name, complaint in (("absent", "no such folder"), ("empty", r"\.png"), ("empty/notes.txt", "no such folder")):
        with pytest.raises(UsageError, match=complaint) as caught:
            open_samples(tmp_path / name)
        assert str(tmp_path / name) in caught.value.expected


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1, 2]",
        '"a.png"',
        "3",
        "null",
        '{"image": "a.png", "suffix": ""}',
        '{"prefix": "ocr", "suffix": ""}',
        json.dumps(line("absent.png", "ocr")),
        json.dumps(line(".", "ocr")),
        json.dumps(line("a\0.png", "ocr")),
        json.dumps(line("iVBORw0KGgo" * 40, "ocr")),  # longer than a file's name may be
        json.dumps({"image": "a.png", "prefix": None, "suffix": ""}),
    ],
)
def test_a_line_that_is_no_sample_is_named(content: str, tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(line('a.png', 'ocr'))}\n\n{content}\n")
    with pytest.raises(UsageError, match="line 3") as caught:
        open_samples(tmp_path)
    assert str(path) in caught.value.expected


def test_a_line_may_hold_unicodes_other_line_breaks(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    sample = line("a.png", "ocr above\u2028below\x85under", "")
    (tmp_path / "train.jsonl").write_text("\ufeff" + json.dumps(sample, ensure_ascii=False) + "\r\n")
    (found,) = open_samples(tmp_path).load()
    assert found.prompts == ("ocr above\u2028below\x85under",)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    paint(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut off.png").write_bytes(whole[: len(whole) // 2])
    folder = open_samples(tmp_path)
    with pytest.raises(ImageError, match=r"cut off\.png"):
        [sample.image for sample in folder.load()]
