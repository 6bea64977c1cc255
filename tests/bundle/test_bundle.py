"""The bundle against damage, forgery, kills and rivals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest

from paliedge import PaliGemma
from paliedge.bundle import bundle, digests, publish
from paliedge.bundle.bundle import Bundle
from paliedge.bundle.digests import describe_file
from paliedge.bundle.manifest import FORMAT_VERSION, MANIFEST, Manifest, write_manifest
from paliedge.bundle.publish import publish_bundle
from paliedge.errors import BundleError, EngineMismatchError, UsageError
from paliedge_export.exporter import export_bundle
from tests.tiny import make_tiny

FILES = (
    "decoder.cpu.onnx",
    "decoder.fp32.weights",
    "embed_tokens.fp32.weights",
    "tokenizer.json",
    "vision_encoder.cpu.onnx",
    "vision_encoder.fp32.weights",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle for all; tests change copies of it."""
    folder = tmp_path_factory.mktemp("exported")
    make_tiny(folder / "checkpoint", "paligemma")
    export_bundle(str(folder / "checkpoint"), folder / "bundle", compare=False)
    return folder / "bundle"


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


class SessionCreated(Exception):
    pass


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands where graphs would be loaded."""

    def create(*args: object) -> NoReturn:
        raise SessionCreated

    monkeypatch.setattr("paliedge.backends.ort.OrtSession", create)


def assert_refused(folder: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        PaliGemma.load(folder)
    assert caught.value.exit_code == 3
    return caught.value


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)  # one would be the newline behind the manifest


def append(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"x")


def replace_by_symlink(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


TAMPER: list[Callable[[Path], None]] = [
    flip_byte,
    truncate,
    append,
    Path.unlink,
    replace_by_symlink,
    replace_by_folder,
    replace_by_pipe,
]


def test_a_bundle_lists_every_file_it_has(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == sorted([MANIFEST, *FILES])
    assert sorted(Bundle(exported).manifest.files) == sorted(FILES)


@pytest.mark.usefixtures("no_session")
def test_a_whole_bundle_gets_as_far_as_the_session(copy: Path) -> None:
    with pytest.raises(SessionCreated):
        PaliGemma.load(copy)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("tamper", TAMPER, ids=lambda tamper: tamper.__name__)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_tampered_file_is_found_before_anything_is_loaded(
    name: str, tamper: Callable[[Path], None], copy: Path
) -> None:
    tamper(copy / name)
    assert name in str(assert_refused(copy))


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("names", list(zip(FILES, FILES[1:] + FILES[:1], strict=True)), ids=" and ".join)
def test_files_that_changed_places_are_found(names: tuple[str, str], copy: Path) -> None:
    first, second = (copy / name for name in names)
    first.rename(copy / "third")
    second.rename(first)
    (copy / "third").rename(second)
    assert_refused(copy)


@pytest.mark.usefixtures("no_session")
def test_a_link_is_refused_though_size_and_digest_are_right(copy: Path) -> None:
    replace_by_symlink(copy / "decoder.fp32.weights")
    manifest = read_manifest(copy)
    manifest["files"]["decoder.fp32.weights"]["size"] = (copy / "decoder.fp32.weights").lstat().st_size
    save_manifest(copy, manifest)
    assert assert_refused(copy).found == "'decoder.fp32.weights', which is no regular file"


@pytest.mark.usefixtures("no_session")
def test_files_of_one_size_that_changed_places_are_found(copy: Path) -> None:
    content = (copy / "decoder.fp32.weights").read_bytes()
    (copy / "vision_encoder.fp32.weights").write_bytes(content[::-1])
    manifest = read_manifest(copy)
    names = ("decoder.fp32.weights", "vision_encoder.fp32.weights")
    first, second = (msgspec.to_builtins(describe_file(copy / name)) for name in names)
    manifest["files"] |= {names[0]: second, names[1]: first}
    save_manifest(copy, manifest)
    assert "with other content" in assert_refused(copy).found


@pytest.mark.usefixtures("no_session")
def test_a_manifest_with_any_byte_damaged_is_refused(copy: Path) -> None:
    content = (copy / MANIFEST).read_bytes()
    for place in range(0, len(content), 13):
        damaged = bytearray(content)
        damaged[place] ^= 0x80
        (copy / MANIFEST).write_bytes(damaged)
        assert_refused(copy)


@pytest.mark.usefixtures("no_session")
def test_a_manifest_with_any_digit_changed_is_refused(copy: Path) -> None:
    content = (copy / MANIFEST).read_bytes()
    digits = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
    for place in digits[::7]:
        changed = bytearray(content)
        changed[place] = ord("1") if content[place] != ord("1") else ord("2")
        (copy / MANIFEST).write_bytes(changed)
        assert_refused(copy)


def read_manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    return content


def save_manifest(folder: Path, content: object) -> None:
    """With the digest that makes it look exported, where it can be read at all."""
    text = json.dumps(content)
    (folder / MANIFEST).write_text(text)
    with contextlib.suppress(msgspec.DecodeError):
        write_manifest(folder, msgspec.json.decode(text, type=Manifest))


def place_value(content: Any, path: str, value: object) -> None:
    """Put `value` at `path` such as `targets.cpu.precision`; file names hold dots, so `/` separates."""
    *parents, last = path.split("/")
    for key in parents:
        content = content[int(key) if isinstance(content, list) else key]
    content[int(last) if isinstance(content, list) else last] = value


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("surprise", 1),
        ("model/surprise", 1),
        ("targets/cpu/decoder/surprise", 1),
        ("files/tokenizer.json/surprise", 1),
        ("format_version", 0),
        ("format_version", 3),
        ("format_version", "1"),
        ("tokens/ends", [10**6]),
        ("preprocess/rescale_factor", "1"),
        ("reference", {"name": 1}),
        ("adapters", {"one": "../x"}),
        ("model/text/num_layers", "3"),
        ("model/text/num_layers", 3.0),
        ("model/text/num_layers", True),
        ("model/text/num_layers", None),
        ("model/text/num_layers", 0),
        ("model/text/num_layers", -1),
        ("model/text/num_layers", 2**60),
        ("model/text/num_layers", 10**400),
        ("model/family", "gemma3"),
        ("model", []),
        ("tokens/eos", -1),
        ("tokens/eos", 2**31),
        ("preprocess/resample", "cubic"),
        ("preprocess/mean", [0.5, 0.5]),
        ("preprocess/mean", [0.5, 0.5, float("nan")]),
        ("embedding/scale", float("nan")),
        ("embedding/scale", float("inf")),
        ("embedding/dtype", "object"),
        ("embedding/rows", 10**6),
        ("model/text/hidden_size", 10**6),
        ("files", {}),
        ("files/tokenizer.json/size", -1),
        ("files/tokenizer.json/sha256", "0" * 63),
        ("files/tokenizer.json/sha256", "G" * 64),
        ("files/tokenizer.json/sha256", "0" * 64 + "\n"),
        ("targets/cpu/decoder/inputs/0/shape/0", -1),
        ("targets/cpu/decoder/inputs/0/shape/0", [[[[]]]]),
        ("tokens/vocab_size", 10**7),
        ("tokens/eos", 10**6),
        ("tokens/first_location", 10**6),
        ("limits/prefix", 16),
        ("tokenizer", "missing.json"),
        ("golden", "missing.npz"),
        ("targets/cpu/decoder/weights", ["missing.weights"]),
    ],
)
def test_a_manifest_with_a_value_that_must_not_be_is_refused(path: str, value: object, copy: Path) -> None:
    content = read_manifest(copy)
    place_value(content, path, value)
    save_manifest(copy, content)
    assert_refused(copy)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("field", ["format_version", "tokens", "files", "comparisons"])
def test_a_manifest_with_a_field_missing_is_refused(field: str, copy: Path) -> None:
    content = read_manifest(copy)
    del content[field]
    save_manifest(copy, content)
    assert field in assert_refused(copy).found


BAD_NAMES = (
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".hidden",
    "-rf",
    "a b",
    "é",
    "a\0b",
    "tokenizer.json\n",
    "x" * 97,
)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
@pytest.mark.parametrize(
    "path", ["tokenizer", "golden", "embedding/file", "targets/cpu/decoder/file", "weights", "files"]
)
def test_names_that_are_no_plain_file_names_are_refused(path: str, name: str, copy: Path) -> None:
    """Though such a file is there and its digest is right."""
    content = read_manifest(copy)
    description = content["files"]["tokenizer.json"]
    if path == "weights":
        content["targets"]["cpu"]["decoder"]["weights"].append(name)
    elif path != "files":
        place_value(content, path, name)
    content["files"][name] = description
    save_manifest(copy, content)
    (copy.parent / "x").write_bytes((copy / "tokenizer.json").read_bytes())
    assert "expected" in str(assert_refused(copy))
    assert f"in format {FORMAT_VERSION}" in assert_refused(copy).expected, (
        "refused for its name, not for what is behind it"
    )


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"files": ' + b'{"a":' * 200_000,
        b"\xff\xfe{}",
        b"\0" * 100,
        b"not json",
    ],
    ids=["empty", "null", "list", "object", "deep-list", "deep-object", "deep-files", "utf-16", "zeros", "text"],
)
def test_a_manifest_that_is_something_else_is_refused(content: bytes, copy: Path) -> None:
    (copy / MANIFEST).write_bytes(content)
    assert_refused(copy)


@pytest.mark.parametrize("name", ["missing", "na\0me", "file", "empty"])
def test_a_folder_without_a_manifest_is_no_bundle(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert assert_refused(tmp_path / name).found == "no bundle.json there"


def test_a_missing_target_is_named_with_those_there_are(exported: Path) -> None:
    with pytest.raises(EngineMismatchError, match="found only cpu") as caught:
        Bundle(exported).target("jetpack6")
    assert caught.value.exit_code == 4


def test_only_files_of_the_manifest_have_a_path(exported: Path) -> None:
    opened = Bundle(exported)
    assert opened.path("tokenizer.json") == exported / "tokenizer.json"
    for name in ("../x", "/etc/passwd", MANIFEST, ""):
        with pytest.raises(BundleError):
            opened.path(name)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was read."""
    names: list[str] = []
    original = digests.sha256_from_file

    def spy(path: Path) -> str:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(bundle, "sha256_from_file", spy)
    return names


