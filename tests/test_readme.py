"""The README: short, plain, its Python blocks run as they stand, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

from dynamask.cli.main import app
from tests.processes import run_program

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
MOST_LINES = 150
DOCS = [path for pattern in ("*.md", "appendix/*.md") for path in (ROOT / "docs").glob(pattern)]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(path.relative_to(ROOT).as_posix() for path in DOCS)]
MOST_NUMBERS = 0.04
"""Numbers per word of prose."""


def prose(text: str) -> str:
    """The text without code, pictures, tables, generated parts and the targets of links."""
    text = re.sub(r"```.*?```|<!-- table: .*?<!-- end of table -->", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|(?<=\])\([^)]*\)|`[^`]*`", "", text)
    return "\n".join(line for line in text.split("\n") if not line.startswith("|"))


def commands(text: str) -> list[str]:
    """The lines of the bash blocks that call `dynamask`, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").split("\n")]
    return [line for line in lines if line.startswith("dynamask ")]


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= MOST_LINES


def test_its_prose_has_few_numbers() -> None:
    words = prose(TEXT).split()
    numbers = [word for word in words if re.search(r"\d", word)]
    assert len(numbers) <= MOST_NUMBERS * len(words), numbers


def test_its_picture_is_small() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", TEXT)
    assert len(pictures) == 1
    assert (ROOT / pictures[0]).stat().st_size < 100_000


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_its_blocks_run(number: int, tmp_path: Path) -> None:
    done = run_program(BLOCKS[number], tmp_path)
    assert done.returncode == 0, f"{BLOCKS[number]}\n{done.stderr[-3000:]}"


def test_it_has_blocks() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if target and not ((ROOT / page).parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    """Every `dynamask` command of a bash block exists and takes the options and arguments it is given."""
    tree = typer.main.get_command(app)
    for line in commands((ROOT / page).read_text(encoding="utf-8")):
        words = shlex.split(line, comments=True)[1:]
        _parse(tree, words, line)


def _parse(command: click.Command, words: list[str], line: str) -> None:
    context = click.Context(command, info_name="dynamask")
    while isinstance(command, click.Group):
        assert words, f"{line}: a command is missing"
        name, words = words[0], words[1:]
        found = command.get_command(context, name)
        assert found is not None, f"{line}: there is no command {name}"
        if found.hidden and "Needs the laboratory" in (found.help or ""):
            return
        command, context = found, click.Context(found, parent=context, info_name=name)
    try:
        command.make_context(command.name or "", list(words), parent=context.parent)
    except click.UsageError as error:
        raise AssertionError(f"{line}: {error.format_message()}") from error
