"""The bundle: a folder that is all exporter and runtime share, described by `bundle.json`.

The manifest is decoded strictly, every file in it is a plain name inside the folder, sizes are
checked at each load and sha256 on the first one. Knows nothing of sessions, images or prompts.
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from paliedge.errors import BundleError, EngineMismatchError, UsageError

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
_ASIDE = ".old"

Count = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
FileName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Dimension = Count | Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class File(_Strict, frozen=True):
    """Size in bytes and digest of one file of the bundle."""

    size: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Sha256


class Producer(_Strict, frozen=True):
    """Who wrote the bundle, from which checkpoint."""

    paliedge: str
    onnx: str
    checkpoint: str


class Vision(_Strict, frozen=True):
    """Dimensions of the vision encoder; `image_size` in pixels, square."""

    image_size: Count
    patch_size: Count
    num_layers: Count
    hidden_size: Count
    num_image_tokens: Count


class Text(_Strict, frozen=True):
    """Dimensions of the decoder."""

    num_layers: Count
    hidden_size: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count


class Model(_Strict, frozen=True):
    """Dimensions of the model; `family` is `paligemma` or `paligemma2`."""

    family: Literal["paligemma", "paligemma2"]
    vision: Vision
    text: Text


class Preprocess(_Strict, frozen=True):
    """Resize to the square by `resample`, then (value / 255 - mean) / std, channels first."""

    resample: Literal["bicubic", "bilinear"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Tokens(_Strict, frozen=True):
    """Token ids. Ids from `vocab_size` on are no tokens and are never generated."""

    bos: TokenId
    eos: TokenId
    pad: TokenId
    image: TokenId
    newline: TokenId
    first_location: TokenId
    num_locations: Count
    first_segmentation: TokenId
    num_segmentations: Count
    vocab_size: Count


class Prompts(_Strict, frozen=True):
    """This checkpoint's prompt templates; `{labels}`, `{lang}` and `{question}` are filled in."""

    detect: str = "detect {labels}"
    caption: str = "caption {lang}"
    answer: str = "answer {lang} {question}"
    ocr: str = "ocr"


class Limits(_Strict, frozen=True):
    """`prefix`: image and prompt tokens of a request; `new_tokens`: generated ones."""

    prefix: Count
    new_tokens: Count


class Embedding(_Strict, frozen=True):
    """The embedding table [rows, hidden], kept on the host; a row times `scale` is an input embedding."""

    file: FileName
    dtype: Literal["float32", "float16"]
    rows: Count
    scale: float


