"""The pages that tests read: README, CONTRIBUTING, docker/README and docs/."""

from __future__ import annotations

import re
from pathlib import Path

from tests.paths import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "docker" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    """A page as tests are called after it."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's code blocks of a language."""
    return [content for name, content in _FENCED.findall(page.read_text()) if name == language]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return _FENCED.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """What stands in backticks in a page's prose."""
    return re.findall(r"`([^`]+)`", prose(page))


def commands(page: Path) -> list[str]:
    """Every command line of a page: of its blocks, without comments, and of its prose."""
    found = [line for language in ("sh", "bash", "text") for block in blocks(page, language) for line in _lines(block)]
    return [part.strip() for command in [*found, *spans(page)] for part in re.split(r"&&|\|(?= )", command)]


def section(page: Path, heading: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    level = len(heading.split(" ")[0])
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{level}}} |\Z)", page.read_text(), re.M | re.S)
    assert found, f"no '{heading}' in {name_of(page)}"
    return found[1]


def table(text: str) -> list[list[str]]:
    """The rows of the first table in a text, without head and rule."""
    lines = [line for line in text.partition("\n|")[2].split("\n\n")[0].split("\n") if line]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


def _lines(block: str) -> list[str]:
    joined = block.replace("\\\n", " ")
    return [line.split("  #")[0] for line in joined.splitlines()]
