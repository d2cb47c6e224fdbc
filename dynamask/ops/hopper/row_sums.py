"""What the backward passes need of each row of queries."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowSums(NamedTuple):
    """Sums of each row, of `dynamask.ops.triton.backward.prepare`; all (B, H, Nq) float32.

    Attributes:
        lse: what to subtract from logits to base 2 before they become weights: the log-sum-exp, less `top` if there is
            one; +inf where the query saw no key, so that the weights are 0.
        top: what to subtract from logits first, in their own unit; None where there is no bias, without which the two
            may be one number.
        delta: grad_output · output, which is the sum over keys of weight times its gradient; 0 where the query saw no
            key.
    """

    lse: Tensor
    top: Tensor | None
    delta: Tensor
