"""A hub in a folder: uploads go into it, downloads come as the client's cache lays them out."""

from __future__ import annotations

import hashlib
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError


class FakeHub:
    """Stands for the client's `snapshot_download` and `HfApi`.

    Attributes:
        folder: a repository a folder, OWNER/NAME.
        downloads: how often each file was fetched.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "remote"
        self.cache = folder / "cache"
        self.downloads: dict[str, int] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

    def add(self, repository: str, folder: Path) -> None:
        shutil.copytree(folder, self.folder / repository)

    def commit_of(self, repository: str) -> str:
        files = sorted(path for path in (self.folder / repository).rglob("*") if path.is_file())
        state = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
        return hashlib.sha1(str(state).encode()).hexdigest()

    def snapshot_download(self, repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        remote = self.folder / repository
        if not remote.is_dir():
            error: Any = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
            raise error
        root = self.cache / f"models--{repository.replace('/', '--')}"
        snapshot = root / "snapshots" / self.commit_of(repository)
        snapshot.mkdir(parents=True, exist_ok=True)
        (root / "blobs").mkdir(exist_ok=True)
        for path in sorted(remote.iterdir()):
            wanted = any(fnmatch(path.name, pattern) for pattern in allow_patterns)
            if wanted and not (snapshot / path.name).is_symlink():
                self.downloads[path.name] = self.downloads.get(path.name, 0) + 1
                blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
                shutil.copy(path, blob)
                (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
        return str(snapshot)

    def model_info(self, repository: str, *, revision: str, files_metadata: bool) -> Any:
        files = (self.folder / repository).iterdir()
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=one.name, size=one.stat().st_size) for one in files])

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> str:
        (self.folder / repository).mkdir(parents=True, exist_ok=exist_ok)
        return f"hub/{repository}"

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str) -> None:
        (self.folder / repo_id / path_in_repo).write_bytes(path_or_fileobj)

    def upload_folder(self, *, folder_path: Path, repo_id: str, allow_patterns: list[str], commit_message: str) -> None:
        for path in folder_path.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, self.folder / repo_id)
