"""What bounds a frozen conversion: its keys, its windows, or how well its ranks are predicted.

    python -m dynamask_lab.studies.conversion.bound --model MODEL --data DATA --state STATE --out rows.jsonl

Every row is the loss by position of the same blocks. Oracles know the attention of the text that they are judged on:
ranks that are static, as the product's, by `key_effects`; and, which no cache can have, the best keys of each query.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dynamask.convert import attention as converted_attention
from dynamask.convert import set_slopes, set_windows
from dynamask.convert.allocate_windows import SLOPES, exact_sum
from dynamask.convert.window_errors import candidate_windows, cheapest_slopes, cheapest_windows, window_errors
from dynamask.models.decoder import attention_of, decoder_of
from dynamask_lab.studies.conversion.forms import load_predictors, upcycled
from dynamask_lab.studies.conversion.measure import Form, loss_by_position
from dynamask_lab.studies.conversion.rank_targets import effects_of


class Given(nn.Module):
    """Ranks that are known."""

    def __init__(self, ranks: Tensor) -> None:
        super().__init__()
        self.ranks = ranks

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, hidden) -> (B, G, N), whatever the hidden states."""
        return self.ranks


@contextmanager
def given_ranks(model: Any, ranks: dict[int, Tensor]) -> Iterator[None]:
    """Give the layers these ranks for as long as the context lasts."""
    modules = {index: attention_of(decoder_of(model).layers[index]) for index in model.config.ranked_layers}
    own = {index: module.rank_predictor for index, module in modules.items()}
    for index, module in modules.items():
        module.rank_predictor = Given(ranks[index])
    try:
        yield
    finally:
        for index, module in modules.items():
            module.rank_predictor = own[index]


@contextmanager
def best_of_each_query() -> Iterator[None]:
    """Let every query choose the keys of its group that it gives the largest weights, as many as the window holds."""
    original = converted_attention._mix

    def mix(module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, call: Any) -> Tensor:
        if module.rank_predictor is None:
            return original(module, query, key, value, scale, call)
        rows = zip(query, key, value, strict=True)
        return torch.stack([_choose(*row, module.windows, scale) for row in rows])

    converted_attention._mix = mix
    try:
        yield
    finally:
        converted_attention._mix = original


def _choose(query: Tensor, key: Tensor, value: Tensor, windows: Any, scale: float, chunk: int = 512) -> Tensor:
    """One sequence: query (H, N, D), key and value (G, N, D)."""
    groups, length = key.shape[:2]
    asking = query.unflatten(0, (groups, -1))
    position = torch.arange(length, device=query.device)
    parts = []
    for start in range(0, length, chunk):
        at = position[start : start + chunk, None]
        logits = torch.einsum("grqd,gkd->grqk", asking[:, :, start : start + chunk].float(), key.float()) * scale
        weight = logits.masked_fill(position > at, -torch.inf).softmax(-1)
        kept = torch.zeros_like(weight[:, 0], dtype=torch.bool)
        for group, window in enumerate(windows):
            best = weight[group].amax(0).topk(min(window, length), dim=-1).indices
            kept[group].scatter_(-1, best, True)
        weight = weight * kept[:, None]
        weight = weight / weight.sum(-1, keepdim=True)
        parts.append(torch.einsum("grqk,gkd->grqd", weight, value.float()))
    return torch.cat(parts, 2).flatten(0, 1).to(query.dtype)


def set_rules(model: Any, windows: list[int], slopes: list[float]) -> None:
    """Set one window and slope for each of the layers that rank."""
    layers = model.config.num_hidden_layers
    each: list[Any] = [[512]] * layers
    rising: list[Any] = [None] * layers
    for index, window, slope in zip(model.config.ranked_layers, windows, slopes, strict=True):
        each[index], rising[index] = [window], [slope]
    set_windows(model, each)
    set_slopes(model, rising if any(slopes) else None)


def _known(model: Any, block: Tensor) -> dict[str, dict[int, Tensor]]:
    """Per target and ranked layer the ranks of an oracle for this block (1, N)."""
    effects = {index: found for index, (_, found) in effects_of(model, block).items()}
    return {
        name: {index: found[name].clamp(min=1e-30).log() for index, found in effects.items()}
        for name in ("max", "mass", "loss")
    }


