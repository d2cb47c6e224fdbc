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
from tests.ops.checks import LOWEST, inputs, spoilt_reaches_only_its_queries, weights_sum_to_one


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
    output, *parts = blocked.forward(*arguments, expiry, scores.detach(), 0.5, block=block)
    torch.testing.assert_close(output, expected.detach())
    grads = blocked.backward(grad, *arguments, expiry, scores.detach(), output, *parts, 0.5, block=block)
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
    torch.library.opcheck(interval_attention_op, (query, key, value, expiry, scores, 0.5, "torch", []))
    torch.library.opcheck(interval_attention_op, (query, key, value, expiry, None, 0.5, "torch", []))


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


@pytest.mark.slow
def test_one_graph_serves_all_lengths() -> None:
    compiled = torch.compile(lambda *tensors: dynamic_mask_attention(*tensors, 5), fullgraph=True, backend="eager")
    for length in (20, 13, 9):
        tensors = [t.detach().float() for t in inputs(length=length)]
        torch.testing.assert_close(compiled(*tensors), dynamic_mask_attention(*tensors, 5))


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_forward_mode_takes_the_reference_or_is_refused(which: int) -> None:
    """torch drops the tangent of an operator without a formula for it, and its derivative would be zero."""
    given = [t.detach() for t in inputs(length=12)]
    tangent = torch.randn(given[which].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def along(step: float | torch.Tensor, **options: str) -> torch.Tensor:
        moved = [*given[:which], given[which] + step * tangent, *given[which + 1 :]]
        expiry = key_expiry(given[3], 5)
        return interval_attention(*moved[:3], expiry, bias=moved[3], **options)

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    found = torch.func.jvp(along, (zero,), (one,))[1]
    torch.testing.assert_close(found, (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-5, atol=1e-7)
    with pytest.raises(InvalidInputError, match="reverse mode alone"):
        torch.func.jvp(lambda step: along(step, backend="torch"), (zero,), (one,))
    if which == 2:
        jacobian = torch.func.jacfwd(lambda value: interval_attention(*given[:2], value, key_expiry(given[3], 5)).sum())
        assert jacobian(given[2]).abs().sum() > 0


def test_transforms_of_torch_func_take_the_reference() -> None:
    query, key, value, scores = (t.detach() for t in inputs(length=8))

    def loss(query: torch.Tensor, **options: str) -> torch.Tensor:
        return interval_attention(query, key, value, key_expiry(scores, 4), **options).square().sum()

    wanted = query.clone().requires_grad_()
    loss(wanted).backward()
    torch.testing.assert_close(torch.func.grad(loss)(query), wanted.grad)
    torch.testing.assert_close(torch.func.jacrev(loss)(query), wanted.grad)
    along = torch.func.jvp(torch.func.grad(loss), (query,), (query,))[1]
    moved = [torch.func.grad(loss)(query * (1 + step)) for step in (1e-5, -1e-5)]
    torch.testing.assert_close(along, (moved[0] - moved[1]) / 2e-5, rtol=1e-5, atol=1e-7)
    with pytest.raises(InvalidInputError, match=r"torch\.autograd\.grad"):
        torch.func.grad(lambda query: loss(query, backend="torch"))(query)


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
        (_change(0, None), "query must be a torch.Tensor"),
        (_change(1, [[1.0]]), "key must be a torch.Tensor"),
        (_change(3, [8, 8]), "expiry must be a torch.Tensor"),
        (_change(4, [0.0]), "bias must be a torch.Tensor"),
        (_change(4, torch.zeros(2, 4, 8)), r"one number per key and key/value head \(2\), not per query head \(4\)"),
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


@pytest.mark.parametrize(
    ("heads", "groups", "turned", "message"),
    [
        (4, 2, "qkv", "query, key and value seem to be in the layout .batch, length, heads, head_dim."),
        (4, 4, "qkv", r"scores must be .*if query, key and value are in the layout"),
        (3, 2, "qkv", "layout"),
        (6, 2, "q", r"query seems to be in the layout .* call query.transpose\(1, 2\)"),
    ],
)
def test_a_layout_with_the_length_first_is_named(heads: int, groups: int, turned: str, message: str) -> None:
    heads = heads if turned == "q" or heads % groups == 0 else 4
    tensors = {
        name: torch.zeros(2, count, 9 if name != "q" or turned == "qkv" else 5, 8)
        for name, count in (("q", heads), ("k", groups), ("v", groups))
    }
    tensors = {name: t.transpose(1, 2) if name in turned else t for name, t in tensors.items()}
    with pytest.raises(InvalidInputError, match=message):
        dynamic_mask_attention(*tensors.values(), torch.zeros(2, groups, 9), 4)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(2, 4, 8), r"scores must be .* = \(2, 2, 8\).*not per query head \(4\)"),
        (torch.zeros(2, 8, 2), r"scores must be .*transpose scores"),
        (torch.zeros(2, 2, 7), r"scores must be a float tensor of shape"),
        (torch.zeros(2, 2, 8, dtype=torch.int32), r"scores must be a float tensor"),
        (None, r"scores must be a torch.Tensor"),
    ],
)
def test_bad_scores_are_named(scores: object, message: str) -> None:
    query, key, value, _ = inputs(length=8)
    with pytest.raises(InvalidInputError, match=message):
        dynamic_mask_attention(query, key, value, scores, 4)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize(("batch", "queries", "length"), [(0, 5, 5), (2, 0, 0), (2, 0, 5), (0, 0, 0)])
