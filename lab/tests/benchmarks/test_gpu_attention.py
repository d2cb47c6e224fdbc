"""The GPU benchmark, as far as a CPU can tell: its plan, budget, checks, masks, tables and pictures."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dynamask import key_expiry
from dynamask.cli.main import app
from dynamask.errors import UsageError
from dynamask.models import DynamaskForCausalLM, preset
from dynamask.ops.interval.reference import visible
from dynamask_lab.benchmarks import gpu as bench
from dynamask_lab.benchmarks import scores as trained
from dynamask_lab.benchmarks.gpu import apart, check, peers, plots, report, run
from dynamask_lab.benchmarks.gpu.problem import KINDS, Shape, scores_like


def row(n: int, forward: float, backward: float, **more: Any) -> dict[str, Any]:
    """A row of attention as `time_attention` returns it."""
    rates = {"forward_tflops": 600.0, "backward_tflops": 200.0, "memory_forward": 0.1, "memory_backward": 1.6}
    sizes = {"N": n, "D": 128, "H": 16, "G": 4, "w": 2048, "scores": "random"}
    times = {"expiry_ms": 0.02, "lists_ms": 0.02, "mask_share": 0.04 / forward, "forward_ms": forward}
    return sizes | times | {"backward_ms": backward} | rates | more


@pytest.fixture
def results() -> dict[str, Any]:
    """Results in which forward breaks even at 3·w and forward + backward at 16·w."""
    dense = {
        6144: {"fa3_forward_ms": 0.5, "cudnn_forward_ms": 0.7, "cudnn_backward_ms": 1.0},
        8192: {"fa3_forward_ms": 0.8, "cudnn_forward_ms": 1.0, "cudnn_backward_ms": 1.5},
        32768: {"fa3_forward_ms": 12.0, "cudnn_backward_ms": 24.0, "flash_forward_ms": 24.0, "flash_backward_ms": 48.0},
    }
    rows = [row(n, n / 16384, 4 * n / 16384, **dense.get(n, {})) for n in (32768, 6144, 8192, 16384, 1 << 20)]
    rows.append(row(32768, 9.0, 9.0, scores="trained x"))
    case = {"dtype": "bfloat16", "D": 64, "G": 4, "scores": "rising", "dense": "flash", "worst": 1.2}
    return {
        "environment": {"device": "a test", "peers": {"fla-core": "0.6.0"}},
        "errors": [case, case | {"worst": 1.7, "D": 96}],
        "attention": rows,
        "peers": [
            {
                "peer": "fsa1",
                **Shape(32768).row,
                "mask": "same",
                "note": "slow",
                "forward_ms": 30.0,
                "backward_ms": 90.0,
            },
            {"peer": "nsa", **Shape(32768, groups=1).row, "mask": "own", "note": "", "error": "first\nlast line"},
        ],
        "decode": [
            {"context": 2048, "w": 2048, "B": 1, "bounded_us": 9.0, "dense_us": 7.0},
            {"context": 524288, "w": 2048, "B": 1, "bounded_us": 9.9, "dense_us": 1485.0},
        ],
        "prefill": [{"N": 32768, "w": 2048, "extend_ms": 1.0, "prefill_ms": 2.0, "fa3_ms": 6.0}],
        "not_measured": [{"part": "decode", "context": 5, "reason": "the budget of 1 s was spent"}],
    }


def verdict(results: dict[str, Any], start: str) -> report.Target:
    """The one target whose name starts so."""
    (found,) = [target for target in bench.targets(results) if target.what.startswith(start)]
    return found


def test_fastest_dense_pair_may_come_from_two_peers(results: dict[str, Any]) -> None:
    pair = report.fastest_dense(results, 32768)
    assert pair == report.Pair(12.0, "fa3", 36.0, "cudnn")
    assert report.fastest_dense(results, 16384) is None


@pytest.mark.parametrize(
    ("start", "measured", "met"),
    [
        ("useful rate, forward, D = 128, G = 4", "600 TFLOP/s", True),
        ("useful rate, backward, D = 128, G = 4", "200 TFLOP/s", False),
        ("useful rate, forward, D = 64", "not measured", None),
        ("forward against FlashAttention-3, N = 32K, G = 4", "6x (5.94x with expiry)", True),
        ("forward + backward against the fastest dense pair, N = 32K, G = 4", "3.6x (fa3 + cudnn)", False),
        ("break-even with the fastest dense, forward, w", "N = 6144 (3·w); 1.33x at 3·w", True),
        ("break-even with the fastest dense, forward + backward", "N = 32768 (16·w); 0.92x at 4·w", False),
        ("expiry + lists", "8% at 8K, 4% at 16K, 2% at 32K, 0% at 1M", True),
        ("decode step at 512K against at its window, B = 1", "1.1x", True),
        ("decode step against dense SDPA at 512K, B = 1", "150x", True),
        ("peak memory above inputs and outputs, backward", "1.6x", False),
        ("time per query, forward", "+0% at 32K, +0% at 1M", True),
        ("errors against float64, 2 cases", "at most 1.70x (bfloat16, D = 96, G = 4, rising); 1 above", False),
    ],
)
def test_targets(results: dict[str, Any], start: str, measured: str, met: bool | None) -> None:
    found = verdict(results, start)
    assert (found.measured, found.met) == (measured, met)


def test_a_slope_that_bends_is_missed(results: dict[str, Any]) -> None:
    results["attention"][4]["backward_ms"] *= 1.2
    found = verdict(results, "time per query, backward")
    assert (found.measured, found.met) == ("+0% at 32K, +20% at 1M", False)


def test_break_even_asks_for_every_longer_length(results: dict[str, Any]) -> None:
    results["attention"][2]["fa3_forward_ms"] = 0.4  # loses at 8192 again
    assert report.break_even(results, 2048, both=False) == 32768
    results["attention"][0]["fa3_forward_ms"] = 1.9
    assert report.break_even(results, 2048, both=False) is None


def test_markdown_holds_every_part_and_whole_errors(results: dict[str, Any]) -> None:
    text = bench.markdown(results)
    assert "| forward against FlashAttention-3, N = 32K, G = 4 | >= 5.5x | 6x (5.94x with expiry) | met |" in text
    assert "| fsa1 | same | 32768 | 128 | 16 | 4 | 2048 |  | 30 |  | 90 |  |" in text
    assert "peers, nsa, N 32768, D 128, G 1:\n\n```\nfirst\nlast line\n```" in text
    assert "- part decode, context 5, reason the budget of 1 s was spent" in text
    assert "fla-core 0.6.0" in text
    # Every table's rows have as many cells as its head.
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count(" | ") for line in block.splitlines()}) == 1


def test_results_of_earlier_versions_can_be_rendered() -> None:
    committed = Path(__file__).parents[2] / "results" / "h100-attention.json"
    results = json.loads(committed.read_text())
    assert "## Targets" in bench.markdown(results)
    assert plots.curves(results, 128, 4)["both"]["peers"]["fa3 + cudnn"]


def test_curves_join_the_fastest_dense_pair(results: dict[str, Any]) -> None:
    found = plots.curves(results, 128, 4)
    assert found["forward"]["peers"]["fa3"] == {6144: 0.5, 8192: 0.8, 32768: 12.0}
    assert found["both"]["peers"]["fa3 + cudnn"][32768] == 36.0
    assert "fa3" not in found["both"]["peers"]
    assert found["both"]["peers"]["fsa1"] == {32768: 120.0}
    assert found["forward"]["ours"]["dynamask, w = 2048"][32768] == 2.0  # random scores, not the trained ones
    assert plots.curves(results, 64, 4)["forward"]["ours"] == {}


def test_every_peer_has_a_style_of_its_own() -> None:
    drawn = [plots._STYLES[name] for name in peers.PEERS if name != "nsa"]  # nsa's shape is not drawn
    assert len({style[1] for style in drawn}) == len({style[0] for style in drawn}) == len(drawn)


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no row"):
        bench.draw({"attention": [], "environment": {}}, tmp_path / "x")


def test_rows_without_a_backward_are_rows_of_the_forward(results: dict[str, Any]) -> None:
    for name in ("backward_ms", "backward_tflops", "memory_backward"):
        del results["attention"][4][name]
    results["attention"][4]["backward_error"] = "not done after 60 s"
    found = verdict(results, "time per query, backward")
    assert (found.measured, found.met) == ("not measured", None)
    assert verdict(results, "time per query, forward").met
    assert 1 << 20 not in plots.curves(results, 128, 4)["both"]["ours"]["dynamask, w = 2048"]
    assert "attention, backward, N 1048576, D 128, G 4:\n\n```\nnot done after 60 s" in bench.markdown(results)


def test_a_deterministic_backward_that_differs_is_a_miss(results: dict[str, Any]) -> None:
    results["attention"][0] |= {"deterministic_backward_ms": 12.0, "deterministic_runs": 100}
    for equal, said in ((True, "the same bits"), (False, "other bits")):
        results["attention"][0]["deterministic_equal"] = equal
        found = verdict(results, "deterministic backward")
        assert (found.measured, found.met) == (f"1.50x at 32K; {said} over 100 runs", equal)


def test_plan_puts_the_most_important_first_and_repeats_nothing() -> None:
    rows = list(run.plan(bench.Settings(scores=(Path("a/paper.npz"),)), []))
    attention = [(i, measure) for part, i, measure in rows if part == "attention"]
    shapes = [(i["N"], i["D"], i["G"], i["w"], i["scores"]) for i, _ in attention]
    assert shapes[:2] == [(n, 128, 4, 2048, "random") for n in (32768, 131072)]
    assert {s[:4] for s in shapes[2:6]} == {(n, d, g, 2048) for n in (32768, 131072) for d, g in ((128, 16), (64, 4))}
    assert {s[:4] for s in shapes[6:10]} == {(n * w, 128, 4, w) for w in (1024, 2048) for n in (3, 4)}
    assert [s[0] for s in shapes[10:15]] == [16384, 65536, 1048576, 262144, 524288]
    # The backward of the longest rows is the last thing of all, the shortest of them first.
    assert [(part, i["N"]) for part, i, _ in rows[-3:]] == [("attention", n << 18) for n in (1, 2, 4)]
    assert [measure.func.__name__ for _, _, measure in rows[-3:]] == ["backward_apart"] * 3
    long = [measure for i, measure in attention[:-3] if i["N"] > run.LONGEST_BACKWARD]
    assert [measure.keywords["backward"] for measure in long] == [False] * 3
    assert len(set(shapes[:-3])) == len(shapes) - 3
    assert (32768, 128, 4, 2048, "trained paper") in shapes
    parts = [part for part, _, _ in rows]
    assert parts.count("peers") == 5
    assert parts.count("decode") == 6
    assert parts.count("prefill") == 2


def test_a_backward_measured_apart_completes_its_row() -> None:
    command = (sys.executable, "-c", _CHILD)
    done = run.backward_apart(Shape(64, 8), command=command)
    hung = run.backward_apart(Shape(128, 8), timeout=1.0, command=command)
    assert done == {"backward_ms": 64.0}
    assert hung == {**Shape(128, 8).row, "backward_error": "not done after 1 s"}
    rows = [{**Shape(n, 8).row, "forward_ms": 1.0, "seconds": 2.0} for n in (64, 128)]
    run.place(rows, hung | {"seconds": 1.0}, Shape(128, 8).row)
    assert rows[1] == {**Shape(128, 8).row, "forward_ms": 1.0, "backward_error": "not done after 1 s", "seconds": 3.0}
    assert "backward_error" not in rows[0]
    run.place(rows, {"N": 1}, {"N": 1})
    assert len(rows) == 3


def test_figures_are_kept_where_tables_cannot_be_drawn(tmp_path: Path) -> None:
    bench.write({"attention": [{"N": 1}]}, tmp_path / "x")
    assert json.loads((tmp_path / "x.json").read_text()) == {"attention": [{"N": 1}]}
    assert "KeyError" in (tmp_path / "x.md").read_text()


def test_wrong_results_of_what_is_timed_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = {"dtype": "bfloat16", "D": 128, "G": 4, "worst": 1.0}
    untimed = {"dtype": "float16", "D": 96, "G": 4, "worst": float("nan")}
    saved: list[int] = []
    monkeypatch.setattr(run, "environment", lambda commit: {"device": "a test"})
    monkeypatch.setattr(run, "plan", lambda settings, rehearsals: iter([("decode", {"B": 1}, lambda: {"B": 1})]))
    settings = bench.Settings(peers=())
    for found, ends in (([right, untimed], False), ([right, right | {"worst": 11.0}], True)):
        monkeypatch.setattr(run, "run_apart", lambda tasks, found=found, **_: [{"result": found} for _ in tasks])
        if ends:
            with pytest.raises(AssertionError, match="no time is worth anything"):
                run.benchmark_gpu(settings, save=lambda results: saved.append(len(results["errors"])))
            assert saved[-1] > 0
        else:
            assert run.benchmark_gpu(settings)["decode"][0]["B"] == 1


def test_a_peer_that_failed_its_rehearsal_is_not_run_again() -> None:
    rehearsals = [{"peer": "fsa1", "error": "illegal memory access"}, {"peer": "nsa", "seconds": 1.0}]
    rows = {i["peer"]: measure for part, i, measure in run.plan(bench.Settings(), rehearsals) if part == "peers"}
    assert rows["fsa1"]()["error"] == "illegal memory access"
    assert rows["fsa1"]()["G"] == 4
    assert rows["nsa"].func.__name__ == "time_peer"


def test_budget_saves_each_row_and_lists_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])

    def slow() -> dict[str, Any]:
        clock[0] += 40.0
        return {"N": 1}

    def broken() -> dict[str, Any]:
        raise ValueError("first line\nand the rest")

    results: dict[str, Any] = {part: [] for part in run.PARTS} | {"not_measured": []}
    saved: list[int] = []
    rows = [("attention", {"N": 1}, slow), ("decode", {"N": 2}, broken)] + [
        ("attention", {"N": n}, slow) for n in (3, 4)
    ]
    run.run_rows(iter(rows), results, 70.0, 0.0, lambda r: saved.append(len(r["attention"])), lambda line: None)
    assert [r["seconds"] for r in results["attention"]] == [40.0, 40.0]
    assert "and the rest" in results["decode"][0]["error"]
    assert results["not_measured"] == [{"part": "attention", "N": 4, "reason": "the budget of 70 s was spent"}]
    assert saved == [1, 1, 2, 2]


def test_after_a_lost_gpu_nothing_more_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_lost_context", lambda identity: "the GPU was lost")
    results: dict[str, Any] = {part: [] for part in run.PARTS} | {"not_measured": []}
    rows = [("decode", {"B": n}, lambda: {"B": 1}) for n in (1, 2)]
    run.run_rows(iter(rows), results, 1e9, 0.0, lambda r: None, lambda line: None)
    assert len(results["decode"]) == 1
    assert results["not_measured"] == [{"part": "decode", "B": 2, "reason": "the GPU was lost"}]


def test_settings_name_unknown_peers() -> None:
    with pytest.raises(UsageError, match="unknown peer 'fa3'"):
        bench.Settings(peers=("fa3",))
    with pytest.raises(UsageError, match="at least 1"):
        bench.Settings(lengths=(0,))


def test_write_replaces_both_files(results: dict[str, Any], tmp_path: Path) -> None:
    for _ in range(2):
        bench.write(results, tmp_path / "deep" / "h100.v2")
    assert json.loads((tmp_path / "deep" / "h100.v2.json").read_text()) == results
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["h100.v2.json", "h100.v2.md"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_check_measures_rounding_against_the_dense_kernel(kind: str, dtype: str) -> None:
    found = check.check(dtype, 32, 4, 2, 160, 48, kind, "cpu", "torch")
    assert 0 < found["worst"] < 3
    assert check.failures([found]) == []


def test_the_reference_in_pieces_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    query, grad = torch.randn(2, 1, 4, 50, 8)
    key, value = torch.randn(2, 1, 2, 50, 8)
    scores = torch.randn(1, 2, 50)
    expiry = key_expiry(scores, 9)
    whole = check._expected((query, key, value, scores), expiry, grad)
    monkeypatch.setattr(check, "_PAIRS", 4 * 50 * 7)  # seven queries at a time
    for one, other in zip(whole, check._expected((query, key, value, scores), expiry, grad), strict=True):
        torch.testing.assert_close(one, other)


def test_check_sees_wrong_and_unwritten_results(monkeypatch: pytest.MonkeyPatch) -> None:
    real = check.attend
    for spoil in (float("nan"), 0.1):
        monkeypatch.setattr(check, "attend", lambda *a, spoil=spoil, **k: real(*a, **k) + spoil)
        found = check.check("float32", 32, 4, 2, 96, 32, "random", "cpu", "torch")
        assert check.failures([found]) == [found]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_shows_what_is_wrong(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, grad = torch.randn(2, 1, 4, 300, 16, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 2, 300, 16, dtype=torch.bfloat16)
    scores = scores_like(kind, (1, 2, 300), "cpu")
    expiry = key_expiry(scores, 40)
    assert check.kept_wrongly(scores, expiry, 40) == 0
    assert check.kept_wrongly(scores, expiry, 39) > 0
    assert check.kept_wrongly(scores, (expiry - 1).clamp(min=0), 40) > 0
    inputs = (query, key, value, scores, expiry, grad, 40)
    errors = check.sampled_errors(*inputs, backend="torch")
    assert set(errors) == {*check.NAMES, "lse"}
    assert max(errors.values()) < 0.01
    assert set(check.sampled_errors(*inputs, backend="torch", backward=False)) == {"output", "lse"}
    # The last 64 positions left unwritten, and a mask that lets another key through.
    real = check.interval_attention_op

    def unwritten(*arguments: Any) -> Any:
        output, *sums = real(*arguments)
        return output.index_fill(2, torch.arange(236, 300), float("nan")), *sums

    monkeypatch.setattr(check, "interval_attention_op", unwritten)
    assert not check.sampled_errors(*inputs, backend="torch", backward=False)["output"] < 0.01
    monkeypatch.setattr(check, "interval_attention_op", lambda q, k, v, e, *rest: real(q, k, v, e + 9, *rest))
    spoilt = check.sampled_errors(*inputs, backend="torch")
    assert spoilt["output"] > 0.01
    assert spoilt["d_query"] > 0.01


def test_cases_cover_every_dtype_and_width() -> None:
    cases = check.cases()
    assert {(c["dtype"], c["dim"]) for c in cases} == {(t, d) for t in check.DTYPES for d in check.DIMS}
    assert {c["groups"] for c in cases} == {1, 4, 8, 16}
    assert any(c.get("length", 0) >= 16384 for c in cases)  # where the walk of the backward pass begins


def test_wide_mask_is_the_masks_definition() -> None:
    expiry = key_expiry(scores_like("random", (1, 3, 100), "cpu"), 17)
    mask = peers.wide_mask(expiry)
    assert torch.equal(mask, visible(expiry, 100))
    assert mask.stride() == (30000, 10000, 100, 1)


def test_a_missing_peer_says_what_is_missing() -> None:
    with pytest.raises(ImportError, match=r"flash-sparse-attn 1\.x is not installed"):
        peers._old_flash_sparse_attn()


def test_autotuners_are_held_to_some_configurations() -> None:
    class Tuner:
        configs = [1, 2, 3]  # noqa: RUF012

    class Heuristics:
        fn = Tuner()

    kernel = Heuristics()
    peers._keep_configs(kernel, lambda config: config > 1)
    assert kernel.fn.configs == [2, 3]
    peers._keep_configs(kernel, lambda config: config > 5)  # never none at all
    assert kernel.fn.configs == [2, 3]


_CHILD = """
import json, os, sys, time
kind, arguments, path = sys.argv[1:]
given = json.loads(arguments)
if kind == "backward":
    time.sleep(60 if given["length"] > 64 else 0)
    result = {"backward_ms": float(given["length"])}
