"""The command line: `dynamask train | evaluate | generate | chat | inspect | convert | report`, and what plugins add.

A package adds commands through the entry-point group `dynamask.commands`: name "NAME" or "GROUP NAME", value a
function or a `typer.Typer`. The laboratory (`dynamask-lab`) adds `experiment`, `benchmark`, `report masks` and
`report results` this way.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from importlib.metadata import EntryPoint, entry_points
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from dynamask.cli import convert, evaluate, report
from dynamask.cli.chat import chat
from dynamask.cli.common import errors
from dynamask.cli.inspect import inspect
from dynamask.cli.plan import plan
from dynamask.cli.train import train
from dynamask.errors import CacheRollbackError, Interrupted, InvalidInputError, UsageError

LAB_COMMANDS = ("experiment", "benchmark", "report masks", "report results")
"""Commands of the laboratory, which a plain installation names but does not have."""

app = typer.Typer(
    name="dynamask",
    help="Train, evaluate and serve language models with Dynamic Mask Attention.\n\n"
    "Start with: dynamask train preset=tiny data=stdlib steps=200",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["DYNAMASK_DEBUG"] = "1"


app.command()(train)
app.command()(plan)
app.command()(evaluate.evaluate)
app.command()(evaluate.retrieval)
app.command()(evaluate.generate)
app.command()(chat)
app.command()(inspect)
app.add_typer(convert.app, name="convert")
app.add_typer(report.app, name="report")


def add_plugins(to: typer.Typer = app, groups: dict[str, typer.Typer] | None = None) -> None:
    """Add the commands of installed packages, and a hint for those of the laboratory where it is missing."""
    groups = groups or {"report": report.app}
    found = {point.name: point for point in entry_points(group="dynamask.commands")}
    for name in [*LAB_COMMANDS, *(name for name in found if name not in LAB_COMMANDS)]:
        group, _, command = name.rpartition(" ")
        parent = groups[group] if group else to
        if name in found:
            _add(parent, command, found[name])
        else:
            parent.command(command, help="Needs the laboratory: pip install dynamask-lab", hidden=True)(_missing(name))


def _add(parent: typer.Typer, command: str, point: EntryPoint) -> None:
    loaded = point.load()
    if isinstance(loaded, typer.Typer):
        parent.add_typer(loaded, name=command)
    else:
        parent.command(command)(loaded)


def _missing(name: str):  # type: ignore[no-untyped-def]
    def hint(rest: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        raise UsageError(f"`dynamask {name}` belongs to the laboratory: pip install dynamask-lab")

    return hint


add_plugins()


def main() -> None:
    """Run the command line. Mistakes of the user end with a message and exit code 2, never with a traceback.

    Ctrl-C ends with exit code 130 and SIGTERM with 143, after whatever the command does to be continued.
    """
    before: Any = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except (UsageError, InvalidInputError, CacheRollbackError) as error:
        if os.environ.get("DYNAMASK_DEBUG"):
            raise
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except Interrupted as stop:
        errors.print(escape(str(stop)), highlight=False, soft_wrap=True)
        sys.exit(128 + stop.signal)
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of a KeyboardInterrupt, without a word
            errors.print("interrupted")
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """End by an exception, so that commands remove what they have half written."""
    raise Interrupted("terminated", number)
