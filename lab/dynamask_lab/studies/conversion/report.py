"""Tables with 95% intervals, and one picture, from the study's lines.

    python -m dynamask_lab.studies.conversion.report FOLDER results-*.jsonl

Intervals are bootstrap percentiles over documents, examples or questions. Differences from another form are paired:
both forms saw the same documents and examples, and only those that both have seen count.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from dynamask_lab.studies.conversion.jobs import BUDGET, LENGTHS
from dynamask_lab.studies.conversion.levers import COMPARISONS
from dynamask_lab.studies.conversion.measure import BENCHMARKS, BIN
from dynamask_lab.studies.conversion.study import read_rows

RESAMPLES = 2000
GROUPS = {
    "needles": ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multivalue", "multiquery"),
    "multi-key 3": ("multikey_3",),
    "tracking": ("tracking",),
    "words": ("common_words", "frequent_words"),
    "pairs": ("pairs",),
}
"""Task groups; multi-key 3 stands alone, because small dense models fail it too."""
_DRAWN = (
    ("dense", "dense"),
    (f"converted-{BUDGET}-heads-learned-distilled", "learned ranks, distilled"),
    (f"converted-{BUDGET}-heads-learned-frozen", "learned ranks, frozen"),
    (f"converted-{BUDGET}-heads-newest-distilled", "newest keys in the same windows, distilled"),
    (f"converted-{BUDGET}-equal-newest-distilled", "window + sinks, distilled"),
    (f"converted-{BUDGET}-equal-newest-frozen", "window + sinks"),
)

Values = Mapping[Any, float]
"""A figure for each document or example, by what identifies it."""


class Study:
    """The lines of the study by form.

    Args:
        rows: as `read_rows` gives them; of lines with one key the last counts.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = list({row["key"]: row for row in rows}.values())
        self.forms = list(dict.fromkeys(row["form"] for row in self.rows if row["measure"] in _MEASURES))

    def of(self, form: str, measure: str) -> list[dict[str, Any]]:
        """The lines of a form and a measure."""
        return [row for row in self.rows if row["form"] == form and row["measure"] == measure]

    def losses(self, form: str, corpus: str, measure: str = "loss") -> Values:
        """Mean loss of each document."""
        return {
            (corpus, index): float(np.nanmean(loss))
            for row in self.of(form, measure)
            if row["settings"]["corpus"] == corpus
            for index, loss in enumerate(row["result"]["losses"])
        }

    def by_position(self, form: str, corpus: str) -> np.ndarray | None:
        """Mean loss of each `BIN` positions, or None."""
        found = [row for row in self.of(form, "loss") if row["settings"]["corpus"] == corpus]
        return np.nanmean(np.array(found[0]["result"]["losses"], dtype=float), axis=0) if found else None

    def scores(self, form: str, tasks: Sequence[str], *, question: int | None = None, length: int = 0) -> Values:
        """Score of each example; of one question, or the mean of all."""
        made = {}
        for row in self.of(form, "tasks"):
            settings = row["settings"]
            if settings["task"] not in tasks or (length and settings["length"] != length):
                continue
            for index, scores in enumerate(row["result"]["scores"], settings["first"]):
                name = (settings["task"], settings["length"], settings["haystack"], index)
                made[name] = float(np.mean(scores) if question is None else scores[question])
        return made

    def answers(self, form: str, name: str, kind: str) -> Values:
        """1 or 0 for each question of a benchmark."""
        return {
            (name, index): float(right)
            for row in self.of(form, "benchmark")
            if row["settings"]["name"] == name
            for index, right in enumerate(row["result"][kind])
        }


_MEASURES = ("loss", "continuation", "tasks", "benchmark", "long", "speed")


def interval(figures: np.ndarray) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean."""
    rng = np.random.default_rng(0)
    means = figures[rng.integers(0, len(figures), (RESAMPLES, len(figures)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def mean(values: Values, digits: int = 3) -> str:
    """The mean of all figures, or "–" where there are none."""
    return f"{np.mean(list(values.values())):.{digits}f}" if values else "–"


def difference(values: Values, base: Values, digits: int = 3) -> str:
    """The mean paired difference with its interval, "–" where nothing is common."""
    common = [key for key in values if key in base]
    if not common:
        return "–"
    figures = np.array([values[key] - base[key] for key in common])
    low, high = interval(figures)
    return f"{figures.mean():+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def share(values: Values, base: Values) -> str:
    """The ratio of paired means with its interval, "–" where nothing is common or the base is zero."""
    common = [key for key in values if key in base]
    pairs = np.array([(values[key], base[key]) for key in common])
    if not len(pairs) or pairs[:, 1].sum() == 0:
        return "–"
    rng = np.random.default_rng(0)
    drawn = pairs[rng.integers(0, len(pairs), (RESAMPLES, len(pairs)))].sum(1)
    low, high = np.percentile(drawn[:, 0] / np.maximum(drawn[:, 1], 1e-9), (2.5, 97.5))
    ratio = pairs[:, 0].sum() / pairs[:, 1].sum()
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def loss_table(study: Study, measure: str = "loss") -> str:
    """Losses by form, and how far they are above the dense model's."""
    rows = []
    for form in study.forms:
        if study.of(form, measure):
            cells = [form]
            for corpus in ("text", "code"):
                values, base = study.losses(form, corpus, measure), study.losses("dense", corpus, measure)
                cells += [mean(values), "" if form == "dense" else difference(values, base)]
            rows.append(cells)
    return table(["form", "text", "above dense", "code", "above dense"], rows)


