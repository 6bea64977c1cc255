"""Which files of a checkpoint's folder hold its weights, in transformers' own order, and what else may lie there."""

# Tests: tests/export/checkpoint/test_weight_files.py.
from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401  gives numpy the bfloat16 that safetensors asks it for
import numpy as np
from safetensors import SafetensorError, safe_open

from paliedge.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_POINTER = b"version https://git-lfs"
_OTHERS = {
    "pytorch_model.bin": "Load it with transformers and save it with safe_serialization.",
    "pytorch_model.bin.index.json": "Load it with transformers and save it with safe_serialization.",
    "consolidated.safetensors": f"Name it {SINGLE} if it is the whole model.",
    "model.weights.h5": "It is a KerasHub preset: convert it with KerasHub's export to transformers.",
    "model.gguf": "Export from the weights that it was made of.",
}


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files: `model.safetensors` before shards with an index before shards without one.

    Raises:
        CheckpointError: none, not all, two sets that differ, or pointers of Git LFS instead of files.
    """
    single = folder / SINGLE
    indexed, absent = _indexed(folder)
    shards = indexed if indexed and not absent else _numbered(folder, all_or_none=single.is_file())
    if single.is_file():
        if shards and single not in shards and not _are_equal([single], shards):
            raise broken(
                folder,
                f"two sets of weights that differ: {SINGLE}, and {shards[0].name} with {len(shards) - 1} others"
                + (f" that {INDEX} names" if indexed else ""),
                f"Remove the older one; with {SINGLE} transformers takes that, whatever {INDEX} says.",
            )
        found = [single]
    elif absent:
        raise broken(folder, f"no {some(absent)}, which {INDEX} names", "Download the missing shards.")
    elif shards:
        found = shards
    else:
        raise _nothing(folder)
    for path in found:
        refuse_pointer(path)
    return found


def is_pointer(path: Path) -> bool:
    """Whether Git left its note on a large file in the file's place."""
    with path.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


def refuse_pointer(path: Path) -> None:
    """Raise a CheckpointError where Git left its note on a file in the file's place."""
    if is_pointer(path):
        raise broken(path.parent, f"a pointer of Git LFS in place of {path.name}", "Run `git lfs pull` in that folder.")


def folders_below(folder: Path) -> list[Path]:
    """The folders below that hold a checkpoint, as a Trainer leaves them, the newest last."""
    found = {path.parent for name in (SINGLE, INDEX, "adapter_config.json") for path in folder.glob(f"*/{name}")}
    return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _indexed(folder: Path) -> tuple[list[Path], list[str]]:
    """The shards that the index names, and those of them that are not there."""
    index = folder / INDEX
    if not index.is_file():
        return [], []
    refuse_pointer(index)
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise broken(folder, f"an unreadable {INDEX}", "Download or copy the checkpoint again.") from error
    return [folder / name for name in names], [name for name in names if not (folder / name).is_file()]


def _numbered(folder: Path, *, all_or_none: bool) -> list[Path]:
    """Shards whose names say that they are all there; without an index.

    With `all_or_none` some of them count as none: beside a whole file transformers does not look at them.
    """
    found = {
        path: match for path in sorted(folder.glob("model-*.safetensors")) if (match := _SHARD.fullmatch(path.name))
    }
    counts = {int(match[2]) for match in found.values()}
    if len(counts) != 1:
        return []
    (count,) = counts
    there = {int(match[1]) for match in found.values()}
    if missing := sorted(set(range(1, count + 1)) - there):
        if all_or_none:
            return []
        digits = len(next(iter(found.values()))[1])
        names = [f"model-{number:0{digits}d}-of-{count:0{digits}d}.safetensors" for number in missing]
        raise broken(folder, f"no {some(names)}", "Download the missing shards.")
    return list(found)


def _are_equal(one: Sequence[Path], other: Sequence[Path]) -> bool:
    """Whether two sets of files hold the same tensors, bit for bit."""
    places = [{key: path for path in files for key in _keys(path)} for files in (one, other)]
    if places[0].keys() != places[1].keys():
        return False
    for key in places[0]:
        first, second = (_read(place[key], key) for place in places)
        if first.dtype != second.dtype or first.shape != second.shape or first.tobytes() != second.tobytes():
            return False
    return True


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="np") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            expected=f"a safetensors file at {path}",
            found="a pointer of Git LFS" if is_pointer(path) else f"{error}",
            action="Download or copy the checkpoint again.",
        ) from error


def _read(path: Path, key: str) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    with safe_open(path, framework="np") as file:
        return np.asarray(file.get_tensor(key))


def _nothing(folder: Path) -> CheckpointError:
    if below := folders_below(folder):
        return broken(folder, f"its weights in {some(path.name for path in below)}", f"Name {below[-1]}.")
    for name, action in _OTHERS.items():
        if next(folder.glob(name), None):
            return broken(folder, f"{name} and no {SINGLE}", action)
    others = [path.name for path in sorted(folder.glob("*.safetensors"))]
    if others:
        return broken(
            folder, f"{some(others)}, and no {SINGLE}", f"Rename the file to {SINGLE} if it is the whole model."
        )
    if next(folder.glob("_METADATA"), None) or next(folder.glob("*/_METADATA"), None):
        action = (
            "It is an Orbax checkpoint, such as openpi's: convert it with openpi's convert_jax_model_to_pytorch.py."
        )
        return broken(folder, f"_METADATA and no {SINGLE}", action)
    return broken(folder, f"no {SINGLE} and no {INDEX}", "Save the model with safe_serialization.")


def some(names: Iterable[str]) -> str:
    """A few of the names, in quotes, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(f"'{name}'" for name in listed[:5]) + more


def broken(folder: Path, found: str, action: str) -> CheckpointError:
    """The error of a checkpoint that is not whole, or not what its files say."""
    return CheckpointError(expected=f"a complete PaliGemma checkpoint in {folder}", found=found, action=action)
