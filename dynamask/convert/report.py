"""What a conversion costs and keeps: figures of a model, a table of two, a picture of its windows, a model card."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from dynamask.cache import cache_bytes
from dynamask.convert.teacher import teacher_states
from dynamask.evaluation.retrieval import evaluate_retrieval, least_length
from dynamask.training.loss import output_head
from dynamask.training.model_card import USE, card_head

NEEDLE_TASKS = ("single_needle", "multi_key")
_BINS = 8


@dataclass(frozen=True)
class Figures:
    """Measures of one model.

    Attributes:
        positions: ends of the ranges of positions.
        losses: mean loss in nats per token of each range, over held-out blocks.
        needles: task -> prompt length -> share of the examples answered exactly. Empty without a tokenizer.
        cache_bytes: memory of the cache that holds one block.
    """

    positions: list[int]
    losses: list[float]
    needles: dict[str, dict[str, float]] = field(default_factory=dict)
    cache_bytes: int = 0

    @property
    def loss(self) -> float:
        """Mean loss over all positions."""
        widths = [end - start for start, end in zip([0, *self.positions], self.positions, strict=False)]
        return sum(loss * width for loss, width in zip(self.losses, widths, strict=True)) / sum(widths)


def measure(
    model: Any,
    blocks: Tensor,
    tokenizer: Any = None,
    documents: Iterable[str] | None = None,
    *,
    samples: int = 4,
    batch: int = 1,
) -> Figures:
    """Measure a causal LM.

    Args:
        model: dense or converted.
        blocks: (B, N) token ids of held-out text.
        tokenizer: for the needles; None leaves them out.
        documents: texts to hide the needles in; None: RULER's noise.
        samples: examples of every task, length and depth.
        batch: blocks or prompts run at a time.
    """
    positions, losses = loss_by_position(model, blocks, batch=batch)
    needles: dict[str, dict[str, float]] = {}
    if tokenizer is not None and samples > 0:
        texts = None if documents is None else list(documents)
        for task in NEEDLE_TASKS:
            least = least_length(task, tokenizer)
            lengths = [length for length in (blocks.shape[1] // part for part in (4, 2, 1)) if length >= least]
            if lengths:
                found = evaluate_retrieval(
                    model,
                    tokenizer,
                    lengths,
                    (0.1, 0.5, 0.9),
                    samples,
                    tasks=(task,),
                    documents=texts,
                    batch_size=max(1, batch),
                )
                needles[task] = {
                    str(length): sum(s.exact for s in found if s.length == length) / 3 for length in lengths
                }
    return Figures(positions, losses, needles, bytes_of_cache(model, blocks[:1]))


@torch.no_grad()
def loss_by_position(model: Any, blocks: Tensor, *, batch: int = 1, chunk: int = 1024) -> tuple[list[int], list[float]]:
    """Compute the mean loss of ranges of positions.

    Args:
        model: a causal LM.
        blocks: (B, N) token ids.
        batch: blocks run at a time.
        chunk: positions whose logits are in memory at a time.

    Returns:
        The ends of up to 8 ranges, and the mean loss of each in nats per token.
    """
    head = output_head(model)
    sums = torch.zeros(blocks.shape[1] - 1, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for part in blocks.split(batch):
        tokens = part.to(next(model.parameters()).device)
        hidden = teacher_states(model, tokens)
        for start in range(0, tokens.shape[1] - 1, chunk):
            stop = min(start + chunk, tokens.shape[1] - 1)
            logits = head(hidden[:, start:stop].to(next(model.parameters()).dtype)).float()
            target = tokens[:, start + 1 : stop + 1]
            losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            sums[start:stop] += losses.view_as(target).sum(0).double().cpu()
    model.train(was_training)
    mean = sums / len(blocks)
    count = min(_BINS, len(mean))
    ends = [len(mean) * (i + 1) // count for i in range(count)]
    return ends, [float(mean[a:b].mean()) for a, b in zip([0, *ends], ends, strict=False)]


@torch.no_grad()
def bytes_of_cache(model: Any, block: Tensor) -> int:
    """Return the memory of the cache that the model decodes with after a block (1, N)."""
    cache = model._new_cache() if hasattr(model, "_new_cache") else DynamicCache(config=model.config)
    was_training = model.training
    model.eval()
    model(block.to(next(model.parameters()).device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    model.train(was_training)
    return cache_bytes(cache)


@dataclass(frozen=True)
class ConversionReport:
    """Everything about one conversion, as it is written beside the converted model.

    Attributes:
        source: the dense model's name.
        settings: of the conversion.
        windows: of every layer and key/value head; None for a layer left dense.
        seconds: of every stage.
        before, after: figures of the dense and of the converted model on the same texts.
    """

    source: str
    settings: dict[str, Any]
    windows: list[Any]
    seconds: dict[str, float]
    before: Figures
    after: Figures

    def rows(self) -> list[tuple[str, str, str]]:
        """What was measured, dense, converted: rows of a table."""
        rows = []
        start = 0
        for end, dense, sparse in zip(self.before.positions, self.before.losses, self.after.losses, strict=True):
            rows.append((f"loss, positions {start} to {end - 1}", f"{dense:.3f}", f"{sparse:.3f}"))
            start = end
        rows.append(("loss, all positions", f"{self.before.loss:.3f}", f"{self.after.loss:.3f}"))
        for task, by_length in self.before.needles.items():
            for length, share in by_length.items():
                found = self.after.needles[task][length]
                rows.append((f"{task.replace('_', ' ')} at {length} tokens", f"{share:.0%}", f"{found:.0%}"))
        rows.append(("cache of one block", _size(self.before.cache_bytes), _size(self.after.cache_bytes)))
        return rows

    def save(self, folder: Path) -> None:
        """Write `conversion.json`, the model card and, with matplotlib, the picture of the windows."""
        (folder / "conversion.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        picture = draw_windows(self.windows, folder / "windows.png")
        (folder / "README.md").write_text(self.model_card(picture is not None), encoding="utf-8")

    def model_card(self, picture: bool) -> str:
        """Return the model card in Markdown."""
        settings = self.settings
        table = ["| measured on held-out text | dense | converted |", "| --- | ---: | ---: |"]
        table += [f"| {name} | {dense} | {sparse} |" for name, dense, sparse in self.rows()]
        stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        trained = f", then distilled for {settings['distill_steps']} steps" if settings["distill_steps"] else ""
        return "\n".join(
            [
                *_converted_head(self.source),
                f"Each query sees {settings['window']} keys on average over the key/value heads: the first "
                f"{settings['sinks']}, the newest {settings['local']} and those that a small predictor on the layer's "
                "hidden state ranks highest. The cache keeps these keys and no others, at any length of the text.",
                "",
                *USE,
                "## Figures",
                "",
                *table,
                "",
                f"Losses are in nats per token, on blocks of {settings['block']} tokens. Needles are answered exactly, "
                "by generation from the cache. One short run over one text: differences of a few hundredths, or of "
                "one or two needles, are noise.",
                "",
                "## Conversion",
                "",
                f"Ranks learned in {settings['rank_steps']} steps of {settings['batch']} blocks{trained}. Time: "
                f"{stages}.",
                "",
                *(["![windows of layers and heads](windows.png)", ""] if picture else []),
                "Windows of the key/value heads, layer by layer:",
                "",
                "```",
                *(f"{layer:3d}  {_windows_of(entry)}" for layer, entry in enumerate(self.windows)),
                "```",
                "",
            ]
        )


def plain_card(source: str, about: str) -> str:
    """Return the model card of a converted model that nothing was measured of.

    Args:
        source: the original model's name.
        about: one sentence on what the conversion did.
    """
    return "\n".join(
        [
            *_converted_head(source),
            about,
            "",
            *USE,
        ]
    )


def _converted_head(source: str) -> list[str]:
    """The head and the title of a converted model's card. A folder's name is told without the folders above it."""
    base = source if not Path(source).exists() else Path(source).name
    return [*card_head(base if "/" in base else None), f"# {base}, converted by dynamask", ""]


def _windows_of(entry: Any) -> str:
    return "dense" if entry is None else " ".join(f"{window:5d}" for window in entry)


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def draw_windows(windows: list[Any], picture: Path) -> Path | None:
    """Draw a heat map of windows, layers by heads; None where matplotlib is missing."""
    try:
        from matplotlib import colors
        from matplotlib.figure import Figure
    except ImportError:
        return None
    heads = max((len(entry) for entry in windows if entry is not None), default=1)
    values = [[math.nan] * heads if entry is None else list(entry) for entry in windows]
    figure = Figure(figsize=(max(3.0, 0.45 * heads + 2.2), max(2.5, 0.22 * len(values) + 1.2)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", norm=colors.LogNorm(), cmap="viridis")
    axes.set_xlabel("key/value head")
    axes.set_ylabel("layer (white: dense)" if None in windows else "layer")
    axes.set_xticks(range(heads))
    figure.colorbar(image, label="window (keys)")
    figure.savefig(picture, dpi=150, metadata={"Software": None})
    return picture


def figures_from(stored: dict[str, Any]) -> Figures:
    """Read figures back from JSON."""
    return Figures(**stored)