class Tensor(_Strict, frozen=True):
    """A graph's input or output; unknown sizes are names."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


class Graph(_Strict, frozen=True):
    """One ONNX graph of one target, with the files that hold its weights."""

    file: FileName
    weights: tuple[FileName, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Target(_Strict, frozen=True):
    """The lowering for one kind of runtime. Cache tensors are [batch, kv heads, capacity, head_dim]."""

    precision: Literal["fp32", "fp16"]
    vision_encoder: Graph
    decoder: Graph


class Comparison(_Strict, frozen=True):
    """What the export's last step measured against `reference`.

    `image_features_error` is relative to the largest feature, `log_prob_error` in nats;
    `token_match` is the share of equal tokens, the reference's tokens being fed in.
    """

    reference: str
    image_features_error: float
    log_prob_error: float
    token_match: float


class Manifest(_Strict, frozen=True):
    """The content of `bundle.json`; `sha256` is of the same JSON, compact, with this field empty."""

    format_version: Literal[1]
    producer: Producer
    model: Model
    preprocess: Preprocess
    tokens: Tokens
    prompts: Prompts
    limits: Limits
    embedding: Embedding
    targets: dict[str, Target]
    tokenizer: FileName
    golden: FileName | None
    comparison: Comparison | None
    files: dict[FileName, File]
    sha256: Sha256 | Literal[""] = ""


class Bundle:
    """A bundle on disk whose manifest is valid and whose files have the recorded sizes.

    Raises:
        BundleError: no bundle at `folder`, a manifest that is not valid, a file that is missing,
            of another size, no regular file, or (with `check_hashes`) of another digest.
    """

    def __init__(self, folder: Path, *, check_hashes: bool = True) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self._check_files(check_hashes)

    def path(self, name: str) -> Path:
        """Path of a file that the manifest lists."""
        if name not in self.manifest.files:
            raise BundleError(
                expected="a file that the manifest lists", found=f"'{name}'", action="Export the bundle again."
            )
        return self.folder / name

    def target(self, name: str) -> Target:
        """The lowering `name`, or an error that lists those the bundle has."""
        try:
            return self.manifest.targets[name]
        except KeyError:
            raise EngineMismatchError(
                expected=f"graphs for the target '{name}' in {self.folder}",
                found=f"only {', '.join(sorted(self.manifest.targets))}",
                action=f"Export the checkpoint again with --target {name}.",
            ) from None

    def _check_files(self, check_hashes: bool) -> None:
        manifest = self.manifest
        named = {manifest.tokenizer, manifest.embedding.file, *([manifest.golden] if manifest.golden else [])}
        for target in manifest.targets.values():
            for graph in (target.vision_encoder, target.decoder):
                named |= {graph.file, *graph.weights}
        if named - set(manifest.files):
            raise _damaged(self.folder, f"no size and digest for {', '.join(sorted(named - set(manifest.files)))}")
        for name, recorded in manifest.files.items():
            path = self.folder / name
            try:
                status = path.lstat()
            except OSError:
                raise _damaged(self.folder, f"no file '{name}'") from None
            if not stat.S_ISREG(status.st_mode):
                raise _damaged(self.folder, f"'{name}' is no regular file")
            if status.st_size != recorded.size:
                raise _damaged(self.folder, f"'{name}' with {status.st_size} bytes instead of {recorded.size}")
        self._check_numbers()
        if check_hashes:
            self.verify_hashes(trust_notes=True)

    def _check_numbers(self) -> None:
        """Numbers of the manifest that must fit one another."""
        manifest = self.manifest
        embedding, hidden_size, tokens = manifest.embedding, manifest.model.text.hidden_size, manifest.tokens
        num_bytes = embedding.rows * hidden_size * {"float32": 4, "float16": 2}[embedding.dtype]
        if num_bytes > manifest.files[embedding.file].size:
            raise _damaged(self.folder, f"'{embedding.file}' too small for {embedding.rows} rows of {hidden_size}")
        used = (
            tokens.vocab_size - 1,
            tokens.bos,
            tokens.eos,
            tokens.newline,
            tokens.first_location + tokens.num_locations - 1,
            tokens.first_segmentation + tokens.num_segmentations - 1,
        )
        if max(used) >= embedding.rows:
            raise _damaged(self.folder, f"token id {max(used)} without a row in a table of {embedding.rows}")
        if manifest.limits.prefix <= manifest.model.vision.num_image_tokens:
            raise _damaged(self.folder, f"a prefix limit of {manifest.limits.prefix}, which leaves no prompt")

    def verify_hashes(self, *, trust_notes: bool = False) -> None:
        """Compare every file's sha256 with the manifest's.

        What passed is noted in the user's cache folder. With `trust_notes`, such a file is not read
        again while its path, size, inode and modification time stay the same.
        """
        known = _read_known_digests()
        fresh = dict(known)
        for name, recorded in self.manifest.files.items():
            path = self.folder / name
            key = _digest_key(path)
            digest = (trust_notes and known.get(key)) or sha256_from_file(path)
            if digest != recorded.sha256:
                raise _damaged(self.folder, f"'{name}' with other content than was exported (sha256 {digest[:12]}...)")
            fresh[key] = digest
        if fresh != known:
            _write_known_digests(fresh)


def sha256_from_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_file(path: Path) -> File:
    """Size and digest of a file, for the manifest."""
    return File(size=path.stat().st_size, sha256=sha256_from_file(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `bundle.json`, the last file of a bundle."""
    manifest = msgspec.structs.replace(manifest, sha256=_manifest_digest(manifest))
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    with (folder / MANIFEST).open("wb") as stream:
        stream.write(content + b"\n")


