"""The names of `DynamaskConfig`'s fields, read from source: to import the class takes seconds."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

_OWN = Path(__file__).with_name("configuration.py")


def field_names() -> list[str] | None:
    """Return the fields of `DynamaskConfig`, transformers' own among them, without an import of either package.

    Returns:
        The names, as `DynamaskConfig.__dataclass_fields__` has them; None where a source file is missing.
    """
    found = find_spec("transformers")
    if found is None or found.origin is None:
        return None
    inherited = Path(found.origin).with_name("configuration_utils.py")
    try:
        return [*_annotated(inherited, "PreTrainedConfig"), *_annotated(_OWN, "DynamaskConfig")]
    except (OSError, StopIteration):
        return None


def _annotated(file: Path, name: str) -> list[str]:
    """Names that a class annotates, but for its class variables. Raises StopIteration where there is no such class."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return [
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not ast.unparse(node.annotation).startswith("ClassVar")
    ]
