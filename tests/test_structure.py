"""The structure of the code, read from its imports: the product never imports the laboratory, and nothing circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    ("errors", "lazy", "registration"),
    ("hub", "integers", "lock"),
    ("ops",),
    ("packed_ranks", "cache_layer"),
    ("cache", "attention_function"),
    ("mixers",),
    ("models",),
    ("recipes", "data", "layers", "convert_settings"),
    ("training",),
    ("evaluation",),
    ("inspect",),
    ("convert",),
    ("serving", "cli", "integrations"),
    ("__main__",),
)
"""Rooms of the product, from the bottom: a room imports from those below it, never from one above."""


def _modules(base: Path, package: str) -> dict[str, Path]:
    found = {}
    for file in (base / package).rglob("*.py"):
        parts = file.relative_to(base).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = _modules(ROOT, "dynamask") | _modules(ROOT / "lab", "dynamask_lab")


def _imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import of a module, those inside functions included, those for type checkers alone left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from _imports(node)


def _arrows() -> dict[str, set[str]]:
    arrows: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        found = set()
        for node in _imports(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {name if name in MODULES else str(node.module) for name in names}
            else:
                found |= {alias.name for alias in node.names}
        arrows[module] = {name for name in found if name in MODULES and name != module}
    return arrows


ARROWS = _arrows()


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(arrows.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return found


def test_no_module_is_part_of_a_circle() -> None:
    assert circles(ARROWS) == []


def test_the_search_for_circles_finds_one() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_the_product_never_imports_the_laboratory() -> None:
    back = [(a, b) for a, found in ARROWS.items() if a.startswith("dynamask.") for b in found if "dynamask_lab" in b]
    assert back == []


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("dynamask.")))
def test_rooms_import_downwards(module: str) -> None:
    level = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
    room = module.split(".")[1]
    assert room in level, f"{module}: give the new room its layer in LAYERS"
    for other in ARROWS[module]:
        if other.count(".") and other.split(".")[1] != room:
            assert level[other.split(".")[1]] < level[room], f"{module} imports {other}, which stands above it"
