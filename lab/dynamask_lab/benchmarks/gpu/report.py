"""The GPU benchmark's results as tables, and the targets they meet or miss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from dynamask_lab.benchmarks.gpu.check import ALLOWED, NAMES
from dynamask_lab.benchmarks.gpu.peers import DENSE, PEERS

Results = dict[str, Any]
Attention = dict[str, Any]

ATTENTION_COLUMNS = (
    *("N", "D", "G", "w", "scores", "expiry_ms", "lists_ms", "mask_share", "forward_ms", "forward_tflops"),
    *("backward_ms", "backward_tflops", "deterministic_backward_ms", "memory_forward", "memory_backward"),
    *("fa3_forward_ms", "cudnn_forward_ms", "cudnn_backward_ms", "flash_forward_ms", "flash_backward_ms"),
)
_PEER_COLUMNS = (
    *("peer", "mask", "N", "D", "H", "G", "w", "ours_forward_ms", "forward_ms", "ours_backward_ms", "backward_ms"),
    *("difference",),
)
_ERROR_COLUMNS = ("dtype", "N", "D", "G", "scores", *NAMES, "dense", "dense_output", "dense_d_key", "worst")
NOTES = (
    "bfloat16, batch 1, random scores unless said; milliseconds on the device, medians, inputs not in the L2 cache. "
    "Forward and backward include their lists, not the expiry; expiry and lists alone are timed as CUDA graphs.",
    "Before a row is timed, its masks, output and gradients are compared with float64 at a sample of queries and keys "
    "(sampled_, in the JSON).",
    "tflops: useful work, sum(expiry − j) · 4 · D · (H / G) forward and 2.5 times that backward. mask_share: expiry + "
    "lists over the forward. memory: peak above the results, over the inputs' size.",
    "Dense peers see every key and take no scores, so their time depends on N, D and G alone.",
)


class Target(NamedTuple):
    """One line of the table of targets.

    Attributes:
        what: the figure.
        wanted: the target, in words.
        measured: the figure found, in words; "not measured" where rows are missing.
        met: whether it meets the target; None where there is none, or rows are missing.
    """

    what: str
    wanted: str
    measured: str
    met: bool | None


class Pair(NamedTuple):
    """The fastest dense forward and backward at one N, D and G, in milliseconds, and whose they are."""

    forward: float
    forward_peer: str
    both: float | None
    backward_peer: str | None


def fastest_dense(results: Results, length: int, dim: int = 128, groups: int = 4) -> Pair | None:
    """Of all dense peers timed at this shape; forward and backward may come from two of them."""
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    for row in results["attention"]:
        if (row["N"], row["D"], row["G"]) == (length, dim, groups):
            for peer in DENSE:
                for times, key in ((forward, f"{peer}_forward_ms"), (backward, f"{peer}_backward_ms")):
                    if key in row:
                        times[peer] = row[key]
    if not forward:
        return None
    first = min(forward, key=forward.__getitem__)
    second = min(backward, key=backward.__getitem__) if backward else None
    return Pair(forward[first], first, forward[first] + backward[second] if second else None, second)


def rows_at(results: Results, *, scores: str = "random", **fixed: Any) -> list[Attention]:
    """Rows of our own times with these scores and sizes, by N."""
    rows = [
        row
        for row in results["attention"]
        if row["scores"] == scores and "forward_ms" in row and all(row[key] == value for key, value in fixed.items())
    ]
    return sorted(rows, key=lambda row: row["N"])


def speedups(results: Results, rows: Iterable[Attention], *, both: bool) -> dict[int, float]:
    """How many times the fastest dense peers' time ours goes into, by N; forward, or forward + backward."""
    found = {}
    for row in rows:
        dense = fastest_dense(results, row["N"], row["D"], row["G"])
        theirs = None if dense is None else dense.both if both else dense.forward
        ours = row["forward_ms"] + row.get("backward_ms", float("nan")) if both else row["forward_ms"]
        if theirs is not None and ours == ours:
            found[row["N"]] = theirs / ours
    return found


def break_even(results: Results, window: int, *, both: bool) -> int | None:
    """Smallest measured N from which on ours is the faster one (D = 128, G = 4)."""
    wins = speedups(results, rows_at(results, D=128, G=4, w=window), both=both)
    least = None
    for length in sorted(wins, reverse=True):
        if wins[length] < 1:
            break
        least = length
    return least


def targets(results: Results) -> list[Target]:
    """Every target of the kernels, with what was measured. D = 128 and the largest window unless said."""
    windows = sorted({row["w"] for row in results["attention"]})
    if not windows:
        return []
    wide = windows[-1]
    table = [
        *_rates(results, wide),
        *_against_dense(results, wide),
        *_break_evens(results, windows),
        _mask_share(results, wide),
        *_decode(results),
        *_memory(results),
        *_scaling(results, wide),
        *_errors(results),
        _deterministic(results, wide),
    ]
    return table


def _target(
    what: str, wanted: str, measured: str, values: list[float], *, least: float = 0.0, most: float = float("inf")
) -> Target:
    """Met where all values lie between `least` and `most`."""
    if not values:
        return Target(what, wanted, "not measured", None)
    return Target(what, wanted, measured, all(least <= value <= most for value in values))


