"""The bundle: a folder that is all exporter and runtime share, described by `bundle.json`.

The manifest is decoded strictly, and every file in it is a plain name inside the folder. Sizes are
checked at each load and sha256 on the first one. Knows nothing of sessions, images or prompts.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import msgspec

from paliedge.bundle.digests import digest_key, read_known_digests, sha256_from_file, write_known_digests
from paliedge.bundle.manifest import FORMAT_VERSION, ITEMSIZE, MANIFEST, Manifest, Target, content_digest
from paliedge.errors import BundleError, EngineMismatchError

_LOG = logging.getLogger(__name__)


class Bundle:
    """A bundle on disk whose manifest is valid and whose files have the recorded sizes.

    Raises:
        BundleError: no bundle at `folder`, a manifest that is not valid, or a file that is missing, not
            regular or of another size. With `check_hashes` a file of another digest is one, too. Engines
            can be built again: without `check_engines` their files are not looked at.
    """

    def __init__(self, folder: Path, *, check_hashes: bool = True, check_engines: bool = True) -> None:
        self.folder = folder
        self._verified: dict[str, str] = {}
        self.manifest = read_manifest(folder)
        self._engine_files = {name for engine in self.manifest.engines for name in engine.files}
        self._files = {
            name: file for name, file in self.manifest.files.items() if check_engines or name not in self._engine_files
        }
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
        except KeyError as error:
            raise EngineMismatchError(
                expected=f"graphs for the target '{name}' in {self.folder}",
                found=f"only {', '.join(sorted(self.manifest.targets))}",
                action=f"Export the checkpoint again with --target {name}.",
            ) from error

    def _check_files(self, check_hashes: bool) -> None:
        manifest = self.manifest
        optional = (
            *(manifest.golden, manifest.calibration, manifest.precision_report),
            manifest.embedding.row_scales,
        )
        named = {manifest.tokenizer, manifest.embedding.file, *filter(None, optional)}
        for target in manifest.targets.values():
            graphs = (target.vision_encoder, target.decoder, target.prefill, target.mask_decoder)
            for graph in filter(None, graphs):
                named |= {graph.file, *graph.weights}
        for engine in manifest.engines:
            named |= set(engine.files)
        if named - set(manifest.files):
            raise _damaged(self.folder, f"no size and digest for {', '.join(sorted(named - set(manifest.files)))}")
        for name, recorded in self._files.items():
            path = self.folder / name
            try:
                status = _status_of(path)
            except OSError as error:
                raise self._damaged(name, f"no file '{name}'") from error
            if not stat.S_ISREG(status.st_mode):
                raise self._damaged(name, f"'{name}', which is no regular file")
            if status.st_size != recorded.size:
                raise self._damaged(name, f"'{name}' with {status.st_size} bytes instead of {recorded.size}")
        self._check_numbers()
        if check_hashes:
            self.verify_hashes(trust_notes=True)

    def _check_numbers(self) -> None:
        """Numbers of the manifest that must fit one another."""
        manifest = self.manifest
        embedding, hidden_size, tokens = manifest.embedding, manifest.model.text.hidden_size, manifest.tokens
        num_bytes = embedding.rows * hidden_size * ITEMSIZE[embedding.dtype]
        if num_bytes > manifest.files[embedding.file].size:
            raise _damaged(self.folder, f"a '{embedding.file}' too small for {embedding.rows} rows of {hidden_size}")
        if (embedding.row_scales is not None) != (embedding.dtype in ("int8", "uint8")):
            raise _damaged(self.folder, f"an embedding table of {embedding.dtype} and scales that do not go with it")
        if embedding.row_scales and embedding.rows * 4 > manifest.files[embedding.row_scales].size:
            raise _damaged(self.folder, f"a '{embedding.row_scales}' too small for {embedding.rows} rows")
        used = (
            tokens.vocab_size - 1,
            tokens.bos,
            tokens.eos,
            *tokens.ends,
            tokens.newline,
            tokens.first_location + tokens.num_locations - 1,
            tokens.first_segmentation + tokens.num_segmentations - 1,
        )
        if max(used) >= embedding.rows:
            raise _damaged(self.folder, f"token id {max(used)} without a row in a table of {embedding.rows}")
        if manifest.limits.prefix <= manifest.model.vision.num_image_tokens:
            raise _damaged(self.folder, f"a prefix limit of {manifest.limits.prefix}, which leaves no prompt")

    def _damaged(self, name: str, found: str) -> BundleError:
        if name not in self._engine_files:
            return _damaged(self.folder, found)
        return BundleError(
            expected=f"the engines of {self.folder} as they were built",
            found=found,
            action=f"Build them again: `paliedge build {self.folder} --force`; nothing was loaded.",
        )

    def verify_hashes(self, *, trust_notes: bool = False) -> None:
        """Compare every file's sha256 with the manifest's.

        What passed is noted here and in the user's cache folder. With `trust_notes`, such a file is not
        read again while its path, size, inode and modification time stay the same.
        """
        known = read_known_digests() | self._verified
        fresh = dict(known)
        for name, recorded in self._files.items():
            path = self.folder / name
            try:
                key = digest_key(path)
                digest = trust_notes and known.get(key)
                if not digest:
                    _LOG.info("reading %s to check its sha256", path)
                    digest = sha256_from_file(path)
            except OSError as error:
                raise self._damaged(name, f"no file '{name}' that can be read") from error
            if digest != recorded.sha256:
                raise self._damaged(name, f"'{name}' with other content than was exported (sha256 {digest[:12]}...)")
            fresh[key] = digest
        self._verified = fresh
        if fresh != known:
            write_known_digests(fresh)


def read_manifest(folder: Path) -> Manifest:
    """A bundle's manifest alone, before anything is known of its files.

    Raises:
        BundleError: no bundle at `folder`, or a manifest that is not valid.
    """
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(_status_of(path).st_mode):
            raise _damaged(folder, f"'{MANIFEST}', which is no regular file")
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BundleError(
            expected=f"a bundle at {folder}",
            found="no bundle.json there",
            action="Make one with `paliedge export CHECKPOINT -o BUNDLE`, or correct the path.",
        ) from error
    try:
        _check_format(path, content)
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # ValidationError is a DecodeError
        raise BundleError(
            expected=f"{path} in format {FORMAT_VERSION}",
            found=f"{error}",
            action="Export the checkpoint again with this version of paliedge.",
        ) from error
    if manifest.sha256 != content_digest(content):
        raise _damaged(folder, f"'{MANIFEST}' with other content than was exported")
    return manifest


def _status_of(path: Path) -> os.stat_result:
    """Of the file itself, or of what it links to in the hub's cache: from `snapshots/REVISION` to `blobs` beside it.

    Other links are not followed: they would lead out of what was exported.
    """
    status = path.lstat()
    snapshots = path.absolute().parents[1]
    if stat.S_ISLNK(status.st_mode) and snapshots.name == "snapshots":
        blob = path.parent / path.readlink()
        if blob.parent.resolve() == (snapshots.parent / "blobs").resolve():
            return blob.lstat()
    return status


class _Format(msgspec.Struct):
    format_version: int


def _check_format(path: Path, content: bytes) -> None:
    """A BundleError for a format that is newer than this paliedge."""
    version = msgspec.json.decode(content, type=_Format).format_version
    if version > FORMAT_VERSION:
        raise BundleError(
            expected=f"{path} in format {FORMAT_VERSION} or an older one",
            found=f"format {version}, of a newer paliedge",
            action="Run `pip install --upgrade paliedge`, or export the checkpoint again with this one.",
        )


def _damaged(folder: Path, found: str) -> BundleError:
    return BundleError(
        expected=f"the bundle {folder} as it was exported",
        found=found,
        action="Copy or export the bundle again; nothing of it was loaded.",
    )
