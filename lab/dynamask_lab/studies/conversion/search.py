"""Windows and slopes of a model with few key/value heads, chosen by the loss that they cause instead of an estimate.

    python -m dynamask_lab.studies.conversion.search --model MODEL --data DATA --state STATE --out rows.jsonl

Coordinate descent from the windows and slopes that `allocate_windows` chose, on the validation blocks: slopes of one
layer after another, then splits of the budget, then slopes again. The rules that the report names are measured on test
blocks: what was chosen by the estimate, no slopes, slopes of at most 4/8192, and what the search found. Oracles' ranks,
which know the later attention, are searched on the test blocks themselves: a bound, not a method.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynamask_lab.studies.conversion.bound import _known, given_ranks, set_rules
from dynamask_lab.studies.conversion.forms import LOCAL, load_predictors, upcycled
from dynamask_lab.studies.conversion.measure import Form, loss_by_position

STEEP = tuple(steps / 8192 for steps in (0, 1, 2, 4, 8, 16))
SHARES = ((1, 1, 1), (3, 2, 1), (2, 3, 1), (3, 3, 1), (5, 3, 1), (3, 5, 1), (6, 2, 1), (2, 6, 1), (1, 1, 0), (3, 2, 0))
"""Splits of the budget over the layers that rank: what each gets beyond the least window, up to a factor."""

Rules = tuple[list[int], list[float]]


def split(shares: Sequence[int], budget: int, least: int) -> list[int]:
    """Windows of that mean whose excess over the least window has these shares."""
    spare = (budget - least) * len(shares)
    windows = [least + spare * share // sum(shares) for share in shares]
    windows[int(np.argmax(shares))] += budget * len(shares) - sum(windows)
    return windows


def descend(cost: Callable[[Rules], float], start: Rules, budget: int, least: int, over: Callable[[], bool]) -> Rules:
    """The best rules of a coordinate descent: slopes, windows, slopes."""
    best, known = start, {}

    def better(candidates: list[Rules]) -> Rules:
        for rules in (best, *candidates):
            key = json.dumps(rules)
            if key not in known and not over():
                known[key] = cost(rules)
        measured = [rules for rules in (best, *candidates) if json.dumps(rules) in known]
        return min(measured, key=lambda rules: known[json.dumps(rules)], default=best)

    def slopes() -> Rules:
        chosen = best
        for layer in range(len(best[0])):
            tried = [(chosen[0], [slope if n == layer else s for n, s in enumerate(chosen[1])]) for slope in STEEP]
            chosen = better([chosen, *tried])
        return chosen

    best = slopes()
    best = better([(split(shares, budget, least), best[1]) for shares in SHARES if len(shares) == len(best[0])])
    return slopes()


def capped(rules: Rules, most: float) -> Rules:
    """The rules with no slope above `most`."""
    return rules[0], [min(slope, most) for slope in rules[1]]


class Searcher:
    """Measures rules of one model and writes a row for each.

    Args:
        arguments: of the command.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.begun = arguments, time.monotonic()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
        self.dense: Any = dense.to(self.device).eval()
        self.held, self.test = self._blocks("validation"), self._blocks("test-text")

    def _blocks(self, name: str) -> Tensor:
        most = self.arguments.blocks
        array = np.load(self.arguments.data / f"{name}.npy").astype(np.int64)
        chosen = array[:: max(1, len(array) // most)][:most, : self.arguments.length]
        return torch.from_numpy(chosen).to(self.device)

    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() - self.begun > self.arguments.seconds

    def losses(self, model: Any, blocks: Tensor) -> list[list[float]]:
        """The loss by position of blocks."""
        return loss_by_position(Form("", model), blocks, batch=1)

    def write(self, losses: list[list[float]], **row: Any) -> float:
        """Write one row; the mean loss."""
        full = {"study": "conversion search", "model": self.arguments.model.name, **row, "losses": losses}
        with open(self.arguments.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(full) + "\n")
        mean = float(np.nanmean(losses))
        print(f"{time.monotonic() - self.begun:6.1f} s  {mean:.4f} {row}", flush=True)
        return mean

    def converted(self, budget: int, ranks: str, local: int) -> tuple[Any, Rules]:
        """A converted model with these ranks, and the windows and slopes that the estimate chose for them."""
        state = self.arguments.state
        model = upcycled(self.dense, budget, local=local)
        load_predictors(model, torch.load(state / f"ranks-hidden-seed0{ranks}.pt", map_location=self.device))
        kept = json.loads((state / f"windows-{budget}-hidden-seed0-loss-learned-slopes{ranks}.json").read_text())
        ranked = model.config.ranked_layers
        return model, ([kept["windows"][i][0] for i in ranked], [kept["slopes"][i][0] for i in ranked])

    def search(self, budget: int, ranks: str, local: int) -> Rules:
        """Search on validation blocks, then measure on test blocks what the report names."""
        model, start = self.converted(budget, ranks, local)
        common = {"budget": budget, "ranks": ranks or "repeats", "local": local}

        def cost(rules: Rules, blocks: Tensor = self.held, part: str = "validation", rule: str = "tried") -> float:
            set_rules(model, *rules)
            found = self.losses(model, blocks)
            return self.write(found, rule=rule, part=part, windows=rules[0], slopes=rules[1], **common)

        best = descend(cost, start, budget, local + model.config.sinks, self.over)
        named = {"estimated": start, "no slopes": capped(start, 0.0), "slopes <= 4/8192": capped(start, 4 / 8192)}
        for rule, rules in {**named, "found": best}.items():
            cost(rules, self.test, "test", rule)
        return best

    def oracle(self, budget: int, ranks: str, target: str, start: Rules) -> None:
        """Search for ranks that know the later attention of the test blocks, on these."""
        model, _ = self.converted(budget, ranks, LOCAL)
        known = [_known(model, block)[target] for block in self.test.split(1)]

        def cost(rules: Rules) -> float:
            set_rules(model, *rules)
            found: list[list[float]] = []
            for block, each in zip(self.test.split(1), known, strict=True):
                with given_ranks(model, each):
                    found += self.losses(model, block)
            rule = f"oracle, {target}, tried"
            return self.write(found, rule=rule, part="test", windows=rules[0], slopes=rules[1], budget=budget)

        descend(cost, start, budget, LOCAL + model.config.sinks, self.over)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "state", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--budgets", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--ranks", nargs="*", default=["-ranks-on-facts"], help="ends of the names of ranks' files")
    parser.add_argument("--blocks", type=int, default=12, help="of each part")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--locals", type=int, nargs="*", default=[LOCAL, 32], help="numbers of newest keys")
    parser.add_argument("--oracles", nargs="*", default=["max"])
    parser.add_argument("--seconds", type=float, default=1e9)
    arguments = parser.parse_args()
    searcher = Searcher(arguments)
    for part, blocks in (("test", searcher.test), ("validation", searcher.held)):
        searcher.write(searcher.losses(searcher.dense, blocks), rule="dense", part=part)
    for budget in arguments.budgets:
        for ranks in arguments.ranks:
            found = [searcher.search(budget, ranks, local) for local in arguments.locals if not searcher.over()]
            for target in arguments.oracles if found else ():
                searcher.oracle(budget, ranks, target, found[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
