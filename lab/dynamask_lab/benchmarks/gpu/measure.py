"""Rows of results: the operator and its peers at one shape, one decoding step, one prefill."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamask import key_expiry
from dynamask.cache import BoundedLayer
from dynamask.ops.interval.api import attend
from dynamask_lab.benchmarks.gpu.check import kept_wrongly, sampled_errors
from dynamask_lab.benchmarks.gpu.peers import PEERS
from dynamask_lab.benchmarks.gpu.problem import Problem, Shape
from dynamask_lab.benchmarks.gpu.timing import extra_memory, graph_milliseconds, milliseconds


def time_attention(
    shape: Shape,
    peers: tuple[str, ...] = (),
    *,
    deterministic: bool = False,
    backward: bool = True,
    scores: Path | None = None,
) -> dict[str, Any]:
    """Median milliseconds of ours (and its parts) and of dense peers, bfloat16, batch 1; results are checked first.

    Args:
        shape: what to time.
        peers: names of `PEERS`.
        deterministic: time the deterministic backward too, and see on short rows that it repeats itself.
        backward: time the backward, too.
        scores: file of trained scores, where the shape's are.

    Raises:
        AssertionError: the results are wrong at a sample of queries and keys.
    """
    from dynamask.ops.triton import forward_lists

    problem = Problem(shape, scores=scores)
    row = {**shape.row, **_sampled(problem, backward)}
    with torch.no_grad():
        row["forward_ms"] = milliseconds(partial(_attend, problem))
    # Replayed as a graph: a training step queues its launches ahead, so their device time is what it pays.
    row["expiry_ms"] = graph_milliseconds(lambda: key_expiry(problem.scores, shape.window))
    row["lists_ms"] = graph_milliseconds(
        lambda: forward_lists(problem.query, problem.value, problem.expiry, [shape.window] * shape.groups)
    )
    row["mask_share"] = (row["expiry_ms"] + row["lists_ms"]) / row["forward_ms"]
    row["forward_tflops"] = problem.flops / row["forward_ms"] / 1e9
    row["memory_forward"] = extra_memory(torch.no_grad()(partial(_attend, problem)), problem.inputs)
    if backward:
        row.update(_backward(problem, deterministic))
    for peer in peers:
        try:
            row.update({f"{peer}_{key}": value for key, value in _peer(peer, problem).items()})
        except Exception as error:  # a peer that cannot run here is reported, not fatal
            row[f"{peer}_error"] = whole(error)
    return row


def time_backward(shape: Shape) -> dict[str, Any]:
    """The backward's part of `time_attention`, alone."""
    problem = Problem(shape)
    return {**shape.row, **_sampled(problem, True), **_backward(problem, False)}


def _sampled(problem: Problem, backward: bool) -> dict[str, float]:
    window = problem.shape.window
    if wrong_queries := kept_wrongly(problem.scores, problem.expiry, window):
        raise AssertionError(f"{wrong_queries} queries of a sample keep other keys than their {window} best")
    errors = sampled_errors(*problem.inputs, problem.expiry, problem.grad, window, backward=backward)
    # Rounding to bfloat16 alone gives a few thousandths.
    wrong = {name: value for name, value in errors.items() if not value < 0.03}
    if wrong:
        raise AssertionError(f"wrong at a sample of queries and keys, so no time is worth anything: {wrong}")
    return {f"sampled_{name}": value for name, value in errors.items()}


def _backward(problem: Problem, deterministic: bool) -> dict[str, Any]:
    output = _attend(problem)
    run = partial(torch.autograd.grad, output, problem.inputs, problem.grad, retain_graph=True)
    row: dict[str, Any] = {"backward_ms": milliseconds(run)}
    row["backward_tflops"] = 2.5 * problem.flops / row["backward_ms"] / 1e9
    row["memory_backward"] = extra_memory(run, problem.inputs)
    if deterministic:
        with _deterministic():
            row["deterministic_backward_ms"] = milliseconds(run)
            if problem.shape.length <= 1 << 15:
                row["deterministic_runs"], row["deterministic_equal"] = _REPEATS, _repeats(run)
    return row


_REPEATS = 100


