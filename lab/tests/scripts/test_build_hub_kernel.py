"""The kernel for the hub: built, loaded without dynamask, and compared with dynamask."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "lab" / "scripts" / "build_hub_kernel.py"

# Loaded by file, as the kernels library does, in a process in which dynamask cannot be imported; then compared with it.
CHECK = """
import importlib.util, sys
from pathlib import Path
import torch

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dynamask":
            raise ImportError("the kernel imports " + name)

variant = Path(sys.argv[1]) / "build" / "torch-cpu"
sys.meta_path.insert(0, Hidden())
if importlib.util.find_spec("kernels"):
    from kernels import get_local_kernel
    from kernels._rust import Build
    assert len(Build.open(sys.argv[1]).general.backends) == 2
    kernel = get_local_kernel(Path(sys.argv[1]))
    print("loaded by kernels")
else:
    spec = importlib.util.spec_from_file_location("some_kernel", variant / "__init__.py")
    kernel = importlib.util.module_from_spec(spec)
    sys.modules["some_kernel"] = kernel
    spec.loader.exec_module(kernel)
torch.manual_seed(0)
query = torch.randn(1, 4, 48, 16)
key, value = torch.randn(2, 1, 2, 48, 16)
query, key, value = (t.requires_grad_() for t in (query, key, value))
scores = torch.randn(1, 2, 48)
results = {}
for backend in ("torch", "triton"):
    expiry = kernel.key_expiry(scores, [5, 9], local=2, sinks=1)
    output = kernel.interval_attention(query, key, value, expiry, backend=backend)
    gradient = torch.autograd.grad(output.square().sum(), [query, key, value])
    results[backend] = [expiry, output, *gradient]
sys.meta_path.pop(0)
import dynamask
assert dynamask.key_expiry is not kernel.key_expiry
expiry = dynamask.key_expiry(scores, [5, 9], local=2, sinks=1)
output = dynamask.interval_attention(query, key, value, expiry, backend="reference")
expected = [expiry, output, *torch.autograd.grad(output.square().sum(), [query, key, value])]
for found in results.values():
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
print("equal")
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_hub_kernel", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_built_folder_computes(script: Any, tmp_path: Path) -> None:
    namespace = script.build(tmp_path / "kernel")
    assert script.build(tmp_path / "kernel") == namespace, "built again over an earlier build"
    names = {path.name for path in (tmp_path / "kernel").iterdir()}
    assert names == {"build.toml", "README.md", "LICENSE", "torch-ext", "build"}
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHECK, str(tmp_path / "kernel")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "equal"
    if importlib.util.find_spec("kernels"):
        assert "loaded by kernels" in done.stdout


def test_what_would_need_dynamask_is_refused(script: Any, tmp_path: Path) -> None:
    def rewrite(text: str) -> str:
        return str(script.rewritten("dynamask.ops.triton.x", text, "space", is_package=False))

    assert rewrite("from dynamask.ops.bias import a\n    from dynamask.errors import b\n".replace("\n    ", "\n")) == (
        "from ...ops.bias import a\nfrom ...errors import b\n"
    )
    assert rewrite('op("dynamask::key_expiry")') == 'op("space::key_expiry")'
    with pytest.raises(ValueError, match="names dynamask"):
        rewrite('load("dynamask.ops.bias")')
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files"):
        script.build(tmp_path)
