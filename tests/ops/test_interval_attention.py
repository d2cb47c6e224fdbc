"""The operator: backends agree, gradients are right, registration is sound, bad input is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamask import InvalidInputError, dynamic_mask_attention, interval_attention, key_expiry
from dynamask.ops.interval import blocked
from dynamask.ops.interval.operators import interval_attention_op


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


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 90),
    window=st.integers(1, 40),
    data=st.data(),
    ratio=st.integers(1, 3),
    block=st.integers(1, 50),
)
def test_lean_path_is_the_reference(length: int, window: int, data: st.DataObject, ratio: int, block: int) -> None:
    queries = data.draw(st.integers(1, length))
    local = data.draw(st.integers(0, window))
    query, key, value, scores = inputs(heads=2 * ratio, queries=queries, length=length)
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.8
    segments = (torch.rand(2, length, generator=torch.Generator().manual_seed(2)) < 0.05).long().cumsum(-1)
    options = {
        "local": local,
        "key_mask": mask if data.draw(st.booleans()) else None,
        "segment_ids": segments if data.draw(st.booleans()) else None,
    }
    expiry = key_expiry(scores, window, **options)
    expected = interval_attention(query, key, value, expiry, bias=scores, backend="reference")
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected_grads = torch.autograd.grad(expected, (query, key, value, scores), grad)
    arguments = [t.detach() for t in (query, key, value)]
    output, lse = blocked.forward(*arguments, expiry, scores.detach(), 0.5, block=block)
    torch.testing.assert_close(output, expected.detach())
    grads = blocked.backward(grad, *arguments, expiry, scores.detach(), output, lse, 0.5, block=block)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str) -> None:
    query, key, value, scores = inputs(batch=1, queries=9, length=13, dim=3)
    mask = torch.ones(1, 13, dtype=torch.bool)
    mask[0, :3] = False
    expiry = key_expiry(scores.detach(), 4, key_mask=mask)
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: interval_attention(q, k, v, expiry, bias=b, backend=backend), (query, key, value, scores)
    )


def test_gradcheck_without_bias_and_with_another_value_width() -> None:
    query, key, _, scores = inputs(batch=1, length=9, dim=3)
    value = torch.randn(1, 2, 9, 5, dtype=torch.float64, requires_grad=True)
    expiry = key_expiry(scores.detach(), 4)
    assert torch.autograd.gradcheck(
        lambda q, k, v: interval_attention(q, k, v, expiry, backend="torch"), (query, key, value)
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_query_without_keys_gives_zeros_and_zero_gradients(backend: str) -> None:
    query, key, value, scores = inputs(length=8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :5] = False
    output = dynamic_mask_attention(query, key, value, scores, 3, key_mask=mask, backend=backend)
    assert (output[0, :, :5] == 0).all()
    assert (output[0, :, 5:] != 0).any()
    output.sum().backward()
    assert (query.grad[0, :, :5] == 0).all()
    for tensor in (key, value, scores):
        assert torch.isfinite(tensor.grad).all()
        assert (tensor.grad[0, :, :5] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_nan_score_reaches_only_the_rows_that_keep_it(backend: str) -> None:
    query, key, value, scores = (t.detach() for t in inputs(length=12))
    scores[:, :, 2] = float("nan")
    expiry = key_expiry(scores, 4)
    assert (expiry[:, :, 2] == 4).all()  # lowest: it goes as soon as four others are there
    output = interval_attention(query, key, value, expiry, bias=scores, backend=backend)
    assert output[:, :, 2:4].isnan().all()
    assert not output[:, :, :2].isnan().any()
    assert not output[:, :, 4:].isnan().any()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_dense_and_sliding_agree_with_sdpa(backend: str) -> None:
    query, key, value, _ = (t.detach().float() for t in inputs(length=300, dim=16))
    position = torch.arange(300)
    repeat = [t.repeat_interleave(2, dim=1) for t in (key, value)]
    for window in (300, 37):
        expiry = (position + window).clamp(max=300).int().expand(2, 2, 300)
        mask = (position <= position[:, None]) & (position[:, None] < position + window)
        expected = F.scaled_dot_product_attention(query, *repeat, attn_mask=mask)
        actual = interval_attention(query, key, value, expiry, backend=backend)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float64(dtype: torch.dtype) -> None:
    wide = inputs(length=200, dim=16)
    narrow = [t.detach().to(dtype) for t in wide[:3]]
    expected = dynamic_mask_attention(*[t.double() for t in narrow], wide[3].detach(), 32, backend="reference")
    actual = dynamic_mask_attention(*narrow, wide[3].detach().float(), 32, backend="torch")
    assert actual.dtype == dtype
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]


def test_memory_is_not_quadratic() -> None:
    """At N = 16384 the mask of one head alone would be 256 MiB; a tile here is a thousandth of that."""
    length = 16384
    expiry = key_expiry(torch.randn(1, 1, length), 64)
    largest = max(index.shape[-1] * (stop - start) for start, stop, index, _ in blocked.key_lists(expiry, length, 256))
    assert largest <= 256 * (64 + 256)


def test_operator_is_registered_soundly() -> None:
    query, key, value, scores = inputs(batch=1, length=12)
    expiry = key_expiry(scores.detach(), 5)
    torch.library.opcheck(interval_attention_op, (query, key, value, expiry, scores, 0.5, "torch", 0))
    torch.library.opcheck(interval_attention_op, (query, key, value, expiry, None, 0.5, "torch", 0))


def test_compiles_without_graph_breaks() -> None:
    query, key, value, scores = (t.detach().float() for t in inputs(length=32))
    scores.requires_grad_()

    def attend(q, k, v, s):
        return dynamic_mask_attention(q * 1.0, k, v, s, 8).square()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(query, key, value, scores), attend(query, key, value, scores)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(output.sum(), scores)[0] for output in (actual, expected)), atol=1e-5, rtol=1e-5
    )


def _change(index: int, tensor: torch.Tensor) -> list:
    query, key, value, scores = (t.detach() for t in inputs(length=8))
    arguments = [query, key, value, key_expiry(scores, 4), scores]
    arguments[index] = tensor
    return arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (_change(0, torch.zeros(2, 3, 8, 4, dtype=torch.float64)), "must be a multiple"),
        (_change(0, torch.zeros(2, 4, 9, 4, dtype=torch.float64)), "9 queries but only 8 keys"),
        (_change(0, torch.zeros(2, 4, 8, 4)), "must share one dtype"),
        (_change(0, torch.zeros(4, 8, 4)), "query must be a float tensor"),
        (_change(1, torch.zeros(2, 2, 8, 5, dtype=torch.float64)), "key must be"),
        (_change(2, torch.zeros(2, 2, 7, 4, dtype=torch.float64)), "value must agree"),
        (_change(3, torch.zeros(2, 2, 8)), "expiry must be int32"),
        (_change(4, torch.zeros(2, 8)), "bias must be a float tensor"),
        (_change(4, torch.zeros(2, 2, 8, device="meta")), "one device"),
    ],
)
def test_bad_input_is_named(arguments: list, message: str) -> None:
    *tensors, bias = arguments
    with pytest.raises(InvalidInputError, match=message):
        interval_attention(*tensors, bias=bias)


def test_unknown_or_unavailable_backend_is_named() -> None:
    query, key, value, scores = inputs(length=8)
    with pytest.raises(InvalidInputError, match="'cuda'"):
        dynamic_mask_attention(query, key, value, scores, 4, backend="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidInputError, match="backend='triton' needs a CUDA device"):
            dynamic_mask_attention(query, key, value, scores, 4, backend="triton")


def test_autocast_takes_inputs_of_mixed_width_as_sdpa_does() -> None:
    query, key, value = (torch.randn(1, 2, 20, 8) for _ in range(3))
    scores = torch.randn(1, 2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        actual = dynamic_mask_attention(query, key, value.bfloat16(), scores, 5)
    narrow = (t.bfloat16() for t in (query, key, value))
    assert torch.equal(actual, dynamic_mask_attention(*narrow, scores, 5))