def test_empty_tensors_give_an_empty_result(backend: str, batch: int, queries: int, length: int) -> None:
    query, key, value, scores = inputs(batch=batch, queries=queries, length=length)
    output = dynamic_mask_attention(query, key, value, scores, [3, 4], sinks=1, backend=backend)
    assert output.shape == (batch, 4, queries, 4)
    for grad, tensor in zip(torch.autograd.grad(output.sum(), (query, key, value)), (query, key, value), strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_windows_of_heads_and_sinks_reach_the_operator(backend: str) -> None:
    query, key, value, scores = inputs()
    actual = dynamic_mask_attention(query, key, value, scores, [4, 30], local=1, sinks=2, backend=backend)
    expiry = key_expiry(scores, [4, 30], local=1, sinks=2)
    expected = interval_attention(query, key, value, expiry, bias=scores, backend="reference")
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_score_that_is_not_finite_ranks_but_is_not_added(backend: str) -> None:
    query, key, value, scores = inputs()
    special = torch.tensor([float("nan"), float("inf"), float("-inf")])
    with torch.no_grad():
        scores[:, :, 3:6] = special
    output = dynamic_mask_attention(query, key, value, scores, 8, backend=backend)
    expiry, bias = key_expiry(scores, 8), scores.detach().clone()
    bias[:, :, 3:6] = 0
    assert (expiry[:, :, 4] == 40).all()
    torch.testing.assert_close(output, interval_attention(query, key, value, expiry, bias=bias, backend="reference"))
    for grad in torch.autograd.grad(output.square().sum(), (query, key, value, scores)):
        assert grad.isfinite().all()
    assert (grad[:, :, 3:6] == 0).all()
    assert (grad[:, :, 6:].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("level", [1e5, -1e7, 1e30, LOWEST, -LOWEST])
@pytest.mark.parametrize("queries", [40, 3])
def test_weights_sum_to_one_under_large_biases(backend: str, level: float, queries: int) -> None:
    weights_sum_to_one(backend, level, queries, "cpu")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_bias_of_minus_infinity_takes_a_key_out(backend: str) -> None:
    query, key, value, scores = inputs()
    with torch.no_grad():
        scores[0, :, 5:9] = float("-inf")
        scores[1] = float("-inf")
    expiry = key_expiry(torch.zeros(2, 2, 40), 4)  # query 8 of the first row sees keys at -inf alone
    output = interval_attention(query, key, value, expiry, bias=scores, backend=backend)
    assert (output[1] == 0).all()
    assert (output[0, :, 8] == 0).all()
    seen = (torch.arange(40)[:, None] >= torch.arange(40)) & (torch.arange(40)[:, None] < torch.arange(40) + 4)
    mask = scores.detach()[:1].repeat_interleave(2, 1)[:, :, None].masked_fill(~seen, float("-inf"))
    mask[:, :, 8] = 0
    repeat = [t.detach()[:1].repeat_interleave(2, 1) for t in (key, value)]
    expected = F.scaled_dot_product_attention(query.detach()[:1], *repeat, attn_mask=mask)
    rows = torch.arange(40) != 8
    torch.testing.assert_close(output[:1, :, rows], expected[:, :, rows])
    for grad in torch.autograd.grad(output.square().sum(), (query, key, value, scores)):
        assert grad.isfinite().all()
        assert (grad[1] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_steep_slope_drifts_at_no_position(backend: str) -> None:
    query, key, value, _ = (t.detach().float() for t in inputs())
    expiry = key_expiry(torch.zeros(2, 2, 40), 9)
    near = 0.5 * torch.arange(40.0).expand(2, 2, 40)
    far = near + 2.0**20
    outputs = [interval_attention(query, key, value, expiry, bias=b, backend=backend) for b in (near, far)]
    torch.testing.assert_close(*outputs, atol=4e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["value", "key", "padding"])
def test_what_a_query_does_not_see_cannot_reach_it(backend: str, number: float, which: str) -> None:
    spoilt_reaches_only_its_queries(backend, number, which, "cpu", torch.float64, 1e-9)


def test_unknown_or_unavailable_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
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


@pytest.mark.parametrize("length", [1, 9, 40])
def test_layouts_in_memory_change_nothing(length: int) -> None:
    """Numbers of a row need not be neighbours: query, key and value may be views of any strides."""
    query, key, value = (torch.randn(1, heads, length, 8) for heads in (4, 2, 2))
    expiry = (torch.arange(length) + 4).clamp(max=length).int().expand(1, 2, length)

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]

    expected = interval_attention(query, key, value, expiry, backend="reference")
    for odd in (turned, spread):
        for given_so in ((odd(query), key, value), (query, odd(key), odd(value)), tuple(map(odd, (query, key, value)))):
            torch.testing.assert_close(interval_attention(*given_so, turned(expiry[..., None])[..., 0]), expected)
