"""What holds of interval attention in every backend, as checks that its tests share."""

from __future__ import annotations

import torch

from dynamask import interval_attention, key_expiry

LOWEST = torch.finfo(torch.float32).min


def inputs(batch=2, heads=4, groups=2, queries=None, length=40, dim=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = length if queries is None else queries

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return (
        draw(batch, heads, queries, dim),
        draw(batch, groups, length, dim),
        draw(batch, groups, length, dim),
        draw(batch, groups, length),
    )


def weights_sum_to_one(backend: str, level: float, queries: int, device: str) -> None:
    """In the forward pass and, by the gradient of the values, in the backward pass."""
    query, key, _, noise = (t.detach().float().to(device) for t in inputs(queries=queries, dim=16))
    bias = (level + noise).clamp(LOWEST, -LOWEST)
    bias[0] = noise[0]
    bias[0, :, 10:20] = level
    value = torch.ones(2, 2, 40, 16, device=device).requires_grad_()
    output = interval_attention(query, key, value, key_expiry(noise, 7), bias=bias, backend=backend)
    torch.testing.assert_close(output, torch.ones_like(output), atol=1e-6, rtol=0)
    total = torch.autograd.grad(output.sum(), value)[0].sum((1, 2, 3))
    torch.testing.assert_close(total, torch.full_like(total, 4.0 * queries * 16), atol=0, rtol=1e-6)


def spoilt_reaches_only_its_queries(
    backend: str, number: float, which: str, device: str, dtype: torch.dtype, tolerance: float, queries: int = 40
) -> None:
    """One key, value or padded position is not finite: queries that do not see it, and their gradients, stay as
    they are."""
    tensors = [t.detach().to(device, dtype) for t in inputs(dim=16, queries=queries)]
    mask = torch.ones(2, 40, dtype=torch.bool, device=device)
    spoilt = [t.clone() for t in tensors[:3]]
    at = 2 if queries == 40 else 38
    if which == "padding":
        mask[:, 30:33] = False
        mask[:, :2] = False
        spoilt[1][:, :, 30:33], spoilt[2][:, :, 30:33] = number, number
        spoilt[1][:, :, :2], spoilt[2][:, :, :2] = number, number
        if queries == 40:
            spoilt[0][:, :, :2] = number  # they see nothing
    else:
        spoilt[1 if which == "key" else 2][:, :, at] = number
    scores = tensors[3]
    scores[:, :, at] = 0.1
    expiry = key_expiry(scores, 6, key_mask=mask)
    if queries != 40:
        expiry[:, :, 38] = 39
    position = torch.arange(40 - queries, 40, device=device)
    sees = (position >= at) & (position < expiry[:, :, at, None])
    sees = sees if which != "padding" else torch.zeros_like(sees)
    assert which == "padding" or (sees.any() and not sees.all())
    results = []
    for inputs_ in (tensors[:3], spoilt):
        leaves = [t.clone().requires_grad_() for t in (*inputs_, scores)]
        output = interval_attention(*leaves[:3], expiry, bias=leaves[3], backend=backend)
        rows = ~sees.repeat_interleave(2, 1)
        results.append((output, torch.autograd.grad(output[rows].square().sum(), leaves)))
    (clean, clean_grads), (output, grads) = results
    torch.testing.assert_close(output[rows], clean[rows], atol=tolerance, rtol=tolerance)
    if which != "padding":
        assert not output[~rows].isfinite().any(-1).any() or which == "key"
    assert grads[0][rows].isfinite().all()
    for actual, expected in zip(grads, clean_grads, strict=True):
        # Rows that see it got no gradient, and so no finite one: 0 · NaN. All others are as they were.
        finite = actual.isfinite()
        torch.testing.assert_close(actual[finite], expected[finite], atol=tolerance, rtol=tolerance)
        assert which != "padding" or finite.all()
