"""`dynamask train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dynamask.cli.common import console, errors, progress


def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value settings, such as steps=500 model.windows=128.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with settings.")] = None,
) -> None:
    """Train a language model on text.

    Settings come from their defaults, then the YAML file, then the overrides.

    **Examples**

    - `dynamask train` — tiny model, Python's standard library, a few minutes on a CPU

    - `dynamask train preset=30m data=corpus/ context=2048 output=runs/mine`

    - `dynamask train model.attention=mha output=runs/dense` — a rival: dma, mha, swa, mla, nsa

    - `dynamask train -c run.yaml learning_rate=3e-4`

    - `accelerate launch -m dynamask train -c run.yaml` — several GPUs

    **Data** is a list of files, folders, .jsonl or .parquet tables with a `text` column, hub data sets, or
    `stdlib`. A killed run continues from its last checkpoint when the same command is run again. Curves:
    `tensorboard --logdir runs`.

    **Settings**: preset, model.*, data, tokenizer, validation, errors, output, corpus, context, batch_size,
    gradient_accumulation, steps, learning_rate, schedule (cosine, wsd, constant), warmup, weight_decay, beta1,
    beta2, clip, precision (auto, bf16, fp32), gradient_checkpointing, compile, seed, log_every, eval_every,
    save_every, keep, resume.
    """
    from dynamask.training import TrainConfig
    from dynamask.training import train as run

    settings = TrainConfig.load(config, overrides or [])
    result = run(settings, progress=progress)
    if result.skipped:
        errors.print(
            f"left out {len(result.skipped)} unreadable files, such as: {escape(result.skipped[0])}", soft_wrap=True
        )
    console.print(f"validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}")
    console.print(f"model: {result.model_dir}", soft_wrap=True)