def test_the_second_load_reads_no_content(copy: Path, hashed: list[str]) -> None:
    Bundle(copy)
    assert sorted(hashed) == sorted(FILES)
    hashed.clear()
    Bundle(copy)
    assert hashed == []


def test_verifying_reads_everything_again(copy: Path, hashed: list[str]) -> None:
    opened = Bundle(copy)
    hashed.clear()
    opened.verify_hashes()
    assert sorted(hashed) == sorted(FILES)


def test_a_file_that_was_touched_is_read_again_and_no_other(copy: Path, hashed: list[str]) -> None:
    Bundle(copy)
    hashed.clear()
    os.utime(copy / "tokenizer.json", (0, 0))
    Bundle(copy)
    assert hashed == ["tokenizer.json"]


def test_a_copy_elsewhere_is_read_for_itself(copy: Path, hashed: list[str]) -> None:
    Bundle(copy)
    hashed.clear()
    Bundle(Path(shutil.copytree(copy, copy.with_name("another"))))
    assert sorted(hashed) == sorted(FILES)


def test_a_file_changed_after_it_passed_is_found_every_time(copy: Path) -> None:
    Bundle(copy)
    flip_byte(copy / "decoder.fp32.weights")
    for _ in range(2):
        with pytest.raises(BundleError, match=r"'decoder\.fp32\.weights' with other content"):
            Bundle(copy)


