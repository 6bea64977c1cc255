"""A bundle on its way to the Hugging Face hub, with a model card written from its manifest."""

# Tests: tests/export/sharing/test_pushing.py.
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import MANIFEST, Manifest
from paliedge.errors import OutputError
from paliedge_export.checkpoint.hub import is_hub_id, split_revision

CARD, NOTICE = "README.md", "NOTICE"
_GEMMA = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
"""The sentence that Gemma's terms ask for in a file beside whatever is derived from its weights."""


def push_bundle(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    license: str = "gemma",
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """Upload a bundle, its hashes verified, with a model card and for Gemma's licence its notice.

    The repository is made if it is not there. What else lies in `folder` stays here.

    Args:
        folder: the bundle.
        repository: its id on the hub.
        private: make a new repository private.
        license: the hub's name of the licence that the checkpoint's weights are under.
        report: gets a line a stage.

    Returns:
        The address of the repository.

    Raises:
        BundleError: it is damaged.
        OutputError: the hub did not take it.
    """
    from huggingface_hub import HfApi

    report(f"checking {folder}")
    bundle = Bundle(folder)
    bundle.verify_hashes()
    manifest = bundle.manifest
    texts = {CARD: write_card(manifest, repository, license)} | ({NOTICE: f"{_GEMMA}\n"} if license == "gemma" else {})
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        report(f"uploading {sum(file.size for file in manifest.files.values()) / 1e6:.1f} MB to {repository}")
        for name, text in texts.items():
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id=repository)
        api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            allow_patterns=[MANIFEST, *manifest.files],
            commit_message=f"paliedge bundle of {manifest.producer.checkpoint}",
        )
    except Exception as error:  # what the client lets through changes with its HTTP library
        raise OutputError(
            expected=f"a repository {repository} on the hub that takes the bundle",
            found=(isinstance(error, OSError) and error.strerror) or type(error).__name__,
            action="Run `hf auth login` with a token that may write, check the name, and run this command again: "
            "files that have arrived are not sent twice.",
        ) from None  # its text may hold the token
    return str(address)


def write_card(manifest: Manifest, repository: str, license: str) -> str:
    """The repository's README.md: the hub's metadata, what the bundle is, how to run it, hashes, terms."""
    producer, vision, text = manifest.producer, manifest.model.vision, manifest.model.text
    checkpoint, _ = split_revision(producer.checkpoint)
    base = [f"base_model: {checkpoint}"] if is_hub_id(checkpoint) else []
    metadata = [
        "---",
        f"license: {license}",
        "library_name: paliedge",
        "pipeline_tag: image-text-to-text",
        *base,
        f"tags: [paliedge, onnx, {manifest.model.family}]",
        "---",
    ]
    rows = {
        "checkpoint": f"{producer.checkpoint} ({manifest.model.family})",
        "pictures": f"{vision.image_size} x {vision.image_size} pixels",
        "decoder": f"{text.num_layers} layers of width {text.hidden_size}",
        "limits": f"{manifest.limits.prefix} tokens of prompt and pictures, {manifest.limits.new_tokens} new ones",
        "exported by": f"paliedge {producer.paliedge}",
    }
    for name, target in sorted(manifest.targets.items()):
        compared = manifest.comparisons.get(name)
        judged = compared.describe() if compared else f"not compared: {manifest.not_compared[name]}"
        rows[f"target {name}"] = f"{target.precision}; {judged}"
    if manifest.reference:
        said = manifest.reference
        rows["checked by"] = f"{said.name}: {said.compared}" if said.name else f"nobody else: {said.not_compared}"
    table = [f"| {name} | {value} |" for name, value in rows.items()]
    hashes = [f"| `{name}` | {file.size} | `{file.sha256}` |" for name, file in sorted(manifest.files.items())]
    terms = (
        f"{_GEMMA}. Its use restrictions travel with these files. They are modified: turned into ONNX graphs"
        f"{' and quantised' if _is_quantised(manifest) else ''}."
        if license == "gemma"
        else f"The weights are under {license}. They are modified: turned into ONNX graphs."
    )
    parts = [
        *metadata,
        f"# {repository.rpartition('/')[2]}",
        'A bundle for paliedge, which runs PaliGemma on edge devices: `pip install "paliedge[cpu,export]"`.',
        "",
        "```sh",
        f'paliedge detect photo.jpg "cat ; dog" -m {repository}',
        "```",
        "",
        "| | |",
        "|---|---|",
        *table,
        "",
        "## Terms",
        "",
        terms,
        "",
        "## Files",
        "",
        "paliedge compares them with the hashes in `bundle.json` before it runs them.",
        "",
        "| file | bytes | sha256 |",
        "|---|---|---|",
        *hashes,
    ]
    return "\n".join(parts) + "\n"


def _is_quantised(manifest: Manifest) -> bool:
    return any(target.precision in ("int8", "int4") for target in manifest.targets.values())
