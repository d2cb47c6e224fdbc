"""The one table of tuning constants of the attention kernels: tiles, pipeline stages, warps and registers.

All were swept on an H100 at N = 32K, w = 2048; lab/kernels.md gives the figures. On Hopper a kernel gives out all of a
multiprocessor's registers and nearly all of its shared memory, so its rows cannot be changed one number at a time.
"""

from __future__ import annotations

_ROWS: dict[str, tuple[tuple[str, int, dict[str, int]], ...]] = {
    # Portable kernels: N keys a tile; the deterministic walk's `rows` are those of its tile of queries.
    "forward": (
        ("16-bit", 64, {"N": 128, "num_warps": 4, "num_stages": 2}),
        ("16-bit", 128, {"N": 64, "num_warps": 4, "num_stages": 2}),
        ("any", 1 << 30, {"N": 32, "num_warps": 8, "num_stages": 2}),
    ),
    "backward": (
        ("16-bit", 64, {"N": 32, "num_warps": 4, "num_stages": 2}),
        ("16-bit", 128, {"N": 64, "num_warps": 8, "num_stages": 2}),
        ("any", 1 << 30, {"N": 32, "num_warps": 8, "num_stages": 1}),
    ),
    "deterministic walk": (
        ("16-bit", 64, {"N": 64, "rows": 128, "num_warps": 4, "num_stages": 2}),
        ("16-bit", 128, {"N": 64, "rows": 64, "num_warps": 4, "num_stages": 2}),
        ("16-bit", 1 << 30, {"N": 32, "rows": 64, "num_warps": 8, "num_stages": 1}),
        ("32-bit", 128, {"N": 32, "rows": 64, "num_warps": 4, "num_stages": 1}),
        ("32-bit", 1 << 30, {"N": 32, "rows": 32, "num_warps": 4, "num_stages": 1}),
    ),
    # Hopper's kernels: N keys a stage, or PART rows of queries copied at a time, and the registers of each role.
    "Hopper forward": (
        ("16-bit", 64, {"N": 64, "STAGES": 8, "PRODUCER_REGISTERS": 56, "CONSUMER_REGISTERS": 152}),
        ("16-bit", 128, {"N": 64, "STAGES": 4, "PRODUCER_REGISTERS": 56, "CONSUMER_REGISTERS": 152}),
    ),
    "Hopper forward with a bias": (  # which takes the room of a stage
        ("16-bit", 64, {"N": 64, "STAGES": 8, "PRODUCER_REGISTERS": 56, "CONSUMER_REGISTERS": 152}),
        ("16-bit", 128, {"N": 64, "STAGES": 3, "PRODUCER_REGISTERS": 56, "CONSUMER_REGISTERS": 152}),
    ),
    "Hopper dQ": (
        ("16-bit", 64, {"N": 64, "STAGES": 8, "PRODUCER_REGISTERS": 72, "CONSUMER_REGISTERS": 216}),
        ("16-bit", 128, {"N": 64, "STAGES": 3, "PRODUCER_REGISTERS": 72, "CONSUMER_REGISTERS": 216}),
    ),
    "Hopper dQ, heads apart": (
        ("16-bit", 64, {"N": 64, "STAGES": 6, "PRODUCER_REGISTERS": 56, "CONSUMER_REGISTERS": 152}),
    ),
    "Hopper walk": (  # narrow heads leave the producer registers enough to spill nothing
        ("16-bit", 64, {"STAGES": 6, "PART": 8, "PRODUCER_REGISTERS": 56, "CONSUMER_REGISTERS": 224}),
        ("16-bit", 128, {"STAGES": 4, "PART": 16, "PRODUCER_REGISTERS": 24, "CONSUMER_REGISTERS": 240}),
    ),
}
"""Kernel -> rows of (size of the numbers, widest head up to which the row holds, constants), the first that fits."""


def tuning(kernel: str, dim: int, narrow: bool = True) -> dict[str, int]:
    """Look the constants of a kernel up.

    Args:
        kernel: a name of the table.
        dim: the wider of the key's and the value's head width.
        narrow: whether numbers have 16 bits.

    Returns:
        Keyword arguments of the launch.
    """
    size = "16-bit" if narrow else "32-bit"
    return dict(next(row for kind, widest, row in _ROWS[kernel] if kind in (size, "any") and dim <= widest))
