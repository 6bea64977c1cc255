"""What is to be exported: the checkpoint in whichever form it comes, checked before anything is written."""

from __future__ import annotations

from pathlib import Path

from paliedge.bundle.manifest import Tokens
from paliedge.errors import CheckpointError, UsageError
from paliedge_export.checkpoint.big_vision import BigVisionCheckpoint
from paliedge_export.checkpoint.config import read_config
from paliedge_export.checkpoint.hub import find_checkpoint
from paliedge_export.checkpoint.lora import Adapted
from paliedge_export.checkpoint.roboflow import split_package
from paliedge_export.checkpoint.safetensors_reader import EMBED_TOKENS, LM_HEAD, Checkpoint


def open_checkpoint(checkpoint: str, lora: Path | None) -> Checkpoint:
    """A folder, a hub id, big_vision's .npz or Roboflow's package, with an adapter merged into it if there is one.

    Raises:
        CheckpointError: none of them, or one that cannot be read.
        UsageError: an adapter for an .npz, or a second one.
    """
    path = Path(checkpoint)
    if path.suffix == ".npz" and path.is_file():
        if lora:
            raise UsageError(
                expected="a Hugging Face checkpoint to merge an adapter into",
                found=f"big_vision's {path.name}",
                action="Name the checkpoint that the adapter was trained on.",
            )
        return BigVisionCheckpoint(path)
    folder, adapter = split_package(find_checkpoint(checkpoint))
    if lora and adapter:
        raise UsageError(
            expected=f"one adapter: {adapter} holds one with its base model",
            found=f"a second one, --lora {lora}",
            action=f"Leave out --lora, or name {folder} as CHECKPOINT.",
        )
    config = read_config(folder)
    adapter = lora or adapter
    return Adapted(folder, config, adapter) if adapter else Checkpoint(folder, config)


def check_rows(checkpoint: Checkpoint, tokens: Tokens) -> None:
    """Raise a CheckpointError where the tokenizer has more tokens than the table has rows."""
    for name in (EMBED_TOKENS, LM_HEAD):
        if name in checkpoint and checkpoint.shape(name)[0] < tokens.vocab_size:
            raise CheckpointError(
                expected=f"a row of '{name}' for each of the tokenizer's {tokens.vocab_size} tokens",
                found=f"{checkpoint.shape(name)[0]} rows",
                action="Take tokenizer.json from the checkpoint that yours was trained from.",
            )
