"""The ablation in the report: a table per question, the window sweep drawn, the gradient claim judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynamask_lab.studies.ablation.study import LEAKY, ablation_summary, grouped, language_settings, mean_loss
from dynamask_lab.studies.judged import share
from dynamask_lab.sweeps.registry import reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Row, Section
from dynamask_lab.sweeps.verdicts import LOSS_INTEREST, NOT_TESTED, judge, mean_interval

_TRAINED, _CUT = "dma-random-start", ("dma-detached-scores", "dma-unbiased-logits")


@reports("ablation")
def report_ablation(records: Sequence[Record], folder: Path) -> Section:
    """See `Experiment.report`."""
    groups = grouped(records)
    seeds = len({record.seed for record in records})
    exhibits = [
        Exhibit(
            "variants",
            "Every variant",
            [record.key for record in records],
            f"Validation loss, nats per token, {seeds} seed{'s' if seeds > 1 else ''}; `exact` and `leaky`: the same "
            "weights under the selection of each query's prefix, and under the best keys of the whole sequence. Rows "
            "of different numbers of runs do not compare: seeds differ, too.",
            ablation_summary(records),
        )
    ]
    leak = {place: runs for place, runs in groups.items() if "exact_loss" in runs[0].result}
    if leak:
        rows: list[Row] = [
            {
                "trained with": name,
                "window": str(window),
                "runs": str(len(runs)),
                "read exactly": f"{mean_loss(runs, 'exact_loss'):.4f}",
                "read leakily": f"{mean_loss(runs, 'leaky_loss'):.4f}",
                "higher without the leak by": mean_interval(
                    [run.result["exact_loss"] - run.result["leaky_loss"] for run in runs]
                ).shown(digits=4),
            }
            for (name, window), runs in leak.items()
        ]
        keys = [run.key for runs in leak.values() for run in runs]
        text = (
            f"`{LEAKY}` chooses by looking at the future. It is wrong on purpose, and exists in this experiment alone. "
            "With several runs, in brackets the 95% interval over their seeds."
        )
        exhibits.append(Exhibit("leak", "How much the leak flatters the loss", keys, text, rows))
    sweep = {key: runs for key, runs in groups.items() if key[0] in ("dma", "sliding window")}
    common = set.intersection(*({run.seed for run in runs} for runs in sweep.values())) if sweep else set()
    sweep = {key: own for key, runs in sweep.items() if (own := [run for run in runs if run.seed in common])}
    if len({window for _, window in sweep}) > 1:
        rows = []
        for window in sorted({window for _, window in sweep}):
            row = {"window": str(window)}
            for name in ("dma", "sliding window"):
                if (name, window) in sweep:
                    row[name] = f"{mean_loss(sweep[name, window]):.4f}"
            rows.append(row)
        keys = [run.key for runs in sweep.values() for run in runs]
        picture = _draw_windows({key: mean_loss(runs) for key, runs in sweep.items()}, folder / "windows.svg")
        exhibits.append(Exhibit("windows", "Loss by window", keys, table=rows, picture=picture))
    return Section("", exhibits, [*_findings(records), *_leak_findings(records)])


def _leak_findings(records: Sequence[Record]) -> list[Finding]:
    """By window: how far a model trained with the leak ends below one trained exactly, each read as it was trained; and
    what the leak's model loses when it is read exactly."""
    found = []
    groups = grouped(records)
    for (name, window), runs in groups.items():
        both = [run for run in runs if "leaky_loss" in run.result]
        if not name.startswith(LEAKY) or not both:
            continue
        exact = {(run.seed, run.corpus): run for run in groups.get((name.replace(LEAKY, "dma"), window), ())}
        pairs = [(run, exact[run.seed, run.corpus]) for run in both if (run.seed, run.corpus) in exact]
        config = both[0].config
        setting = {"w/N": share(window, config["length"]), "size": f"{language_settings(config).parameters / 1e6:.1f}M"}
        subject, interest = f"trained with the leak, w = {window}", f"{LOSS_INTEREST} nats"
        lost = mean_interval([run.result["exact_loss"] - run.result["leaky_loss"] for run in both])
        if pairs:
            gain = mean_interval([own.result["exact_loss"] - leaky.result["leaky_loss"] for leaky, own in pairs])
            rest = mean_interval([own.result["exact_loss"] - leaky.result["exact_loss"] for leaky, own in pairs])
            measured = (
                f"nats below a model trained exactly, each read as it was trained {gain}; both read exactly {rest}"
            )
            verdict = judge(gain, LOSS_INTEREST, seeds=len(pairs))
            keys = [run.key for pair in pairs for run in pair]
            own = setting | {"seeds": str(len(pairs))}
            found.append(Finding("leak", subject, measured, verdict, keys, "", own, interest, f"{gain} nats"))
        measured = f"nats by which the same model's loss is higher without the leak {lost}"
        verdict = judge(lost, LOSS_INTEREST, seeds=len(both))
        keys, own = [run.key for run in both], setting | {"seeds": str(len(both))}
        found.append(Finding("leak-cost", subject, measured, verdict, keys, "", own, interest, f"{lost} nats"))
    return found


def _findings(records: Sequence[Record]) -> list[Finding]:
    """Gates that start alike, with and without the gradient, seed by seed."""
    losses: dict[str, dict[tuple[int, int], Record]] = {}
    for (name, window), runs in grouped(records).items():
        losses.setdefault(name, {}).update({(window, run.seed): run for run in runs})
    found = []
    for cut in _CUT:
        both = sorted(losses.get(_TRAINED, {}).keys() & losses.get(cut, {}).keys())
        if not both:
            continue
        keys = [losses[name][place].key for place in both for name in (_TRAINED, cut)]
        pairs = [(losses[_TRAINED][place].result["loss"], losses[cut][place].result["loss"]) for place in both]
        subject = f"gates from a random start, against {cut}"
        if any(loss is None for pair in pairs for loss in pair):
            found.append(Finding("gradients", subject, "a run diverged", NOT_TESTED, keys))
            continue
        gain = mean_interval([without - trained for trained, without in pairs])
        measured = f"nats per token gained by the gradient {gain.shown(digits=4)}"
        verdict = judge(gain, LOSS_INTEREST, seeds=len(pairs))
        config = losses[_TRAINED][both[0]].config
        setting = {"seeds": str(len(pairs)), "w/N": share(config["window"], config["length"])}
        setting |= {"size": f"{language_settings(config).parameters / 1e6:.1f}M"}
        interest, difference = f"{LOSS_INTEREST} nats", f"{gain} nats"
        found.append(Finding("gradients", subject, measured, verdict, keys, "", setting, interest, difference))
    return found


def _draw_windows(losses: dict[tuple[str, int], float], picture: Path) -> Path:
    from matplotlib.figure import Figure

    from dynamask.inspect.style import line_style
    from dynamask_lab.report.pictures import save_small

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for name, style in (("dma", line_style("dma")), ("sliding window", line_style("swa"))):
        points = sorted((window, loss) for (own, window), loss in losses.items() if own == name)
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="window, keys per query", ylabel="validation loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return save_small(figure, picture)
