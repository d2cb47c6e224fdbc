"""`dynamask inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dynamask.cli.common import Model, check_output_file, check_text, console, errors, quiet_libraries
from dynamask.errors import UsageError

_FILE_SUFFIXES = {".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".html", ".text"}


def inspect(
    model: Model,
    text: Annotated[str, typer.Argument(help="A text file, the text itself, or - for standard input.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML page to write.")] = Path("inspect.html"),
    tokens: Annotated[int, typer.Option(help="Tokens to generate behind the text, greedily.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the text into the model's chat template.")] = False,
    limit: Annotated[int, typer.Option(help="Most tokens of the text to read.")] = 4096,
) -> None:
    """Show which keys every head keeps of a text, as one HTML page that works offline.

    The page has a slider over the text, the keys that are alive in every layer and head, the windows, the ranks, and
    what each generated token attended to. MODEL is a native or converted model.

    **Examples**

    - `dynamask inspect runs/tiny notes.txt --out notes.html`

    - `dynamask inspect sparse "Ada was born in 1815. When was Ada born?" --chat --tokens 20`

    - `cat notes.txt | dynamask inspect sparse - --tokens 30`
    """
    for name, value, least in (("tokens", tokens, 0), ("limit", limit, 1)):
        if value < least:
            raise UsageError(f"--{name} must be at least {least}; got {value}")
    check_output_file(out)
    content = read_text(text)
    if not content.strip():
        raise UsageError("the text is empty: give at least one character that is not a blank")
    from dynamask.training.folder import check_run, open_run

    check_run(model)
    quiet_libraries()
    import torch

    from dynamask.data.tokenizer import encode_beginning
    from dynamask.inspect import inspect_text, inspection_page, token_texts

    loaded, tokenizer = open_run(model)
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(f"the tokenizer of {model} has no chat template: leave --chat out")
        message = [{"role": "user", "content": content}]
        whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = encode_beginning(tokenizer, content)
    if not ids:
        raise UsageError("the text is empty: the tokenizer makes no token of it")
    if len(ids) > limit:
        if chat:
            raise UsageError(
                f"the text is {len(ids)} tokens in the chat template: shorten it, or raise --limit {limit}"
            )
        errors.print(f"reads the first {limit} of {len(ids)} tokens; --limit reads more", highlight=False)
        ids = ids[:limit]
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    found = inspect_text(loaded, torch.tensor([ids], device=loaded.device), new_tokens=tokens)
    name = Path(model).name if Path(model).exists() else model
    page = inspection_page(found, token_texts(tokenizer, found.input_ids), name)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror or error}") from error
    made = len(found.input_ids) - found.prompt
    facts = f"{len(found.input_ids)} tokens" + (f", {made} of them generated" if made else "")
    if found.not_recorded is not None:
        errors.print(f"without what generated tokens attended to: {found.not_recorded}", highlight=False)
    console.print(f"written {out} ({facts}, {len(page.encode()) / 1024:.0f} KiB)", highlight=False, soft_wrap=True)


def read_text(text: str) -> str:
    """Return the text that an argument stands for: standard input for "-", a file's content, or itself.

    Raises:
        UsageError: a folder, a file that cannot be read as UTF-8, or a name of a text file that is not there.
    """
    if text == "-":
        try:
            return sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not UTF-8 text: {error}") from error
    path = Path(text)
    try:
        there = bool(text) and path.exists()
    except (OSError, ValueError):  # too long for a name, or a null byte: a text
        there = False
    if there:
        if path.is_dir():
            raise UsageError(f"{text} is a folder: give a text file, the text itself, or - for standard input")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {text} as UTF-8 text: {error}") from error
    if len(text) < 256 and not any(c.isspace() for c in text) and path.suffix.lower() in _FILE_SUFFIXES:
        raise UsageError(f"there is no file {text}; a text that looks like a file's name can be piped in (-)")
    return check_text(text, "the text")
