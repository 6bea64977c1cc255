"""What every test may rely on, wherever it runs."""

from __future__ import annotations

from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["tests.bundles"]

_FIRST_WITH_OPSET_24 = (1, 25)
_NEED_TORCH = ("torch", "transformers", "peft", "optimum")
BARE = "bare"
_OURS = r"(paliedge|paliedge_export|benchmarks|tests)(\..*)?"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--announced",
        action="store_true",
        help="list what packages announce to drop; it stays an error where the project itself uses it",
    )
    parser.addoption(
        "--without-torch",
        action="store_true",
        help="where torch is not to be had: leave out what needs it, and count it as skipped",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-torch") and find_spec("torch"):
        raise pytest.UsageError("--without-torch is for where torch is not installed; here it is")
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs graphs of opset 24 is skipped, and so counted, where ONNX Runtime cannot."""
    marked = [(item, mark) for item in items if (mark := item.get_closest_marker("opset24"))]
    if not marked:
        return
    from paliedge.backends.ort import VERSION

    if tuple(map(int, VERSION.split(".")[:2])) >= _FIRST_WITH_OPSET_24:
        return
    for item, mark in marked:
        parameters = str(getattr(item, "callspec", None) and item.callspec.params)  # type: ignore[attr-defined]
        if mark.kwargs.get("always") or "jetpack7" in parameters or "'rtx'" in parameters:
            item.add_marker(pytest.mark.skip(reason="this ONNX Runtime runs no graphs of opset 24; 1.25 does"))


def _needs_torch(error: BaseException | None) -> bool:
    """Whether an import of torch, or of a package that is installed with it alone, is behind an error."""
    while error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _NEED_TORCH:
            return True
        error = error.__cause__
    return False


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    excinfo = getattr(getattr(report, "call", None), "excinfo", None)
    if collector.config.getoption("--without-torch") and report.failed and excinfo and _needs_torch(excinfo.value):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: needs torch")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if item.config.getoption("--without-torch") and call.excinfo and _needs_torch(call.excinfo.value):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "Skipped: needs torch")
    return report
