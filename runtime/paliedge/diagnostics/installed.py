"""Which installed packages are of versions that paliedge does not allow; it is tested with no others."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

_SELF, _DEVELOPERS = "paliedge", "dev"


class Outside(NamedTuple):
    """An installed package, its version, and the versions that are allowed."""

    package: str
    version: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}, where paliedge allows {self.allowed}"

    @property
    def action(self) -> str:
        """What puts it right."""
        return f'Run `pip install "{self.package}{self.allowed}"`.'


def find_outside() -> Iterator[Outside]:
    """Of the packages that paliedge or an extra of it asks for, those that are installed in another version."""
    try:
        own = distribution(_SELF)
    except PackageNotFoundError:  # a checkout that is only on the path
        return
    extras = [extra for extra in own.metadata.get_all("Provides-Extra") or [] if extra != _DEVELOPERS]
    seen = set()
    for text in own.requires or ():
        wanted = Requirement(text)
        if wanted.name in seen or not _applies(wanted, extras):
            continue
        seen.add(wanted.name)
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            continue
        if not _allows(wanted, found):
            yield Outside(wanted.name, found, str(wanted.specifier))


def _allows(wanted: Requirement, found: str) -> bool:
    try:
        return wanted.specifier.contains(found, prereleases=True)
    except InvalidVersion:  # a build of somebody's own
        return True


def _applies(wanted: Requirement, extras: list[str]) -> bool:
    return wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in ["", *extras])
