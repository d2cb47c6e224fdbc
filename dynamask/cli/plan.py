"""`dynamask plan`."""

from __future__ import annotations

import contextlib
import math
import re
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dynamask.cli.common import console
from dynamask.errors import UsageError

_SIZES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def plan(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields of the model, such as model.windows=1024.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Preset, which gives the sizes of the model.")] = "1.7b",
    recipe: Annotated[str, typer.Option(help="Recipe, which gives the attention of the model.")] = "default",
    gpus: Annotated[int, typer.Option(help="Number of H100 GPUs.")] = 8,
    tokens: Annotated[str, typer.Option(help="Tokens of the whole training, such as 40B or 1.5T.")] = "40B",
    context: Annotated[int, typer.Option(help="Tokens of a sequence; 0: the model's own.")] = 0,
    batch: Annotated[int, typer.Option(help="Sequences per GPU and step.")] = 1,
    checkpointing: Annotated[bool, typer.Option(help="Recompute layers in the backward pass.")] = True,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node, which share NVLink.")] = 8,
    network: Annotated[float, typer.Option(help="Bandwidth between nodes, in GB/s per GPU.")] = 50.0,
) -> None:
    """Estimate what a training takes: operations, memory of a GPU, time, and the command that starts it.

    **Examples**

    - `dynamask plan --preset 1.7b --gpus 64 --tokens 40B`

    - `dynamask plan --preset 320m --gpus 1 --tokens 6B --context 4096 --batch 8`

    The model of a step's time is fitted to measured steps on one GPU and checked against others on one and two; the
    largest error is printed. Communication is modelled from bandwidths; more than two GPUs have not been measured.
    """
    from dynamask import recipes
    from dynamask.models.presets import check_fields, check_preset
    from dynamask.training import TrainConfig

    check_preset(preset)
    recipes.get(recipe)
    settings = TrainConfig.load(None, [f"preset={preset}", *(overrides or [])])
    check_fields(settings.model)
    count = _tokens(tokens)
    if not network > 0:
        raise UsageError(f"--network must be above 0; got {network}")
    from dynamask.models import preset as shape_of
    from dynamask.training.plan import GPU_BYTES, launch_command
    from dynamask.training.plan import plan as plan_of

    length = context or shape_of(preset, **settings.model).max_position_embeddings
    config = recipes.apply(recipe, preset, length, **settings.model)
    found = plan_of(
        config,
        gpus=gpus,
        tokens=count,
        context=length,
        sequences=batch,
        recompute=checkpointing,
        gpus_per_node=gpus_per_node,
        network=network * 1e9,
    )
    table = Table(show_header=False, box=None)
    rows = {
        "parameters": f"{found.parameters / 1e9:.2f} B",
        "operations": f"{found.flops:.2e}, {found.flops / count:.2e} a token",
        "steps": f"{found.steps:,} of {found.tokens_per_step:,} tokens",
        "memory of a GPU": f"{found.memory['peak'] / 1e9:.1f} GB of {GPU_BYTES / 1e9:.0f}: "
        + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in found.memory.items() if name != "peak" and size),
        "step": f"{found.step_seconds:.3f} s, of which {found.exposed_seconds:.3f} s wait for communication",
        "speed": f"{found.tokens_per_step / found.step_seconds:,.0f} tokens/s, {found.share_of_peak:.0%} of the peak",
        "time": f"{found.days:.1f} days",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if not found.fits:
        console.print(
            "[bold]This does not fit:[/bold] take a smaller --batch or --context, more --gpus, or --checkpointing"
        )
    given = " ".join([f"preset={preset}", *([f"recipe={recipe}"] if recipe != "default" else []), *(overrides or [])])
    arguments = (
        f"{given} data=CORPUS output=RUN context={length} batch_size={batch} steps={found.steps} compile=true"
        + (" gradient_checkpointing=true" if checkpointing else "")
    )
    console.print(f"\n{escape(launch_command(arguments, gpus, gpus_per_node))}", soft_wrap=True, highlight=False)
    console.print(
        f"\nFitted to {found.measured}; largest error {found.error:.1%}. Communication is modelled from "
        "bandwidths; more than two GPUs have not been measured.",
        soft_wrap=True,
    )


def _tokens(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([KMBGT]?)", text.strip(), flags=re.IGNORECASE)
    count = math.inf
    if match is not None:
        with contextlib.suppress(ValueError):  # two points
            count = float(match[1]) * _SIZES[match[2].upper()]
    if count == math.inf:
        raise UsageError(f"--tokens must be a number such as 40B or 1.5T; got {text!r}")
    return count
