"""What every launch of interval attention takes, in one tuple."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor


class AttentionInputs(NamedTuple):
    """Contiguous tensors on one device, and the scale.

    Attributes:
        query: (B, H, Nq, D), the last Nq of N positions.
        key: (B, G, N, D).
        value: (B, G, N, Dv).
        expiry: (B, G, N) int32.
        bias: (B, G, N) float32, or None.
        scale: factor on the query-key products.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    expiry: Tensor
    bias: Tensor | None
    scale: float

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, expiry: Tensor, bias: Tensor | None, scale: float
    ) -> AttentionInputs:
        """Make the tensors contiguous and the bias float32."""
        query, key, value, expiry = (tensor.contiguous() for tensor in (query, key, value, expiry))
        return cls(query, key, value, expiry, None if bias is None else bias.float().contiguous(), scale)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first five arguments of a kernel. Without a bias its place is filled by a tensor that is not read."""
        return (*self[:4], self.expiry if self.bias is None else self.bias)

    @property
    def batch(self) -> int:
        """B."""
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        """H."""
        return self.query.shape[1]

    @property
    def groups(self) -> int:
        """G."""
        return self.value.shape[1]

    @property
    def ratio(self) -> int:
        """H / G."""
        return self.heads // self.groups

    @property
    def num_queries(self) -> int:
        """Nq."""
        return self.query.shape[2]

    @property
    def length(self) -> int:
        """N."""
        return self.value.shape[2]

    @property
    def dim(self) -> int:
        """D."""
        return self.query.shape[3]

    @property
    def value_dim(self) -> int:
        """Dv."""
        return self.value.shape[3]

    @property
    def widest(self) -> int:
        """The wider of D and Dv."""
        return max(self.dim, self.value_dim)

    @property
    def narrow(self) -> bool:
        """Whether numbers have 16 bits."""
        return self.query.element_size() == 2

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments that every kernel is compiled for."""
        return {
            "GROUPS": self.groups,
            "RATIO": self.ratio,
            "RATIO_PAD": triton.next_power_of_2(self.ratio),
            "DIM": self.dim,
            "VALUE_DIM": self.value_dim,
            "HAS_BIAS": self.bias is not None,
        }

    @property
    def portable_constants(self) -> dict[str, Any]:
        """Arguments that the portable kernels are compiled for: widths of tiles and the products' precision."""
        return {
            **self.constants,
            "DIM_PAD": tile_width(self.dim),
            "VALUE_PAD": tile_width(self.value_dim),
            "PRECISION": "tf32" if self.narrow else "ieee",
        }


def tile_width(dim: int) -> int:
    """Return the width of tiles of `dim` numbers: a power of two that a product on tensor cores takes."""
    return max(16, triton.next_power_of_2(dim))
