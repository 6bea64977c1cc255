"""What the pages say of the code is so: options, files, layers, messages, errors."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from paliedge import GenerationOptions, errors
from paliedge.cli import main
from paliedge.planning.devices import DEVICES
from tests.docs.pages import PAGES, README, blocks, commands, name_of, section, spans, table
from tests.paths import ROOT

DOCS = ROOT / "docs"
ARCHITECTURE = DOCS / "architecture.md"
_FOLDERS = ("runtime", "export", "tests", "benchmarks", "docker", "locks", "docs", ".ci")
_PLACEHOLDER = re.compile(r"[A-Z]{2}|\*")


def user_errors() -> dict[str, int]:
    """Exit codes by the names of the errors that a user can cause."""
    found = {name: one for name, one in vars(errors).items() if isinstance(one, type) and name != "PaliEdgeError"}
    return {name: one.exit_code for name, one in found.items() if issubclass(one, errors.PaliEdgeError)}


def option_names(verb: str) -> set[str]:
    command = main.get_command(click.Context(main), verb)
    assert command, f"no verb {verb}"
    shown = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    return {name for one in shown for name in (*one.opts, *one.secondary_opts)} | {"--help"}


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len(README.read_text().split()) <= 1400
    assert len(README.read_text().splitlines()) <= 220


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_of_a_command_exists(page: Path) -> None:
    for command in commands(page):
        words = shlex.split(command, comments=True) if re.match(r"(python -m )?paliedge ", command) else []
        words = words[2:] if words[:2] == ["python", "-m"] else words
        if len(words) > 1 and not _PLACEHOLDER.match(words[1]):
            given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            known = option_names(words[1]) if not words[1].startswith("-") else given
            assert given <= known, command


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_script_and_target_of_a_command_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in commands(page):
        for module in re.findall(r"-m (benchmarks[\w.]+)", command):
            assert find_spec(module), command
        for target in command.split()[1:] if re.match(r"make [a-z]", command) else []:
            assert "=" in target or re.search(rf"^{re.escape(target)}(?= |:)", makefile, re.MULTILINE), command


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_is_there(page: Path) -> None:
    for span in spans(page):
        if re.fullmatch(rf"({'|'.join(map(re.escape, _FOLDERS))})/[\w./-]*", span) and not _PLACEHOLDER.search(span):
            assert (ROOT / span).exists(), span


def test_the_table_of_folders_names_files_that_are_there() -> None:
    rows = table(section(ARCHITECTURE, "## Where to change what"))
    assert len(rows) > 20
    for folder, text in rows:
        path = ROOT / folder.strip("`")
        assert path.is_dir(), folder
        for name in re.findall(r"`([\w./]+\.py)`", text):
            assert (path / name).exists() or (ROOT / name).exists(), f"{folder}: {name}"


def test_every_package_has_its_line_in_the_table_of_folders_and_in_the_readme() -> None:
    named = {row[0].strip("`") for row in table(section(ARCHITECTURE, "## Where to change what"))}
    tree = next(block for block in blocks(README, "text") if block.startswith("runtime/paliedge/"))
    for root in ("runtime/paliedge", "export/paliedge_export"):
        for package in sorted(path.parent for path in (ROOT / root).glob("*/__init__.py")):
            assert str(package.relative_to(ROOT)) in named
            assert re.search(rf"\b{package.name}/", tree), package


def layers(container: str) -> list[str]:
    """Of import-linter's contract, top down."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf'containers = \["{container}"\].*?layers = \[(.*?)\]', text, re.DOTALL)
    assert found
    return re.findall(r'"([^"]+)"', found[1])


def test_the_drawing_of_packages_is_the_contract() -> None:
    drawing = next(block for block in blocks(ARCHITECTURE, "text") if block.startswith("runtime/paliedge  "))
    middle = drawing.index("export/paliedge_export")
    columns = [[line[:middle], line[middle:]] for line in drawing.splitlines()[2:]]
    for column, container in enumerate(("paliedge", "paliedge_export")):
        shown = [re.split(r"\s{2,}", row[column].strip())[0] for row in columns]
        assert [name for name in shown if name] == layers(container)


def sources() -> Iterator[str]:
    """Code whose strings are in one piece."""
    for folder in (ROOT / "runtime" / "paliedge", ROOT / "export" / "paliedge_export"):
        for path in sorted(folder.rglob("*.py")):
            yield re.sub(r'"\s*\n\s*f?"', "", path.read_text())


def test_every_message_that_is_explained_is_one_of_ours() -> None:
    code = "\n".join(sources())
    rows = re.findall(r"^\| (.*?) \| ", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = [span for row in rows for span in re.findall(r"`([^`]+)`", row) if " " in span]
    messages = [message for message in messages if not message.startswith("make ")]
    assert len(messages) > 15
    for message in messages:
        assert message in code, message


def test_every_error_has_its_line() -> None:
    rows = table(section(DOCS / "python.md", "## Errors"))
    assert {name.strip("`"): int(code) for name, _, code in rows} == user_errors()


def test_every_exit_code_has_its_line() -> None:
    codes = {int(row[0]) for row in table(section(DOCS / "cli.md", "## Exit codes"))}
    assert codes == {0, 6, 130} | set(user_errors().values())


def test_every_answering_option_has_its_line() -> None:
    names = [row[0].strip("`") for row in table(section(DOCS / "python.md", "## Options"))]
    assert names == [field.name for field in fields(GenerationOptions)]


def test_every_verb_has_its_line() -> None:
    named = " ".join(row[0] for row in table(section(DOCS / "cli.md", "## Verbs")))
    for verb in main.list_commands(click.Context(main)):
        assert re.search(rf"`{verb}\b", named), verb


def test_the_readmes_precisions_are_those_that_fit() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "jetson_floors.json").read_text())["rows"]
    shown = table(section(README, "## On a Jetson"))
    assert len(shown) == 4
    for board, targets, precisions in shown:
        fitting = {row["precision"] for row in rows if row["device"].startswith(board)}
        assert set(precisions.split(", ")) == fitting
        devices = [device for device in DEVICES.values() if device.name.startswith(board)]
        assert set(re.findall(r"`(\w+)`", targets)) == {name for device in devices for name in device.targets}