def continuation_table(study: Study) -> str:
    """Losses behind a context that was read, and bounded, before."""
    return loss_table(study, "continuation")


def task_table(study: Study) -> str:
    """Scores by task group, and their share of the dense model's on the needles."""
    rows = []
    for form in study.forms:
        if study.of(form, "tasks"):
            needles, base = study.scores(form, GROUPS["needles"]), study.scores("dense", GROUPS["needles"])
            groups = [mean(study.scores(form, tasks), 2) for name, tasks in GROUPS.items() if name != "pairs"]
            pairs = [mean(study.scores(form, GROUPS["pairs"], question=q), 2) for q in (0, 1)]
            rows.append([form, *groups, *pairs, "" if form == "dense" else share(needles, base)])
    names = [name for name in GROUPS if name != "pairs"]
    return table(["form", *names, "pairs, 1st question", "2nd", "needles, share of dense"], rows)


def length_table(study: Study) -> str:
    """Needle scores by length."""
    rows = [
        [form, *(mean(study.scores(form, GROUPS["needles"], length=length), 2) for length in LENGTHS)]
        for form in study.forms
        if study.of(form, "tasks")
    ]
    return table(["form", *(f"{length // 1024}K" for length in LENGTHS)], rows)


def rival_table(study: Study) -> str:
    """The distilled and the frozen form against the best peer of each task group."""
    peers = [form for form in study.forms if form.endswith(f"-{BUDGET}") and not form.startswith("converted")]
    rows = []
    for name, tasks in GROUPS.items():
        scored = {peer: study.scores(peer, tasks) for peer in peers}
        scored = {peer: values for peer, values in scored.items() if values}
        if not scored:
            continue
        best = max(scored, key=lambda peer: float(np.mean(list(scored[peer].values()))))
        cells = [name, f"{best}: {mean(scored[best], 2)}"]
        for form in (f"converted-{BUDGET}-heads-learned-frozen", f"converted-{BUDGET}-heads-learned-distilled"):
            cells.append(difference(study.scores(form, tasks), scored[best], 2))
        rows.append(cells)
    return table(["tasks", "best peer", "frozen above it", "distilled above it"], rows)


def benchmark_table(study: Study) -> str:
    """Benchmarks: acc_norm where choices differ in length, acc elsewhere."""
    plain = ("winogrande", "boolq", "copa", "siqa", "lambada_openai")
    kinds = {name: "acc" if name in plain else "acc_norm" for name in BENCHMARKS}
    rows = []
    for form in study.forms:
        if study.of(form, "benchmark"):
            values = {name: study.answers(form, name, kind) for name, kind in kinds.items()}
            base = {key: v for name, kind in kinds.items() for key, v in study.answers("dense", name, kind).items()}
            every = {key: value for figures in values.values() for key, value in figures.items()}
            shown = [mean(figures, 3) for figures in values.values()]
            rows.append([form, *shown, "" if form == "dense" else difference(every, base)])
    return table(["form", *BENCHMARKS, "all, above dense"], rows)


def cost_table(study: Study) -> str:
    """Cache bytes, speed, and seconds of training."""
    rows = []
    for form in study.forms:
        for row in study.of(form, "speed"):
            result = row["result"]
            rows.append(
                [
                    form,
                    str(row["settings"]["batch"]),
                    f"{result['cache_bytes'] / 2**20:.1f}",
                    f"{result['read_tokens_per_second']:,.0f}",
                    f"{result['decoded_tokens_per_second']:,.0f}",
                    row["device"],
                ]
            )
    made = table(["form", "batch", "cache, MiB a sequence", "read, tokens/s", "decoded, tokens/s", "device"], rows)
    trained = [
        [row["form"], row["measure"], f"{row['result']['seconds']:.1f}", row["device"]]
        for row in study.rows
        if row["measure"] in ("learn_ranks", "allocate_windows", "train")
    ]
    return made + "\n" + table(["form", "stage", "seconds", "device"], trained)


