"""`dynamask report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dynamask.cli.common import Model, check_output_file, console, quiet_libraries
from dynamask.errors import UsageError

app = typer.Typer(help="Tables and pictures about models and runs.", no_args_is_help=True)


@app.command("parameters")
def report_parameters(
    preset: Annotated[str | None, typer.Option(help="One preset; default: all of them.")] = None,
) -> None:
    """Count the parameters of every preset with every mixer, and compare them with dense attention's."""
    from dynamask.models.presets import PRESETS, check_preset

    if preset:
        check_preset(preset)
    names = [preset] if preset else list(PRESETS)
    from dynamask.inspect import parameter_counts

    table: Table | None = None
    for name in names:
        counts = parameter_counts(name)
        table = table or Table("preset", *counts)
        cells = [f"{n / 1e6:.2f}M ({n / counts['mha'] - 1:+.2%})" for n in counts.values()]
        table.add_row(name, *cells)
    console.print(table)


def require_plots() -> None:
    """Raise UsageError where matplotlib is missing."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError("pictures need matplotlib: pip install 'dynamask-attention[plots]'")


def check_picture(file: Path) -> None:
    """Refuse a picture that cannot be drawn or written, before any work is done for it.

    Raises:
        UsageError: a file that cannot be written, a suffix of no format that matplotlib writes, or no matplotlib.
    """
    check_output_file(file)
    require_plots()
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in formats:
        raise UsageError(f"cannot draw {file}: its suffix must be .png, .svg, .pdf or another of {', '.join(formats)}")


@app.command("curves")
def report_curves(
    runs: Annotated[list[str], typer.Argument(help="Folders of finished runs.")],
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("curves.png"),
) -> None:
    """Draw the training and validation curves of runs side by side."""
    check_picture(output)
    from dynamask.inspect import draw_curves

    console.print(f"written {draw_curves(runs, output)}")


@app.command("mask")
def report_mask(
    model: Model,
    text: Annotated[Path, typer.Argument(help="Text file to read.")],
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("live_keys.png"),
) -> None:
    """Draw which keys stay alive in which head, over the text itself."""
    check_picture(output)
    from dynamask.training.folder import check_run, open_run

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {text} as UTF-8 text: {error}. Give the name of a text file") from error
    check_run(model)
    quiet_libraries()
    from dynamask.inspect import draw_live_keys

    loaded, tokenizer = open_run(model)
    console.print(f"written {draw_live_keys(loaded, tokenizer, content, output)}")


@app.command("needle")
def report_needle(
    scores: Annotated[list[Path], typer.Argument(help="JSON lines that `dynamask retrieval` wrote.")],
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("needle.png"),
    metric: Annotated[str, typer.Option(help="exact or recall.")] = "exact",
) -> None:
    """Draw retrieval by depth and length, models side by side."""
    check_picture(output)
    from dynamask.inspect import draw_needle

    console.print(f"written {draw_needle(scores, output, metric=metric)}")
