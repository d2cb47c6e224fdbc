"""`dynamask chat`."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamask.cli.common import Model, check_sampling, check_text, quiet_libraries
from dynamask.cli.status_line import StatusLine
from dynamask.errors import UsageError

if TYPE_CHECKING:
    from dynamask.cli.conversation import Answer, Conversation

_HELP = """\
/reset   forget the conversation
/help    show this
Ctrl-C   stop the answer
Ctrl-D   end"""
_BETWEEN_UPDATES = 0.2
"""Seconds between updates of the status line."""


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message, for models with a chat template.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampling; 0: greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling; default: another one every time.")] = None,
) -> None:
    """Talk with a model; its bounded cache carries over from turn to turn.

    The status line shows the size of the cache, beside that of a cache of all keys, and tokens per second. Ctrl-C stops
    an answer, Ctrl-D ends, `/reset` forgets the conversation, `/help` lists the commands. Without a terminal, each line
    of standard input is a message, and answers go to standard output.

    **Examples**

    - `dynamask chat sparse`

    - `echo "Name three birds." | dynamask chat sparse --temperature 0`
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1; got {max_new_tokens}")
    check_sampling(temperature, top_p)
    if system is not None:
        check_text(system, "the system message")
    from dynamask.training.folder import check_run, open_run

    check_run(model)
    quiet_libraries()
    import torch

    from dynamask.cli.conversation import Conversation

    loaded, tokenizer = open_run(model)
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    if seed is not None:
        torch.manual_seed(seed)
    else:
        torch.seed()
    talk = Conversation(loaded, tokenizer, system, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if not talk.has_template:
        _say("this model has no chat template: it continues your text")
    with StatusLine(sys.stdout, active=terminal) as line:
        _turns(talk, line, terminal)


def _turns(talk: Conversation, line: StatusLine, terminal: bool) -> None:
    if terminal:
        print("/help lists the commands.")
        line.show(status(talk, None))
    for message in _messages(terminal):
        if message.startswith("/") and not any(c.isspace() for c in message):
            _command(message, talk, line)
        elif message.strip():
            _turn(message, talk, line, terminal)


def _command(name: str, talk: Conversation, line: StatusLine) -> None:
    if name == "/reset":
        talk.reset()
        line.show(status(talk, None))
        _say("the conversation is forgotten")
    elif name == "/help":
        _say(_HELP)
    else:
        _say(f"there is no command {name}; /help lists them")


def _turn(message: str, talk: Conversation, line: StatusLine, terminal: bool) -> None:
    shown, again = 0.0, talk.read_again
    encoding = sys.stdout.encoding or "utf-8"

    def write(piece: str) -> None:
        nonlocal shown
        sys.stdout.write(piece.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
        now = time.perf_counter()
        if now - shown > _BETWEEN_UPDATES:
            shown = now
            line.show(status(talk, None) + " · answering")

    with _stopped_by_interrupt() as stop:
        answer = talk.ask(message, write, stop)
    print()
    if answer.stopped:
        _say("stopped")
    if talk.read_again > again:
        _say("the chat template changed earlier turns, so the whole conversation was read again")
    longest = getattr(talk.model.config, "max_position_embeddings", None)
    if longest is not None and len(talk.ids) > longest:
        _say(f"the conversation is longer than the {longest} positions that the model was made for: /reset starts over")
    line.show(status(talk, answer))
    if not line.active:
        _say(status(talk, answer))
    elif terminal:
        print()


def status(talk: Conversation, answer: Answer | None) -> str:
    """Return the facts of the status line."""
    facts = [f"{len(talk.ids):,} tokens", f"cache {_size(talk.cache_bytes)} (all keys: {_size(talk.dense_bytes)})"]
    if answer is not None:
        facts.append(f"{answer.tokens_per_second:.1f} tokens/s")
        facts.append(f"{answer.read} tokens read, {answer.made} generated")
    return " · ".join(facts)


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def _messages(terminal: bool) -> Iterator[str]:
    """The lines that a person types, or those of a pipe, until they end."""
    if not terminal:
        for raw in sys.stdin:
            yield check_text(raw.rstrip("\n"), "standard input")
        return
    with suppress(ImportError):  # line editing and history
        import readline  # noqa: F401
    while True:
        try:
            yield check_text(input("> "), "the message")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D ends")


@contextmanager
def _stopped_by_interrupt() -> Iterator[Any]:
    """Give a function that tells whether Ctrl-C was pressed inside of the `with` block; a second one interrupts."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: pressed
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _say(line: str) -> None:
    """Print a notice: beside the answers, which go to standard output."""
    print(line, file=sys.stderr, flush=True)
