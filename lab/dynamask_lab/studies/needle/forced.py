"""Exact match without decoding: a greedy answer is exact where every token of it is the likeliest behind those before.

One pass over prompt and answer decides that for mixers without a cache, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dynamask.evaluation.retrieval import Haystack, RetrievalScore, make_example


@torch.no_grad()
def forced_scores(
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    *,
    tasks: Sequence[str],
    seed: int = 0,
    batch_size: int = 8,
    name: str = "model",
) -> list[RetrievalScore]:
    """Score as `evaluate_retrieval` does, on the same examples; `recall` is of the likeliest tokens.

    Args:
        model: a `DynamaskForCausalLM`.
        tokenizer, lengths, depths, samples, tasks, seed, name: see `evaluate_retrieval`.
        batch_size: examples read together.

    Returns:
        One score per task, length and depth, in that order.
    """
    haystack = Haystack(tokenizer, None, max_tokens=max(1 << 20, 2 * max(lengths)))
    found = []
    model.eval()
    for task in tasks:
        for length in lengths:
            cells = [(depth, sample) for depth in depths for sample in range(samples)]
            examples = [
                make_example(task, tokenizer, length, depth, f"{seed} {sample}", haystack=haystack)
                for depth, sample in cells
            ]
            exact, recall = dict.fromkeys(depths, 0), dict.fromkeys(depths, 0.0)
            for start in range(0, len(examples), batch_size):
                batch = examples[start : start + batch_size]
                for (depth, _), example, made in zip(
                    cells[start : start + batch_size], batch, _likeliest(model, batch), strict=True
                ):
                    exact[depth] += made == list(example.answer)
                    text = tokenizer.decode(made, skip_special_tokens=True).lower()
                    recall[depth] += sum(value.lower() in text for value in example.values) / len(example.values)
            found += [
                RetrievalScore(name, task, length, depth, exact[depth] / samples, recall[depth] / samples, samples)
                for depth in depths
            ]
    return found


def _likeliest(model: Any, examples: Sequence[Any]) -> list[list[int]]:
    """The likeliest token at each place of every answer. Rows are filled up behind their end, which none sees."""
    rows = [[*example.prompt, *example.answer] for example in examples]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=model.device)
    states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return [
        model.lm_head(states[place, len(example.prompt) - 1 : len(row) - 1]).argmax(-1).tolist()
        for place, (example, row) in enumerate(zip(examples, rows, strict=True))
    ]
