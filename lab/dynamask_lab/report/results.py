"""`docs/results`: every table, picture and verdict drawn anew from the raw lines in `lab/results`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import dynamask_lab.studies.reports  # noqa: F401 -- registers them
from dynamask.errors import UsageError, did_you_mean
from dynamask_lab.report.benchmarks import BENCHMARKS
from dynamask_lab.report.claims import CLAIMS
from dynamask_lab.studies import EXPERIMENTS, Experiment, Record, read_results, run_key
from dynamask_lab.sweeps.provenance import short_commit
from dynamask_lab.sweeps.registry import REPORTS
from dynamask_lab.sweeps.section import Exhibit, Finding, Row, Section

RESULTS, OUTPUT = Path("lab/results"), Path("docs/results")
COMMAND = "dynamask report results"
_KEYS_SHOWN = 12
_BUILD = "-"
"""Between a run's key and the content that tells it from the run of the same key on another build of its corpus."""
_Runs = dict[str, tuple[str, Record]]
"""Key of a run -> its file and itself."""
_VERDICTS = {True: "held", False: "**did not hold**", None: "not measured"}


@dataclass(frozen=True)
class _Part:
    """A section, and where what it shows lies.

    Attributes:
        name: "mqar-small", unique in the report.
        title: heading.
        section: what to show.
        rows: key of a raw row -> its file and the row itself, as JSON.
        sources: markdown: devices and commits the rows come from.
    """

    name: str
    title: str
    section: Section
    rows: Mapping[str, tuple[str, Any]]
    sources: str


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
    for old in [*output.glob("*.md"), *output.glob("*/*.svg")]:
        old.unlink()
    pages = _collect(results, output)
    files = {"index": _index(pages, results)} | {page.name: _render(page, output, results) for page in pages}
    written = []
    for name, text in files.items():
        path = output / f"{name}.md"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    for folder in output.iterdir():
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return written


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
        for page in _collect(results, Path(scratch)):
            for part in page.parts:
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


def _collect(results: Path, output: Path) -> list[_Page]:
    if not results.is_dir():
        raise UsageError(f"there is no folder {results} with raw results: give one with --results")
    records: dict[str, tuple[str, Record]] = {}
    for file in sorted(set(results.glob("*.jsonl")) - {file for name in BENCHMARKS for file in _files(name, results)}):
        for record in read_results(file):
            # Runs are numbered by their settings: a second one of the same key is the same run repeated, unless it read
            # another build of its corpus.
            earlier = records.setdefault(record.key, (_shown(file), record))[1]
            if earlier.corpus != record.corpus:
                key = f"{record.key}{_BUILD}{record.corpus[1][:8]}"
                records.setdefault(key, (_shown(file), replace(record, key=key)))
    pages = [_experiment_page(EXPERIMENTS[name], records, results, output) for name in sorted(EXPERIMENTS)]
    return pages + [_benchmark_page(name, results, output) for name in BENCHMARKS]


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
    for what, of, name, chosen in groups:
        for number, runs in enumerate(_by_build(chosen)):
            # Corpora built anew hold other versions of their packages, so losses of two builds do not compare.
            build = "" if number == 0 else ", an earlier build of the corpora" if number == 1 else f", build {number}"
            label = name if number == 0 else f"{name}-build-{number}"
            title = f"{what}{build}: {len(runs)}{of} runs"
            parts.append(_experiment_part(experiment, label, title, runs, output))
    largest = list(experiment.sizes)[-1]
    command = f"dynamask experiment {experiment.name} --size {largest} --results {_shown(results)}/"
    return _Page(
        experiment.name,
        experiment.name,
        experiment.description[0].upper() + experiment.description[1:] + ".",
        parts,
        f"{command}{experiment.name}.jsonl",
    )