def long_table(study: Study) -> str:
    """Losses beyond the trained context: of all positions, and of the last eighth."""
    rows = []
    for form in study.forms:
        for row in study.of(form, "long"):
            losses = np.array(row["result"]["losses"], dtype=float)
            last = losses[:, -losses.shape[1] // 8 :]
            settings = row["settings"]
            figures = [f"{np.nanmean(losses):.3f}", f"{last.mean():.3f}"]
            rows.append([form, settings["corpus"], str(settings["length"]), *figures])
    return table(["form", "corpus", "length", "loss", "last eighth"], rows)


def lever_table(study: Study) -> str:
    """What each lever changes: paired differences of losses, and the needles' share of the other form's."""
    rows = []
    for name, spec, other in COMPARISONS:
        form, base = spec.name, other.name
        if not study.of(form, "loss") or not study.of(base, "loss"):
            continue
        cells = [name, form, base]
        for measure, corpus in (("loss", "text"), ("loss", "code"), ("continuation", "text"), ("continuation", "code")):
            cells.append(difference(study.losses(form, corpus, measure), study.losses(base, corpus, measure)))
        needles: dict[Any, float] = {}
        found: dict[Any, float] = {}
        for length in (1024, 2048, 4096):
            needles |= study.scores(form, GROUPS["needles"], length=length)
            found |= study.scores(base, GROUPS["needles"], length=length)
        rows.append([*cells, share(needles, found)])
    heads = [
        "lever",
        "form",
        "against",
        "text",
        "code",
        "text behind 7680",
        "code behind 7680",
        "needles, 1K to 4K, share",
    ]
    return table(heads, rows)


def picture(study: Study, file: Path) -> None:
    """Loss above dense by position, needles by length, and the windows of the heads."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    dense = study.by_position("dense", "text")
    for number, (form, label) in enumerate(_DRAWN):
        curve = study.by_position(form, "text")
        if curve is not None and dense is not None and form != "dense":
            left.plot((np.arange(len(curve)) + 0.5) * BIN, curve - dense, f"C{number}", label=label)
        scores = [study.scores(form, GROUPS["needles"], length=length) for length in LENGTHS]
        shown = [(n, float(np.mean(list(v.values())))) for n, v in zip(LENGTHS, scores, strict=True) if v]
        if shown:
            middle.plot(*zip(*shown, strict=True), f"C{number}o-", label=label)
    for number, form in enumerate(study.forms):
        values = [(n, study.scores(form, GROUPS["needles"], length=n)) for n in LENGTHS]
        shown = [(n, float(np.mean(list(v.values())))) for n, v in values if v]
        if form.endswith(f"-{BUDGET}") and not form.startswith("converted") and shown:
            middle.plot(
                *zip(*shown, strict=True),
                marker=".",
                linestyle=":",
                color=plt.cm.Greys(0.35 + number % 7 / 12),
                label=form.removesuffix(f"-{BUDGET}"),
            )
    left.set(title=f"Loss above dense, text, {BUDGET} keys per head", xlabel="position", ylabel="nats")
    middle.set(title="Needle tasks", xlabel="tokens", ylabel="score", ylim=(0, 1))
    middle.set_xscale("log", base=2)
    middle.set_xticks(LENGTHS, [f"{n // 1024}K" for n in LENGTHS])
    for axis in (left, middle):
        if axis.lines:
            axis.legend(fontsize=7)
    found = [row for row in study.rows if row["measure"] == "allocate_windows" and row["spec"]["budget"] == BUDGET]
    if found:
        windows = np.array([layer for layer in found[0]["result"]["windows"] if layer]).T
        image = right.imshow(np.log2(windows), aspect="auto", cmap="viridis")
        bar = figure.colorbar(image, ax=right)
        bar.set_ticks(bar.get_ticks(), labels=[f"{2**tick:.0f}" for tick in bar.get_ticks()])
    right.set(title="Window of each KV head", xlabel="layer", ylabel="KV head")
    figure.savefig(file, dpi=130)
    plt.close(figure)


SECTIONS: dict[str, Callable[[Study], str]] = {
    "Loss at 8192": loss_table,
    "Loss of 512 tokens behind 7680": continuation_table,
    "Tasks by generation": task_table,
    "Needle tasks by length": length_table,
    "Against the best peer": rival_table,
    "Levers": lever_table,
    "Benchmarks": benchmark_table,
    "Longer than the model was trained for": long_table,
    "Cost": cost_table,
}


def write(rows: Iterable[dict[str, Any]], folder: Path) -> Path:
    """Write `conversion.md` and `conversion.png` into the folder, and return the first."""
    study = Study(rows)
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, set[str]] = defaultdict(set)
    for row in study.rows:
        for name in ("model", "device", "commit", "data"):
            facts[name].add(str(row.get(name)))
        facts["versions"].add(json.dumps(row.get("versions")))
        facts["schedule"].add(json.dumps(row.get("schedule")))
    parts = ["# Conversion of a pretrained model\n", "![](conversion.png)\n"]
    parts += [f"## {title}\n\n{make(study)}" for title, make in SECTIONS.items()]
    parts.append("## Where it was measured\n")
    parts += [f"- {name}: {', '.join(sorted(values))}" for name, values in sorted(facts.items())]
    file = folder / "conversion.md"
    file.write_text("\n".join(parts) + "\n", encoding="utf-8")
    picture(study, folder / "conversion.png")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args()
    print(write(read_rows(arguments.results), arguments.folder))


if __name__ == "__main__":
    main()
