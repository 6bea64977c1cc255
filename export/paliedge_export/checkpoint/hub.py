"""Find a checkpoint: a local folder, or a repository on the Hugging Face hub, through its own client."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from paliedge.errors import CheckpointError

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_WANTED = ["*.json", "*.safetensors"]
_TOKENIZER = ["tokenizer*", "added_tokens.json", "special_tokens_map.json"]
_LOG_IN = "2. Run `hf auth login` (or set HF_TOKEN). 3. Run this command again."


def find_checkpoint(checkpoint: str, revision: str | None = None) -> Path:
    """The folder of `checkpoint`, downloaded into the hub client's cache if it is a repository id.

    A `revision` is a branch, a tag or a commit; it may stand behind the id, as in ID@REVISION.

    Raises:
        CheckpointError: neither a folder nor an id, or a repository that is gated, missing or out of reach.
    """
    try:
        folder = Path(checkpoint).expanduser()
    except RuntimeError:  # ~somebody who has no home here
        raise _misspelt(checkpoint) from None
    if checkpoint and folder.is_dir():
        return folder
    if revision is None:
        checkpoint, revision = split_revision(checkpoint)
    if folder.exists() or not is_hub_id(checkpoint):
        raise _misspelt(checkpoint)
    return download(checkpoint, revision, _WANTED)


def find_tokenizer(repository: str) -> Path:
    """A folder with the tokenizer of a repository, without its weights.

    Raises:
        CheckpointError: it is gated, missing or out of reach.
    """
    return download(repository, None, _TOKENIZER)


def is_hub_id(name: str) -> bool:
    """Whether it has the form OWNER/NAME."""
    return bool(_REPOSITORY.fullmatch(name))


def _misspelt(checkpoint: str) -> CheckpointError:
    return CheckpointError(
        expected="a checkpoint folder or a hub id such as google/paligemma-3b-mix-224",
        found=f"'{checkpoint}'",
        action="Check the spelling; a folder holds config.json, tokenizer.json and .safetensors files.",
    )


def split_revision(name: str) -> tuple[str, str | None]:
    """ID@REVISION in two; the revision is None where there is none."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def download(repository: str, revision: str | None, wanted: list[str]) -> Path:
    """The folder of a repository in the hub client's cache, with the files whose names match one of `wanted`.

    The client's errors are not kept as causes: their texts may hold the user's token.

    Raises:
        CheckpointError: it is gated, missing or out of reach, or the disk is full.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the client lets through what its HTTP library raises, and changes the library
        raise _explain(error, repository, revision) from None


def _explain(error: Exception, repository: str, revision: str | None) -> CheckpointError:
    """What went wrong with a download, and what to do."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    expected, address = f"the hub repository {repository}", f"https://huggingface.co/{repository}"
    if isinstance(error, HFValidationError):
        return _misspelt(repository)
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(
            expected=f"the revision '{revision}' of {repository}",
            found="no branch, tag or commit of that name",
            action=f"Open {address}/tree/main and choose one of its branches.",
        )
    if isinstance(error, GatedRepoError):  # before its base class RepositoryNotFoundError
        found, action = (
            "a gated repository, without access for you",
            f"1. Open {address} and accept its terms. {_LOG_IN}",
        )
    elif isinstance(error, RepositoryNotFoundError):
        expected += f" (there is no folder {repository} here)"
        found = "no such repository, or a private one that you are not logged in for"
        action = f"1. Open {address} and check the name. {_LOG_IN}"
    elif getattr(getattr(error, "response", None), "status_code", None) == 403:
        found = "a token that may not read it (403)"
        action = (
            "1. Give the token access to public gated repositories in its settings on the hub, and accept the terms at "
            f"{address}. 2. Run this command again."
        )
    elif _is_full(error):
        expected, found = f"room on the disk for {repository}", "a full disk (No space left on device)"
        action = (
            "Free some, or set HF_HOME to a folder on another disk, and run this command again: what has come is kept."
        )
    elif HF_HUB_OFFLINE:
        found = "no complete copy in the local cache, and HF_HUB_OFFLINE is set, so that nothing is downloaded"
        action = "Unset HF_HUB_OFFLINE, or download the repository elsewhere and name its folder."
    else:
        reason = (isinstance(error, OSError) and error.strerror) or type(error).__name__
        expected += f" (there is no folder {repository} here)"
        found = f"no complete copy in the local cache, and a download that failed ({reason})"
        action = (
            "Run this command again, which goes on where it stopped. If it fails again, check the network and "
            "HF_HUB_OFFLINE, or download the repository elsewhere and name its folder."
        )
    return CheckpointError(expected=expected, found=found, action=action)


def _is_full(error: Exception) -> bool:
    """Whether the disk is full, as Python or the client's own downloader says it."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)
