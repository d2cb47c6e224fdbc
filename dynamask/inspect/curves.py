"""Training curves of one or more runs."""

from __future__ import annotations

import json
from pathlib import Path

from dynamask.errors import UsageError


def draw_curves(runs: list[str], picture: str | Path) -> Path:
    """Draw training and validation loss against steps.

    Args:
        runs: folders of finished runs.
        picture: file to write, by its suffix .png, .svg or .pdf.

    Raises:
        UsageError: a folder without a finished run.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        try:
            state = json.loads((Path(run) / "model" / "trainer_state.json").read_text())
        except OSError as error:
            raise UsageError(f"{run} holds no finished run (no model/trainer_state.json)") from error
        except ValueError as error:
            raise UsageError(f"{run}/model/trainer_state.json is damaged: {error}") from error
        color = f"C{number}"
        trained = [(e["step"], e["loss"]) for e in state["log_history"] if "loss" in e]
        held_out = [(e["step"], e["eval_loss"]) for e in state["log_history"] if "eval_loss" in e]
        if trained:
            axes.plot(*zip(*trained, strict=True), color=color, alpha=0.6, label=f"{Path(run).name}, training")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o", color=color, label=f"{Path(run).name}, validation")
    axes.set(xlabel="optimizer step", ylabel="cross-entropy, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)
    return Path(picture)
