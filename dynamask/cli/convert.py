"""`dynamask convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dynamask.cli.common import console, errors
from dynamask.errors import UsageError

app = typer.Typer(help="Turn an existing model into one whose attention runs on dynamask.", no_args_is_help=True)


@app.command("doge")
def convert_doge(
    source: Annotated[str, typer.Argument(help="Folder or hub name of a Doge model.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """A released Doge model, with the same logits, its attention on dynamask."""
    from dynamask import convert

    model = _load_causal_lm(source)
    _save_converted(convert.from_doge(model), source, target)


@app.command("upcycle")
def convert_upcycle(
    source: Annotated[str, typer.Argument(help="Folder or hub name of a Llama, Mistral, Qwen or SmolLM model.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    window: Annotated[int, typer.Option(help="Keys each query keeps.")] = 2048,
    local: Annotated[int, typer.Option(help="How many of them are the newest.")] = 128,
    sinks: Annotated[int, typer.Option(help="How many of them are the first.")] = 4,
    dense_layer: Annotated[
        list[int] | None, typer.Option(help="Index of a layer left dense, -1 for the last; repeatable.")
    ] = None,
) -> None:
    """A dense model with untrained ranks: the same model up to `window` tokens.

    **Examples**

    - `dynamask convert upcycle Qwen/Qwen3-0.6B sparse --window 1024`

    - `dynamask convert upcycle Qwen/Qwen3-0.6B mixed --dense-layer 9 --dense-layer 18`
    """
    from dynamask import convert

    model = _load_causal_lm(source)
    sparse = convert.upcycle(model, window, local=local, sinks=sinks, dense_layers=dense_layer or ())
    _save_converted(sparse, source, target)


def _load_causal_lm(source: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load a causal LM from {source!r}: {str(error).splitlines()[0]}") from error


def _save_converted(model: Any, source: str, target: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    if target.exists():
        raise UsageError(f"{target} exists already: choose another folder, or delete it")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        try:
            AutoTokenizer.from_pretrained(source).save_pretrained(partial)
        except (OSError, ValueError):
            errors.print(f"{source} has no tokenizer; the converted model is saved without one")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(f"{type(model).__name__} written to {target}", soft_wrap=True)
