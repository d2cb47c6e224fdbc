"""`docs/results`: every table, picture and verdict drawn anew from the raw lines in `lab/results`."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import dynamask_lab.studies.reports  # noqa: F401 -- registers them
from dynamask.errors import UsageError, did_you_mean
from dynamask_lab.report.benchmarks import BENCHMARKS, newest_speeds
from dynamask_lab.report.claims import CLAIMS
from dynamask_lab.report.conversion_bound import PATTERN as BOUND
from dynamask_lab.report.exhibits import exhibits
from dynamask_lab.report.markdown import markdown_table
from dynamask_lab.report.pictures import pictures
from dynamask_lab.report.recipe_names import NOTE
from dynamask_lab.report.scoreboard import Placed, board, details, goals, told_verdict
from dynamask_lab.studies import EXPERIMENTS, Experiment, Record, read_results, run_key
from dynamask_lab.studies.needle.data import same_mixture
from dynamask_lab.sweeps.provenance import short_commit
from dynamask_lab.sweeps.registry import REPORTS, Lender
from dynamask_lab.sweeps.section import Exhibit, Row, Section
from dynamask_lab.sweeps.verdicts import FEW_SEEDS, FEW_SEEDS_INTEREST, NOT_TESTED

RESULTS, OUTPUT = Path("lab/results"), Path("docs/results")
COMMAND = "dynamask report results"
_KEYS_SHOWN = 12
_BUILD = "-"
"""Between a run's key and the content that tells it from the run of the same key on another build of its corpus."""
_Runs = dict[str, tuple[str, Record]]
"""Key of a run -> its file and itself."""
VERDICTS_PAGE = "verdicts"
APPENDIX = "appendix"
"""Folder of the sections that the site does not index."""
_UNINDEXED = "---\nsearch:\n  exclude: true\n---\n\n"
_APPENDIX_NAMES = re.compile(
    r"(-(probe|quick|other)(-build-\d+)?|-build-\d+|mqar-small)$|^masks-(paper-form|ranked|spread)|"
    r"^masks-over-training-tiny|^h100-more"
)
"""Sections of small trials, earlier builds of a corpus, other settings and tiny models."""
_PAIRED = ("ablation-leak", "needle-far", "recurrent-tiny")
"""Sweeps whose runs of one seed read one build of the corpus, and are compared with no others."""
_MAIN_NAMES = ("mqar-quick",)
"""Of those the one sweep with three seeds."""


def _of_appendix(name: str) -> bool:
    return name not in _MAIN_NAMES and _APPENDIX_NAMES.search(name) is not None


@dataclass(frozen=True)
class _Part:
    """A section, and where what it shows lies.

    Attributes:
        name: "mqar-small", unique in the report.
        title: heading.
        section: what to show.
        rows: key of a raw row -> its file and the row itself, as JSON.
        sources: markdown: devices and commits the rows come from.
        command: of the runs; "" where the page names it.
        lent: how many of the rows belong to the sweep whose spread this one borrows.
    """

    name: str
    title: str
    section: Section
    rows: Mapping[str, tuple[str, Any]]
    sources: str
    command: str = ""
    lent: int = 0

    @property
    def in_appendix(self) -> bool:
        """Whether the section belongs to the appendix."""
        return _of_appendix(self.name)


@dataclass(frozen=True)
class _Page:
    """One file of the report."""

    name: str
    title: str
    text: str
    parts: Sequence[_Part]
    full_size: str


