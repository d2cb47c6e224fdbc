"""What a trained mask does: how long keys live, which live long, how far back heads read, and whether it matters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamask.data import documents
from dynamask.errors import InvalidInputError, UsageError
from dynamask.mixers import DynamicMaskGate, dma
from dynamask.ops.expiry import key_expiry
from dynamask_lab.legacy import OldGate
from dynamask_lab.legacy import mixers as old_mixers
from dynamask_lab.masks.token_kinds import KINDS, token_kinds

QUANTILES = (0.5, 0.9, 0.99)
_QUERIES = 256  # rows of attention weights that exist at a time
_SAMPLE_HEADS = 12
_SAMPLE_LENGTH = 512
_OPENING = 4  # tokens that count as a text's first ones: where attention sinks lie


@dataclass(frozen=True)
class _Call:
    """What one layer gave the operator."""

    query: Tensor
    key: Tensor
    scores: Tensor
    expiry: Tensor
    window: Tensor
    """(G, 1) keys that each head sees at most."""
    scale: float


@contextlib.contextmanager
def _attention(replacement: Callable[..., Tensor]) -> Iterator[None]:
    """Every dynamic mask layer, of dynamask's models and of converted ones, calls this instead of the operator.

    The one seam through which all of them pass with projected, rotated heads; hooks on modules would differ by
    architecture.
    """
    original = dma.attend
    for module in (dma, old_mixers):
        module.attend = replacement  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in (dma, old_mixers):
            module.attend = original  # type: ignore[attr-defined]


def _option(config: Any, name: str, default: Any) -> Any:
    """An option of dynamask 0.1's mixers, or the default for today's."""
    return (getattr(config, "mixer_options", None) or {}).get(name, default)


def mask_texts(run: str | Path, tokenizer: Any, data: Sequence[str] | None, length: int, count: int) -> list[list[int]]:
    """Beginnings of documents, as token ids, for `measure_masks`.

    Args:
        run: folder of the run.
        tokenizer: the model's.
        data: sources, see `dynamask.data.documents`; None: the run's held-out split.
        length: tokens of each; shorter documents are passed over.
        count: at most so many, spread evenly over the data.

    Raises:
        UsageError: no document that long, or no held-out split there.
    """
    if data:
        streams: Iterable[list[int]] = (
            list(
                tokenizer(document.text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
                    "input_ids"
                ]
            )
            for document in documents(data)
        )
    else:
        from dynamask.training import open_corpus

        corpus = open_corpus(run)
        shards = corpus.tokens("validation")
        whole = np.concatenate(shards) if shards else np.zeros(0, dtype=np.int64)
        starts = corpus.document_starts("validation")
        streams = (part.tolist() for part in np.split(whole, starts[1:]))
    found = [stream[:length] for stream in streams if len(stream) >= length]
    if not found:
        raise UsageError(
            f"no document of the data has {length} tokens: give a shorter length (at least four windows), or --data "
            "with longer texts"
        )
    return [found[index * len(found) // min(count, len(found))] for index in range(min(count, len(found)))]


@torch.no_grad()
def measure_masks(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Sequence[int]],
    *,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
) -> dict[str, Any]:
    """Figures about the masks of a causal LM with dynamic mask attention.

    Args:
        model: the model, dynamask's or a converted one.
        tokenizer: its tokenizer.
        texts: token ids, one document each, all of one length N, at least four windows.
        progress: wraps the texts, given a description.

    Returns:
        Plain JSON. Nested lists (L, G) are by layer and key/value head, (L, H) by layer and query head.

        - "model", "length", "texts".
        - "gate": A (L, G) and the learned recency slope (L, G), 0 without one.
        - "loss": cross-entropy in nats per token, as trained; and under controls that leave the weights alone: the
          newest `window` keys instead of the chosen ones ("sliding"), chosen keys without their scores in the logits
          ("no_bias"), both ("gates_off"); each with its difference from "trained" and that difference's standard
          error over texts. Weights fit the mask they were trained with, so a control's loss is an upper bound for a
          model trained that way: whether choosing *pays* is for the ablation to say.
        - "kept_beyond_window": (L, G) share of visible (query, key) pairs further apart than a sliding window reaches.
        - "lifetimes": "edges", and (L, G) shares of keys whose lifetime is at least that edge and below the next, of
          the keys of the text's first half, whose lifetimes are known up to N/2, the last edge.
        - "kinds": "names" (`KINDS`, then two that overlap with them), "total" counts, and "long_lived" (L, G) counts
          of keys that live at least "lifetime" = 2·window queries, of the keys old enough to have done so.
        - "distance": between query and key, weighted by attention, of the queries of the second half: (L, H) of
          quantiles as trained ("own") and under the newest `window` keys ("sliding"), and the share of attention
          beyond the window's reach.
        - "threshold": at "positions", the least score among contested keys that are kept, and the mean score of the
          prefix, (L, G), both less the recency slope times the position.
        - "sample": a text's "pieces", and the "expiry" of its keys in the "heads" (layer, head) that keep most
          beyond the window.

    Raises:
        InvalidInputError: no dynamic mask attention in the model, no texts, texts of different lengths or too short.
    """
    gates = [module for module in model.modules() if isinstance(module, (DynamicMaskGate, OldGate))]
    if not gates:
        raise InvalidInputError("the model has no dynamic mask attention, so there is no mask to measure")
    lengths = {len(text) for text in texts}
    window = _option(model.config, "window", round(model.config.budget or 0))
    if len(lengths) != 1 or (length := lengths.pop()) < 4 * window:
        raise InvalidInputError(
            f"measuring masks takes texts of one length, at least four windows ({4 * window} tokens), so that there is "
            f"something to choose from; got {len(texts)} texts of lengths {sorted({len(text) for text in texts})}"
        )
    slopes = torch.stack([_slope(gate) for gate in gates])
    was_training = model.training
    model.eval()
    sums = _Sums(len(gates), model.config, length, window)
    losses: dict[str, list[float]] = {}
    try:
        for text in progress(texts, "measuring masks") if progress else texts:
            ids = torch.tensor([list(text)], device=model.device)
            calls: list[_Call] = []
            with _attention(_recording(calls)):
                trained = _loss(model, ids)
            losses.setdefault("trained", []).append(trained)
            for control in ("sliding", "no_bias", "gates_off"):
                with _attention(_control(control, slopes)):
                    losses.setdefault(control, []).append(_loss(model, ids))
            pieces = [tokenizer.decode([token]) for token in text]
            sums.add(calls, slopes.cpu(), list(text), pieces, set(tokenizer.all_special_ids))
    finally:
        model.train(was_training)
    return {
        "model": _description(model, gates),
        "length": length,
        "texts": len(texts),
        "gate": {"a": _plain(torch.stack([gate.gate.float() for gate in gates])), "recency": _plain(slopes)},
        "loss": _compared(losses),
        **sums.result(),
    }


def _slope(gate: DynamicMaskGate | OldGate) -> Tensor:
    """(G,) learned recency per position."""
    if isinstance(gate, OldGate) and gate.recency:
        return gate.log_recency.float().exp()
    return torch.zeros_like(gate.gate, dtype=torch.float32)


def _description(model: Any, gates: Sequence[DynamicMaskGate | OldGate]) -> dict[str, Any]:
    config = model.config
    return {
        "type": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(gates),
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "window": _option(config, "window", round(config.budget or 0)),
        "local": _option(config, "local", config.local),
        "recency": getattr(gates[0], "recency", 0.0),
        "score_form": _option(config, "score_form", "exp"),
    }


def _loss(model: Any, ids: Tensor) -> float:
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return float(F.cross_entropy(logits, ids[0, 1:]))


def _recording(calls: list[_Call]) -> Callable[..., Tensor]:
    """The operator, remembering its arguments."""
    original = dma.attend

    def attend(query: Tensor, key: Tensor, value: Tensor, expiry: Tensor, **rest: Any) -> Tensor:
        scale = rest.get("scale") or query.shape[-1] ** -0.5
        window = torch.tensor(rest["max_live"]).view(-1, 1).expand(key.shape[1], 1)
        calls.append(_Call(query, key, rest["bias"], expiry, window, scale))
        return original(query, key, value, expiry, **rest)

    return attend


def _control(name: str, slopes: Tensor) -> Callable[..., Tensor]:
    """The operator with the choice, the scores' part in the logits, or both taken away. One instance per forward."""
    original = dma.attend
    layer = iter(slopes)

    def attend(query: Tensor, key: Tensor, value: Tensor, expiry: Tensor, **rest: Any) -> Tensor:
        scores, window = rest["bias"], rest["max_live"]
        recency = next(layer)[:, None] * torch.arange(scores.shape[-1], device=scores.device)
        if name in ("sliding", "gates_off"):
            expiry = key_expiry(torch.zeros_like(scores), window)
        if name in ("no_bias", "gates_off"):
            rest["bias"] = recency.expand_as(scores).to(scores.dtype)
        return original(query, key, value, expiry, **rest)

    return attend


