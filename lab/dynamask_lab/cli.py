"""Commands that the laboratory adds to `dynamask`: experiment, benchmark, report masks, report results."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dynamask.cli.common import (
    Model,
    check_output_file,
    check_output_folder,
    console,
    errors,
    progress,
    quiet_libraries,
)
from dynamask.errors import Interrupted, UsageError

benchmark = typer.Typer(
    help="Time the kernels against their peers, each correct first, and whole models.", no_args_is_help=True
)


def experiment(
    name: Annotated[str | None, typer.Argument(help="Which one, such as mqar; none: say which there are.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="JSON lines, one per finished run; created, or continued.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Wall time, such as 25m, 1h30m or 90s. Default: until every run is done.")
    ] = None,
    size: Annotated[str, typer.Option(help="Which sweep: smoke (seconds on a CPU), small, paper.")] = "small",
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time, spread over the visible GPUs. Default: one per visible GPU.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: only runs with this setting, such as seed=0; repeatable.")
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="Say what is done, what is left and how long; run nothing.")
    ] = False,
    keep_models: Annotated[
        Path | None, typer.Option(help="Keep the trained language models in this folder, each in one of its own.")
    ] = None,
) -> None:
    """Run the sweep of an experiment, as much of it as the budget allows, and say what it found.

    The runs not in the results file yet are done shortest first. Each is on the disk when it ends, with its settings,
    time, device, versions and commit, so a killed or exhausted sweep continues when the same command is run again.
    No run is started that would not end within the budget, judging by the times of those before it.

    With several workers each is a process of its own, which saves its run when the budget ends or Ctrl-C comes, where
    runs can be continued (all but mqar's). More workers than GPUs share them: quicker for models too small to fill
    one, but seconds and tokens/s are then not those of a run alone, and the device's name in the results says so.
    Processes take turns on a GPU unless NVIDIA's MPS lets them overlap, which small models gain a lot from: start it
    with `nvidia-cuda-mps-control -d` before the sweep, and end it with `echo quit | nvidia-cuda-mps-control`.

    **Examples**

    - `dynamask experiment` — which experiments and sizes there are

    - `dynamask experiment mqar --size smoke --results smoke.jsonl` — seconds, on any machine

    - `dynamask experiment mqar --results mqar.jsonl --budget 25m` — the small sweep, on one GPU

    - `dynamask experiment mqar --size paper --results mqar.jsonl --list` — what is left, and how long it takes

    - `dynamask experiment scaling --results scaling.jsonl --budget 8m --workers 4` — two runs on each of two GPUs

    - `dynamask experiment locality --results code.jsonl --where corpus=code --where seed=0` — part of a sweep

    - `dynamask experiment scaling --results scaling.jsonl --keep-models models` — and its models, for `evaluate`
    """
    from dynamask_lab.studies import check_experiment
    from dynamask_lab.sweeps.budget import parse_seconds

    if name is not None:
        check_experiment(name)
        if results is None and not listing:
            raise UsageError(f"say where the runs go: dynamask experiment {name} --results {name}.jsonl")
    seconds = None if budget is None else parse_seconds(budget)
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1; got {workers}")
    from dynamask_lab.language.kept_models import KEPT_FOLDER
    from dynamask_lab.studies import EXPERIMENTS, get_experiment, read_results, run_sweep
    from dynamask_lab.sweeps.display import SweepDisplay, runs_table, summary_table
    from dynamask_lab.sweeps.results import corpora_of_several_builds
    from dynamask_lab.sweeps.selection import parse_conditions, select
    from dynamask_lab.sweeps.workers import visible_gpus

    if name is None:
        table = Table("experiment", "sizes (runs)", "what it measures")
        for known in EXPERIMENTS.values():
            sizes = ", ".join(f"{each} ({len(known.configs(each))})" for each in known.sizes)
            table.add_row(known.name, sizes, known.description)
        console.print(table)
        return
    chosen = get_experiment(name)
    earlier = read_results(results) if results else []
    conditions = parse_conditions(where or [])

    def wanted(finished: Sequence[Any]) -> list[dict[str, Any]]:
        return select(chosen.configs(size, finished), conditions)

    configs = wanted(earlier)
    at_a_time = workers if workers is not None else max(1, len(visible_gpus()))
    if listing:
        console.print(runs_table(chosen, configs, earlier, at_a_time, console.width))
        return
    assert results is not None
    if keep_models is not None:
        if not chosen.trains_language_models:
            raise UsageError(f"--keep-models keeps language models, and {name} trains none: leave it out")
        os.environ[KEPT_FOLDER] = str(keep_models.absolute())
    try:
        with SweepDisplay(errors, configs) as display:
            report = run_sweep(
                *(chosen, configs, results, seconds),
                workers=at_a_time,
                follow_up=wanted,
                observer=display,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; the finished runs are in {results}: run the same command again to go on", signal.SIGINT
        ) from None
    configs = wanted(report.records)
    title = f"{name} {size}: {len(report.records)} of {len(configs)} runs"
    console.print(summary_table(chosen.summary(report.records), title) if report.records else title)
    for corpus in corpora_of_several_builds(report.records):
        errors.print(
            f"runs in this file read {corpus} in several builds, of other package versions: their losses do not "
            "compare, and the report shows them apart; to have one build alone, start a new results file",
            highlight=False,
        )
    if report.left:
        errors.print(f"{len(report.left)} runs are left: run the same command again to go on", highlight=False)
    if report.failed:
        raise typer.Exit(1)


@benchmark.command("cpu")
def benchmark_cpu_command(
    lengths: Annotated[list[int] | None, typer.Option("--length", help="Sequence length; repeatable.")] = None,
    window: Annotated[int, typer.Option(help="Keys per query.")] = 512,
    repeats: Annotated[int, typer.Option(help="Timed runs; the median counts.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    """Interval attention against masked and dense SDPA on this CPU."""
    from dynamask_lab.benchmarks.cpu import benchmark_cpu, environment

    for name, value in (("length", min(lengths or [1])), ("window", window), ("repeats", repeats)):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1; got {value}")
    check_output_file(output)

    rows = benchmark_cpu(lengths or [2048, 4096, 8192], window, repeats=repeats)
    table = Table(
        "N", "pass", "interval ms", "masked SDPA ms", "dense SDPA ms", "x masked", "x dense", title=f"window {window}"
    )
    for row in rows:
        for kind in ("forward", "train"):
            ours, masked, dense = (row[f"{peer}_{kind}_s"] for peer in ("interval", "masked_sdpa", "dense_sdpa"))
            figures = [f"{1e3 * t:.0f}" for t in (ours, masked, dense)]
            table.add_row(str(row["length"]), kind, *figures, f"{masked / ours:.1f}", f"{dense / ours:.1f}")
    console.print(table)
    if output:
        output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


@benchmark.command("gpu")
def benchmark_gpu_command(
    lengths: Annotated[
        list[int] | None, typer.Option("--length", help="Sequence length of the main rows; repeatable.")
    ] = None,
    scaling: Annotated[
        list[int] | None, typer.Option("--scaling", help="Further length, for the largest window; repeatable.")
    ] = None,
    windows: Annotated[
        list[int] | None, typer.Option("--window", help="Keys per query, the main one last; repeatable.")
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option("--peer", help="flex, nsa, fsa1, fsa2 or fsa2_gated; repeatable; none: no peer but dense ones."),
    ] = None,
    scores: Annotated[
        list[Path] | None, typer.Option(help="Trained scores, see `dynamask benchmark scores`; repeatable.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds after which nothing more is begun.")] = 300.0,
    checks: Annotated[bool, typer.Option(help="Compare with float64 first.")] = True,
    commit: Annotated[str | None, typer.Option(help="Recorded as the code's commit; default: asked of git.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write STEM.json, STEM.md and STEM.png.")] = None,
    redraw: Annotated[
        Path | None, typer.Option(help="Measure nothing: render this JSON of an earlier run again. Needs no GPU.")
    ] = None,
) -> None:
    """The kernels on one GPU against SDPA, FlashAttention-3, FlexAttention, fla's NSA and flash-sparse-attn.

    Correct first: every dtype and head_dim against float64, in processes side by side. Then times, the most important
    first and written after every row; what the budget leaves out is listed. A peer that is missing, or fails, leaves
    its whole error in the results.

    **Examples**

    - `dynamask benchmark gpu --output lab/results/h100-attention` — the whole of it, on one GPU

    - `dynamask benchmark gpu --length 32768 --peer none --no-checks --budget 30` — the main rows

    - `dynamask benchmark gpu --redraw lab/results/h100-attention.json` — tables and pictures again
    """
    import torch

    from dynamask_lab.benchmarks.gpu import Settings, benchmark_gpu, draw, markdown, write
    from dynamask_lab.benchmarks.gpu.run import stderr_progress

    if redraw is not None:
        results = _results_of(redraw, "attention", "dynamask benchmark gpu")
        stem = output or redraw.with_suffix("")
        stem.with_name(f"{stem.name}.md").write_text(markdown(results))
        pictures = draw(results, stem)
        console.print(f"written {stem}.md, {', '.join(str(picture) for picture in pictures)}", soft_wrap=True)
        return
    if not torch.cuda.is_available():
        raise UsageError("no CUDA device here: `dynamask benchmark cpu` times the CPU path")
    if output:
        check_output_folder(output.parent)
    if not budget > 0:
        raise UsageError(f"--budget must be positive; got {budget}")
    given: dict[str, Any] = {"lengths": lengths, "scaling": scaling, "windows": windows, "scores": scores}
    if peers is not None:
        given["peers"] = [name for name in peers if name != "none"]
    chosen = {name: tuple(value) for name, value in given.items() if value is not None}
    settings = Settings(**chosen, budget_seconds=budget, checks=checks)

    def save(results: dict[str, Any]) -> None:
        if output:
            write(results, output)

    results = benchmark_gpu(settings, commit=commit, save=save, progress=stderr_progress)
    print(markdown(results))
    if output:
        try:
            draw(results, output)
        except UsageError as error:  # the budget left nothing to draw, but what there is was written
            errors.print(f"no picture: {error}", highlight=False)


def _results_of(file: Path, part: str, command: str) -> dict[str, Any]:
    """Results that a benchmark wrote, told from other JSON by a part they all have."""
    try:
        results = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read results from {file}: {error}") from error
    if not isinstance(results, dict) or part not in results:
        raise UsageError(f"{file} holds no results of `{command}`")
    return results


@benchmark.command("scores")
def benchmark_scores_command(
    run: Annotated[str, typer.Argument(help="Folder of a finished run, or of a saved model with dynamic mask gates.")],
    output: Annotated[Path, typer.Argument(help="File to write, .npz.")],
    text: Annotated[
        str, typer.Option(help="What to read: a text file, a folder of them, or stdlib, as `dynamask train` takes it.")
    ] = "stdlib",
    length: Annotated[int, typer.Option(help="Tokens.")] = 32768,
) -> None:
    """Save what a trained model's gates say of real text, for `dynamask benchmark gpu --scores FILE`.

    **Example**: `dynamask benchmark scores runs/tiny lab/data/scores.npz`
    """
    from dynamask.data import documents
    from dynamask_lab.benchmarks.scores import extract_scores

    if length < 1:
        raise UsageError(f"--length must be at least 1; got {length}")
    if output.suffix != ".npz":
        raise UsageError(f"scores are written as .npz; got {output}")
    check_output_file(output)
    content, size = [], 0
    for document in documents([text]):
        content.append(document.text)
        size += len(document.text)
        # More characters than any tokenizer needs for so many tokens of prose or code.
        if size > 16 * length:
            break
    about = extract_scores(run, "\n".join(content), length, output)
    console.print(
        f"written {output}: {about['layers']} layers of {about['heads']} heads, {length} tokens, "
        f"{output.stat().st_size / 1024:.0f} KiB, gates {about['gates']}",
        soft_wrap=True,
    )


@benchmark.command("model")
def benchmark_model_command(
    preset: Annotated[str, typer.Option(help="Model size; `tiny` tries the command out on a CPU.")] = "1.7b",
    lengths: Annotated[
        list[int] | None,
        typer.Option("--length", help="Tokens of a training step; repeatable, first is measured first."),
    ] = None,
    contexts: Annotated[
        list[int] | None, typer.Option("--context", help="Tokens in the cache when decoding; repeatable.")
    ] = None,
    batches: Annotated[list[int] | None, typer.Option("--batch", help="Sequences decoded; repeatable.")] = None,
    prefill: Annotated[int, typer.Option(help="Tokens of the timed prefill; 0 leaves it out.")] = 32768,
    steps: Annotated[int, typer.Option(help="Decoding steps timed.")] = 32,
    only: Annotated[str | None, typer.Option(help="training or generation; default: both.")] = None,
    longest: Annotated[bool, typer.Option(help="Search for the longest trainable length, last of all.")] = True,
    compile: Annotated[bool, typer.Option(help="Train with layers compiled by torch.compile.")] = True,
    checks: Annotated[bool, typer.Option(help="On a GPU, compare the kernels with float64 first.")] = True,
    gates: Annotated[
        str,
        typer.Option(help="scattered (random keys kept, dma's worst case) or initial (a sliding window, its best)."),
    ] = "scattered",
    budget: Annotated[float, typer.Option(help="Seconds after which nothing more is begun.")] = 450.0,
    commit: Annotated[str | None, typer.Option(help="Recorded as the code's commit; default: asked of git.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for model.json, model.md, training.png and generation.png.")
    ] = None,
    redraw: Annotated[
        Path | None, typer.Option(help="Measure nothing: render this model.json of an earlier run again.")
    ] = None,
) -> None:
    """Whole models, dynamic mask against dense attention: training steps, decoding, prefill, longest length.

    Measures tokens/s, peak memory and model FLOP utilisation, the most important figures first; results are written
    after every measurement, so a killed run keeps what it has. What does not fit is reported, not fatal.

    **Examples**

    - `dynamask benchmark model --output lab/results/h100-model` — the whole of it, on one GPU

    - `dynamask benchmark model --only training --length 32768 --no-longest --budget 120`

    - `dynamask benchmark model --redraw lab/results/h100-model/model.json` — tables and pictures again

    - `dynamask benchmark model --preset tiny --length 256 --context 128 --batch 1 --no-longest --prefill 9` — a CPU
    """
    from dynamask.models.presets import check_preset

    check_preset(preset)
    from dynamask_lab.benchmarks.gpu.run import stderr_progress
    from dynamask_lab.benchmarks.model import (
        BATCHES,
        CONTEXTS,
        LENGTHS,
        TABLES,
        Settings,
        benchmark_model,
        draw,
        table_rows,
        write,
    )

    if redraw is not None:
        earlier = _results_of(redraw, "training", "dynamask benchmark model")
        write(earlier, output or redraw.parent)
        pictures = draw(earlier, output or redraw.parent)
        console.print(f"written {output or redraw.parent}: model.md, {len(pictures)} pictures", soft_wrap=True)
        return
    if only not in (None, "training", "generation"):
        raise UsageError(f"--only must be training or generation; got {only!r}")
    if gates not in ("scattered", "initial"):
        raise UsageError(f"--gates must be scattered or initial; got {gates!r}")
    checked = (
        ("length", min(lengths or LENGTHS), 2),
        ("context", min(contexts or CONTEXTS), 1),
        ("batch", min(batches or BATCHES), 1),
        ("prefill", prefill, 0),
        ("steps", steps, 1),
    )
    for name, value, least in checked:
        if value < least:
            raise UsageError(f"--{name} must be at least {least}; got {value}")
    if not budget > 0:
        raise UsageError(f"--budget must be positive; got {budget}")
    if output:
        check_output_folder(output)
    settings = Settings(
        preset=preset,
        lengths=lengths or LENGTHS,
        contexts=contexts or CONTEXTS,
        batches=batches or BATCHES,
        prefill=prefill,
        steps=steps,
        only=only,
        budget_seconds=budget,
        longest=longest,
        compile=compile,
        checks=checks,
        gates=gates,
    )

    def save(results: dict[str, Any]) -> None:
        if output:
            write(results, output)

    results = benchmark_model(settings, commit=commit, save=save, progress=stderr_progress)
    for part, (title, columns) in TABLES.items():
        if results[part]:
            table = Table(*columns, "remark", title=title)
            for cells in table_rows(results, part):
                table.add_row(*map(escape, cells))
            # A log has no width of its own, and at 80 columns the figures would be cut.
            (console if console.is_terminal else Console(width=160)).print(table)
    if results["not_measured"]:
        console.print(
            f"{len(results['not_measured'])} measurements were left out: the budget of {budget:g} s was spent"
        )
    if output:
        draw(results, output)
        console.print(f"written {output}/model.json, model.md and pictures", soft_wrap=True)


def report_masks(
    model: Model,
    data: Annotated[
        list[str] | None, typer.Option(help="Texts to read; default: the run's own held-out split.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures and masks.jsonl.")] = Path("masks"),
    length: Annotated[int | None, typer.Option(help="Tokens of each text; default: eight windows.")] = None,
    texts: Annotated[int, typer.Option(help="How many texts, at most.")] = 16,
    name: Annotated[str | None, typer.Option(help="Name in the report; default: the folder's.")] = None,
    line: Annotated[
        Path | None, typer.Option(help="Also write the raw figures here, for `dynamask report results`.")
    ] = None,
    over_training: Annotated[
        bool,
        typer.Option("--over-training", help="Of every checkpoint of the run: lifetimes, losses by step."),
    ] = False,
) -> None:
    """What did the mask learn? Masks, lifetimes, which kinds of token survive, how far back heads read.

    Also whether the model needs the choice: its loss with the newest keys in place of the chosen ones.

    **Examples**

    - `dynamask report masks runs/tiny`

    - `dynamask report masks runs/tiny --data essays/ --texts 64 --line lab/results/masks/tiny.jsonl`

    - `dynamask report masks runs/tiny --over-training` — of a run trained with save_every=100 keep=20, for one
    """
    from dynamask.training.folder import check_run, open_run

    if texts < 1:
        raise UsageError(f"--texts must be at least 1; got {texts}")
    check_output_folder(output)
    if line:
        check_output_folder(line.parent)
    check_run(model)
    quiet_libraries()
    import torch

    from dynamask.inspect import draw_live_keys
    from dynamask_lab.masks.masks import mask_texts, measure_masks
    from dynamask_lab.masks.masks_over_training import measure_masks_over_training
    from dynamask_lab.report.masks import draw_masks
    from dynamask_lab.report.masks_over_training import draw_lifetimes_over_training
    from dynamask_lab.sweeps import provenance

    loaded, tokenizer = open_run(model)
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    size = length or 8 * getattr(loaded.config, "window", 32)
    chosen = mask_texts(model, tokenizer, data, size, texts)
    environment = {"device": provenance.device_name(), "torch": torch.__version__, "commit": provenance.commit()}

    def write(kind: str, figures: dict[str, Any]) -> dict[str, Any]:
        content = {"report": kind, "name": name or Path(model).resolve().name, "environment": environment, **figures}
        for file in (output / f"{kind}.jsonl", *([line] if line else [])):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content) + "\n", encoding="utf-8")
        return content

    if over_training:
        content = write("masks-over-training", measure_masks_over_training(model, tokenizer, chosen, progress=progress))
        picture = draw_lifetimes_over_training(content, output / "lifetimes_over_training.png")
        console.print(f"written {output}/masks-over-training.jsonl and {picture.name}", soft_wrap=True)
        return
    figures = measure_masks(loaded, tokenizer, chosen, progress=progress)
    content = write("masks", figures)
    pictures = list(draw_masks(content, output).values())
    pictures.append(draw_live_keys(loaded, tokenizer, tokenizer.decode(chosen[0]), output / "live_keys.png"))
    loss = figures["loss"]
    table = Table("mask", "loss, nats per token", "difference ± standard error")
    table.add_row("as trained", f"{loss['trained']:.4f}", "")
    for control, words in (("sliding", "newest keys"), ("no_bias", "no scores in logits"), ("gates_off", "both")):
        found = loss[control]
        error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.4f}"
        table.add_row(words, f"{found['loss']:.4f}", f"{found['difference']:+.4f}{error}")
    console.print(table)
    console.print(f"written {output}/masks.jsonl and {', '.join(path.name for path in pictures)}", soft_wrap=True)


def report_results(
    results: Annotated[Path, typer.Option(help="Folder of raw results.")] = Path("lab/results"),
    output: Annotated[Path, typer.Option(help="Folder to write; an earlier report in it is replaced.")] = Path(
        "docs/results"
    ),
    trace: Annotated[
        str | None, typer.Option(help="Instead: print the raw rows of one exhibit, named as below it.")
    ] = None,
) -> None:
    """Draw docs/results anew: every table, picture and verdict, from the raw lines in lab/results.

    In a checkout, with the default folders, the marked tables of README.md and of the site's pages are drawn as well.

    **Examples**

    - `dynamask report results` — in a checkout

    - `dynamask report results --results mine/ --output mine/report` — of one's own sweeps

    - `dynamask report results --trace attention-decode` — which lines a table comes from
    """
    from dynamask_lab.report import results as report
    from dynamask_lab.report.readme import write_pages

    if trace is not None:
        for line in report.trace(trace, results):
            print(line)
        return
    check_output_folder(output)
    pages = report.render_results(results, output)
    console.print(f"written {len(pages)} pages, the first {pages[0]}", soft_wrap=True)
    if (results, output) == (report.RESULTS, report.OUTPUT):
        for page in write_pages(Path(), results):
            console.print(f"written the tables of {page}", soft_wrap=True)
