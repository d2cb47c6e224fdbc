"""Rows of the GPU benchmark, computed on a CPU: everything but the clock and the kernels is what runs on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dynamask import key_expiry
from dynamask.ops.interval.api import attend
from dynamask.ops.interval.reference import interval_attention_reference
from dynamask_lab.benchmarks.gpu import check, measure, peers, timing
from dynamask_lab.benchmarks.gpu.problem import Problem, Shape
from dynamask_lab.benchmarks.scores import save_scores

SHAPE = Shape(96, 24, dim=16, heads=4, groups=2)


class OnCpu(TorchFunctionMode):
    """Sends to the CPU what asks for a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return args[0] if getattr(func, "__name__", "") == "cuda" else func(*args, **kwargs)


def timed(run: Callable[[], Any], value: float, **_: Any) -> float:
    """Runs what would be timed."""
    run()
    return value


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import dynamask.ops.triton as kernels

    def here(*args: Any, backend: str, **kwargs: Any) -> Tensor:
        assert backend == "triton"
        return attend(*args, backend="torch", **kwargs)

    monkeypatch.setattr(measure, "attend", here)
    monkeypatch.setattr(measure, "sampled_errors", partial(check.sampled_errors, backend="torch"))
    monkeypatch.setattr(measure, "_REPEATS", 3)
    monkeypatch.setattr(measure, "milliseconds", partial(timed, value=2.0))
    monkeypatch.setattr(measure, "graph_milliseconds", lambda run, steps=20: timed(run, 0.5))
    monkeypatch.setattr(measure, "extra_memory", lambda run, inputs: timed(run, 0.25))
    monkeypatch.setattr(kernels, "forward_lists", lambda query, value, expiry, live: live)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 33, 1 << 33))
    with OnCpu():
        yield


@pytest.mark.parametrize("kind", ["random", "rising", "falling"])
def test_attention_row_counts_the_work_the_mask_leaves(kind: str) -> None:
    shape = Shape(96, 24, dim=16, heads=4, groups=2, scores=kind)
    row = measure.time_attention(shape, ("flash", "fa3"), deterministic=True)
    pairs = sum(min(i + 1, 24) for i in range(96))  # every query sees as many keys as the window lets it
    assert row["forward_tflops"] == pytest.approx(4 * 16 * 4 * pairs / 2.0 / 1e9)
    assert row["backward_tflops"] == pytest.approx(2.5 * row["forward_tflops"])
    assert row["mask_share"] == 0.5
    assert (row["N"], row["w"], row["scores"]) == (96, 24, kind)
    assert row["flash_forward_ms"] == row["flash_backward_ms"] == row["deterministic_backward_ms"] == 2.0
    assert (row["deterministic_runs"], row["deterministic_equal"]) == (3, True)
    assert 0 < row["sampled_output"] < 0.01
    assert 0 < row["sampled_d_key"] < 0.01
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert "fa3_fwd" in row["fa3_error"]  # the whole error, with the name of what is missing
    assert "fa3_forward_ms" not in row


def test_a_forward_and_its_backward_make_the_whole_row() -> None:
    whole = measure.time_attention(SHAPE)
    halves = measure.time_attention(SHAPE, backward=False), measure.time_backward(SHAPE)
    assert set(whole) == set(halves[0]) | set(halves[1])
    assert "backward_ms" not in halves[0]
    assert "forward_ms" not in halves[1]


def test_nothing_wrong_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "milliseconds", lambda run: pytest.fail("timed a wrong result"))
    for name, match in (("sampled_errors", "at a sample"), ("kept_wrongly", "keep other keys")):
        with monkeypatch.context() as patch:
            result = {"output": float("nan")} if name == "sampled_errors" else 3
            patch.setattr(measure, name, lambda *a, result=result, **k: result)
            with pytest.raises(AssertionError, match=match):
                measure.time_attention(SHAPE)


def test_the_device_is_kept_busy_while_the_host_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def elapsed_time(self, other: Event) -> float:
            return 20.0

    class Flush:
        def zero_(self) -> None:
            happened.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append(f"pause {cycles > 0}"))
    monkeypatch.setattr(timing, "_l2_sized", Flush)
    assert timing.milliseconds(lambda: happened.append("run")) == 20.0
    once = ["flush", "pause True", "record", "run", "record"]
    assert happened == ["run", "run", *once, *once * 3]  # no more than three calls of 20 ms
    assert timing.pause_cycles(1e-4) == pytest.approx(2.6e5)
    assert timing.pause_cycles(1.0) == 4e6


def test_trained_scores_decide_the_mask(tmp_path: Path) -> None:
    scores = torch.randn(1, 2, 96)
    save_scores(scores, tmp_path / "x.npz", {})
    problem = Problem(SHAPE, scores=tmp_path / "x.npz")
    assert torch.equal(problem.scores, scores)
    assert torch.equal(problem.expiry, key_expiry(scores, 24))
    row = measure.time_attention(Shape(96, 24, 16, 4, 2, "trained x"), scores=tmp_path / "x.npz")
    assert row["scores"] == "trained x"


def by_the_definition(problem: Problem, shift: int = 0) -> peers.Call:
    """A peer with the mask's whole definition, its queries seeing `shift` more of the dying keys."""
    query, key, value, scores = (t.detach().requires_grad_() for t in problem.inputs)

    def forward() -> Tensor:
        out = interval_attention_reference(query, key, value, problem.expiry + shift, scores, problem.shape.dim**-0.5)
        return out.transpose(1, 2)

    grad = problem.grad.transpose(1, 2)
    return peers.Call(forward, (query, key, value, scores), grad, lambda output: output.transpose(1, 2))


@pytest.mark.parametrize(("shift", "right"), [(0, True), (5, False)])
def test_a_peer_of_the_same_mask_is_compared_with_ours(
    shift: int, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = peers.Peer("definition", "same", partial(by_the_definition, shift=shift), note="slow")
    monkeypatch.setitem(peers.PEERS, "definition", peer)
    row = measure.time_peer("definition", SHAPE)
    assert (row["difference"] < 0.01) == right
    assert (row["ours_forward_ms"], row["forward_ms"], row["backward_ms"]) == (2.0, 2.0, 2.0)
    assert (row["peer"], row["mask"], row["note"]) == ("definition", "same", "slow")


@pytest.mark.parametrize("name", ["fa3", "cudnn", "fsa1", "fsa2"])
def test_peers_that_cannot_run_leave_their_whole_error(name: str) -> None:
    row = measure.attempt(lambda: measure.time_peer(name, SHAPE), {"peer": name})
    assert row["peer"] == name
    assert "Traceback" in row["error"]
    assert len(row["error"].splitlines()) > 3


@pytest.mark.parametrize("free", [1 << 33, 1 << 10])
def test_decode_row_leaves_out_what_does_not_fit(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 33))
    row = measure.time_decode(64, 32, 2, dim=16, heads=4, groups=2)
    assert row["bounded_us"] == 500.0
    fits = free > 1 << 20
    assert ("dense_us" in row) == fits
    assert ("do not fit" in row.get("dense_error", "")) != fits


def test_prefill_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "cudnn", peers.PEERS["flash"])
    row = measure.time_prefill(96, 24)
    assert (row["extend_ms"], row["prefill_ms"], row["cudnn_ms"]) == (2.0, 2.0, 2.0)
    assert "fa3_error" in row
