"""The gated delta rule (arXiv 2412.06464) in plain PyTorch: chunks side by side, and a scan over their states.

    S_t = a_t (I - b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ        o_t = S_tᵀ q_t

Within a chunk the updates u solve a triangular system (I + T) u = b (v - g k S), in which S is the state that the chunk
begins with. So the state behind a chunk is an affine function M S + N of the one before it, and these functions are
composed in a logarithmic number of steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError

CHUNK = 64


def gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Read a state that decays, and is corrected at every key.

    Args:
        query, key: (B, H, N, D) float32 or float64, N a multiple of `CHUNK`; keys of norm at most 1.
        value: (B, H, N, Dv).
        log_decay: (B, H, N), the logarithm of a, at most 0.
        beta: (B, H, N), b, from 0 to 1.

    Returns:
        (B, H, N, Dv).

    Raises:
        InvalidInputError: a length that is no multiple of `CHUNK`.
    """
    if query.shape[2] % CHUNK:
        raise InvalidInputError(f"the length must be a multiple of {CHUNK}; got {query.shape[2]}")
    query, key, value, log_decay, beta = (
        tensor.unflatten(2, (-1, CHUNK)) for tensor in (query, key, value, log_decay, beta)
    )
    total = log_decay.cumsum(-1)
    # From a key to a later query of its chunk; the exponents above the diagonal would overflow.
    between = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    eye = torch.eye(CHUNK, dtype=query.dtype, device=query.device)
    system = eye + (beta[..., None] * between * (key @ key.mT)).tril(-1)
    right = torch.cat([value, total.exp()[..., None] * key], -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, carried = solved.split([value.shape[-1], key.shape[-1]], -1)
    last = total[..., -1:]
    faded = ((last - total).exp()[..., None] * key).mT
    matrix = last.exp()[..., None] * torch.eye(key.shape[-1], dtype=key.dtype, device=key.device) - faded @ carried
    state = _states(matrix, faded @ own)
    update = own - carried @ state
    return (total.exp()[..., None] * query @ state + (between * (query @ key.mT)) @ update).flatten(2, 3)


def _states(matrix: Tensor, added: Tensor) -> Tensor:
    """The state that each chunk begins with: (B, H, C, D, D) and (B, H, C, D, Dv) -> (B, H, C, D, Dv)."""
    chunks, reach = matrix.shape[2], 1
    while reach < chunks:
        later, earlier = matrix[:, :, reach:], slice(None, -reach)
        added = torch.cat([added[:, :, :reach], later @ added[:, :, earlier] + added[:, :, reach:]], 2)
        matrix = torch.cat([matrix[:, :, :reach], later @ matrix[:, :, earlier]], 2)
        reach *= 2
    return torch.cat([torch.zeros_like(added[:, :, :1]), added[:, :, :-1]], 2)