def allocated(model: Any, blocks: Tensor, ranks: list[dict[int, Tensor]], budget: int) -> tuple[list[int], list[float]]:
    """Windows and slopes for known ranks of these blocks, as `allocate_windows` chooses them."""
    least, heads = model.config.local + model.config.sinks, len(model.config.ranked_layers)
    candidates = candidate_windows(least, blocks.shape[1])
    total: Any = 0
    for block, known in zip(blocks.split(1), ranks, strict=True):
        with given_ranks(model, known):
            total = total + window_errors(model, block, candidates, SLOPES)
    wanted = cheapest_windows(total.amin(1), candidates, budget * heads)
    spare = exact_sum(wanted - least, (budget - least) * heads, blocks.shape[1] - least)
    windows = [least + number for number in spare]
    return windows, [SLOPES[index] for index in cheapest_slopes(total, candidates, windows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "state", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--budgets", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--corpora", nargs="*", default=["text", "code"])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=1e9)
    arguments = parser.parse_args()
    begun = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).to(device).eval()
    model = upcycled(dense, 512)
    load_predictors(model, torch.load(arguments.state / "ranks-hidden-seed0.pt", map_location=device))
    found, heads = {}, len(model.config.ranked_layers)
    for corpus in arguments.corpora:
        array = np.load(arguments.data / f"test-{corpus}.npy").astype(np.int64)
        step = max(1, len(array) // arguments.blocks)
        found[corpus] = torch.from_numpy(array[::step][: arguments.blocks, : arguments.length]).to(device)

    def write(rule: str, corpus: str, budget: int | None, windows: Any, slopes: Any, losses: list[list[float]]) -> None:
        row: dict[str, Any] = {"study": "conversion bound", "model": arguments.model.name, "rule": rule}
        row |= {"corpus": corpus, "budget": budget, "windows": windows, "slopes": slopes, "losses": losses}
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{time.monotonic() - begun:6.1f} s  {rule} {corpus} {budget} {np.nanmean(losses):.4f}", flush=True)

    def measure(target: Any, blocks: Tensor) -> list[list[float]]:
        return loss_by_position(Form("", target), blocks, batch=1)

    for corpus, blocks in found.items():
        write("dense", corpus, None, None, None, measure(dense, blocks))
        length = blocks.shape[1]
        set_rules(model, [length] * heads, [0.0] * heads)
        write("windows as long as the text", corpus, length, [length] * heads, None, measure(model, blocks))
        for budget in arguments.budgets:
            kept = json.loads((arguments.state / f"windows-{budget}-hidden-seed0-loss-learned-slopes.json").read_text())
            ranked = model.config.ranked_layers
            windows = [kept["windows"][index][0] for index in ranked]
            slopes = [kept["slopes"][index][0] for index in ranked]
            set_rules(model, windows, slopes)
            write("learned", corpus, budget, windows, slopes, measure(model, blocks))
            if budget == arguments.budgets[0]:
                for index in range(heads):
                    alone = [windows[index] if index == n else length for n in range(heads)]
                    set_rules(model, alone, slopes)
                    write("learned, one layer", corpus, budget, alone, slopes, measure(model, blocks))
            known = [_known(model, block) for block in blocks.split(1)]
            for name in ("max", "mass", "loss"):
                for chosen in ("product's", "none", "its own"):
                    rules = windows, [0.0] * heads if chosen == "none" else slopes
                    if chosen == "its own":
                        rules = allocated(model, blocks, [ranks[name] for ranks in known], budget)
                    set_rules(model, *rules)
                    losses = []
                    for block, ranks in zip(blocks.split(1), known, strict=True):
                        with given_ranks(model, ranks[name]):
                            losses += measure(model, block)
                    write(f"oracle, {name}, windows and slopes: {chosen}", corpus, budget, *rules, losses)
                if time.monotonic() - begun > arguments.seconds:
                    break
            set_rules(model, [budget] * heads, [0.0] * heads)
            with best_of_each_query():
                write("best keys of each query", corpus, budget, [budget] * heads, None, measure(model, blocks))
        if time.monotonic() - begun > arguments.seconds:
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
