"""Experiments: sweeps of short runs under a budget of time, their figures with where they come from.

| file | holds |
| --- | --- |
| `registry.py` | what an experiment is, and the experiments by name |
| `sweep.py` | the runner: resumes, orders by estimate, keeps a budget |
| `results.py` | the results file, safe against a kill at any moment |
| `provenance.py`, `budget.py` | device, versions and commit; spans of time |
| `mqar.py`, `mqar_data.py` | multi-query associative recall and its sequences |
"""

from dynamask.experiments.mqar import MQAR
from dynamask.experiments.registry import EXPERIMENTS, Experiment, get_experiment, register
from dynamask.experiments.results import Record, read_results, run_key
from dynamask.experiments.sweep import Observer, SweepReport, run_sweep

__all__ = [
    "EXPERIMENTS",
    "MQAR",
    "Experiment",
    "Observer",
    "Record",
    "SweepReport",
    "get_experiment",
    "read_results",
    "register",
    "run_key",
    "run_sweep",
]
