"""Rotary position embedding (RoPE, arXiv 2104.09864), rotating halves and scaled as Llama and Qwen do."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError

ROPE_TYPES = ("default", "linear", "yarn", "llama3")


def _check_kind(kind: str) -> None:
    if kind not in ROPE_TYPES:
        raise InvalidInputError(
            f"rope_type must be one of {', '.join(ROPE_TYPES)}; got {kind!r}. Frequencies that change with the length "
            "of the text (dynamic, longrope) would not fit the keys of a cache"
        )


def check_rope_parameters(config: Any) -> None:
    """Refuse rotary embeddings that this library does not compute.

    Args:
        config: a configuration with standardised `rope_parameters`.

    Raises:
        InvalidInputError: a type whose frequencies change with the length of the text ("dynamic", "longrope"), so that
            cached keys would no longer fit; an unknown type; a rotation of part of a head; missing parameters.
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    _check_kind(kind)
    if parameters.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise InvalidInputError(
            f"rope_parameters: partial_rotary_factor must be 1; got {parameters['partial_rotary_factor']}"
        )
    theta = parameters.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        raise InvalidInputError(f"rope_theta must be a number above 0; got {theta!r}")
    factor = parameters.get("factor", 1.0 if kind == "default" else None)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor < 1:
        raise InvalidInputError(f'rope_parameters of rope_type "{kind}" need a factor of at least 1; got {factor!r}')
    if kind != "default":
        try:
            RotaryFrequencies(config, config.head_dim)
        except KeyError as missing:
            raise InvalidInputError(f'rope_parameters of rope_type "{kind}" need {missing}') from missing


class RotaryFrequencies:
    """Frequencies of a configuration's rotary embedding for heads of one width.

    Not a module with a buffer: a model cast to bfloat16 would round the frequencies.

    Args:
        config: gives `rope_parameters` (or `rope_theta` alone) and `max_position_embeddings`.
        dim: rotated dimensions of a head, even.
    """

    def __init__(self, config: Any, dim: int) -> None:
        parameters = getattr(config, "rope_parameters", None) or {}
        self.dim = dim
        self.theta = float(parameters.get("rope_theta", getattr(config, "rope_theta", 10_000.0)))
        self.attention_scaling = 1.0
        self._scaled: list[float] | None = None
        self._on: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        kind = parameters.get("rope_type", "default")
        if kind != "default":
            _check_kind(kind)  # the field may have been set after the configuration was made
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            own = copy(config)
            own.head_dim = dim
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](own)
            self._scaled, self.attention_scaling = frequencies.tolist(), float(scaling)

    def frequencies(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return (dim / 2,) frequencies of this dtype, the values that transformers' Qwen3 uses in float32."""
        if self._scaled is None:
            return 1.0 / self.theta ** (torch.arange(0, self.dim, 2, device=device, dtype=dtype) / self.dim)
        if torch.compiler.is_compiling():
            return torch.tensor(self._scaled, device=device, dtype=dtype)
        if (device, dtype) not in self._on:  # kept: a captured CUDA graph allows no copy to the device
            with torch.inference_mode(False):
                self._on[device, dtype] = torch.tensor(self._scaled, device=device, dtype=dtype)
        return self._on[device, dtype]

    def angles(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute cosine and sine of every position's angles, the same for all heads and layers.

        Args:
            position_ids: (B, N) integers.
            dtype: of the model; angles are computed in float32 or wider.

        Returns:
            Two (B, 1, N, dim), scaled by `attention_scaling`: each angle twice, for the two halves of a head vector.
        """
        wide = torch.promote_types(dtype, torch.float32)
        angle = position_ids.to(wide)[:, None, :, None] * self.frequencies(position_ids.device, wide)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate head vectors by their positions.

    Args:
        x: (B, heads, N, dim).
        angles: as `RotaryFrequencies.angles` gives them.

    Returns:
        (B, heads, N, dim) in x's dtype; products are computed in the angles' dtype.
    """
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