@contextmanager
def publish_bundle(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success it takes the place of `folder` in one step.

    A kill at any moment leaves the old bundle, the new one, or none where there was none. What a
    killed run left behind is removed by the next one for the same `folder`.

    Raises:
        UsageError: `folder` holds something that is no bundle, or cannot be made.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UsageError(
            expected=f"{folder} to be new, empty or a bundle",
            found="other content",
            action="Name another output folder.",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            expected=f"a place for {folder}", found=f"{error.strerror}", action="Name another output folder."
        ) from None
    prefix = f".{folder.name}.new-"
    for leftover in folder.parent.glob(f"{glob.escape(prefix)}*"):
        with _lock_folder(leftover) as locked:
            if locked and leftover.suffix == _ASIDE and not folder.exists():
                leftover.rename(folder)
            elif locked:
                shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    with _lock_folder(staging):
        try:
            yield staging
            staging.chmod(0o755)
            for path in (*staging.iterdir(), staging):
                _sync(path)
            _replace_folder(staging, folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _lock_folder(folder: Path) -> Iterator[bool]:
    """Hold the folder's advisory lock; yields whether it was free. The system drops it with the process."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # gone meanwhile: another publisher removed it
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _replace_folder(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`; afterwards `new` is what was there before, or is gone."""
    if not old.exists():
        new.rename(old)
        return
    if not _exchange(new, old):  # a file system without the exchange: a moment without a bundle
        aside = new.with_name(new.name + _ASIDE)
        old.rename(aside)
        new.rename(old)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step: Linux renameat2 with RENAME_EXCHANGE, which Python does not offer."""
    at_working_folder, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    names = (os.fsencode(first), os.fsencode(second))
    return bool(renameat2(at_working_folder, names[0], at_working_folder, names[1], rename_exchange) == 0)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _damaged(folder, f"'{MANIFEST}' is no regular file")
        content = path.read_bytes()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        raise BundleError(
            expected=f"a bundle at {folder}",
            found="no bundle.json there",
            action="Make one with `paliedge export CHECKPOINT -o BUNDLE`, or correct the path.",
        ) from None
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # ValidationError is a DecodeError
        raise BundleError(
            expected=f"{path} in format {FORMAT_VERSION}",
            found=f"{error}",
            action="Export the checkpoint again with this version of paliedge.",
        ) from None
    if manifest.sha256 != _manifest_digest(manifest):
        raise _damaged(folder, f"'{MANIFEST}' with other content than was exported")
    return manifest


def _manifest_digest(manifest: Manifest) -> str:
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(manifest, sha256=""))).hexdigest()


def _damaged(folder: Path, found: str) -> BundleError:
    return BundleError(
        expected=f"the bundle {folder} as it was exported",
        found=found,
        action="Copy or export the bundle again; nothing of it was loaded.",
    )


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "paliedge" / "verified.json"


def _digest_key(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


def _read_known_digests() -> dict[str, str]:
    try:
        return msgspec.json.decode(_cache_file().read_bytes(), type=dict[str, str])
    except (OSError, RuntimeError, UnicodeDecodeError, msgspec.DecodeError):
        return {}


def _write_known_digests(digests: dict[str, str]) -> None:
    """Best effort: without a writable cache the next start reads the files again."""
    try:
        target = _cache_file()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        partial.write_bytes(msgspec.json.encode(digests))
        partial.replace(target)
    except (OSError, RuntimeError):
        pass