def _repeats(run: Callable[[], tuple[Tensor, ...]]) -> bool:
    """Whether `_REPEATS` runs give the same bits."""
    first = run()
    return all(all(map(torch.equal, run(), first)) for _ in range(_REPEATS - 1))


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic algorithms, without filling the memory that `torch.empty` gives, which is a debugging aid."""
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(False)


def time_peer(name: str, shape: Shape) -> dict[str, Any]:
    """A peer and ours at one shape, in one row.

    Raises:
        Exception: whatever the peer raises, for the caller to report.
    """
    peer, problem = PEERS[name], Problem(shape)
    row: dict[str, Any] = {"peer": name, **shape.row, "mask": peer.mask, "note": peer.note}
    row["ours_forward_ms"], row["ours_backward_ms"] = _ours(problem)
    row.update(_peer(name, problem))
    return row


def _attend(problem: Problem) -> Tensor:
    query, key, value, scores = problem.inputs
    return attend(query, key, value, problem.expiry, bias=scores, backend="triton", max_live=problem.shape.window)


def _ours(problem: Problem) -> tuple[float, float]:
    """Milliseconds forward and backward."""
    with torch.no_grad():
        forward = milliseconds(partial(_attend, problem))
    output = _attend(problem)
    return forward, milliseconds(partial(torch.autograd.grad, output, problem.inputs, problem.grad, retain_graph=True))


def _peer(name: str, problem: Problem) -> dict[str, float]:
    """Milliseconds forward and, where there is one, backward; for the same mask, how far the output is from ours."""
    peer = PEERS[name]
    call = peer.prepare(problem)
    row: dict[str, float] = {}
    with torch.no_grad():
        row["forward_ms"] = milliseconds(call.forward)
        if peer.mask == "same":
            ours, theirs = _attend(problem).float(), call.output(call.forward()).float()
            row["difference"] = ((theirs - ours).norm() / ours.norm()).item()
    if call.inputs:
        output = call.forward()
        row["backward_ms"] = milliseconds(
            partial(torch.autograd.grad, output, call.inputs, call.grad, retain_graph=True)
        )
    return row


def time_decode(context: int, window: int, batch: int, dim: int = 128, heads: int = 16, groups: int = 4) -> dict:
    """Microseconds of one decoding step's attention over the bounded cache, and of dense SDPA over the context."""
    dtype = torch.bfloat16
    query = torch.randn(batch, heads, 1, dim, device="cuda", dtype=dtype)
    slots = min(window, context)
    key, value = (torch.randn(batch, groups, slots, dim, device="cuda", dtype=dtype) for _ in range(2))
    bias = torch.randn(batch, groups, slots, device="cuda")
    expiry = torch.full((batch, groups, slots), slots, dtype=torch.int32, device="cuda")
    row: dict[str, Any] = {"context": context, "w": window, "B": batch, "D": dim, "H": heads, "G": groups}
    with torch.no_grad():
        bounded = partial(attend, query, key, value, expiry, bias=bias, backend="triton", max_live=window)
        row["bounded_us"] = 1e3 * graph_milliseconds(bounded)
        del key, value, bounded
        if batch * context * groups * dim * 4 < 0.8 * torch.cuda.mem_get_info()[0]:
            key, value = (torch.randn(batch, groups, context, dim, device="cuda", dtype=dtype) for _ in range(2))
            dense = partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=True)
            row["dense_us"] = 1e3 * graph_milliseconds(dense, steps=4 if batch * context > 1 << 20 else 20)
        else:
            row["dense_error"] = "keys and values of the whole context do not fit into the memory that is free"
    return row


def time_prefill(length: int, window: int = 2048) -> dict[str, Any]:
    """Milliseconds of a layer's prefill into an empty bounded cache, and of FlashAttention-3's over all keys.

    `extend_ms` is the cache's part (expiry, and the survivors gathered), `prefill_ms` that and the attention. The
    dense peer's keys are its cache as they stand, so nothing is added to its attention.
    """
    shape = Shape(length, window)
    problem = Problem(shape)
    query, key, value, scores = (t.detach() for t in problem.inputs)

    def extend() -> Any:
        return BoundedLayer(window).extend(key, value, scores, None)

    def prefill() -> Tensor:
        live = extend()
        return attend(query, live.key, live.value, live.expiry, bias=live.score, backend="triton", max_live=window)

    row: dict[str, Any] = {"N": length, "w": window, "D": shape.dim, "H": shape.heads, "G": shape.groups}
    with torch.no_grad():
        row["extend_ms"], row["prefill_ms"] = milliseconds(extend), milliseconds(prefill)
        for peer in ("fa3", "cudnn"):
            try:
                row[f"{peer}_ms"] = milliseconds(PEERS[peer].prepare(problem).forward)
                break
            except Exception as error:
                row[f"{peer}_error"] = whole(error)
    return row


def whole(error: BaseException) -> str:
    """An error as it is to be read later: where it was raised, and what it says."""
    return "".join(traceback.format_exception(error, limit=-4)).strip()


def attempt(measure: Callable[[], dict[str, Any]], identity: dict[str, Any]) -> dict[str, Any]:
    """A row, or why there is none."""
    try:
        return measure()
    except Exception as error:
        return {**identity, "error": whole(error)}
