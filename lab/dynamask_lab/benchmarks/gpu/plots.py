"""Time and speed-up against N, per peer, drawn from the benchmark's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynamask.errors import UsageError
from dynamask_lab.benchmarks.gpu.peers import DENSE, PEERS
from dynamask_lab.benchmarks.gpu.report import rows_at

# Okabe and Ito's palette, told apart with any colour vision; marks and dashes say the same a second time.
_OURS = (("#000000", "o", "-"), ("#666666", "s", "--"))
_STYLES = {
    "fa3": ("#0072B2", "^", "-"),
    "cudnn": ("#D55E00", "v", "--"),
    "flash": ("#009E73", "D", "-."),
    "flex": ("#CC79A7", "P", ":"),
    "fsa1": ("#E69F00", "X", ":"),
    "fsa2": ("#56B4E9", "*", ":"),
    "fsa2_gated": ("#F0E442", "h", ":"),
    "fa3 + cudnn": ("#0072B2", "^", "-"),
}
Curve = dict[int, float]


def curves(results: dict[str, Any], dim: int, groups: int) -> dict[str, dict[str, dict[str, Curve]]]:
    """What is drawn: "ours" by window and "peers" by name, milliseconds by N, for "forward" and "both".

    FlashAttention-3's wheel has no backward, so "both" joins its forward to cuDNN's backward, as the fastest pair.
    """
    windows = sorted({row["w"] for row in results["attention"]}, reverse=True)[:2]
    found: dict[str, dict[str, dict[str, Curve]]] = {}
    for part in ("forward", "both"):
        ours = {
            f"dynamask, w = {w}": {
                r["N"]: r["forward_ms"] + (r["backward_ms"] if part == "both" else 0.0)
                for r in rows
                if part == "forward" or "backward_ms" in r
            }
            for w in windows
            if (rows := rows_at(results, D=dim, G=groups, w=w))
        }
        theirs: dict[str, Curve] = {}
        for row in results["attention"]:
            if (row["D"], row["G"]) == (dim, groups):
                for peer in DENSE:
                    _add(theirs, peer, row["N"], row.get(f"{peer}_forward_ms"), row.get(f"{peer}_backward_ms"), part)
                mixed = row.get("fa3_forward_ms"), row.get("cudnn_backward_ms")
                if part == "both":
                    _add(theirs, "fa3 + cudnn", row["N"], *mixed, part)
        for row in results.get("peers", ()):
            if (row["D"], row["G"]) == (dim, groups):
                _add(theirs, row["peer"], row["N"], row.get("forward_ms"), row.get("backward_ms"), part)
        found[part] = {"ours": ours, "peers": theirs}
    return found


def _add(found: dict[str, Curve], name: str, n: int, forward: float | None, backward: float | None, part: str) -> None:
    if forward is None or (part == "both" and backward is None):
        return
    found.setdefault(name, {})[n] = forward + (backward or 0.0) * (part == "both")


def draw(results: dict[str, Any], stem: Path) -> list[Path]:
    """STEM.png for D = 128, G = 4 and STEM-d128-g16.png, STEM-d64-g4.png, where there are rows.

    Raises:
        UsageError: the results hold no row that could be drawn.
    """
    written = []
    for dim, groups, suffix in ((128, 4, ""), (128, 16, "-d128-g16"), (64, 4, "-d64-g4")):
        found = curves(results, dim, groups)
        if found["forward"]["ours"]:
            written.append(
                _draw(found, results["environment"], dim, groups, stem.with_name(f"{stem.name}{suffix}.png"))
            )
    if not written:
        raise UsageError("the results hold no row of attention with H = 16 that could be drawn")
    return written


def _draw(
    found: dict[str, dict[str, dict[str, Curve]]], environment: dict[str, Any], dim: int, groups: int, path: Path
) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    for (time_axes, ratio_axes), (part, title) in zip(
        grid, (("forward", "forward"), ("both", "forward + backward")), strict=True
    ):
        ours, theirs = found[part]["ours"], found[part]["peers"]
        for (label, curve), style in zip(ours.items(), _OURS, strict=False):
            _plot(time_axes, curve, label, style, width=2.2)
        for peer, curve in theirs.items():
            _plot(time_axes, curve, _label(peer), _STYLES.get(peer, _STYLES["flex"]))
            first = next(iter(ours.values()), {})
            ratios = {n: theirs_ms / first[n] for n, theirs_ms in curve.items() if n in first}
            _plot(ratio_axes, ratios, _label(peer), _STYLES.get(peer, _STYLES["flex"]))
        ratio_axes.axhline(1.0, color="black", linewidth=1, linestyle=":")
        time_axes.set(title=f"{title}: time", ylabel="milliseconds")
        ratio_axes.set(title=f"{title}: times as fast as the peer", ylabel=f"peer's time / {next(iter(ours), '')}")
        for axes in (time_axes, ratio_axes):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize="small")
    lengths = sorted(
        {n for part in found.values() for group in part.values() for curve in group.values() for n in curve}
    )
    for axes in grid[1]:
        axes.set_xlabel("N, tokens")
        axes.set_xticks(lengths, [f"{n >> 20}M" if n >= 1 << 20 else f"{n / 1024:g}K" for n in lengths], rotation=45)
        axes.minorticks_off()
    figure.suptitle(
        f"{environment.get('device', '')}, bfloat16, causal, batch 1, H = 16, G = {groups}, D = {dim}, random scores"
    )
    figure.savefig(path, dpi=130)
    return path


def _plot(axes: Any, curve: Curve, label: str, style: tuple[str, str, str], width: float = 1.5) -> None:
    if curve:
        color, marker, line = style
        points = sorted(curve.items())
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line, linewidth=width, label=label)


def _label(peer: str) -> str:
    return " + ".join(PEERS[name].label if name in PEERS else name for name in peer.split(" + "))
