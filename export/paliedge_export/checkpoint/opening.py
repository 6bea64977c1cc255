"""What is to be exported: the checkpoint in whichever form it comes, checked before anything is written."""

# Tests: tests/export/checkpoint/test_opening.py and tests/export/checkpoint/test_roboflow.py.
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from paliedge.bundle.manifest import Tokens
from paliedge.errors import CheckpointError, UsageError
from paliedge_export.checkpoint.big_vision import BigVisionCheckpoint
from paliedge_export.checkpoint.config import read_config
from paliedge_export.checkpoint.hub import find_checkpoint
from paliedge_export.checkpoint.lora import Adapted, Adapter
from paliedge_export.checkpoint.pi0 import Pi0Checkpoint, is_policy
from paliedge_export.checkpoint.roboflow import split_package
from paliedge_export.checkpoint.safetensors_reader import EMBED_TOKENS, LM_HEAD, Checkpoint

_ANY_FOLDER = re.compile(r"checkpoint-\d+|model|base|base_model|merged|output|outputs|final|best|weights|\.+")
"""Names that say nothing of the model in them."""
_WEIGHTED = re.compile(r"(.+):([0-9.]+)")


def open_checkpoint(
    checkpoint: str,
    adapters: Sequence[str | Path] = (),
    *,
    revision: str | None = None,
    force_base: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """A folder, a hub id, big_vision's .npz, Roboflow's package or a pi0 policy, with its adapters merged into it.

    Args:
        checkpoint: its folder, file or hub id. An adapter alone brings the base model that it names.
        adapters: folders or hub ids, each with `:WEIGHT` behind it if only a part is to be merged; in this order.
        revision: a branch, tag or commit of a hub id.
        force_base: merge adapters that name another base model.
        report: gets a line for what is odd and no error.

    Raises:
        CheckpointError: none of them, or one that cannot be read; an adapter of another base model.
        UsageError: an adapter for an .npz, or one beside that of a package.
    """
    path = Path(checkpoint)
    if path.suffix == ".npz" and path.is_file():
        if adapters:
            raise UsageError(
                expected="a Hugging Face checkpoint to merge an adapter into",
                found=f"big_vision's {path.name}",
                action="Name the checkpoint that the adapter was trained on.",
            )
        return BigVisionCheckpoint(path)
    folder, packaged = split_package(find_checkpoint(checkpoint, revision))
    if packaged and adapters:
        raise UsageError(
            expected=f"one adapter: {packaged} holds one with its base model",
            found=f"--lora {adapters[0]}, too",
            action=f"Leave out --lora, or name {folder} as CHECKPOINT.",
        )
    if is_policy(folder):
        if adapters:
            raise UsageError(
                expected="a policy without --lora",
                found=f"--lora {adapters[0]}",
                action="Merge it into the policy with the tools that trained it.",
            )
        report(f"{folder} is a policy for robots: its PaliGemma is exported, its action expert is left out")
        return Pi0Checkpoint(folder)
    if packaged is None and not adapters:
        return Checkpoint(folder, read_config(folder))
    opened = [Adapter(packaged)] if packaged else [_open_adapter(str(one)) for one in adapters]
    if packaged and folder == packaged:  # an adapter alone
        folder, checkpoint = _find_base(opened[0]), opened[0].base
    for adapter in opened:
        if not packaged and not force_base:
            _check_base(adapter, checkpoint, folder)
        if adapter.changes_nothing:
            report(f"the adapter {adapter.folder} changes no weight: all its lora_B are zero")
    return Adapted(folder, read_config(folder), opened)


def _open_adapter(name: str) -> Adapter:
    weight, weighted = 1.0, _WEIGHTED.fullmatch(name)
    if weighted and not Path(name).exists():
        try:
            name, weight = weighted[1], float(weighted[2])
        except ValueError as error:
            raise UsageError(
                expected="ADAPTER:WEIGHT, such as adapter:0.5",
                found=f"{name}",
                action="Give a number behind the colon.",
            ) from error
    return Adapter(find_checkpoint(name), weight)


def _find_base(adapter: Adapter) -> Path:
    """The base model of an adapter that was given alone."""
    if not adapter.base:
        raise CheckpointError(
            expected=f"a checkpoint in {adapter.folder}",
            found="an adapter without the model that it was trained on, which it does not name",
            action=f"Name that model as CHECKPOINT and add --lora {adapter.folder}.",
        )
    try:
        return find_checkpoint(adapter.base, adapter.base_revision)
    except CheckpointError as error:
        raise CheckpointError(
            expected=f"the model '{adapter.base}', on which the adapter in {adapter.folder} was trained",
            found=error.found,
            action=f"Run `paliedge export {adapter.base} --lora {adapter.folder} ...` where it is to be had, or name "
            "another copy of it as CHECKPOINT.",
        ) from error


def _check_base(adapter: Adapter, checkpoint: str, folder: Path) -> None:
    """Refuse an adapter that names another model than the one at hand; names are all that it tells."""
    named = adapter.base.rstrip("/")
    last = named.rpartition("/")[2]
    names = {checkpoint.partition("@")[0].rstrip("/"), folder.name}
    names |= {part.removeprefix("models--").replace("--", "/") for part in folder.parts if part.startswith("models--")}
    same_place = Path(named).exists() and Path(named).resolve() == folder.resolve()
    alike = last in {name.rpartition("/")[2] for name in names} and not _ANY_FOLDER.fullmatch(last)
    if not named or same_place or alike:
        return
    raise CheckpointError(
        expected=f"the base model of the adapter in {adapter.folder}: {named}",
        found=f"{checkpoint}",
        action="Name that model as CHECKPOINT, or add --force-base if this is a copy of it.",
    )


def check_rows(checkpoint: Checkpoint, tokens: Tokens) -> None:
    """Raise a CheckpointError where the tokenizer has more tokens than the table has rows."""
    for name in (EMBED_TOKENS, LM_HEAD):
        if name in checkpoint and checkpoint.shape(name)[0] < tokens.vocab_size:
            raise CheckpointError(
                expected=f"a row of '{name}' for each of the tokenizer's {tokens.vocab_size} tokens",
                found=f"{checkpoint.shape(name)[0]} rows",
                action="Take tokenizer.json from the checkpoint that yours was trained from.",
            )
