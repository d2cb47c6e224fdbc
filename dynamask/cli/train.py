"""`dynamask train`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from dynamask.cli.common import console, errors, progress, quiet_libraries
from dynamask.errors import Interrupted

if TYPE_CHECKING:
    from dynamask.training import TrainConfig


def check_names(settings: TrainConfig) -> None:
    """Refuse names that stand for nothing, before the imports of a training.

    Raises:
        UsageError: an unknown preset, recipe or field of the model, or no such model, text or tokenizer.
    """
    from dynamask import recipes
    from dynamask.data.sources import check_sources
    from dynamask.hub import check_local_or_hub
    from dynamask.models.presets import check_fields, check_preset
    from dynamask.training.folder import check_run

    check_preset(settings.preset)
    check_fields(settings.model)
    if settings.recipe is not None:
        recipes.get(settings.recipe)
    for model in (settings.init, settings.teacher):
        if model is not None:
            check_run(model)
    if not Path(settings.corpus or Path(settings.output) / "corpus").exists():  # else the texts may be gone
        check_sources(settings.data)
    if settings.tokenizer is not None:
        check_local_or_hub(settings.tokenizer, "tokenizer folder")


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

    - `dynamask train preset=30m data=corpus/ output=runs/mine`

    - `dynamask train model.attention=mha output=runs/dense` — a rival: dma, mha, swa, mla, nsa

    - `dynamask train recipe=recall preset=30m` — learned ranks; recipes: default, recall, even, paper, sliding, dense

    - `dynamask train init=sparse teacher=dense data=corpus/` — a converted model towards the one it was made from

    - `dynamask train -c run.yaml learning_rate=3e-4`

    - `torchrun --nproc-per-node 8 -m dynamask train preset=1.7b data=corpus/` — several GPUs, which split the model

    **Presets**: tiny, 30m, 65m, 120m, 320m, 1.7b (`dynamask report parameters`).

    **Data** is a list of files, folders, .jsonl or .parquet tables with a `text` column, hub data sets (owner/name), or
    `stdlib`. A killed run continues from its last checkpoint when the same command is run again; Ctrl-C writes one
    first. Curves: `tensorboard --logdir runs`.

    **Settings**: preset, recipe, init, teacher, model.*, data, tokenizer, validation, errors (fail, skip), output,
    corpus, context, batch_size, gradient_accumulation, steps, window_schedule, learning_rate, gate_rate, rank_rate,
    schedule (cosine, wsd, constant), warmup, weight_decay, beta1, beta2, clip, precision (auto, bf16, fp32),
    gradient_checkpointing, compile, recorded, shard, context_parallel, spike, skip, seed, log_every, eval_every,
    save_every, keep, resume.
    """
    from dynamask.training import TrainConfig

    settings = TrainConfig.load(config, overrides or [])
    check_names(settings)
    from dynamask.training import train as run
    from dynamask.training.processes import is_first

    quiet_libraries()
    if settings.teacher is not None:
        from dynamask.convert.distillation_run import train_towards as run
    try:
        result = run(
            settings,
            progress=progress,
            report=lambda line: errors.print(escape(line), highlight=False, soft_wrap=True),
        )
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; run the same command again to continue from the last checkpoint", signal.SIGINT
        ) from None
    if not is_first():
        return
    if result.skipped:
        errors.print(
            f"left out {len(result.skipped)} unreadable files, lines or rows, such as: {escape(result.skipped[0])}",
            soft_wrap=True,
        )
    if settings.teacher is None:
        console.print(f"validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}")
    else:
        console.print(f"divergence from the teacher {result.loss:.4f} nats per token, on held-out text")
    console.print(f"model: {result.model_dir}", soft_wrap=True)
