"""Whatever the hub's client raises, the user reads what to do, and no secret."""

from __future__ import annotations

import errno
import importlib
import traceback
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from paliedge.errors import CheckpointError
from paliedge_export.checkpoint.hub import find_checkpoint

REPOSITORY = "google/paligemma-3b-mix-224"
SECRET = "hf_secretsecretsecret"
hub_utils: Any = importlib.import_module("huggingface_hub.utils")
http: Any = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
"""The HTTP library of the installed client, which changed it between its versions."""


def answer_of_the_hub(status: int, headers: dict[str, str]) -> Exception:
    """The exception that the client makes of such an answer."""
    request = http.Request(
        "GET", f"https://huggingface.co/api/models/{REPOSITORY}", headers={"authorization": f"Bearer {SECRET}"}
    )
    try:
        hub_utils.hf_raise_for_status(http.Response(status, headers=headers, request=request))
    except HfHubHTTPError as error:
        return error
    raise AssertionError


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> CheckpointError:
    """What `find_checkpoint` makes of an exception of the client."""

    def snapshot_download(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(REPOSITORY)
    raised = caught.value
    assert SECRET not in "".join(traceback.format_exception(raised))  # its cause's text, where that is kept, included
    assert SECRET not in str(raised)
    assert "Traceback" not in str(raised)
    assert "\n" not in str(raised)
    return raised


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_is_explained_in_three_steps(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    error = answer_of_the_hub(status, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"no access for {SECRET}"})
    assert isinstance(error, GatedRepoError)
    raised = fail_with(monkeypatch, error)
    assert "gated" in raised.found
    assert f"1. Open https://huggingface.co/{REPOSITORY} and accept" in raised.action
    assert "2. Run `hf auth login`" in raised.action
    assert "3. Run this command again" in raised.action


@pytest.mark.parametrize(("status", "headers"), [(404, {"X-Error-Code": "RepoNotFound"}), (401, {})])
def test_a_missing_or_private_repository_is_explained_in_three_steps(
    status: int, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = answer_of_the_hub(status, headers)
    assert isinstance(error, RepositoryNotFoundError)
    raised = fail_with(monkeypatch, error)
    assert "no such repository" in raised.found
    assert f"1. Open https://huggingface.co/{REPOSITORY} and check" in raised.action
    assert "2. Run `hf auth login`" in raised.action
    assert "3. Run this command again" in raised.action


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError(f"no snapshot, token {SECRET}"),
        OfflineModeIsEnabled("HF_HUB_OFFLINE=1"),
        answer_of_the_hub(500, {}),
        answer_of_the_hub(429, {"X-Error-Message": f"slow down {SECRET}"}),
        http.ConnectError(f"connection refused {SECRET}"),
        http.ConnectTimeout("timed out"),
        http.ReadTimeout("timed out"),
        http.ProxyError("proxy"),
        http.RemoteProtocolError("peer closed connection"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_out_of_reach_is_named_and_the_ways_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    raised = fail_with(monkeypatch, error)
    reason = getattr(error, "strerror", None) or type(error).__name__
    assert f"no complete copy in the local cache, and a download that failed ({reason})" in raised.found
    assert "HF_HUB_OFFLINE" in raised.action
    assert "name its folder" in raised.action


def test_a_full_disk_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = fail_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert "No space left on device" in raised.found


def test_an_id_that_the_client_refuses_is_a_misspelling(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Check the spelling" in fail_with(monkeypatch, HFValidationError("double dash")).action


def test_only_what_an_export_reads_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str | None, list[str]]] = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_checkpoint(REPOSITORY) == tmp_path
    assert find_checkpoint(REPOSITORY, "bfloat16") == find_checkpoint(f"{REPOSITORY}@float16") == tmp_path
    patterns = ["*.json", "*.safetensors"]
    assert asked == [(REPOSITORY, revision, patterns) for revision in (None, "bfloat16", "float16")]


def test_a_local_folder_wins_over_a_repository_of_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def snapshot_download(*args: object, **kwargs: object) -> str:
        raise AssertionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / REPOSITORY).mkdir(parents=True)
    assert find_checkpoint(REPOSITORY) == Path(REPOSITORY)


@pytest.mark.parametrize("checkpoint", ["", "paligemma", "a/b/c", "../x", "/no/such/folder", "a b/c", "https://x/y"])
def test_what_is_neither_folder_nor_id_is_refused(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # beside which there is no folder x
    with pytest.raises(CheckpointError, match="Check the spelling"):
        find_checkpoint(checkpoint)


def test_a_file_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").touch()
    with pytest.raises(CheckpointError, match="Check the spelling"):
        find_checkpoint("owner/name")


def test_a_token_that_may_not_read_gated_repositories_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = fail_with(monkeypatch, answer_of_the_hub(403, {}))
    assert "403" in raised.found
    assert "public gated repositories" in raised.action


def test_a_full_disk_is_called_that_by_the_clients_own_downloader_too(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = fail_with(monkeypatch, RuntimeError("Data processing error: No space left on device (os error 28)"))
    assert "a full disk" in raised.found
    assert "HF_HOME" in raised.action


def test_a_revision_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = fail_with(monkeypatch, answer_of_the_hub(404, {"X-Error-Code": "RevisionNotFound"}))
    assert raised.expected.startswith("the revision 'None' of")
    assert "branches" in raised.action
