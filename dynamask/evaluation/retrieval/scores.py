"""Accuracy of a model's greedy answers by task, length and depth, and the JSON lines of these figures."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dynamask.errors import InvalidInputError, UsageError
from dynamask.evaluation.retrieval.haystack import Haystack
from dynamask.evaluation.retrieval.tasks import TASKS, RetrievalExample, check_task, make_example

_Cell = tuple[str, int, float]


@dataclass(frozen=True)
class RetrievalScore:
    """The samples of one task at one length and depth.

    Attributes:
        model: a name for pictures and tables.
        task, length, depth: as given to `evaluate_retrieval`.
        exact: share of samples whose first generated tokens are the answer's, all of them.
        recall: mean share of an answer's values that occur in the generated text: RULER's string_match_all.
        samples: how many.
    """

    model: str
    task: str
    length: int
    depth: float
    exact: float
    recall: float
    samples: int


@torch.no_grad()
def evaluate_retrieval(
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    documents: Iterable[str] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    extra_tokens: int = 0,
    name: str = "model",
    progress: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
) -> list[RetrievalScore]:
    """Evaluate a causal LM, decoding greedily from the cache that `generate()` would use (bounded for dma and swa).

    Args:
        model: has `generate`, `device`, `eval` and `train`, as transformers models do.
        tokenizer: its tokenizer.
        lengths: tokens of prompt and answer together.
        depths: shares of the haystack, 0 to 1.
        samples: examples per task, length and depth; the same for every model with this tokenizer and seed.
        tasks: names in `TASKS`.
        documents: texts to hide the needles in; None: RULER's noise.
        seed: of all examples.
        batch_size: prompts per call of `generate`; only prompts of one length are batched, so nothing is padded.
        extra_tokens: generated beyond the answer's own; they count for `recall` alone. A model that was not trained
            on these formats may need some room for its own words.
        name: value of `RetrievalScore.model`.
        progress: wraps the batches, given a description.

    Returns:
        One score per task, length and depth, in that order.

    Raises:
        InvalidInputError: whatever `make_example` refuses, or no samples, lengths, depths or tasks.
    """
    if samples < 1 or batch_size < 1 or extra_tokens < 0:
        raise InvalidInputError(
            f"samples and batch_size must be at least 1 and extra_tokens at least 0; got {samples}, {batch_size} and "
            f"{extra_tokens}"
        )
    if not (lengths and depths and tasks):
        raise InvalidInputError("nothing to evaluate: give at least one length, one depth and one task")
    for task in tasks:
        check_task(task)
    haystack = Haystack(tokenizer, documents, max_tokens=max(1 << 20, 2 * max(lengths)))
    cells: list[_Cell] = [(task, length, depth) for task in tasks for length in lengths for depth in depths]
    # Prompts of one length together: no padding, which would cost the faster unpadded attention.
    alike: dict[int, list[tuple[_Cell, RetrievalExample]]] = defaultdict(list)
    for cell in dict.fromkeys(cells):
        for sample in range(samples):
            example = make_example(*_arguments(cell, tokenizer), f"{seed} {sample}", haystack=haystack)
            alike[len(example.prompt)].append((cell, example))
    batches = [group[i : i + batch_size] for group in alike.values() for i in range(0, len(group), batch_size)]

    exact: dict[_Cell, int] = defaultdict(int)
    recall: dict[_Cell, float] = defaultdict(float)
    was_training = model.training
    model.eval()
    try:
        for batch in progress(batches, "retrieving") if progress else batches:
            answers = _generate(model, tokenizer, [example for _, example in batch], extra_tokens)
            for (cell, example), made in zip(batch, answers, strict=True):
                exact[cell] += made[: len(example.answer)] == example.answer
                said = tokenizer.decode(made, skip_special_tokens=True).lower()
                recall[cell] += sum(value.lower() in said for value in example.values) / len(example.values)
    finally:
        model.train(was_training)
    return [RetrievalScore(name, *cell, exact[cell] / samples, recall[cell] / samples, samples) for cell in cells]


def _arguments(cell: _Cell, tokenizer: Any) -> tuple[str, Any, int, float]:
    task, length, depth = cell
    return task, tokenizer, length, depth


def _generate(model: Any, tokenizer: Any, examples: list[RetrievalExample], extra_tokens: int) -> list[list[int]]:
    """Generate the continuation of each prompt, all prompts being of one length."""
    prompts = torch.tensor([example.prompt for example in examples], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=max(len(example.answer) for example in examples) + extra_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
    )
    return [
        row[: len(example.answer) + extra_tokens]
        for row, example in zip(output[:, prompts.shape[1] :].tolist(), examples, strict=True)
    ]


def write_scores(scores: Iterable[RetrievalScore], file: str | Path) -> Path:
    """Write scores as JSON lines."""
    Path(file).write_text("".join(json.dumps(asdict(score)) + "\n" for score in scores), encoding="utf-8")
    return Path(file)


def read_scores(file: str | Path) -> list[RetrievalScore]:
    """Read what `write_scores` wrote.

    Raises:
        UsageError: no such file, no scores in it, or a line that is none (named by its number).
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the scores {file}: {error}") from error
    scores = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                scores.append(RetrievalScore(**json.loads(line)))
            except (json.JSONDecodeError, TypeError) as error:
                raise UsageError(f"{file}, line {number} is no retrieval score: {error}") from error
    if not scores:
        raise UsageError(f"{file} holds no retrieval scores: write them with evaluate_retrieval and write_scores")
    return scores