else:
    result = given.get("n")
if kind == "sleep":
    time.sleep(60)
if kind == "die":
    print("about to die", flush=True)
    os._exit(9)
open(path, "w").write(json.dumps({"result": result}))
"""


def test_tasks_apart_survive_crashes_and_hangs() -> None:
    kinds = ("well", "die", "sleep", "well", "well")
    tasks = [apart.Task(kind, {"n": n}) for n, kind in enumerate(kinds)]
    found = apart.run_apart(tasks, workers=3, timeout=3.0, command=(sys.executable, "-c", _CHILD))
    assert [found[n].get("result") for n in (0, 3, 4)] == [0, 3, 4]
    assert "ended with code 9" in found[1]["error"]
    assert "about to die" in found[1]["error"]
    assert found[2]["error"] == "not done after 3 s"


def test_a_deadline_ends_what_runs_and_begins_nothing_more() -> None:
    tasks = [apart.Task(kind, {"n": n}) for n, kind in enumerate(("well", "sleep", "sleep"))]
    began = time.perf_counter()
    found = apart.run_apart(tasks, workers=1, deadline=1.5, command=(sys.executable, "-c", _CHILD))
    assert time.perf_counter() - began < 10
    assert found[0]["result"] == 0
    assert "not done after" in found[1]["error"]
    assert found[2]["error"] == "not begun within 1.5 s"


def test_a_task_reports_its_error(tmp_path: Path) -> None:
    apart.main("peer", json.dumps({"peer": "unknown", "length": 8}), str(tmp_path / "out"))
    assert "error" in json.loads((tmp_path / "out").read_text())


def test_trained_scores_survive_the_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DynamaskForCausalLM(preset("tiny", windows=16, ranking="paper")).eval()
    for module in model.modules():
        if isinstance(module, trained.DynamicMaskGate):
            torch.nn.init.constant_(module.gate, 0.7)
    found = trained.layer_scores(model, torch.randint(4096, (1, 90)))
    assert found.shape == (4, 2, 90)
    assert found.unique().numel() > 300
    trained.save_scores(found, tmp_path / "s.npz", {"window": 16})
    read, about = trained.read_scores(tmp_path / "s.npz")
    assert torch.equal(read, found)
    assert about == {"window": 16}
    picked = trained.load_scores(tmp_path / "s.npz", 4, 64)
    assert torch.equal(picked[0], found.flatten(0, 1)[[0, 2, 5, 7], :64])
    with pytest.raises(UsageError, match="8 heads of 90 positions; 4 of 91 are needed"):
        trained.load_scores(tmp_path / "s.npz", 4, 91)


def test_a_model_without_gates_has_no_scores() -> None:
    model = DynamaskForCausalLM(preset("tiny", attention="mha"))
    with pytest.raises(UsageError, match="no dynamic mask attention"):
        trained.layer_scores(model, torch.randint(4096, (1, 8)))


def test_committed_scores_are_read() -> None:
    folder = Path(__file__).parents[2] / "data"
    files = sorted(folder.glob("scores-*.npz"))
    assert files
    for file in files:
        scores, about = trained.read_scores(file)
        assert scores.shape == (about["layers"], about["heads"], about["length"])
        assert scores.isfinite().all()
        assert any(gate != 0 for layer in about["gates"] for gate in layer)
        assert trained.load_scores(file, 4, about["length"]).shape == (1, 4, about["length"])


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> list[apart.Task]:
    """A GPU that takes no time: the tasks done apart are returned, rows are their identity."""
    tasks: list[apart.Task] = []

    def done(given: list[apart.Task], **limits: float) -> list[dict[str, Any]]:
        if given[0].kind == "backward":
            assert limits["timeout"] == 60.0
            return [{"error": "hung"}]
        assert limits["deadline"] > 0
        tasks.extend(given)
        case = {"dtype": "bfloat16", "D": 64, "G": 4, "scores": "random", "worst": 1.0}
        found: list[dict[str, Any]] = [{"result": None if task.kind == "peer" else [case]} for task in given]
        for number, task in enumerate(given):
            if task.arguments.get("peer") == "nsa":
                found[number] = {"error": "crashed"}
        if given[-1].kind == "check":
            found[-1] = {"error": "did not compile"}
        return found

    monkeypatch.setattr(run, "run_apart", done)
    monkeypatch.setattr(run, "environment", lambda commit: {"device": "none", "peers": {}, "commit": commit})
    monkeypatch.setattr(run, "time_attention", lambda shape, peers=(), **options: row(shape.length, 1.0, 2.0))
    monkeypatch.setattr(
        run, "time_peer", lambda name, shape: {"peer": name, **shape.row, "note": "", "forward_ms": 4.0}
    )
    for name in ("time_decode", "time_prefill"):
        monkeypatch.setattr(run, name, lambda *args: {"context": 1, "B": 1, "w": 1})
    return tasks


def test_the_whole_benchmark(no_gpu_needed: list[apart.Task], tmp_path: Path) -> None:
    saved: list[None] = []
    done = bench.benchmark_gpu(
        bench.Settings(),
        commit="abc",
        save=lambda r: saved.append(bench.write(r, tmp_path / "x")),
    )
    assert [task.arguments["peer"] for task in no_gpu_needed if task.kind == "peer"] == list(bench.Settings().peers)
    assert {t.arguments["peer"]: t.arguments["groups"] for t in no_gpu_needed if t.kind == "peer"}["nsa"] == 1
    # What is timed is checked before anything that may take long is tried.
    assert [task.arguments for task in no_gpu_needed[: len(check.TIMED)]] == check.TIMED
    assert len([task for task in no_gpu_needed if task.kind == "check"]) == len(check.cases())
    assert [r["error"] for r in done["peers"] if "error" in r] == ["crashed"]
    assert done["errors"][-1]["error"] == "did not compile"
    assert done["not_measured"] == []
    assert {r.get("backward_error") for r in done["attention"] if r["N"] > run.LONGEST_BACKWARD} == {"hung"}
    assert len(saved) > 30
    text = (tmp_path / "x.md").read_text()
    assert "did not compile" in text
    assert "1 cases did not run" in text


def test_a_wrong_result_stops_before_any_time_is_taken(no_gpu_needed: list[apart.Task], monkeypatch) -> None:
    monkeypatch.setattr(run.check, "failures", lambda rows: rows[:1])
    saved: list[dict[str, Any]] = []
    with pytest.raises(AssertionError, match="wrong results"):
        bench.benchmark_gpu(bench.Settings(), save=saved.append)
    assert [len(results["attention"]) for results in saved] == [0]


def test_command_hands_its_options_on(no_gpu_needed: list[apart.Task], monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "_lost_context", lambda identity: "")
    options = ["--length", "4096", "--scaling", "16384", "--window", "1024", "--peer", "flex", "--peer", "fsa1"]
    options += ["--scores", "s.npz", "--no-checks", "--budget", "9", "--commit", "abc", "--output", str(tmp_path / "x")]
    done = CliRunner().invoke(app, ["benchmark", "gpu", *options])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "x.json").read_text())
    settings = results["settings"]
    assert (settings["lengths"], settings["scaling"], settings["windows"]) == ([4096], [16384], [1024])
    assert (settings["peers"], settings["scores"], settings["budget_seconds"]) == (["flex", "fsa1"], ["s.npz"], 9.0)
    assert results["environment"]["commit"] == "abc"
    assert [task.kind for task in no_gpu_needed] == ["peer", "peer"]
    assert (tmp_path / "x.png").exists()


def test_redraw_renders_a_committed_file_again(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "h100.json").write_text(json.dumps(results))
    done = CliRunner().invoke(app, ["benchmark", "gpu", "--redraw", str(tmp_path / "h100.json")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "h100.md").read_text() == bench.markdown(results)
    assert (tmp_path / "h100.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu", "--redraw", "nowhere.json"], "cannot read results from nowhere.json"),
        (["gpu", "--redraw", "lab/results/cpu.json"], "holds no results of"),
        (["scores", "nowhere", "x.txt"], "scores are written as .npz"),
        (["scores", "nowhere", "x.npz", "--length", "0"], "--length must be at least 1"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    done = CliRunner().invoke(app, ["benchmark", *arguments])
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)
