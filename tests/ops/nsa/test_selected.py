"""NSA's selected branch in fla's kernels against gathered keys: on a GPU, or small under TRITON_INTERPRET=1.

`test_nsa.py` runs this file in a process of its own with the interpreter on, because Triton decides at import.
"""

from __future__ import annotations

import os

import pytest
import torch

from dynamask.ops.nsa import blocks as nsa
from dynamask.ops.nsa import selected as nsa_selected
from dynamask.ops.nsa.selected import kernels_take, selected_attention

parallel = pytest.importorskip("fla.ops.nsa.parallel", reason="flash-linear-attention is not installed")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)
DTYPE = torch.bfloat16 if GPU else torch.float32  # numpy, which the interpreter computes with, has no bfloat16
TOLERANCE = 1e-2 if GPU else 1e-6


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no clock to tune by: the first configuration of each kernel."""
    if GPU:
        return
    for kernel in (
        *(parallel.parallel_nsa_fwd_kernel, parallel.parallel_nsa_bwd_kernel_dq),
        parallel.parallel_nsa_bwd_kernel_dkv,
    ):
        monkeypatch.setattr(kernel.fn, "configs", kernel.fn.configs[:1])


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1), (16, 1), (1, 1)])
@pytest.mark.parametrize("counts", [3, 4])
def test_kernels_agree_with_gathered_keys(
    heads: int, groups: int, counts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not GPU and (heads, counts) not in ((4, 4), (3, 3)):
        pytest.skip("two cases are enough for the interpreter, which is slow")
    batch, length, dim, size = (3, 1000, 64, 64) if GPU else (2, 33, 16, 16)
    # Parts of one row, or one part.
    width = 16 * groups * dim * length
    monkeypatch.setattr(nsa_selected, "PADDED_ELEMENTS", width if heads == 4 else 4 * width)
    torch.manual_seed(0)

    def draw(number: int) -> torch.Tensor:
        return torch.randn(batch, number, length, dim, device=DEVICE, dtype=DTYPE).requires_grad_()

    query, key, value = draw(heads), draw(groups), draw(groups)
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    grouped = (wide[0] / dim**0.5).view(batch, groups, heads // groups, length, dim)
    layout = nsa.block_layout(batch, length, size, query.device)
    laid_key, laid_value = (nsa._laid_out(tensor, layout) for tensor in wide[1:])
    means = [laid.detach().unflatten(2, (-1, size)).mean(3) for laid in (laid_key, laid_value)]
    _, chosen = nsa._compressed(grouped.detach(), layout.slot, *means, layout, counts)
    expected = nsa._selected(grouped, layout.slot, chosen, laid_key, laid_value, size).reshape(query.shape)
    actual = selected_attention(query, key, value, chosen, block_size=size, scale=dim**-0.5)
    grad = torch.randn_like(actual)
    gradients = zip(
        torch.autograd.grad(actual, (query, key, value), grad),
        torch.autograd.grad(expected, wide, grad.double()),
        strict=True,
    )
    for name, (got, wanted) in zip(("output", "query", "key", "value"), [(actual, expected), *gradients], strict=True):
        error = ((got.double() - wanted).norm() / wanted.norm()).item()
        print(heads, groups, counts, name, f"{error:.1e}")
        assert error < TOLERANCE, (name, error)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_what_the_kernels_take() -> None:
    def takes(dtype: torch.dtype = torch.bfloat16, dim: int = 64, queries: int = 64, size: int = 64) -> bool:
        tensors = (torch.empty(1, 4, n, dim, device="cuda", dtype=dtype) for n in (queries, 64, 64))
        return kernels_take(*tensors, size)

    assert takes()
    assert not any([takes(dtype=torch.float32), takes(dim=8), takes(queries=1), takes(size=8), takes(size=48)])
