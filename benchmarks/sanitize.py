"""One forward and backward pass of the Hopper kernels, small, to be run under compute-sanitizer on a GPU.

compute-sanitizer --tool memcheck python benchmarks/sanitize.py
"""

from __future__ import annotations

import torch

from dynamask import key_expiry
from dynamask.ops.triton import backward, backward_hopper, interval_backward, interval_forward


def main() -> None:
    """Rows of 1000 positions: the last tile of everything is partly filled."""
    torch.manual_seed(0)
    query = torch.randn(1, 8, 1000, 128, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(1, 2, 1000, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bias = torch.randn(1, 2, 1000, device="cuda")
    expiry = key_expiry(bias, 200)
    output, lse = interval_forward(query, key, value, expiry, bias, 0.1, 200)
    backward._walk_kernel = lambda *_: backward_hopper.walk_kernel_launch  # rows this short would not take it
    interval_backward(torch.randn_like(query), query, key, value, expiry, bias, output, lse, 0.1, 200, False)
    torch.cuda.synchronize()
    print("done", float(output.float().norm()))


if __name__ == "__main__":
    main()