@pytest.mark.parametrize("notes", [b"", b"\xff\xfe", b"[]", b'{"a": 1}', b"[" * 100_000])
def test_damaged_notes_of_digests_only_cost_the_time(
    notes: bytes, copy: Path, cache_home: Path, hashed: list[str]
) -> None:
    (cache_home / "paliedge").mkdir(parents=True)
    (cache_home / "paliedge" / "verified.json").write_bytes(notes)
    Bundle(copy)
    assert sorted(hashed) == sorted(FILES)


def test_an_unwritable_cache_folder_only_costs_time(copy: Path, cache_home: Path, hashed: list[str]) -> None:
    cache_home.write_text("a file where a folder should be")
    Bundle(copy)
    Bundle(copy)
    assert len(hashed) == 2 * len(FILES)


def copy_into(source: Path, staging: Path) -> None:
    shutil.copytree(source, staging, dirs_exist_ok=True)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}.new-")]


@pytest.fixture
def other(exported: Path, tmp_path: Path) -> Path:
    """A bundle that differs from `exported` in every weight and in its checkpoint's name."""
    folder = Path(shutil.copytree(exported, tmp_path / "other"))
    manifest = Bundle(folder, check_hashes=False).manifest
    for path in folder.glob("*.weights"):
        path.write_bytes(path.read_bytes()[::-1])
    files = {name: describe_file(folder / name) for name in manifest.files}
    producer = msgspec.structs.replace(manifest.producer, checkpoint="other")
    write_manifest(folder, msgspec.structs.replace(manifest, producer=producer, files=files))
    return folder


