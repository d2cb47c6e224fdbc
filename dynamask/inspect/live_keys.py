"""Which keys stay alive in which head, drawn over the text itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamask.data.tokenizer import encode_beginning
from dynamask.errors import InvalidInputError
from dynamask.inspect.key_ranks import ranked_layers
from dynamask.ops.expiry import key_expiry

_LINE = 88  # characters of text per line of a panel


@torch.no_grad()
def layer_expiry(model: Any, input_ids: Tensor) -> Tensor:
    """Compute the mask of every layer and head on a text.

    Args:
        model: a causal LM with dynamic mask attention (a dynamask or a converted model).
        input_ids: (1, N) tokens.

    Returns:
        (layers, G, N) int32, `key_expiry` of each.

    Raises:
        InvalidInputError: the model has no dynamic mask gates.
    """
    layers = ranked_layers(model, input_ids)
    if not layers:
        raise InvalidInputError("the model has no dynamic mask attention, so no key has a lifetime of its own")
    return torch.cat(
        [key_expiry(each.ranks.float(), each.windows, local=each.local, sinks=each.sinks) for each in layers]
    ).cpu()


def draw_live_keys(model: Any, tokenizer: Any, text: str, picture: str | Path, *, panels: int = 4) -> Path:
    """Draw a text once per head, each token shaded by how long its key lives, and all heads' survivors below.

    Args:
        model, tokenizer: a causal LM with dynamic mask attention and its tokenizer.
        text: what to read; the first 360 tokens are used.
        picture: file to write, by its suffix .png, .svg or .pdf.
        panels: heads shown over the text: those whose survivors are oldest.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    ids = torch.tensor([encode_beginning(tokenizer, text)[:360]], dtype=torch.long, device=model.device)
    if ids.shape[1] == 0:
        raise InvalidInputError("the text is empty: there is no key to draw")
    expiry = layer_expiry(model, ids)
    layers, heads, length = expiry.shape
    position = torch.arange(length)
    lifetime = (expiry - position).clamp(min=0).flatten(0, 1)
    alive = (expiry > length - 1).flatten(0, 1)
    words = [tokenizer.decode([token]) for token in ids[0].tolist()]

    # The heads that remember furthest back, by the mean age of what they hold at the end.
    age = ((length - 1 - position) * alive).sum(-1) / alive.sum(-1).clamp(min=1)
    shown = sorted(age.argsort(descending=True)[:panels].tolist())
    norm, colors = LogNorm(1, length), colormaps["YlOrRd"]

    lines = _layout(words)
    rows = 1 + max(line for line, _, _ in lines)
    figure = Figure(figsize=(13, 1.6 + 0.15 * rows * ((len(shown) + 1) // 2) + 3.2), layout="constrained")
    grid = figure.add_gridspec((len(shown) + 1) // 2 + 1, 2, height_ratios=[rows] * ((len(shown) + 1) // 2) + [16])
    for number, head in enumerate(shown):
        axes = figure.add_subplot(grid[number // 2, number % 2])
        axes.set_title(
            f"layer {head // heads}, key/value head {head % heads}: "
            f"{int(alive[head].sum())} of {length} keys alive at the end",
            fontsize=9,
            loc="left",
        )
        axes.set(xlim=(0, _LINE), ylim=(rows, 0))
        axes.axis("off")
        for index, (line, column, piece) in enumerate(lines):
            if not piece:
                continue
            life = int(lifetime[head, index])
            shade = colors(0.85 * norm(max(1, life))) if life else (1, 1, 1, 1)
            kept = bool(alive[head, index])
            axes.text(
                column,
                line + 0.5,
                piece,
                fontsize=6.6,
                family="monospace",
                va="center",
                color="black" if kept else "0.45",
                weight="bold" if kept else "normal",
                bbox={"facecolor": shade, "edgecolor": "none", "pad": 0.4, "alpha": 0.9 if kept else 0.35},
            )
    axes = figure.add_subplot(grid[-1, :])
    image = axes.imshow(lifetime.clamp(min=1), aspect="auto", norm=norm, cmap=colors, interpolation="nearest")
    axes.set(
        xlabel="position of the key in the text",
        ylabel="layer · head",
        title=f"lifetime of every key in every head of {length} tokens",
    )
    axes.set_yticks(range(layers * heads), [f"{i // heads}·{i % heads}" for i in range(layers * heads)], fontsize=7)
    figure.colorbar(image, ax=axes, label="queries that see the key", pad=0.01)
    figure.suptitle("Which keys stay alive: shaded by lifetime, bold where alive at the last token", fontsize=12)
    figure.savefig(picture, dpi=150)
    return Path(picture)


def _layout(words: list[str]) -> list[tuple[int, int, str]]:
    """Lay out line, column and printable text of each token, broken at new lines and at the width of a panel."""
    placed, line, column = [], 0, 0
    for word in words:
        # Mathematical text mode would swallow dollar signs.
        piece = word.replace("\t", "    ").replace("$", r"\$")
        head, breaks, tail = piece.partition("\n")
        if column + len(head) > _LINE and column:
            line, column = line + 1, 0
        placed.append((line, column, head))
        column += len(head)
        if breaks:
            line += breaks.count("\n") + tail.count("\n")
            column = len(tail.split("\n")[-1])
    return placed