def _compared(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Means, and each control's paired difference from the trained model's."""
    trained = torch.tensor(losses["trained"], dtype=torch.float64)
    found: dict[str, Any] = {"trained": float(trained.mean())}
    for name, values in losses.items():
        if name != "trained":
            difference = torch.tensor(values, dtype=torch.float64) - trained
            error = float(difference.std() / math.sqrt(len(values))) if len(values) > 1 else None
            mean = float(difference.mean())
            found[name] = {"loss": found["trained"] + mean, "difference": mean, "standard_error": error}
    return found


class _Sums:
    """Sums over texts, layer by layer."""

    def __init__(self, layers: int, config: Any, length: int, window: int) -> None:
        groups, heads = config.num_key_value_heads, config.num_attention_heads
        self.length, self.window, self.half = length, window, length // 2
        local, common = _option(config, "local", config.local), _option(config, "window", None)
        own = [max(windows) for windows in config.head_windows[:layers]]
        self.locals = [local if common is None else local * each // common for each in own]
        self.edges = [0, *(2**k for k in range(int(math.log2(self.half)) + 1) if 2**k < self.half), self.half]
        self.long = 2 * window
        self.lifetimes = torch.zeros(layers, groups, len(self.edges))
        self.kept = torch.zeros(layers, groups, 2, dtype=torch.float64)  # all visible pairs, those beyond the window
        self.kinds = torch.zeros(layers, groups, len(KINDS) + 2)
        self.totals = torch.zeros(len(KINDS) + 2)
        self.distance = torch.zeros(2, layers, heads, length, dtype=torch.float64)  # as trained, sliding
        self.positions = sorted({round(window * (length - 1) ** (k / 31) / window ** (k / 31)) for k in range(32)})
        self.threshold = torch.zeros(2, layers, groups, len(self.positions))
        self.sample: tuple[list[str], Tensor] | None = None
        self.texts = 0

    def add(
        self, calls: list[_Call], slopes: Tensor, text: list[int], pieces: list[str], special_ids: set[int]
    ) -> None:
        """One text's layers."""
        self.texts += 1
        features = _features(text, pieces, special_ids)
        old_enough = torch.arange(self.length) < self.length - self.long
        self.totals += features[:, old_enough].sum(-1)
        expiries = []
        for layer, call in enumerate(calls):
            expiry = call.expiry[0].cpu().long()
            expiries.append(expiry)
            lifetime = expiry - torch.arange(self.length)
            first = lifetime[:, : self.half].clamp(max=self.half)
            places = torch.bucketize(first, torch.tensor(self.edges), right=True) - 1
            self.lifetimes[layer].scatter_add_(1, places, torch.ones_like(places, dtype=torch.float32))
            self.kept[layer, :, 0] += lifetime.sum(-1)
            self.kept[layer, :, 1] += (lifetime - call.window).clamp(min=0).sum(-1)
            long_lived = ((lifetime >= self.long) & old_enough).float()
            self.kinds[layer] += long_lived @ features.T
            self._read(layer, call, expiry)
            self._thresholds(layer, call, expiry, slopes[layer])
        if self.sample is None:
            self.sample = pieces[:_SAMPLE_LENGTH], torch.stack(expiries)[..., :_SAMPLE_LENGTH]

    def _read(self, layer: int, call: _Call, expiry: Tensor) -> None:
        """Attention by distance, of the queries of the second half."""
        query, key, scores = (t[0].float() for t in (call.query, call.key, call.scores))
        repeat = query.shape[0] // key.shape[0]
        key, bias = key.repeat_interleave(repeat, 0), scores.repeat_interleave(repeat, 0)
        sliding = (torch.arange(self.length) + call.window).repeat_interleave(repeat, 0)
        for begin in range(self.half, self.length, _QUERIES):
            row = torch.arange(begin, min(begin + _QUERIES, self.length))
            gap = row[:, None] - torch.arange(self.length)
            logits = call.scale * query[:, row] @ key.transpose(1, 2) + bias[:, None]
            for number, alive_until in enumerate((expiry.repeat_interleave(repeat, 0), sliding)):
                seen = (gap >= 0) & (row[:, None] < alive_until[:, None])
                weights = logits.masked_fill(~seen.to(logits.device), -math.inf).softmax(-1).cpu().double()
                self.distance[number, layer].index_add_(1, gap.clamp(min=0).flatten(), weights.flatten(1))

    def _thresholds(self, layer: int, call: _Call, expiry: Tensor, slope: Tensor) -> None:
        scores = call.scores[0].float().cpu()
        for number, place in enumerate(self.positions):
            shift = slope * place
            contested = torch.arange(self.length) <= place - self.locals[layer]
            kept = contested & (expiry > place)
            least = scores.masked_fill(~kept, math.inf).amin(-1)
            self.threshold[0, layer, :, number] += least - shift
            self.threshold[1, layer, :, number] += scores[:, : place + 1].mean(-1) - shift

    def result(self) -> dict[str, Any]:
        """The part of `measure_masks`' answer that is sums."""
        assert self.sample is not None
        beyond = self.kept[..., 1] / self.kept[..., 0]
        pieces, expiry = self.sample
        groups = expiry.shape[1]
        heads = sorted(beyond.flatten().argsort(descending=True, stable=True)[:_SAMPLE_HEADS].tolist())
        own, sliding = self.distance / self.distance.sum(-1, keepdim=True)
        return {
            "kept_beyond_window": _plain(beyond),
            "lifetimes": {
                "edges": self.edges,
                "share": _plain(self.lifetimes / self.lifetimes.sum(-1, keepdim=True)),
            },
            "kinds": {
                "names": [*KINDS, f"first {_OPENING} of the text", "first occurrence"],
                "lifetime": self.long,
                "total": self.totals.int().tolist(),
                "long_lived": self.kinds.int().tolist(),
            },
            "distance": {
                "quantiles": list(QUANTILES),
                "own": _quantiles(own),
                "sliding": _quantiles(sliding),
                "beyond_window": _plain(own[..., self.window :].sum(-1)),
            },
            "threshold": {
                "positions": self.positions,
                "threshold": _plain(self.threshold[0] / self.texts),
                "mean": _plain(self.threshold[1] / self.texts),
            },
            "sample": {
                "pieces": pieces,
                "heads": [[head // groups, head % groups] for head in heads],
                "expiry": [expiry.flatten(0, 1)[head].tolist() for head in heads],
            },
        }


def _features(text: list[int], pieces: list[str], special_ids: set[int]) -> Tensor:
    """(kinds + 2, N) of 0 and 1: which kind each token is, whether it opens the text, and whether it is new in it."""
    kinds = token_kinds(pieces, [token in special_ids for token in text])
    features = torch.zeros(len(KINDS) + 2, len(text))
    features[kinds, torch.arange(len(text))] = 1
    features[-2, :_OPENING] = 1
    seen: set[int] = set()
    for index, token in enumerate(text):
        features[-1, index] = float(token not in seen)
        seen.add(token)
    return features


def _quantiles(shares: Tensor) -> list[Any]:
    """(L, H, N) shares by distance -> (L, H) of the distances below which QUANTILES of the attention lie."""
    summed = shares.cumsum(-1).contiguous()
    wanted = torch.tensor(QUANTILES, dtype=summed.dtype).expand(*summed.shape[:-1], -1).contiguous()
    return torch.searchsorted(summed, wanted).clamp(max=shares.shape[-1] - 1).tolist()


def _plain(figures: Tensor) -> list[Any]:
    """Nested lists, of six significant digits: raw lines are committed."""

    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [rounded(item) for item in value]
        return float(f"{value:.6g}") if math.isfinite(value) else None

    return rounded(figures.detach().cpu().tolist())