def _span(values: list[float], unit: str = "") -> str:
    if not values:
        return ""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _rates(results: Results, wide: int) -> Iterable[Target]:
    wanted = {("forward", 128): 500, ("forward", 64): 380, ("backward", 128): 300}
    for (part, dim), least in wanted.items():
        for groups in (4, 16) if dim == 128 else (4,):
            rows = [row for row in rows_at(results, D=dim, G=groups, w=wide) if row["N"] >= 32768]
            rates = [row[f"{part}_tflops"] for row in rows if f"{part}_tflops" in row]
            what = f"useful rate, {part}, D = {dim}, G = {groups}, N >= 32K"
            yield _target(what, f">= {least} TFLOP/s", _span(rates, " TFLOP/s"), rates, least=least)


def _against_dense(results: Results, wide: int) -> Iterable[Target]:
    for groups in (4, 16):
        for length, forward, both in ((32768, 5.5, 4.0), (131072, 20.0, 15.0)):
            rows = rows_at(results, D=128, G=groups, w=wide, N=length)
            against = [row for row in rows if "fa3_forward_ms" in row]
            ratios = [row["fa3_forward_ms"] / row["forward_ms"] for row in against]
            scored = [row["fa3_forward_ms"] / (row["forward_ms"] + row["expiry_ms"]) for row in against]
            what = f"forward against FlashAttention-3, N = {length // 1024}K, G = {groups}"
            measured = f"{_span(ratios, 'x')} ({_span(scored, 'x')} with expiry)"
            yield _target(what, f">= {forward:g}x", measured, ratios, least=forward)
            ratios = list(speedups(results, rows, both=True).values())
            dense = fastest_dense(results, length, 128, groups)
            pair = f" ({dense.forward_peer} + {dense.backward_peer})" if dense and dense.backward_peer else ""
            what = f"forward + backward against the fastest dense pair, N = {length // 1024}K, G = {groups}"
            yield _target(what, f">= {both:g}x", _span(ratios, "x") + pair, ratios, least=both)


def _break_evens(results: Results, windows: list[int]) -> Iterable[Target]:
    for window in windows:
        for both, times in ((False, 3), (True, 4)):
            wins = speedups(results, rows_at(results, D=128, G=4, w=window), both=both)
            what = f"break-even with the fastest dense, {'forward + backward' if both else 'forward'}, w = {window}"
            wanted = f"N <= {times}·w"
            if times * window not in wins:
                yield Target(what, wanted, "not measured", None)
                continue
            least = break_even(results, window, both=both)
            measured = "never" if least is None else f"N = {least} ({least / window:g}·w)"
            measured += f"; {wins[times * window]:.2f}x at {times}·w"
            yield Target(what, wanted, measured, least is not None and least <= times * window)


def _mask_share(results: Results, wide: int) -> Target:
    rows = [row for row in rows_at(results, D=128, G=4, w=wide) if row["N"] >= 8192]
    shares = [row["mask_share"] for row in rows]
    measured = ", ".join(f"{row['mask_share']:.0%} at {_short(row['N'])}" for row in rows)
    return _target("expiry + lists, share of the forward", "<= 10%", measured, shares, most=0.1)


def _decode(results: Results) -> Iterable[Target]:
    for batch in sorted({row["B"] for row in results["decode"]} or {1, 32}):
        rows = {row["context"]: row for row in results["decode"] if row["B"] == batch and "bounded_us" in row}
        longest = rows.get(524288)
        base = next((rows[c] for c in sorted(rows) if c == rows[c]["w"]), None)
        ratios = [longest["bounded_us"] / base["bounded_us"]] if longest and base else []
        what = f"decode step at 512K against at its window, B = {batch}"
        yield _target(what, "<= 1.1x the time", _span(ratios, "x"), ratios, most=1.1)
        ratios = [longest["dense_us"] / longest["bounded_us"]] if longest and "dense_us" in longest else []
        what = f"decode step against dense SDPA at 512K, B = {batch}"
        yield _target(what, ">= 150x", _span(ratios, "x"), ratios, least=150)


def _memory(results: Results) -> Iterable[Target]:
    for part, most in (("forward", 1.2), ("backward", 1.5)):
        found = [row[f"memory_{part}"] for row in results["attention"] if f"memory_{part}" in row]
        what = f"peak memory above inputs and outputs, {part}, over the inputs' size, all rows"
        yield _target(what, f"<= {most}x", _span(found, "x"), found, most=most)


def _scaling(results: Results, wide: int) -> Iterable[Target]:
    rows = [row for row in rows_at(results, D=128, G=4, w=wide) if row["N"] >= 16384]
    for part in ("forward", "backward"):
        per_key = {row["N"]: row[f"{part}_ms"] / row["N"] for row in rows if f"{part}_ms" in row}
        first, last = per_key.get(16384), per_key.get(1 << 20)
        what = f"time per query, {part}, against that at 16K"
        if first is None or last is None:
            yield Target(what, "within 10% up to 1M", "not measured", None)
            continue
        measured = ", ".join(f"{value / first - 1:+.0%} at {_short(n)}" for n, value in per_key.items() if n != 16384)
        yield Target(what, "within 10% up to 1M", measured, all(abs(t / first - 1) <= 0.1 for t in per_key.values()))


