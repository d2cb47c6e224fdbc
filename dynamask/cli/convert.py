"""`dynamask convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamask.cli.common import check_output_folder, console, errors, quiet_libraries
from dynamask.errors import UsageError

if TYPE_CHECKING:
    from dynamask.convert.progress import Progress

app = typer.Typer(help="Turn an existing model into one whose attention runs on dynamask.", no_args_is_help=True)

_STAGES = {"ranks": "learning ranks", "windows": "setting windows", "distill": "distilling"}


@app.command("doge")
def convert_doge(
    source: Annotated[str, typer.Argument(help="Folder or hub name of a Doge model.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Convert a released Doge model, with the same logits, its attention on dynamask."""
    from dynamask.convert_settings import check_no_run
    from dynamask.hub import check_local_or_hub

    check_output_folder(target)
    if target.exists():
        raise UsageError(f"{target} exists already: choose another folder, or delete it")
    check_local_or_hub(source, "model")
    check_no_run(source)
    quiet_libraries()
    from dynamask import convert

    model = _load_causal_lm(source)
    _save_converted(convert.from_doge(model), source, target)


@app.command("upcycle")
def convert_upcycle(
    source: Annotated[str, typer.Argument(help="Folder or hub name of a dense causal language model.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    window: Annotated[int, typer.Option(help="Keys each query keeps, on average over the key/value heads.")] = 512,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text to learn ranks from: file, folder, hub data set or 'stdlib'; repeatable."),
    ] = None,
    distill_steps: Annotated[
        int, typer.Option(help="Steps of distillation from the dense model; 0: none. 400 come close to it.")
    ] = 0,
    rank_steps: Annotated[int, typer.Option(help="Steps that train the rank predictors.")] = 300,
    local: Annotated[int, typer.Option(help="Newest keys that are always kept; they count towards the window.")] = 128,
    sinks: Annotated[int, typer.Option(help="First keys that are always kept; they count towards the window.")] = 4,
    dense_layer: Annotated[
        list[int] | None, typer.Option(help="Index of a layer left dense, -1 for the last; repeatable.")
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Tokens of a block of text; default: the model's context, at most 8192.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Blocks per step.")] = 4,
    allocation: Annotated[
        str, typer.Option(help="loss: choose windows and slopes by the loss that they cause; threshold: by the ranks.")
    ] = "loss",
    distill_rate: Annotated[
        float | None,
        typer.Option(help="Highest learning rate of the distillation; default: a share of the size of the weights."),
    ] = None,
    label_share: Annotated[
        float, typer.Option(help="Share of the texts' own next tokens in the distillation's loss, 0 to 1.")
    ] = 0.0,
    start_windows: Annotated[
        float, typer.Option(help="Factor of the windows when the distillation starts; they shrink over its first half.")
    ] = 1.0,
    calibration: Annotated[
        str,
        typer.Option(
            help="repeats: half of the blocks repeat their first half; facts: facts and questions are planted in the "
            "texts; plain: the texts as they are."
        ),
    ] = "repeats",
    needles: Annotated[int, typer.Option(help="Needles of each task, length and depth in the report; 0: none.")] = 2,
    max_tokens: Annotated[int, typer.Option(help="Tokens read from the texts at most.")] = 20_000_000,
    seed: Annotated[int, typer.Option(help="Seed of predictors and order.")] = 0,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: a GPU if there is one.")] = None,
) -> None:
    """Convert a dense model: learn which keys to keep, set a window for each head, distil, report.

    Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma 2 and 3 (text), Phi-3, Granite, OLMo 2 and GPT-NeoX. Up to the smallest
    window the result is the dense model exactly. Layers that slide already stay as they are. A conversion that was
    killed continues where it was when the same command is given again. Without --data the ranks stay untrained.

    **Examples**

    - `dynamask convert upcycle HuggingFaceTB/SmolLM2-135M sparse --window 512 --data texts/`

    - `dynamask convert upcycle Qwen/Qwen3-0.6B sparse --window 1024 --data texts/ --distill-steps 200`
    """
    check_output_folder(target)
    from dynamask.convert_settings import Conversion
    from dynamask.data.sources import check_sources

    settings = Conversion(
        source,
        target,
        window,
        tuple(data or ()),
        local=local,
        sinks=sinks,
        dense_layers=tuple(dense_layer or ()),
        block=block,
        batch=batch,
        rank_steps=rank_steps,
        distill_steps=distill_steps,
        allocation=allocation,
        distill_rate=distill_rate,
        label_share=label_share,
        start_windows=start_windows,
        calibration=calibration,
        needles=needles,
        max_tokens=max_tokens,
        seed=seed,
        device=device,
    )
    settings.check()
    if not settings.work.exists():  # else the texts may be gone
        check_sources(settings.data)
    quiet_libraries()
    from dynamask.convert.pipeline import run_conversion

    with _Bars() as bars:
        report = run_conversion(settings, progress=bars.show, say=lambda line: errors.print(line, soft_wrap=True))
    if report is None:
        errors.print("its ranks are untrained: beyond the window it sees the newest keys. --data TEXTS trains them")
    else:
        _show(report)
    console.print(f"written to {target}", soft_wrap=True)


@app.command("gguf", hidden=True)
def convert_gguf(rest: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Refuse, with the reason: llama.cpp cannot run dynamask's models."""
    from dynamask.models.export import cannot_export

    raise cannot_export("gguf")


@app.command("onnx", hidden=True)
def convert_onnx(rest: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Refuse, with the reason: ONNX cannot express dynamask's models."""
    from dynamask.models.export import cannot_export

    raise cannot_export("onnx")


class _Bars:
    """One progress bar for each stage, with the loss, the rate and the time left."""

    def __enter__(self) -> _Bars:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=errors,
        )
        self.tasks: dict[str, Any] = {}
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def show(self, progress: Progress) -> None:
        """Show how far a stage is."""
        if progress.stage not in self.tasks:
            name = _STAGES.get(progress.stage, progress.stage)
            self.tasks[progress.stage] = self.bar.add_task(name, total=progress.steps, facts="")
        loss = f"loss {progress.loss:.3f}, " if progress.loss == progress.loss else ""
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        facts = f"{loss}{progress.tokens_per_second:,.0f} tokens/s, {minutes}:{seconds:02d} left"
        self.bar.update(self.tasks[progress.stage], completed=progress.step, facts=facts)


def _show(report: Any) -> None:
    from rich.table import Table

    table = Table("", "dense", "converted")
    for row in report.rows():
        table.add_row(*row)
    console.print(table)
    rows = [entry for entry in report.windows if entry is not None]
    largest = max(map(max, rows))
    console.print("windows, layers by key/value heads (the darker the wider):")
    for layer, entry in enumerate(report.windows):
        shades = "dense" if entry is None else "".join(" ░▒▓█"[min(4, 5 * w // (largest + 1))] * 2 for w in entry)
        numbers = "" if entry is None else " ".join(f"{w:5d}" for w in entry)
        console.print(f"{layer:3d} {shades} {numbers}", highlight=False, soft_wrap=True)


def _load_causal_lm(source: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load a causal LM from {source!r}: {str(error).splitlines()[0]}") from error


def _save_converted(model: Any, source: str, target: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    from dynamask.convert.report import plain_card

    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        try:
            AutoTokenizer.from_pretrained(source).save_pretrained(partial)
        except (OSError, ValueError):
            errors.print(f"{source} has no tokenizer; the converted model is saved without one")
        about = "A Doge model with its attention on dynamask: the same logits, and a cache of fixed size."
        (partial / "README.md").write_text(plain_card(source, about), encoding="utf-8")
        partial.rename(target)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(f"{type(model).__name__} written to {target}", soft_wrap=True)
