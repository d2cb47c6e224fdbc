"""The gate of dynamask 0.1: scores that rank keys, computed from their value vectors, with its options."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from dynamask.mixers.rank_predictor import settle
from dynamask_lab.legacy.alibi import slopes


class OldGate(nn.Module):
    """Scores every key from its value vector (paper, equations 5 and 6; design section 1).

        z = concat_heads(v) · Delta,  s = A · softplus(z),  score = exp(s) or s,  [ + λ · position ]

    The recency slope λ >= 0 orders keys exactly as a penalty of λ per position of distance would, for every
    query at once, so a key still has one rank; added to the logits it is that penalty up to a constant per
    query, which the softmax ignores.

    Args:
        num_key_value_heads: G, one score per head.
        head_dim: D of a value head.
        score_form: "exp" (paper) or "linear" (later released code).
        recency: initial λ; 0 leaves the term out, which is the paper's form.
        recency_spread: factor from this slope to the first head's, and from the last head's to it; see `slopes`.
        zero: "gate" or "delta", the factor of the score that starts at zero.
        rank_noise: scale of the noise of `ranks` in training.
        rank_recency: slope of the ranks per position; None: λ, that of the logits. Learned with ranking="attention".
        ranking: "score": ranks and logits share one score (paper). "attention": ranks have a Delta and slopes of their
            own, which learn how much attention a key gets (`mixers/ranking.py`), and the logits' score is read from
            the head's own value vector, so that a cache of kept keys can tell it again. Needs a slope, either one.
        rank_power: of the attention that such ranks learn.
        bias: whether Delta has a bias.
    """

    def __init__(
        self,
        num_key_value_heads: int,
        head_dim: int,
        *,
        score_form: str = "exp",
        recency: float = 0.0,
        recency_spread: float = 1.0,
        zero: str = "gate",
        rank_noise: float = 0.0,
        rank_recency: float | None = None,
        ranking: str = "score",
        rank_power: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.score_form = score_form
        self.recency, self.recency_spread = recency, recency_spread
        self.zero = zero
        self.rank_noise, self.rank_recency = rank_noise, rank_recency
        self.ranking, self.rank_power = ranking, rank_power
        self.delta = nn.Linear(num_key_value_heads * head_dim, num_key_value_heads, bias=bias)
        if ranking == "attention":
            self.own_delta = nn.Parameter(torch.zeros(num_key_value_heads, head_dim))
            self.log_rank_recency = nn.Parameter(self._rank_slopes().log())
        self.gate = nn.Parameter(torch.zeros(num_key_value_heads))
        if recency:
            self.log_recency = nn.Parameter(slopes(num_key_value_heads, recency, recency_spread).log())

    def initialize_parameters(self) -> None:
        """All scores equal: an untrained gate is exactly a sliding window (design section 1), and exactly dense
        attention up to `window` tokens. One factor alone is zero, for with both zero neither would get a gradient:
        A, which leaves the contents to be weighed to the random Delta until A has grown, or Delta, which the first
        step moves to the contents whose scores should rise."""
        if self.zero == "gate":
            init.zeros_(self.gate)
        else:
            init.constant_(self.gate, 1.0)
            init.zeros_(self.delta.weight)
        if self.ranking == "attention":
            init.zeros_(self.delta.weight)
            if self.zero == "gate":
                init.normal_(self.own_delta, std=self.own_delta.shape[1] ** -0.5)
            else:
                init.zeros_(self.own_delta)
            init.copy_(self.log_rank_recency, self._rank_slopes().log())
        if self.recency:
            init.copy_(self.log_recency, slopes(self.gate.shape[0], self.recency, self.recency_spread).log())

    def ranks(self, scores: Tensor) -> Tensor:
        """What decides the contest: the scores; in training with `rank_noise`, each with noise of its own.

        Gumbel noise makes the `window` best a sample without replacement in proportion to exp(score / rank_noise)
        (arXiv 1903.06059). A key draws once, so its mask is still one interval.

        Args:
            scores: (B, G, N).

        Returns:
            (B, G, N), not differentiable.
        """
        scores = scores.detach()
        if not (self.training and self.rank_noise):
            return scores
        uniform = torch.rand_like(scores).clamp(min=1e-12)
        return scores - self.rank_noise * (-uniform.log()).clamp(min=1e-12).log()

    def forward(self, value: Tensor, position_ids: Tensor) -> Tensor:
        """Scores of keys: what ranks them and, by `logit_bias`, what is added to their logits.

        Args:
            value: (B, G, N, D).
            position_ids: (B, N), the position of each key inside its own document.

        Returns:
            (B, G, N) float32 (float64 for float64 values): scores rank keys, so they keep full precision
            whatever the model's dtype.
        """
        wide = torch.promote_types(value.dtype, torch.float32)
        with torch.autocast(value.device.type, enabled=False):
            learned = value.detach() if self.ranking == "attention" else value  # only ranks learn from attention
            rows = learned.transpose(1, 2).flatten(2).to(wide)
            bias = None if self.delta.bias is None else self.delta.bias.to(wide)
            z = F.linear(rows, self.delta.weight.to(wide), bias)
            place = position_ids.unsqueeze(1).to(wide)
            if self.ranking == "attention":
                return settle(z).transpose(1, 2) + self.log_rank_recency.to(wide).exp()[:, None] * place
            score = settle(self._form(z, self.gate.to(wide))).transpose(1, 2)
            if self.rank_recency is not None:
                return score + self.rank_recency * place
            return score + self._slope(wide) * place if self.recency else score

    def _form(self, z: Tensor, gate: Tensor) -> Tensor:
        """The score of a projection."""
        score = gate * F.softplus(z)
        return score.exp() if self.score_form == "exp" else score

    def logit_bias(self, scores: Tensor, position: Tensor, value: Tensor) -> Tensor:
        """What is added to the logits, up to a constant per row: the scores, unless ranks go their own way.

        With one slope for both, a key that is to live for some windows needs a bonus on its logits that it has from
        birth, when no distance takes any of it away yet. A flatter slope of the ranks asks for less.

        Args:
            scores: (B, G, N), what `forward` returned.
            position: (B, G, N) or (B, 1, N), counted from any point of the row.
            value: (B, G, N, D), of the same keys.

        Returns:
            (B, G, N).
        """
        if self.ranking == "attention":
            wide = scores.dtype
            with torch.autocast(value.device.type, enabled=False):
                z = (value.to(wide) * self.own_delta.to(wide)[:, None]).sum(-1)
                score = self._form(z, self.gate.to(wide)[:, None])
                return score + self._slope(wide) * position.to(wide) if self.recency else score
        if self.rank_recency is None:
            return scores
        slope = self._slope(scores.dtype) if self.recency else 0.0
        return scores + (slope - self.rank_recency) * position.to(scores.dtype)

    def _rank_slopes(self) -> Tensor:
        """(G,) of ranks of their own, where they start."""
        first = self.recency if self.rank_recency is None else self.rank_recency
        return slopes(self.delta.out_features, first, self.recency_spread)

    def _slope(self, dtype: torch.dtype) -> Tensor:
        """(G, 1) λ."""
        return self.log_recency.to(dtype).exp()[:, None]
