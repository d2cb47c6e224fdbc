"""A stand-in for a language model that answers by reading the prompt, and one that never does."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn


def solve(text: str) -> str:
    """The answer of any task's prompt, from its text alone."""
    if "pass key" in text:
        return " " + re.findall(r"pass key is (\d+)", text)[0]
    if "VAR " in text:
        question = re.findall(r"assigned the value (\d+)", text)[-1]
        held: list[str] = []
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            if source in (question, *held):
                held.append(name)
        return " " + " ".join(held)
    asked = re.findall(r"special magic numbers? for (.*?) mentioned", text)[-1]
    keys = asked.replace(", and ", ", ").split(", ")
    found = [v for k, v in re.findall(r"magic numbers for (\S+) is: (\d+)\.", text) if k in keys]
    return " " + (found[0] if len(found) == 1 else ", ".join(found[:-1]) + ", and " + found[-1])


class Solver(nn.Module):
    """`generate` as transformers models have it; `right` decides from the prompt whether to answer."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, right: Any = lambda text: True) -> None:
        super().__init__()
        self.tokenizer, self.right, self.lengths = tokenizer, right, []

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        assert bool(attention_mask.all())
        assert options["do_sample"] is False
        assert not self.training
        rows = []
        for prompt in input_ids.tolist():
            text = self.tokenizer.decode(prompt)
            made = self._continue(solve(text) if self.right(text) else " nothing like it")[:max_new_tokens]
            rows.append(prompt + made + [options["pad_token_id"]] * (max_new_tokens - len(made)))
            self.lengths.append(len(prompt))
        return torch.tensor(rows)

    def _continue(self, text: str) -> list[int]:
        """The tokens of a text that does not stand at a beginning."""
        before, whole = (self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("is", "is" + text))
        return whole[len(before) :]
