"""The whole-model benchmark: that it measures what it says, and survives what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from dynamask.cache import cache_bytes
from dynamask.cli.main import app
from dynamask.models import preset
from dynamask.ops import key_expiry
from dynamask_lab.benchmarks import model as bench
from dynamask_lab.benchmarks.model import generation, run, training


@pytest.mark.parametrize("chunk", [7, 16, 1000])
def test_chunked_loss_is_the_models_own(chunk: int) -> None:
    model = bench.build("tiny", "dma", 64).train()
    tokens = torch.randint(4096, (1, 40), device=model.device)
    expected = model(tokens, labels=tokens).loss
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    actual = bench.chunked_loss(model, tokens, chunk)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(torch.autograd.grad(actual, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("attention", "length"), [("dma", 100), ("dma", 40), ("mha", 100)])
def test_flops_count_the_pairs_the_mask_lets_through(attention: str, length: int) -> None:
    config = preset("tiny", attention=attention)
    seen = [min(i + 1, config.windows if attention == "dma" else length) for i in range(length)]
    per_pair = 4 * config.head_dim * config.num_attention_heads * config.num_hidden_layers
    flops = bench.training_flops(config, 10, length)
    assert flops["attention"] == 3 * per_pair * sum(seen)
    assert flops["weights"] == 60 * length
    assert flops["output"] == 6 * config.hidden_size * config.vocab_size * length


def test_scattered_gates_keep_other_keys_than_a_sliding_window() -> None:
    from dynamask.inspect import layer_expiry

    tokens = torch.randint(4096, (1, 200))
    sliding = key_expiry(torch.zeros(1, 2, 200), 64, sinks=4)
    for gates, slides in (("initial", True), ("scattered", False)):
        expiry = layer_expiry(bench.build("tiny", "dma", 200, gates=gates).eval(), tokens)
        first = expiry[0] if isinstance(expiry, list) else expiry
        assert bool((first == sliding).all()) == slides


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["dma", "mha", "mha-cudnn"])
def test_training_row(attention: str, weights: str) -> None:
    row = bench.time_training("tiny", attention, 96, warmup=1, steps=1, weights=weights)
    assert row["weights"] == weights
    assert row["tokens_per_s"] == pytest.approx(96 / row["step_s"])
    assert 7 < row["loss"] < 10  # ln 4096 = 8.3: random tokens teach nothing
    assert row["window"] == (64 if attention == "dma" else None)


@pytest.mark.parametrize("context", [20, 64, 300])
@pytest.mark.parametrize(("attention", "cache"), bench.CACHES)
def test_a_filled_cache_is_as_the_context_leaves_it(attention: str, cache: str, context: int) -> None:
    config = preset("tiny", attention=attention)
    held = bench.filled_cache(config, cache, context, 2, 5)
    assert int(held.get_seq_length()) == (context - 1 if cache == "fixed" else context)
    spare = 5 if cache == "static" else 0
    if cache.startswith("bounded"):
        clocks = 4 * 2 * 2 * 8  # of four layers, two sequences and two heads: how many tokens they have seen
        assert cache_bytes(held) == bench.cache_size(config, cache, 64, 2) + clocks  # room for the whole window
        for layer in held.layers:
            assert bool((layer.keys_held == min(context, 64)).all())
            assert layer.positions.max() == context - 1
            assert int((layer.positions >= 0).sum()) == 2 * 2 * min(context, 64)
    else:
        assert cache_bytes(held) == bench.cache_size(config, cache, context + spare, 2)


def test_decoding_goes_through_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    fill = bench.filled_cache
    monkeypatch.setattr(generation, "filled_cache", lambda *args: made.append(fill(*args)) or made[-1])
    for attention, cache in bench.CACHES:
        row = bench.time_generation("tiny", attention, cache, 80, 2, steps=3)
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["ms_per_token"])
        grown = 79 if cache == "fixed" else 80 + 3 + generation._DECODE_WARMUP
        assert int(made[-1].get_seq_length()) == grown
        assert row["cache_mib"] * 2**20 == cache_bytes(made[-1])


def test_a_cache_that_does_not_fit_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "build", lambda *args, **kwargs: pytest.fail("built a model that cannot be used"))
    row = bench.time_generation("1.7b", "mha", "dynamic", 131072, 8, memory=80 * 2**30)
    assert row["skipped"] == "the cache takes 112 GiB, the device has 80 GiB"


def test_errors_are_rows_and_out_of_memory_is_named() -> None:
    def full() -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def wrong() -> dict:
        raise ValueError("no\nmore")

    row = bench.attempt(full, {"N": 1})
    assert (row["N"], row["error"], row["out_of_memory"]) == (1, "out of memory", True)
    row = bench.attempt(wrong, {"N": 1})
    assert row["error"] == "ValueError: no"
    assert row["traceback"].endswith("no\nmore")
    assert "out_of_memory" not in row


@pytest.mark.parametrize(
    ("fits", "tried", "longest"),
    [(1000, [100, 200, 400, 800, 1600, 1200], 800), (1300, [100, 200, 400, 800, 1600, 1200], 1200), (50, [100], None)],
)
def test_longest_doubles_then_bisects_once(fits: int, tried: list[int], longest: int | None) -> None:
    def measure(length: int) -> dict:
        return {"N": length} if length <= fits else {"N": length, "error": "out of memory", "out_of_memory": True}

    *rows, last = bench.longest_trainable(measure, 100, 60.0)
    assert [row["N"] for row in rows] == tried
    assert last["longest"] == longest
    assert "does not fit" in last["ended"]


def test_longest_ends_at_cap_budget_and_other_errors() -> None:
    assert list(bench.longest_trainable(lambda n: {"N": n}, 100, 60.0, cap=250))[-1]["longest"] == 200
    (last,) = bench.longest_trainable(lambda n: {"N": n}, 100, 0.0)
    assert last["longest"] is None
    assert "budget" in last["ended"]
    *_, last = bench.longest_trainable(lambda n: {"N": n, "error": "ValueError: x"}, 100, 60.0)
    assert last["ended"] == "100 failed: ValueError: x"


def test_longest_does_not_begin_what_the_budget_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])

    def measure(length: int) -> dict:
        clock[0] += length**2 / 1000
        return {"N": length}

    *rows, last = bench.longest_trainable(measure, 100, 100.0)
    assert [row["N"] for row in rows] == [100, 200]  # 10 s and 40 s; the next would take 160 of the 50 left
    assert (last["longest"], last["ended"]) == (200, "the budget of 100 s; 400 not tried")


def test_the_most_important_comes_first_and_every_row_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("time_training", "time_generation", "time_prefill"):
        monkeypatch.setattr(run, name, lambda *args, **kwargs: {"attention": args[1], "N": 1})
    parts = [(part, *identity.values()) for part, identity, _ in run._plan(bench.Settings())]
    assert parts[:4] == [("training", a, n) for n in (32768, 8192) for a in ("dma", "mha")]
    assert parts[6:8] == [("generation", "dma", "bounded", 32768, 1), ("generation", "dma", "bounded-eager", 32768, 1)]
    assert [p[0] for p in parts].index("prefill") < parts.index(("generation", "dma", "bounded", 32768, 8))
    saved, told = [], []
    bench.benchmark_model(
        bench.Settings(longest=False), save=lambda r: saved.append(len(r["training"])), progress=told.append
    )
    assert saved[:7] == [0, 1, 2, 3, 4, 5, 6]
    assert "training  attention dma, N 32768" in told[0]
    late = bench.benchmark_model(bench.Settings(budget_seconds=0.0))
    assert late["training"] == []
    assert {row["part"] for row in late["not_measured"]} == {"training", "generation", "prefill", "longest"}


def test_on_a_gpu_the_fastest_dense_backend_follows_the_first_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parts = [(part, *identity.values()) for part, identity, _ in run._plan(bench.Settings())]
    cudnn = [("training", "mha-cudnn", n) for n in bench.LENGTHS]
    assert [part for part in parts if part[1] == "mha-cudnn"] == cudnn
    assert parts.index(cudnn[0]) == parts.index(("generation", "dma", "bounded", 32768, 8)) - 1
    only = [(part, *i.values()) for part, i, _ in run._plan(bench.Settings(only="training"))]
    assert only[-3:] == cudnn
    assert not [1 for part, *_ in run._plan(bench.Settings(only="generation")) if part == "training"]


def test_what_cannot_be_compiled_runs_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*args: object, compile: bool = False, **kwargs: object) -> dict:
        if compile:
            raise failure
        return {"attention": "dma", "N": 96, "compiled": False}

    monkeypatch.setattr(run, "time_training", timed)
    failure: Exception = ValueError("no code\nfor this")
    row = bench.train_as_set(bench.Settings("tiny"), "dma", 96)
    assert not row["compiled"]
    assert "for this" in row["compile_error"]
    results = {part: [] for part in bench.TABLES} | {"training": [row]}
    assert bench.table_rows(results, "training")[0][-1] == "not compiled: for this"
    # What does not fit would not fit eagerly, and what is wrong is not mended by it.
    for failure in (torch.OutOfMemoryError("CUDA out of memory"), AssertionError("the loss is NaN")):
        with pytest.raises(type(failure)):
            bench.train_as_set(bench.Settings("tiny"), "dma", 96)


@pytest.mark.parametrize(("worst", "wrong"), [(1.2, False), (11.0, True), (float("nan"), True)])
def test_kernels_are_checked_at_the_models_heads(worst: float, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def done(tasks: list, **limits: float) -> list[dict]:
        (task,) = tasks
        sizes = {name: task.arguments[name] for name in ("dim", "heads", "groups", "window")}
        assert sizes == {"dim": 128, "heads": 16, "groups": 8, "window": 2048}
        return [{"result": [{"worst": worst}]}]

    monkeypatch.setattr(run, "run_apart", done)
    if wrong:
        with pytest.raises(AssertionError, match="wrong results"):
            bench.check_kernels("1.7b", 9.0)
    else:
        assert bench.check_kernels("1.7b", 9.0) == [{"worst": worst}]
    monkeypatch.setattr(run, "run_apart", lambda tasks, **limits: [{"error": "crashed"}])
    assert bench.check_kernels("1.7b", 9.0)[0]["error"] == "crashed"


def test_figures_are_kept_where_tables_cannot_be_drawn(tmp_path) -> None:
    bench.write({"training": []}, tmp_path)
    assert json.loads((tmp_path / "model.json").read_text()) == {"training": []}
    assert "KeyError" in (tmp_path / "model.md").read_text()


def test_command_writes_everything(tmp_path) -> None:
    shape = ["--preset", "tiny", "--length", "64", "--context", "80", "--batch", "1", "--prefill", "70", "--steps", "2"]
    shape += ["--no-compile"]
    command = [sys.executable, "-m", "dynamask", "benchmark", "model", *shape, "--no-longest", "--output"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokens_per_s" in done.stdout
    results = json.loads((tmp_path / "out" / "model.json").read_text())
    assert [len(results[part]) for part in ("training", "generation", "prefill")] == [2, 5, 2]
    assert not any("error" in row for part in ("training", "generation", "prefill") for row in results[part])
    assert "| dma | bounded | 1 | 80 |" in (tmp_path / "out" / "model.md").read_text()
    for picture in ("training.png", "generation.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    again = ["--redraw", str(tmp_path / "out" / "model.json"), "--output", str(tmp_path / "again")]
    redone = CliRunner().invoke(app, ["benchmark", "model", *again])
    assert redone.exit_code == 0, redone.output
    assert (tmp_path / "again" / "model.md").read_text() == (tmp_path / "out" / "model.md").read_text()
    assert (tmp_path / "again" / "training.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "both"], "--only must be training or generation"),
        (["--gates", "best"], "--gates must be scattered or initial"),
        (["--length", "1"], "--length must be at least 2"),
        (["--preset", "tny"], "did you mean 'tiny'"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "dynamask", "benchmark", "model", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
