"""What the study measures: loss by position, loss behind a compressed context, answers by generation, benchmarks.

Every measure takes a `Form`: a model, the cache it decodes with, and what happens to that cache between the context
and the question. All of them return one figure per document or example, so that intervals can be computed later.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from dynamask.cache import cache_bytes
from dynamask_lab.studies.conversion.tasks import GENERATED, Example, score

BIN = 512
"""Positions that share one figure of the loss by position."""


def _nothing(length: int) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass
class Form:
    """One way to run the model.

    Attributes:
        name: of the row in the report.
        model: a causal LM of transformers.
        compress: given the length of a context, what is active while that context is read (a press, for the peers).
        settings: what else tells its rows apart: budget, seed.
    """

    name: str
    model: Any
    compress: Callable[[int], AbstractContextManager[Any]] = _nothing
    settings: dict[str, Any] = field(default_factory=dict)

    def new_cache(self) -> Any:
        """An empty cache of the kind the model decodes with."""
        return self.model._new_cache() if hasattr(self.model, "_new_cache") else DynamicCache()

    def read(self, context: Tensor) -> tuple[Any, Tensor]:
        """Read contexts (B, N) into a new cache.

        Returns:
            The cache, and the logits (B, 1, V) behind the last token.
        """
        cache = self.new_cache()
        with self.compress(context.shape[1]):
            output = self.model(input_ids=context, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache, output.logits

    def go_on(self, cache: Any, tokens: Tensor, position: int, keep: int = 1) -> Tensor:
        """Read tokens (B, n) behind a cache that stands at `position`; the logits of the last `keep`."""
        positions = torch.arange(position, position + tokens.shape[1], device=tokens.device)[None]
        output = self.model(
            input_ids=tokens,
            past_key_values=cache,
            use_cache=True,
            position_ids=positions.expand(tokens.shape[0], -1),
            logits_to_keep=keep,
        )
        return output.logits


@torch.no_grad()
def loss_by_position(form: Form, blocks: Tensor, batch: int = 4) -> list[list[float]]:
    """Mean loss in nats of each `BIN` positions of each block (n, N)."""
    results: list[list[float]] = []
    for part in blocks.split(batch):
        losses = token_losses(form.model, part)
        padded = F.pad(losses, (1, 0), value=float("nan"))  # the first token is not predicted
        results += padded.view(len(part), -1, BIN).nanmean(2).tolist()
    return results


@torch.no_grad()
def divergence_by_position(form: Form, dense: Any, blocks: Tensor, batch: int = 4) -> list[list[float]]:
    """Mean KL(dense || form) in nats of each `BIN` positions of each block (n, N)."""
    results: list[list[float]] = []
    for part in blocks.split(batch):
        wanted, given = (
            model.lm_head(model.model(input_ids=part, use_cache=False).last_hidden_state).float().log_softmax(-1)
            for model in (dense, form.model)
        )
        found = (wanted.exp() * (wanted - given)).sum(-1)
        results += found.view(len(part), -1, BIN).mean(2).tolist()
    return results


def token_losses(model: Any, tokens: Tensor, chunk: int = 2048) -> Tensor:
    """The loss of each token from its prefix, float32 (B, N - 1); logits exist for `chunk` positions at a time."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    losses = []
    for row, target in zip(hidden, tokens, strict=True):
        for first in range(0, len(target) - 1, chunk):
            last = min(first + chunk, len(target) - 1)
            logits = model.lm_head(row[first:last]).float()
            losses.append(F.cross_entropy(logits, target[first + 1 : last + 1], reduction="none"))
    return torch.cat(losses).view(len(tokens), -1)


