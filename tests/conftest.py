"""What every test may rely on, wherever it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

BARE = "bare"
_OURS = r"(paliedge|paliedge_export|benchmarks|tests)(\..*)?"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--announced",
        action="store_true",
        help="list what packages announce to drop; it stays an error where the project itself uses it",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--announced"):
        for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
            config.addinivalue_line("filterwarnings", f"default::{kind}")
            config.addinivalue_line("filterwarnings", f"error::{kind}:{_OURS}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m bare...` modules without that mark are not even imported: what they import is not there."""
    if not config.getoption("-m").startswith(BARE):
        return None
    modules = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return not any(f"pytest.mark.{BARE}" in path.read_text() for path in modules) or None