def _by_build(runs: _Runs) -> list[_Runs]:
    """Runs apart whose corpora have one name and different contents, those of the build with the most runs first."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for _, record in runs.values():
        corpus, content = record.corpus
        counts[corpus][content] += 1
    ranked = {corpus: [content for content, _ in found.most_common()] for corpus, found in counts.items()}
    builds: dict[int, _Runs] = defaultdict(dict)
    for key, found in runs.items():
        corpus, content = found[1].corpus
        builds[ranked[corpus].index(content)][key] = found
    return [builds[number] for number in sorted(builds)]


def _experiment_part(
    experiment: Experiment, name: str, title: str, chosen: Mapping[str, tuple[str, Record]], output: Path
) -> _Part:
    runs = [record for _, record in sorted(chosen.values(), key=lambda found: found[1].key)]
    report = REPORTS.get(experiment.name)
    if report is not None:
        section = report(runs, output / name)
    else:
        table = experiment.summary(runs)
        section = Section("", [Exhibit("summary", "What the runs found", [run.key for run in runs], table=table)])
    rows = {key: (file, asdict(record)) for key, (file, record) in chosen.items()}
    return _Part(name, title, section, rows, _provenance(runs))


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
                section, rows, sources = benchmark.section(raw, output / part_name)
            except (KeyError, TypeError, IndexError) as error:
                raise UsageError(f"{file} is not what {benchmark.command!r} writes: {error!r}") from error
            located = {key: (_shown(file), row) for key, row in rows.items()}
            parts.append(_Part(part_name, f"`{_shown(file)}`", section, located, sources))
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


def markdown_table(rows: Sequence[Row]) -> str:
    """A table in markdown; the columns are those of any row, in order of appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [str(row.get(column, "")).replace("|", "\\|").replace("\n", " ") for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _render(page: _Page, output: Path, results: Path) -> str:
    lines = [f"# {page.title}", "", page.text, "", "Full size:", "", "```bash", page.full_size, "```", ""]
    if not page.parts:
        lines += ["**Not measured**: there are no raw lines of it.", ""]
    for part in page.parts:
        lines += [f"## {part.title}", ""]
        if part.section.text:
            lines += [part.section.text, ""]
        lines += [f"Measured on {part.sources}." if part.sources else "", ""]
        for exhibit in part.section.exhibits:
            lines += _exhibit(part, exhibit, output)
        if part.section.findings:
            lines += ["### Against the claims", "", markdown_table(_verdicts([part], page)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _exhibit(part: _Part, exhibit: Exhibit, output: Path) -> list[str]:
    lines = [f"### {exhibit.title}", ""]
    if exhibit.text:
        lines += [exhibit.text, ""]
    if exhibit.picture is not None:
        place = exhibit.picture.relative_to(output).as_posix()
        lines += [f"![{exhibit.alt or exhibit.title}]({place})", ""]
    if exhibit.table:
        lines += [markdown_table(exhibit.table), ""]
    files = sorted({part.rows[key][0] for key in exhibit.keys})
    shown = ", ".join(f"`{key}`" for key in exhibit.keys[:_KEYS_SHOWN])
    more = len(exhibit.keys) - _KEYS_SHOWN
    lines += [
        f"Source: {', '.join(f'`{file}`' for file in files)}, {shown}{f' and {more} more' if more > 0 else ''} (digest "
        f"`{digest(exhibit.keys, part.rows)}`). Its raw rows: `{COMMAND} --trace {part.name}-{exhibit.name}`",
        "",
    ]
    return lines


def _index(pages: Sequence[_Page], results: Path) -> str:
    parts = [(page, part) for page in pages for part in page.parts]
    rows: list[Row] = []
    for name, claim in CLAIMS.items():
        found = _findings(name, parts)
        for number, (page, part, finding) in enumerate(found):
            rows.append(
                {
                    "claim": claim.text if number == 0 else "",
                    "of": finding.subject,
                    "measured": finding.measured,
                    "verdict": _VERDICTS[finding.held],
                    "from": f"[{part.name}]({page.name}.md)",
                }
            )
        if not found:
            empty = {"claim": claim.text, "of": "", "measured": "", "verdict": _VERDICTS[None]}
            rows.append(empty | {"from": f"`{claim.command}`"})
    contents: list[Row] = [
        {
            "page": f"[{page.title}]({page.name}.md)",
            "raw rows": str(sum(len(part.rows) for part in page.parts)) if page.parts else "not measured",
            "full size": f"`{page.full_size}`",
        }
        for page in pages
    ]
    return "\n".join(
        [
            "# Results",
            "",
            f"Drawn by `{COMMAND}` from the raw lines in `{_shown(results)}`; nothing here is written by hand. Every "
            "table and picture names the lines it is made of, and `--trace` prints them.",
            "",
            "## What held, and what did not",
            "",
            "The claims are the paper's ([arXiv 2508.02124](https://arxiv.org/abs/2508.02124)), but for the last "
            "three, which are this library's goals. Most were made at sizes that were not run here, and a verdict is "
            "about the sizes measured: the page it comes from names them.",
            "",
            markdown_table(rows),
            "",
            "## Pages",
            "",
            markdown_table(contents),
            "",
        ]
    )


def _findings(claim: str, parts: Sequence[tuple[_Page, _Part]]) -> list[tuple[_Page, _Part, Finding]]:
    """Of each page and subject the largest sweep's finding that has a verdict, or else the largest's without one."""
    best: dict[tuple[str, str], tuple[_Page, _Part, Finding]] = {}
    for page, part in parts:
        for finding in part.section.findings:
            slot = (page.name, finding.subject)
            if finding.claim == claim and (
                slot not in best or (best[slot][2].held is None and finding.held is not None)
            ):
                best[slot] = (page, part, finding)
    return list(best.values())


def _verdicts(parts: Sequence[_Part], page: _Page) -> list[Row]:
    return [
        {
            "claim": f"{CLAIMS[finding.claim].text} ({CLAIMS[finding.claim].origin})",
            "of": finding.subject,
            "measured": finding.measured,
            "verdict": _VERDICTS[finding.held],
        }
        for part in parts
        for finding in part.section.findings
    ]