@torch.no_grad()
def continuation_loss(form: Form, blocks: Tensor, context: int, batch: int = 8) -> list[float]:
    """Mean loss of what follows the first `context` tokens of each block, read from the cache that holds these."""
    results: list[float] = []
    for part in blocks.split(batch):
        cache, before = form.read(part[:, :context])
        rest = part[:, context:]
        logits = torch.cat([before, form.go_on(cache, rest[:, :-1], context, keep=rest.shape[1] - 1)], dim=1)
        losses = F.cross_entropy(logits.float().flatten(0, 1), rest.flatten(), reduction="none")
        results += losses.view(rest.shape).mean(1).tolist()
    return results


@torch.no_grad()
def answers(
    form: Form, tokenizer: Any, examples: Sequence[Example], texts: list[str] | None = None
) -> list[list[float]]:
    """The score of each question of each example of one task and length, all questions put to the same cache.

    What the model generated is added to `texts`.
    """
    device = form.model.device
    task = examples[0].task
    context = torch.tensor([example.context for example in examples], device=device)
    cache, _ = form.read(context)
    scores: list[list[float]] = [[] for _ in examples]
    many = len(examples[0].questions) > 1
    for number in range(len(examples[0].questions)):
        question = torch.tensor([example.questions[number] for example in examples], device=device)
        own = copy.deepcopy(cache) if many else cache
        made = _decode(form, own, question, context.shape[1], GENERATED[task])
        for example, row, found in zip(examples, made, scores, strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            found.append(score(text, example.answers[number]))
            if texts is not None:
                texts.append(text)
    return scores


def _decode(form: Form, cache: Any, question: Tensor, position: int, count: int) -> list[list[int]]:
    """Greedy continuations of at most `count` tokens, each cut at its end-of-text token."""
    ends = form.model.generation_config.eos_token_id
    ends = torch.tensor([ends] if isinstance(ends, int) else ends, device=question.device)
    logits = form.go_on(cache, question, position)
    position += question.shape[1]
    made: list[Tensor] = []
    done = torch.zeros(len(question), dtype=torch.bool, device=question.device)
    for step in range(count):
        token = logits[:, -1].argmax(-1, keepdim=True)
        made.append(token)
        done |= torch.isin(token[:, 0], ends)
        if step + 1 == count or (step % 8 == 7 and bool(done.all())):
            break
        logits = form.go_on(cache, token, position)
        position += 1
    rows = torch.cat(made, 1).tolist()
    stops = set(ends.tolist())
    return [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


@torch.no_grad()
def speed(form: Form, context: Tensor, steps: int = 64) -> dict[str, float]:
    """Bytes of the cache behind a context (B, N), seconds to read it, and decoded tokens per second."""
    form.read(context[:, :256])  # compiles and allocates
    _synchronise(context.device)
    start = time.perf_counter()
    cache, logits = form.read(context)
    _synchronise(context.device)
    read = time.perf_counter() - start
    size = cache_bytes(cache)
    position = context.shape[1]
    token = logits[:, -1].argmax(-1, keepdim=True)
    for warm in (True, False):
        start = time.perf_counter()
        for _ in range(8 if warm else steps):
            token = form.go_on(cache, token, position)[:, -1].argmax(-1, keepdim=True)
            position += 1
        _synchronise(context.device)
        seconds = time.perf_counter() - start
    return {
        "cache_bytes": size / len(context),
        "read_tokens_per_second": context.numel() / read,
        "decoded_tokens_per_second": steps * len(context) / seconds,
    }


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Choice:
    """One question of a benchmark.

    Attributes:
        prompts, endings: one per choice, as text; the ending's likelihood is the choice's score.
        gold: index of the right choice. A single choice is right where greedy decoding gives its ending.
    """

    prompts: list[str]
    endings: list[str]
    gold: int


BENCHMARKS = (
    "piqa",
    "arc_easy",
    "arc_challenge",
    "openbook_qa",
    "winogrande",
    "boolq",
    "copa",
    "siqa",
    "lambada_openai",
)
_DELIMITERS = {
    "piqa": "Answer: ",
    "arc_easy": "\nAnswer: ",
    "arc_challenge": "\nAnswer: ",
    "boolq": "\nAnswer: ",
}


def read_benchmark(folder: Path, name: str, limit: int | None = None) -> list[Choice]:
    """Read `folder / NAME.jsonl`, in the form of mosaicml/llm-foundry's evaluation data."""
    made = []
    with open(folder / f"{name}.jsonl", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if "context_options" in row:
                endings = [" " + row["continuation"]] * len(row["context_options"])
                made.append(Choice(row["context_options"], endings, row["gold"]))
            elif "continuation" in row:
                made.append(Choice([row["context"]], [" " + row["continuation"].strip()], 0))
            else:
                prompt = row["query"].rstrip(" ") + _DELIMITERS.get(name, " ")
                # The space between belongs to the ending, as the tokenizer writes it.
                prompt, space = prompt.rstrip(" "), " "
                made.append(Choice([prompt] * len(row["choices"]), [space + c for c in row["choices"]], row["gold"]))
            if limit is not None and len(made) == limit:
                break
    return made


@torch.no_grad()
def benchmark(form: Form, tokenizer: Any, choices: Sequence[Choice], tokens: int = 32768) -> dict[str, list[int]]:
    """Which questions are answered right, 0 or 1 each.

    Returns:
        "acc" by the likelihood of the ending, "acc_norm" by likelihood per byte. Both are exact match where a question
        has a single choice.
    """
    device = form.model.device
    begin = [tokenizer.bos_token_id] if tokenizer("")["input_ids"] else []
    pieces: list[tuple[int, int, list[int], int]] = []
    for index, choice in enumerate(choices):
        for number, (prompt, ending) in enumerate(zip(choice.prompts, choice.endings, strict=True)):
            first = begin + tokenizer(prompt, add_special_tokens=False)["input_ids"]
            last = tokenizer(ending, add_special_tokens=False)["input_ids"]
            pieces.append((index, number, first + last, len(last)))
    pieces.sort(key=lambda piece: len(piece[2]))
    likelihood: dict[tuple[int, int], tuple[float, bool]] = {}
    for part in _by_tokens(pieces, tokens):
        longest = max(len(ids) for _, _, ids, _ in part)
        # Padding stands on the right, where no token of the text sees it.
        rows = torch.tensor([ids + [0] * (longest - len(ids)) for _, _, ids, _ in part], device=device)
        hidden = form.model.model(input_ids=rows, use_cache=False).last_hidden_state
        for (index, number, ids, size), row, target in zip(part, hidden, rows, strict=True):
            logits = form.model.lm_head(row[len(ids) - size - 1 : len(ids) - 1]).float()
            wanted = target[len(ids) - size : len(ids)]
            total = -F.cross_entropy(logits, wanted, reduction="sum")
            likelihood[index, number] = (float(total), bool((logits.argmax(-1) == wanted).all()))
    result: dict[str, list[int]] = {"acc": [], "acc_norm": []}
    for index, choice in enumerate(choices):
        found = [likelihood[index, number] for number in range(len(choice.endings))]
        if len(found) == 1:
            right = normed = found[0][1]
        else:
            sums = [total for total, _ in found]
            means = [total / len(end.encode()) for (total, _), end in zip(found, choice.endings, strict=True)]
            right = sums.index(max(sums)) == choice.gold
            normed = means.index(max(means)) == choice.gold
        result["acc"].append(int(right))
        result["acc_norm"].append(int(normed))
    return result


def _by_tokens(pieces: Sequence[Any], tokens: int) -> Iterator[list[Any]]:
    """Runs of pieces, sorted by length, that hold at most that many tokens once padded."""
    numbered, run, longest = [], 0, 0
    number = 0
    for piece in pieces:
        longest = max(longest, len(piece[2]))
        run += 1
        if run * longest > tokens and run > 1:
            number, run, longest = number + 1, 1, len(piece[2])
        numbered.append((number, piece))
    for _, group in groupby(numbered, key=lambda item: item[0]):
        yield [piece for _, piece in group]
