"""A conversation with a model whose cache carries over from turn to turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from dynamask.cache import BoundedLayer, cache_bytes
from dynamask.data.tokenizer import opening_tokens
from dynamask.errors import InvalidInputError
from dynamask.models.cache_argument import CACHE_NAME

_CHUNK = 512
"""Tokens that are read at once: between chunks a turn can be stopped."""


@dataclass
class Answer:
    """What one turn did.

    Attributes:
        text: the answer, without special tokens.
        read: tokens that were read for it: the new ones alone.
        made: tokens generated.
        seconds: that generating took, without the reading.
        stopped: whether the turn was stopped from outside.
    """

    text: str = ""
    read: int = 0
    made: int = 0
    seconds: float = 0.0
    stopped: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Return the rate of generating; 0 where nothing was generated."""
        return self.made / self.seconds if self.seconds else 0.0


@dataclass
class Conversation:
    """Turns over one cache: each turn reads the new tokens only.

    Args:
        model: a causal LM in evaluation mode; a bounded cache is used where the model decodes with one.
        tokenizer: its tokenizer. With a chat template, turns are put into it; without one the texts are continued,
            and the first one begins with the special tokens that the tokenizer puts before a text.
        system: message before the first turn; needs a chat template.
        max_new_tokens: of an answer, at most.
        temperature: 0 is greedy.
        top_p: sample among the likeliest tokens of this total probability.

    Attributes:
        ids: all tokens so far, generated ones included.
        cache: what the model has kept of them.
        read_again: how often the template rewrote earlier turns, so that the cache had to be filled anew.

    Raises:
        InvalidInputError: a system message without a chat template.
    """

    model: Any
    tokenizer: Any
    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.95
    ids: list[int] = field(default_factory=list, init=False)
    read_again: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if self.system is not None and not self.has_template:
            raise InvalidInputError("a system message needs a chat template, which this tokenizer lacks")
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {end for end in [*ends, self.tokenizer.eos_token_id] if end is not None}
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.messages: list[dict[str, str]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._restart_cache()

    def _restart_cache(self) -> None:
        make = getattr(self.model, "_new_cache", None)
        self.cache: Cache = DynamicCache() if make is None else make()
        self.ids = []
        self._text = ""  # what `ids` spell, as far as the template goes

    @property
    def cache_bytes(self) -> int:
        """Return the memory of the cache."""
        return cache_bytes(self.cache)

    @property
    def dense_bytes(self) -> int:
        """Return the memory of a cache that keeps all keys of the same tokens."""
        total = 0
        for layer in self.cache.layers:
            if isinstance(layer, BoundedLayer) and layer.is_initialized:
                key, value = layer.keys, layer.values
                width = key.shape[-1] * key.element_size() + value.shape[-1] * value.element_size()
                total += key.shape[0] * len(layer.windows) * layer.seen * width
            elif not isinstance(layer, BoundedLayer):
                held = (layer.keys, layer.values)
                total += sum(t.numel() * t.element_size() for t in held if t is not None)
        return total

    @torch.no_grad()
    def ask(
        self,
        message: str,
        write: Callable[[str], None] = lambda piece: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Answer a message.

        Args:
            message: of the user.
            write: called with each piece of the answer as soon as it is there.
            stop: asked before every step; True ends the answer, and what was generated until then stays in the
                conversation.

        Returns:
            The answer. A turn that is stopped before its first token leaves the message in the conversation.

        Raises:
            InvalidInputError: a message without a token.
        """
        new = self._new_tokens(message)
        if not new:
            raise InvalidInputError("the message is empty: give at least one character")
        self.ids += new
        answer = Answer()
        logits = self._read(answer, stop)
        made: list[int] = []
        started = time.perf_counter()
        while logits is not None and len(made) < self.max_new_tokens:
            token = self._sample(logits)
            made.append(token)
            self.ids.append(token)
            answer.made, answer.seconds = len(made), time.perf_counter() - started
            if token in self._ends:
                break
            text = self._decode(made)
            if len(text) > len(answer.text) and not text.endswith("\ufffd"):
                piece, answer.text = text[len(answer.text) :], text
                write(piece)
            if stop():
                answer.stopped = True
                break
            if len(made) < self.max_new_tokens:
                logits = self._forward([token])
        text = self._decode(made)
        if len(text) > len(answer.text):
            write(text[len(answer.text) :])
            answer.text = text
        answer.seconds = time.perf_counter() - started
        self._text += self._decode(made, special=True)
        if self.has_template:
            self.messages.append({"role": "assistant", "content": answer.text})
        return answer

    def _new_tokens(self, message: str) -> list[int]:
        """The tokens that come behind those of the conversation so far."""
        if not self.has_template:
            if not self.ids:
                return [*opening_tokens(self.tokenizer, message), *self._encode(message)]
            return self._encode(f"\n{message}")
        before = [*self.messages]
        self.messages.append({"role": "user", "content": message})
        whole = self._render(self.messages, prompt=True)
        if whole.startswith(self._text):
            text = whole[len(self._text) :]
        else:
            text = self._after_answer(whole, self._render(before, prompt=False)) or whole
            if text == whole:  # the template rewrites earlier turns, which a bounded cache cannot take back
                self.read_again += 1
                self._restart_cache()
        self._text += text
        return self._encode(text)

    def _after_answer(self, whole: str, before: str) -> str | None:
        """What follows the last answer as it stands in the cache, where the template changes only the answer itself.

        A template that trims answers is such a one, and an answer that was stopped has no end of turn yet.
        """
        if not self.ids or not whole.startswith(before):
            return None
        ends = [self.tokenizer.decode([end]) for end in self._ends]
        found = max((before.rfind(end) for end in ends), default=-1)
        end = next((end for end in ends if found >= 0 and before.startswith(end, found)), None)
        if end is None:
            return None
        ended = self.ids[-1] in self._ends
        return before[found + len(end) if ended else found :] + whole[len(before) :]

    def _render(self, messages: list[dict[str, str]], *, prompt: bool) -> str:
        if not messages:
            return ""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _decode(self, ids: list[int], *, special: bool = False) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    def _read(self, answer: Answer, stop: Callable[[], bool]) -> Tensor | None:
        """Read what the cache has not seen; None where the turn was stopped."""
        logits = None
        while (seen := int(self.cache.get_seq_length())) < len(self.ids):
            if stop():
                answer.stopped = True
                return None
            chunk = self.ids[seen : seen + _CHUNK]
            logits = self._forward(chunk)
            answer.read += len(chunk)
        return logits

    def _forward(self, ids: list[int]) -> Tensor:
        """(V,) float32 logits behind the given tokens, which the cache takes in."""
        tokens = torch.tensor([ids], device=self.model.device)
        logits = self.model(tokens, use_cache=True, logits_to_keep=1, **{CACHE_NAME: self.cache}).logits
        return logits[0, -1].float()  # type: ignore[no-any-return]

    def _sample(self, logits: Tensor) -> int:
        if not self.temperature:
            return int(logits.argmax())
        values, order = (logits / self.temperature).softmax(-1).sort(descending=True)
        kept = values.cumsum(-1) - values < self.top_p  # the likeliest always
        return int(order[torch.multinomial(values * kept, 1)])
