"""The parts of documentation pages that scripts write: what stands between two markers, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def markers(part: str, script: str) -> tuple[str, str]:
    """The lines before and after a part."""
    return f"<!-- {part}, by benchmarks/{script}.py -->", f"<!-- end of {part} -->"


def read_part(page: str, part: str, script: str) -> str:
    """What a page has between the markers of a part."""
    return _split(page, part, script)[1].strip("\n")


def write_part(page: Path, part: str, script: str, content: str) -> None:
    """Put `content` between the markers of a part; the rest of the page stays."""
    begin, end = markers(part, script)
    before, _, after = _split(page.read_text(), part, script)
    page.write_text(f"{before}{begin}\n\n{content}\n\n{end}{after}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _split(page: str, part: str, script: str) -> tuple[str, str, str]:
    begin, end = markers(part, script)
    before, found, rest = page.partition(begin)
    content, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"expected the lines {begin} and {end} on the page")
    return before, content, after