def _errors(results: Results) -> Iterable[Target]:
    rows = results["errors"]
    checked = [row for row in rows if "worst" in row]
    failed = [row for row in rows if "error" in row]
    what = f"errors against float64, {len(checked)} cases, over those of the dense kernel"
    worst = max(checked, key=lambda row: row["worst"], default=None)
    if worst is None:
        yield Target(what, f"<= {ALLOWED}x", "not measured", None)
        return
    case = f"{worst['dtype']}, D = {worst['D']}, G = {worst['G']}, {worst['scores']}"
    measured = f"at most {worst['worst']:.2f}x ({case}); {sum(r['worst'] > ALLOWED for r in checked)} above"
    measured += f", {len(failed)} cases did not run" if failed else ""
    yield Target(what, f"<= {ALLOWED}x", measured, not failed and worst["worst"] <= ALLOWED)


def _deterministic(results: Results, wide: int) -> Target:
    """Its price, and whether it keeps its word."""
    rows = [row for row in rows_at(results, D=128, G=4, w=wide) if "deterministic_backward_ms" in row]
    prices = ", ".join(
        f"{row['deterministic_backward_ms'] / row['backward_ms']:.2f}x at {_short(row['N'])}" for row in rows
    )
    repeated = [row for row in rows if "deterministic_equal" in row]
    if not repeated:
        return Target("deterministic backward against the default", "its price", prices or "not measured", None)
    equal = all(row["deterministic_equal"] for row in repeated)
    runs = min(row["deterministic_runs"] for row in repeated)
    prices += f"; {'the same bits' if equal else 'other bits'} over {runs} runs"
    return Target("deterministic backward against the default", "its price, the same bits", prices, equal)


def markdown(results: Results) -> str:
    """The results as tables for people."""
    environment = dict(results["environment"])
    peers = environment.pop("peers", {})
    lines = ["# Attention on a GPU: `dynamask benchmark gpu`", ""]
    lines += [", ".join(f"{key} {value}" for key, value in environment.items()), ""]
    if peers:
        lines += ["Peers: " + ", ".join(f"{name} {version}" for name, version in peers.items()), ""]
    lines += [f"- {note}" for note in NOTES]
    lines += ["", "## Targets", "", *_targets_table(results)]
    lines += ["", "## Attention", "", *_table(ATTENTION_COLUMNS, results["attention"])]
    if results.get("peers"):
        lines += ["", "## Peers at a shape of their own", "", *_table(_PEER_COLUMNS, results["peers"])]
        lines += ["", "mask: same (our mask and bias), own (a sparsity of its own).", ""]
        lines += [f"- {row['peer']} ({PEERS[row['peer']].label}): {row['note']}" for row in results["peers"]]
    lines += ["", "## Decoding: microseconds of one step's attention", ""]
    lines += _table(("context", "B", "w", "bounded_us", "dense_us"), results["decode"])
    if results.get("prefill"):
        columns = ("N", "w", "extend_ms", "prefill_ms", "fa3_ms", "cudnn_ms")
        lines += ["", "## Prefill into an empty bounded cache, one layer", "", *_table(columns, results["prefill"])]
    if results["errors"]:
        lines += ["", "## Relative errors against float64", "", *_table(_ERROR_COLUMNS, results["errors"])]
    lines += _failures(results)
    if results.get("not_measured"):
        lines += ["", "## Not measured", ""]
        lines += [
            "- " + ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("note", "mask"))
            for row in results["not_measured"]
        ]
    return "\n".join(lines) + "\n"


def _targets_table(results: Results) -> list[str]:
    verdict = {True: "met", False: "missed", None: ""}
    rows = [
        {"what": t.what, "target": t.wanted, "measured": t.measured, "verdict": verdict[t.met]}
        for t in targets(results)
    ]
    return _table(("what", "target", "measured", "verdict"), rows)


def _failures(results: Results) -> list[str]:
    """Every error of the results, whole."""
    found: dict[str, str] = {}
    for part in ("errors", "attention", "peers", "decode", "prefill"):
        for row in results.get(part, ()):
            for key, value in row.items():
                if key == "error" or key.endswith("_error"):
                    where = row.get("peer") or key.removesuffix("_error").replace("error", "ours")
                    sizes = ", ".join(f"{k} {row[k]}" for k in ("dtype", "N", "D", "G", "context", "B") if k in row)
                    found.setdefault(value, f"{part}, {where}, {sizes}")
    if not found:
        return []
    lines = ["", "## What did not run", ""]
    for error, where in found.items():
        lines += [f"{where}:", "", "```", *error.splitlines(), "```", ""]
    return lines[:-1]


def _table(columns: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return lines + ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]


def _short(length: int) -> str:
    return f"{length >> 20}M" if length % (1 << 20) == 0 else f"{length / 1024:g}K"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
