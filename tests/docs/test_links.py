"""Every link of a page leads somewhere: to a file of the project, to a heading of a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, README, name_of, prose
from tests.paths import ROOT

_LINK = re.compile(r"\]\(([^)\s]*)\)")


def links(page: Path) -> list[str]:
    return [link for link in _LINK.findall(prose(page)) if not re.match(r"\w+:", link)]


def target_of(page: Path, link: str) -> Path:
    file = link.partition("#")[0]
    return (page.parent / file).resolve() if file else page


def anchors(page: Path) -> list[str]:
    """A page's headings as GitHub names them."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"[^\w\- ]", "", _LINK.sub("", heading).lower()).replace(" ", "-")
        found.append(text if text not in found else f"{text}-{found.count(text)}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        target = target_of(page, link)
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        anchor = link.partition("#")[2]
        assert not anchor or anchor in anchors(target), f"{link}: there are {anchors(target)}"


def test_headings_are_named_as_github_names_them() -> None:
    assert "contribute-a-boards-figures" in anchors(ROOT / "docs" / "performance.md")
    assert "what-bench-warned-of" in anchors(ROOT / "docs" / "performance.md")
    assert "1-export" in anchors(ROOT / "docs" / "jetson.md")


def test_every_page_is_reached_from_the_readme_by_one_step() -> None:
    assert {target_of(README, link) for link in links(README)} >= set(PAGES) - {README}
