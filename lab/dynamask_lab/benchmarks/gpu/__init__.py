"""Interval attention on a GPU against its peers, in one run: correct first, then timed.

| file | holds |
| --- | --- |
| `problem.py` | one attention problem: shapes, random or trained scores |
| `peers.py` | what it is compared with, each called in its own layout |
| `check.py` | errors against float64, beside those of PyTorch's own kernels |
| `measure.py`, `timing.py` | one row of results: attention, a peer, decoding, prefill; and how a call is timed |
| `apart.py` | work in processes of its own: checks side by side, and rehearsals of peers that may crash |
| `run.py` | what is measured in which order under a budget of time |
| `report.py`, `plots.py` | tables, targets and pictures from the results |
"""

from dynamask_lab.benchmarks.gpu.plots import draw
from dynamask_lab.benchmarks.gpu.report import markdown, targets
from dynamask_lab.benchmarks.gpu.run import Settings, benchmark_gpu, write

__all__ = ["Settings", "benchmark_gpu", "draw", "markdown", "targets", "write"]
