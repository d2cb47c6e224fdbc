"""The site: the names and commands that its pages list exist, and its navigation holds every page to be indexed."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import typer.main
import yaml

import dynamask
import dynamask.training
from dynamask.cli.main import LAB_COMMANDS, app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def _resolve(name: str) -> object:
    """Import the longest module of a dotted name, and take the rest as attributes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def test_the_new_names_exist() -> None:
    """The right column of the page of names: modules of the product, and of the laboratory by their files."""
    page = (DOCS / "names.md").read_text(encoding="utf-8")
    modules = page.split("## Modules")[1].split("## Commands")[0]
    new = [row.split("|")[2] for row in modules.split("\n") if row.startswith("| `")]
    named = [name for cell in new for name in re.findall(r"`(dynamask[\w.]*)`", cell)]
    assert len(named) > 20
    for name in named:
        if name.startswith("dynamask_lab"):
            path = ROOT / "lab" / name.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), name
        else:
            _resolve(name)


def test_the_api_page_names_what_exists() -> None:
    named = re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for name in named:
        _resolve(name)
    shown = {name.rpartition(".")[2] for name in named}
    modules = [name for name in named if name in ("dynamask.errors", "dynamask.recipes")]
    shown |= {member for module in modules for member in vars(importlib.import_module(module))}
    assert set(dynamask.__all__) - shown <= {"convert"}
    assert set(dynamask.convert.__all__) - shown <= {"CompiledLayers", "RecordedPrompts"}  # what functions return
    helpers = {"TrainResult", "adamw", "checkpoints", "model_folder", "open_corpus", "open_run", "parameter_groups"}
    assert set(dynamask.training.__all__) - shown <= helpers  # of training loops of one's own


def test_every_command_is_on_the_commands_page() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    tree = typer.main.get_command(app)
    names = []
    for name, command in tree.commands.items():  # type: ignore[attr-defined]
        inside = getattr(command, "commands", None)
        shown = [] if inside is None else [inner for inner, each in inside.items() if not each.hidden]
        names += [name] if inside is None else [f"{name} {inner}" for inner in shown]
    for name in names:
        if not name.startswith(LAB_COMMANDS):
            assert f"`dynamask {name}" in page, name


def test_navigation_holds_every_page_but_the_ledgers_and_the_appendix() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed: list[str] = []
    for entry in settings["nav"]:
        (value,) = entry.values()
        listed += [value] if isinstance(value, str) else [page for inner in value for page in inner.values()]
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))
    assert settings["not_in_nav"].split() == ["/results/", "/appendix/"]


def test_the_appendix_is_not_indexed_and_is_reached() -> None:
    """Its pages are written by hand: the search leaves them out, and a page of the navigation links each."""
    pages = sorted((DOCS / "appendix").glob("*.md"))
    assert pages
    reached = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    for page in pages:
        assert page.read_text(encoding="utf-8").startswith("---\nsearch:\n  exclude: true\n---\n"), page.name
        assert f"](appendix/{page.name}" in reached, page.name


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_blocks_are_python(page: str) -> None:
    """Blocks that need a user's data do not run here, but compile."""
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL):
        compile(block, page, "exec")