def render_results(results: Path = RESULTS, output: Path = OUTPUT) -> list[Path]:
    """Write the report: an index with the verdicts, a page per experiment and benchmark, and their pictures.

    The same raw lines give the same bytes. What has no raw lines is said to be not measured.

    Args:
        results: folder of raw lines: `*.jsonl` of experiments, `*.json` of benchmarks, `masks/*.jsonl`.
        output: folder to write. Pages and pictures of an earlier report are replaced.

    Returns:
        The pages, the index first.

    Raises:
        UsageError: no such folder, or a file in it that cannot be read as what its place says it is; an output
            folder that holds something else than a report.
    """
    if not results.is_dir():
        raise UsageError(
            f"there is no folder {results} of raw results: run `{COMMAND}` in a checkout, or give --results FOLDER"
        )
    _check_output(output)
    output.mkdir(parents=True, exist_ok=True)
    for old in [*output.glob("*.md"), *output.glob(f"{APPENDIX}/*.md"), *_pictures(output)]:
        old.unlink()
    pages, opening = _collect(results, output)
    placed = _placed(pages)
    files = {"index": _index(pages, placed, opening, output, results), VERDICTS_PAGE: _verdicts_page(placed)}
    for page in pages:
        main = replace(page, parts=[part for part in page.parts if not part.in_appendix])
        rest = replace(page, parts=[part for part in page.parts if part.in_appendix])
        if main.parts or not rest.parts:
            files[page.name] = _render(main, output, output)
        if rest.parts:
            files[f"{APPENDIX}/{page.name}"] = _UNINDEXED + _render(rest, output / APPENDIX, output)
    written = []
    for name, text in files.items():
        path = output / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    for folder in sorted(output.rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return written


def _pictures(output: Path) -> list[Path]:
    return [path for pattern in ("*/*.svg", "*/*.png") for path in output.glob(pattern)]


def trace(name: str, results: Path = RESULTS) -> list[str]:
    """The raw rows an exhibit is made of.

    Args:
        name: as written below the exhibit, such as "mqar-small-accuracy".
        results: folder of raw lines.

    Returns:
        "FILE KEY JSON" each.

    Raises:
        UsageError: no such exhibit, naming those there are; or what `render_results` raises.
    """
    import tempfile

    found: dict[str, tuple[Sequence[str], Mapping[str, tuple[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        pages, opening = _collect(results, Path(scratch))
        for part in [part for page in pages for part in page.parts] + opening:
            for exhibit in part.section.exhibits:
                found[f"{part.name}-{exhibit.name}"] = (exhibit.keys, part.rows)
    if name not in found:
        raise UsageError(f"no exhibit {name!r}{did_you_mean(name, found)}; there are {', '.join(found) or 'none'}")
    keys, rows = found[name]
    return [f"{rows[key][0]} {key} {json.dumps(rows[key][1])}" for key in keys]


def _check_output(output: Path) -> None:
    """A report's folder is emptied first, which must not happen to another one."""
    index = output / "index.md"
    if output.exists() and any(output.glob("*.md")) and not (index.exists() and COMMAND in index.read_text()):
        raise UsageError(f"{output} holds pages that `{COMMAND}` did not write: give another --output")


def _collect(results: Path, output: Path) -> tuple[list[_Page], list[_Part]]:
    """The pages, and the exhibits that open the report."""
    if not results.is_dir():
        raise UsageError(f"there is no folder {results} with raw results: give one with --results")
    records: dict[str, tuple[str, Record]] = {}
    sweeps: dict[str, list[Record]] = {}
    others = {file for name in BENCHMARKS for file in _files(name, results)} | {*results.glob(BOUND)}
    for file in sorted(set(results.glob("*.jsonl")) - others):
        sweeps[file.stem] = list(read_results(file))
        for record in sweeps[file.stem]:
            # Runs are numbered by their settings: a second one of the same key is the same run repeated, unless it read
            # another build of its corpus.
            earlier = records.setdefault(record.key, (_shown(file), record))[1]
            if _build(earlier) != _build(record):
                key = f"{record.key}{_BUILD}{record.corpus[1][:8]}"
                records.setdefault(key, (_shown(file), replace(record, key=key)))
    pages = [_experiment_page(EXPERIMENTS[name], records, results, output) for name in sorted(EXPERIMENTS)]
    pages += [_benchmark_page(name, results, output) for name in BENCHMARKS]
    opening = []
    for exhibit, rows, command in exhibits(results, sweeps, output / "exhibits"):
        devices = sorted({str(row["device"]) for _, row in rows.values() if "device" in row})
        opening.append(_Part("exhibit", exhibit.title, Section("", [exhibit]), rows, "; ".join(devices), command))
    return pages, opening


def _experiment_page(experiment: Experiment, records: _Runs, results: Path, output: Path) -> _Page:
    own = {key: found for key, found in records.items() if found[1].experiment == experiment.name}
    parts = []
    left = dict(own)
    finished = [record for _, record in own.values()]
    sizes = {
        size: {run_key(experiment.name, config) for config in experiment.configs(size, finished)}
        for size in experiment.sizes
    }
    groups: list[tuple[str, str, str, _Runs]] = []  # what they are, how that goes on, name, runs
    for size, keys in reversed(sizes.items()):  # the largest first
        chosen = {key: left.pop(key) for key in [*left] if key.split(_BUILD)[0] in keys}
        groups.append((f"Size `{size}`", f" of {len(keys)}", f"{experiment.name}-{size}", chosen))
    groups.append(("Other settings", "", f"{experiment.name}-other", left))
    whole = {name: chosen for _, _, name, chosen in groups}
    for what, of, name, chosen in groups:
        lender = _lender(experiment, name, whole)
        if name in _PAIRED and len(_by_build(chosen)) > 1:
            what += ", seeds from several builds of the corpus (differences within a seed compare, means do not)"
            parts.append(_experiment_part(experiment, name, f"{what}: {len(chosen)}{of} runs", chosen, output, lender))
            continue
        for number, runs in enumerate(_by_build(chosen)):
            # Corpora built anew hold other versions of their packages, so losses of two builds do not compare.
            build = "" if number == 0 else ", an earlier build of the corpora" if number == 1 else f", build {number}"
            label = name if number == 0 else f"{name}-build-{number}"
            title = f"{what}{build}: {len(runs)}{of} runs"
            parts.append(_experiment_part(experiment, label, title, runs, output, lender))
    largest = list(experiment.sizes)[-1]
    command = f"dynamask experiment {experiment.name} --size {largest} --results {_shown(results)}/"
    return _Page(
        experiment.name,
        experiment.name,
        experiment.description[0].upper() + experiment.description[1:] + ".",
        parts,
        f"{command}{experiment.name}.jsonl",
    )


def _lender(experiment: Experiment, name: str, whole: Mapping[str, _Runs]) -> tuple[str, _Runs] | None:
    """The sweep whose spread a sweep borrows, and its runs on the build of its corpus with the most runs."""
    size = experiment.lenders.get(name.removeprefix(f"{experiment.name}-"))
    if size is None:
        return None
    builds = _by_build(whole[f"{experiment.name}-{size}"])
    return size, builds[0] if builds else {}


def _by_build(runs: _Runs) -> list[_Runs]:
    """Runs apart whose corpora have one name and different contents, those of the build with the most runs first."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for _, record in runs.values():
        corpus, content = _build(record)
        counts[corpus][content] += 1
    ranked = {corpus: [content for content, _ in found.most_common()] for corpus, found in counts.items()}
    builds: dict[int, _Runs] = defaultdict(dict)
    for key, found in runs.items():
        corpus, content = _build(found[1])
        builds[ranked[corpus].index(content)][key] = found
    return [builds[number] for number in sorted(builds)]


def _build(record: Record) -> tuple[str, str]:
    """Name and digest of what a run read, one digest for corpora of the same texts."""
    corpus, content = record.corpus
    return corpus, same_mixture(content)


def _experiment_part(
    experiment: Experiment, name: str, title: str, chosen: _Runs, output: Path, lender: tuple[str, _Runs] | None
) -> _Part:
    runs = _in_order(chosen)
    report = REPORTS.get(experiment.name)
    lent = lender[1] if lender else {}
    if report is not None:
        more = {"lender": Lender(lender[0], _in_order(lent))} if lender else {}
        with pictures(drawn=not _of_appendix(name)):
            section = _shown_section(name, report(runs, output / name, **more))
    else:
        table = experiment.summary(runs)
        section = Section("", [Exhibit("summary", "What the runs found", [run.key for run in runs], table=table)])
    rows = {key: (file, asdict(record)) for key, (file, record) in (lent | chosen).items()}
    return _Part(name, title, section, rows, _provenance(runs), lent=len(lent.keys() - chosen.keys()))


def _in_order(runs: _Runs) -> list[Record]:
    return [record for _, record in sorted(runs.values(), key=lambda found: found[1].key)]


def _shown_section(name: str, section: Section) -> Section:
    """The section, without pictures where it belongs to the appendix."""
    if not _of_appendix(name):
        return section
    return replace(section, exhibits=[replace(each, picture=None) for each in section.exhibits])


def _files(name: str, results: Path) -> list[Path]:
    return sorted(results.glob(BENCHMARKS[name].pattern))


def _benchmark_page(name: str, results: Path, output: Path) -> _Page:
    benchmark = BENCHMARKS[name]
    parts = []
    for file in _files(name, results):
        # Its folder counts where the pattern leaves it open, or two runs of one name would share an exhibit's.
        label = file.stem if file.parent == results else f"{file.parent.name}-{file.stem}"
        raws = _read(file)
        for number, raw in enumerate([raws] if benchmark.together else raws):
            part_name = label if number == 0 else f"{label}-{number + 1}"
            try:
                with pictures(drawn=not _of_appendix(part_name)):
                    section, rows, sources = benchmark.section(raw, output / part_name)
            except (KeyError, TypeError, IndexError) as error:
                raise UsageError(f"{file} is not what {benchmark.command!r} writes: {error!r}") from error
            located = {key: (_shown(file), row) for key, row in rows.items()}
            parts.append(_Part(part_name, f"`{_shown(file)}`", _shown_section(part_name, section), located, sources))
    newest = newest_speeds(results) if name == "attention" and _files(name, results) else None
    if newest is not None:
        section, rows, sources = newest
        located = {key: (_shown(results / row["file"]), row) for key, row in rows.items()}
        parts.insert(0, _Part(f"{name}-newest", "The newest timings", section, located, sources))
    return _Page(name, benchmark.title, benchmark.text, parts, benchmark.command)


def _read(file: Path) -> list[Any]:
    """The JSON values of a file: one, or for `.jsonl` one per line."""
    try:
        text = file.read_text(encoding="utf-8")
        return (
            [json.loads(line) for line in text.split("\n") if line.strip()]
            if file.suffix == ".jsonl"
            else [json.loads(text)]
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {file} as JSON: {error}") from error


def _shown(path: Path) -> str:
    """The path as the report names it: relative to the checkout where it lies in one."""
    for root in (Path.cwd(), path.resolve().parent.parent.parent):
        if path.resolve().is_relative_to(root) and (root / "pyproject.toml").exists():
            return path.resolve().relative_to(root).as_posix()
    return path.as_posix()


def _provenance(runs: Sequence[Record]) -> str:
    """Devices, versions and commits, each with the number of runs where they differ."""
    devices = Counter(run.device for run in runs)
    commits = Counter(short_commit(run.commit) for run in runs)
    versions = Counter(", ".join(f"{k} {v}" for k, v in sorted(run.versions.items())) for run in runs)

    def listed(counts: Counter[str]) -> str:
        if len(counts) == 1:
            return next(iter(counts))
        return "; ".join(f"{name} ({count} runs)" for name, count in sorted(counts.items()))

    seconds = sum(run.seconds for run in runs)
    return f"{listed(devices)}; {listed(versions)}; commit {listed(commits)}; {seconds / 60:.1f} minutes in all"


def digest(keys: Sequence[str], rows: Mapping[str, tuple[str, Any]]) -> str:
    """12 hexadecimal digits that stand for an exhibit's raw rows."""
    text = json.dumps([[key, rows[key][1]] for key in keys], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _render(page: _Page, here: Path, output: Path) -> str:
    lines = [f"# {page.title}", "", page.text, "", "Full size:", "", "```bash", page.full_size, "```", ""]
    if not page.parts:
        lines += ["**Not measured**: there are no raw lines of it.", ""]
    for part in page.parts:
        lines += [f"## {part.title}", ""]
        if part.section.text:
            lines += [part.section.text, ""]
        lines += [f"Measured on {part.sources}." if part.sources else "", ""]
        for exhibit in part.section.exhibits:
            lines += _exhibit(part, exhibit, here)
        if part.section.findings:
            lines += ["### Against the claims", "", markdown_table(_verdicts([part], page)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _exhibit(part: _Part, exhibit: Exhibit, output: Path) -> list[str]:
    lines = [f"### {exhibit.title}", ""]
    if exhibit.text:
        lines += [exhibit.text, ""]
    if exhibit.picture is not None:
        place = os.path.relpath(exhibit.picture, output)
        lines += [f"![{exhibit.alt or exhibit.title}]({place})", ""]
    if exhibit.caption:
        lines += [exhibit.caption, ""]
    if exhibit.table:
        lines += [markdown_table(exhibit.table), ""]
    files = sorted({part.rows[key][0] for key in exhibit.keys})
    few = len(exhibit.keys) <= _KEYS_SHOWN
    shown = ", ".join(f"`{key}`" for key in exhibit.keys) if few else f"{len(exhibit.keys)} rows"
    lines += [
        f"Source: {', '.join(f'`{file}`' for file in files)}, {shown} (digest "
        f"`{digest(exhibit.keys, part.rows)}`). Its raw rows: `{COMMAND} --trace {part.name}-{exhibit.name}`"
        + (f". Its runs: `{part.command}`." if part.command else ""),
        "",
    ]
    return lines


def _placed(pages: Sequence[_Page]) -> list[Placed]:
    """Every finding with the page it stands on."""
    placed = []
    for page in pages:
        for part in page.parts:
            link = f"{APPENDIX}/{page.name}.md" if part.in_appendix else f"{page.name}.md"
            placed += [Placed(finding, part.name, link, part.in_appendix) for finding in part.section.findings]
    return placed


_TERMS = (
    "- **Plain form**: the paper's own (recipe `paper`).",
    "- **Best form**: learned ranks (recipe `recall`, with slopes or with windows per head), or dynamask 0.1's form "
    "for the task. `scored` is the latter from scratch: slopes and scores on the logits, ranks from attention; it is "
    "no recipe.",
    "- **Control**: the newest keys in the same windows (recipe `sliding`).",
    "- **Reproduced**, **refuted**: the 95% interval excludes zero, and the difference is at least the smallest of "
    "interest.",
    "- **No difference**: the interval lies within the smallest difference of interest.",
    f"- **Not tested**: the runs do not decide. Differences of losses below {FEW_SEEDS_INTEREST} nats decide nothing "
    f"with fewer than {FEW_SEEDS} seeds, and a difference without an interval decides nothing. A claim against several "
    "rivals needs each of them.",
    "- **Difference**: to dense attention, with its 95% interval; positive in the form's favour. A verdict may rest on "
    "further rivals. Intervals cover training seeds; *over answers*: the answers of one seed's model.",
    "- **Half rate**: half of the learning rate that suits the form at 1M parameters. **One wide layer**: one layer of "
    "six has a wide window, the others narrow ones. **From dense**, **from wide**: training starts with every key, or "
    "with wide windows.",
    "- **Task**: length of the texts; in recall also how many pairs of key and value they hold.",
    "- **w/N**: window over context, where all layers share it.",
    "- **Of pairs**: query-key pairs as a share of dense attention's; in brackets at shorter texts. *Widest layer*, "
    "*widest head*: the share of that one, where they differ.",
)
"""What the scoreboard's cells mean, as a list in markdown."""


def _index(
    pages: Sequence[_Page], placed: Sequence[Placed], opening: Sequence[_Part], output: Path, results: Path
) -> str:
    contents: list[Row] = []
    for page in pages:
        main = [part for part in page.parts if not part.in_appendix]
        rest = [part for part in page.parts if part.in_appendix]
        contents.append(
            {
                "page": f"[{page.title}]({page.name}.md)" if main or not rest else page.title,
                "raw rows": str(sum(len(part.rows) - part.lent for part in page.parts)) if page.parts else NOT_TESTED,
                "appendix": f"[{len(rest)} sections]({APPENDIX}/{page.name}.md)" if rest else "",
                "full size": f"`{page.full_size}`",
            }
        )
    lines = [
        "# Results",
        "",
        "## Scoreboard",
        "",
        "The paper's claims ([arXiv 2508.02124](https://arxiv.org/abs/2508.02124)) at the sizes that were run here. "
        f"[Every verdict]({VERDICTS_PAGE}.md) has further settings, rivals and controls.",
        "",
        markdown_table(board(placed)),
        "",
        *_TERMS,
        "",
        "## Goals of this library",
        "",
        "One row per form that was named for the goal; two where they decide otherwise. Of levers for length every "
        "form of `recall` has a row. Differences are to dense attention where the goal names it, else to what it "
        "names.",
        "",
        markdown_table(goals(placed)),
        "",
        "Forms on fresh tokens were named before their runs and are judged on a test split. The others were named "
        "after their sweeps had been run, and judged on the split that the sweeps compare forms on. What did not work, "
        "and why: [what did not hold](../what-did-not-hold.md).",
        "",
        "## Exhibits",
        "",
    ]
    for number, part in enumerate(opening, 1):
        for exhibit in part.section.exhibits:
            lines += _exhibit(part, replace(exhibit, title=f"{number}. {exhibit.title}"), output)
    if not opening:
        lines += ["There are no raw lines to draw.", ""]
    lines += [
        "## Pages",
        "",
        f"Drawn by `{COMMAND}` from the raw lines in `{_shown(results)}`; nothing here is written by hand. Every "
        "table and picture names the lines it is made of, and `--trace` prints them.",
        "",
        markdown_table(contents),
        "",
    ]
    return "\n".join(lines)


def _verdicts_page(placed: Sequence[Placed]) -> str:
    about = (
        "The paper's claims first, this library's goals behind them. Differences are in the form's favour where they "
        "are positive. `of interest`: the smallest difference of interest, fixed for all sweeps: 0.02 nats, 0.01 for "
        "the best forms on fresh tokens, whose goal names it; a form is no worse where the interval excludes so much. "
        f"`pairs`: query-key pairs as a share of dense attention's. {NOTE}"
    )
    lines = ["# Every verdict", "", f"Drawn by `{COMMAND}`. {about}", "", markdown_table(details(placed)), ""]
    return "\n".join(lines)


def _verdicts(parts: Sequence[_Part], page: _Page) -> list[Row]:
    return [
        {
            "claim": f"{CLAIMS[finding.claim].text} ({CLAIMS[finding.claim].origin})",
            "of": finding.subject,
            "measured [95% interval]": finding.measured,
            "of interest": finding.interest,
            **finding.setting,
            "verdict": told_verdict(finding),
        }
        for part in parts
        for finding in part.section.findings
    ]