@pytest.mark.parametrize("before", ["nothing", "empty folder", "bundle"])
def test_a_bundle_is_published(before: str, exported: Path, other: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "published"
    if before == "empty folder":
        folder.mkdir(parents=True)
    elif before == "bundle":
        shutil.copytree(other, folder)
    with publish_bundle(folder) as staging:
        assert list(staging.iterdir()) == []
        copy_into(exported, staging)
    assert Bundle(folder).manifest == Bundle(exported).manifest
    assert folder.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in folder.parent.iterdir()] == ["published"]


def test_a_relative_folder_is_published_where_the_work_began(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with publish_bundle(Path("published")) as staging:
        (tmp_path / "cwd").mkdir()
        monkeypatch.chdir(tmp_path / "cwd")
        copy_into(exported, staging)
    assert Bundle(tmp_path / "published").manifest == Bundle(exported).manifest


def test_publishing_works_where_the_file_system_cannot_exchange(
    exported: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "_exchange", lambda first, second: False)
    with publish_bundle(other) as staging:
        copy_into(exported, staging)
    assert Bundle(other).manifest == Bundle(exported).manifest
    assert leftovers(other) == []


def test_a_bundle_set_aside_by_a_killed_publisher_comes_back(other: Path, exported: Path) -> None:
    """Without the exchange there is a moment with the old bundle under another name."""
    manifest = Bundle(other).manifest
    other.rename(other.with_name(f".{other.name}.new-abc.old"))
    with pytest.raises(RuntimeError), publish_bundle(other):
        raise RuntimeError
    assert Bundle(other).manifest == manifest
    assert leftovers(other) == []


def test_an_exception_leaves_the_old_bundle_and_no_litter(other: Path) -> None:
    def publish_half() -> None:
        with publish_bundle(other) as staging:
            (staging / MANIFEST).write_text("{}")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        publish_half()
    assert Bundle(other).manifest.producer.checkpoint == "other"
    assert leftovers(other) == []


def test_a_link_stays_and_what_it_points_to_is_replaced(exported: Path, other: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(other)
    with publish_bundle(link) as staging:
        copy_into(exported, staging)
    assert link.is_symlink()
    assert Bundle(other).manifest == Bundle(exported).manifest
    assert leftovers(link) == leftovers(other) == []


def test_a_place_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="a place for"), publish_bundle(tmp_path / "file" / "deep" / "bundle"):
        pytest.fail("a staging folder was made")


def test_an_exception_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"), publish_bundle(tmp_path / "new"):
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []


def test_other_content_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("a year's work")
    (tmp_path / "file").write_text("a day's work")
    for name in ("notes", "file"):
        with pytest.raises(UsageError, match="other content"), publish_bundle(tmp_path / name):
            pytest.fail("a staging folder was made")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "a year's work"
    assert (tmp_path / "file").read_text() == "a day's work"


@pytest.mark.parametrize("name", ["bundle", "bundle[1]", "*"])
def test_what_a_killed_run_left_is_removed_and_nothing_else(name: str, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / name
    dead = tmp_path / f".{name}.new-abc123"
    neighbours = [tmp_path / ".bundle2.new-abc123", tmp_path / f"{name}.new-abc123", tmp_path / ".new-abc123"]
    for path in (dead, *neighbours):
        path.mkdir()
        (path / "decoder.cpu.onnx").write_text("half a graph")
    with publish_bundle(folder) as staging:
        assert not dead.exists()
        copy_into(exported, staging)
    assert sorted(tmp_path.iterdir()) == sorted([folder, *neighbours])


def test_two_publishers_leave_each_other_alone(exported: Path, other: Path, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    with publish_bundle(folder) as slow:
        copy_into(exported, slow)
        with publish_bundle(folder) as fast:
            assert slow.exists()
            copy_into(other, fast)
        assert Bundle(folder).manifest.producer.checkpoint == "other"
        assert Bundle(slow).manifest == Bundle(exported).manifest
    assert Bundle(folder).manifest == Bundle(exported).manifest
    assert leftovers(folder) == []


PUBLISHER = """
import shutil, sys
from pathlib import Path
from paliedge.bundle.publish import publish_bundle

folder, *sources = map(Path, sys.argv[1:])
while True:
    for source in sources:
        with publish_bundle(folder) as staging:
            shutil.copytree(source, staging, dirs_exist_ok=True)
        print(flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_bundle(exported: Path, other: Path, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    shutil.copytree(exported, folder)
    whole = [Bundle(exported).manifest, Bundle(other).manifest]
    rng = random.Random(0)
    interrupted = 0
    for _ in range(15):
        command: list[str | Path] = [sys.executable, "-c", PUBLISHER, folder, exported, other]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as publisher:
            assert publisher.stdout is not None
            started = time.perf_counter()
            publisher.stdout.readline()  # it is in its loop
            publisher.stdout.readline()
            time.sleep(rng.uniform(0, 0.05))
            os.kill(publisher.pid, signal.SIGKILL)
        assert publisher.returncode == -signal.SIGKILL, f"ended by itself after {time.perf_counter() - started:.1f} s"
        opened = Bundle(folder)
        opened.verify_hashes()
        assert opened.manifest in whole
        interrupted += bool(leftovers(folder))
        assert len(leftovers(folder)) <= 1, "what the last kill left was removed"
    assert interrupted > 3, "the kills came between two runs"
    with publish_bundle(folder) as staging:
        copy_into(other, staging)
    assert leftovers(folder) == []
    assert Bundle(folder).manifest == whole[1]


SINCE_2 = {"": ("reference", "layer_lists", "signature", "adapters"), "tokens": ("ends", "spoken_ends")}
SINCE_2 |= {"preprocess": ("rescale_factor",)}


def write_raw(folder: Path, raw: dict[str, Any]) -> None:
    """Write a manifest of any format with the digest that it should have."""
    raw["sha256"] = ""
    compact = json.dumps(raw, separators=(",", ":"), ensure_ascii=False).encode()
    raw["sha256"] = hashlib.sha256(compact).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(raw, indent=2))


def test_a_bundle_of_format_1_is_read_as_it_was_written(exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    raw = json.loads((copy / MANIFEST).read_text())
    for section, names in SINCE_2.items():
        for name in names:
            (raw[section] if section else raw).pop(name, None)
    raw["format_version"] = 1
    write_raw(copy, raw)
    manifest = Bundle(copy).manifest
    assert manifest.format_version == 1
    assert manifest.tokens.end_ids == {manifest.tokens.eos}
    assert manifest.preprocess.rescale_factor == 1 / 255
    assert (manifest.reference, manifest.adapters) == (None, {})


def test_a_bundle_of_a_newer_paliedge_says_what_to_do(exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    write_raw(copy, json.loads((copy / MANIFEST).read_text()) | {"format_version": FORMAT_VERSION + 1, "news": 1})
    with pytest.raises(BundleError, match=r"of a newer paliedge.*pip install --upgrade paliedge"):
        Bundle(copy)


def lay_out_as_the_hub_does(source: Path, cache: Path) -> Path:
    """A snapshot whose files are links to blobs; returns its folder."""
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        name = hashlib.sha256(path.name.encode()).hexdigest()
        shutil.copy(path, blobs / name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / name)
    return snapshot


def test_a_bundle_in_the_hubs_cache_is_one(exported: Path, tmp_path: Path) -> None:
    snapshot = lay_out_as_the_hub_does(exported, tmp_path / "models--me--bundle")
    assert Bundle(snapshot).manifest == Bundle(exported).manifest
    blob = (snapshot / "tokenizer.json").resolve()
    blob.write_bytes(blob.read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(BundleError, match="other content"):
        Bundle(snapshot)


@pytest.mark.parametrize("target", ["../../elsewhere", "../../../blobs/x", "../../blobs/../elsewhere", "/etc/hostname"])
def test_a_link_that_leads_out_of_the_blobs_is_refused(target: str, exported: Path, tmp_path: Path) -> None:
    snapshot = lay_out_as_the_hub_does(exported, tmp_path / "models--me--bundle")
    for path in (tmp_path / "models--me--bundle" / "elsewhere", tmp_path / "blobs" / "x"):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(exported / "tokenizer.json", path)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(target)
    with pytest.raises(BundleError, match="no regular file"):
        Bundle(snapshot)
