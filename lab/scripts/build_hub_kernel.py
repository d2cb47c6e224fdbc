"""Build the operators as a kernel for the `kernels` hub: a folder that `kernels.get_local_kernel` loads.

    python lab/scripts/build_hub_kernel.py OUT

The kernels are written in Triton, so nothing is compiled and one build serves every machine. The folder has the layout
of a kernel repository:

    build.toml, README.md, LICENSE    what kernel-builder and the hub read
    torch-ext/dynamask_attention/     the sources: `dynamask.ops` and what it imports, with relative imports
    build/torch-cuda/, torch-cpu/     the same, with the metadata.json that `kernels` reads

Operators are registered under a namespace that carries a digest of the sources, so that several versions, and dynamask
itself, can be loaded in one process. Publishing the folder is left to a person.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAME = "dynamask-attention"
MODULE = NAME.replace("-", "_")
PUBLIC = ("dynamic_mask_attention", "future_attention", "interval_attention", "key_expiry")
BACKENDS = ("cpu", "cuda")

_ENTRY = "dynamask.ops"
_IMPORT = re.compile(r"^(\s*)from dynamask((?:\.\w+)*) import ", flags=re.MULTILINE)


def sources() -> dict[str, Path]:
    """Find the modules that the operators need, those imported inside functions included: name -> file."""
    found: dict[str, Path] = {}
    waiting = [_ENTRY, *_members("dynamask.ops.hopper")]  # Hopper's modules are imported by name
    while waiting:
        module = waiting.pop()
        file = _file(module)
        if module in found or file is None:
            continue
        found[module] = file
        package = module.rpartition(".")[0]
        if package != "dynamask":
            waiting.append(package)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dynamask":
                waiting.append(node.module)
                waiting += [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import) and any(alias.name.startswith("dynamask") for alias in node.names):
                raise ValueError(f"{module}: import names from modules of dynamask, not the modules")
    return dict(sorted(found.items()))


def _file(module: str) -> Path | None:
    base = ROOT / module.replace(".", "/")
    return next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None)


def _members(package: str) -> list[str]:
    return [f"{package}.{file.stem}" for file in (ROOT / package.replace(".", "/")).glob("[!_]*.py")]


def rewritten(module: str, text: str, namespace: str, *, is_package: bool) -> str:
    """Make a module's imports relative and put its operators into the namespace.

    Raises:
        ValueError: a name of dynamask is left in the code.
    """
    parts = module.split(".")[1:]
    dots = "." * (len(parts) + (1 if is_package else 0))
    text = _IMPORT.sub(lambda found: f"{found[1]}from {dots}{found[2][1:]} import ", text)
    text = text.replace('"dynamask::', f'"{namespace}::').replace("torch.ops.dynamask.", f"torch.ops.{namespace}.")
    # A module imported by a name that is put together: relative to the package that the line stands in.
    if not is_package:
        package = ".".join(module.split(".")[:-1])
        text = text.replace(f'f"{package}.', 'f"{__package__}.')
    tree = ast.parse(text)
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        bare = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
        if bare and re.match(r"dynamask(\.|::)", str(node.value)):  # type: ignore[attr-defined]
            raise ValueError(f"{module}, line {node.lineno}: {node.value!r} names dynamask")  # type: ignore[attr-defined]
        if isinstance(node, ast.ImportFrom) and node.level == 0 and str(node.module).startswith("dynamask"):
            raise ValueError(f"{module}, line {node.lineno}: an absolute import is left")
    return text


def build(out: Path) -> str:
    """Write the folder, and return the operators' namespace.

    Raises:
        FileExistsError: there is something at `out` that is no earlier build.
    """
    if out.exists() and any(out.iterdir()) and not (out / "build.toml").is_file():
        raise FileExistsError(f"{out} holds other files: name a new folder")
    modules = sources()
    texts = {module: file.read_text(encoding="utf-8") for module, file in modules.items()}
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()[:10]
    namespace = f"{MODULE}_{digest}"
    files = {
        file.relative_to(ROOT / "dynamask"): rewritten(
            module, texts[module], namespace, is_package=file.name == "__init__.py"
        )
        for module, file in modules.items()
    }
    files[Path("__init__.py")] = _init()
    for folder in ("torch-ext", "build"):
        shutil.rmtree(out / folder, ignore_errors=True)
    places = [out / "torch-ext" / MODULE, *(out / "build" / f"torch-{backend}" for backend in BACKENDS)]
    for place in places:
        for path, text in files.items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_text(text, encoding="utf-8")
    for backend, place in zip(BACKENDS, places[1:], strict=True):
        facts = {"id": f"{namespace}_{backend}", "name": NAME, "version": 1, "license": "Apache-2.0"}
        metadata = {**facts, "python-depends": [], "backend": {"type": backend}}
        (place / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    listed = ", ".join(f'"{backend}"' for backend in BACKENDS)
    (out / "build.toml").write_text(
        f'[general]\nedition = 5\nname = "{NAME}"\nversion = 1\nlicense = "Apache-2.0"\nbackends = [{listed}]\n\n'
        "[torch-noarch]\n",
        encoding="utf-8",
    )
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    (out / "README.md").write_text(_card(), encoding="utf-8")
    return namespace


def _init() -> str:
    names = "".join(f'    "{name}",\n' for name in PUBLIC)
    imports = "".join(f"    {name},\n" for name in PUBLIC)
    return (
        '"""Attention whose mask is one interval per key: Dynamic Mask Attention (arXiv 2508.02124)."""\n\n'
        f"from .ops import (\n{imports})\n\n__all__ = [\n{names}]\n"
    )


def _card() -> str:
    return f"""---
library_name: kernels
license: apache-2.0
tags: [kernels, attention, sparse-attention, triton]
---

# {NAME}

Attention whose mask is one interval per key, in Triton. Every key gets a rank, each query sees the best-ranked keys of
its prefix, and a key that drops out never returns: `key_expiry` turns ranks into one integer per key, and
`interval_attention` attends over these intervals, with gradients.

```python
import torch
from kernels import get_kernel

kernel = get_kernel("OWNER/{NAME}", version=1)
query = torch.randn(1, 8, 4096, 64, device="cuda", dtype=torch.bfloat16)
key, value = torch.randn(2, 1, 2, 4096, 64, device="cuda", dtype=torch.bfloat16)
scores = torch.randn(1, 2, 4096, device="cuda")
expiry = kernel.key_expiry(scores, 256, local=64, sinks=4)
output = kernel.interval_attention(query, key, value, expiry)
```

Shapes: query (B, H, N, D); key and value (B, G, N, D), H a multiple of G; scores and expiry (B, G, N).
`dynamic_mask_attention` does both steps, `future_attention` computes the largest weight that later queries give each
key. On a CPU a path in plain PyTorch runs. Models, caches and conversion are in the `dynamask-attention` package.
"""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    out = parser.parse_args().out
    try:
        namespace = build(out)
    except (FileExistsError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    count = len(list((out / "torch-ext").rglob("*.py")))
    print(f"{out}: {count} modules, operators under torch.ops.{namespace}. Publishing it is left to a person.")


if __name__ == "__main__":
    main()
