"""Experiments: sweeps of short runs under a budget of time, their figures with where they come from.

| file | holds |
| --- | --- |
| `registry.py` | what an experiment is, and the experiments by name |
| `sweep.py` | the runner: runs in this process or in several, one results file |
| `schedule.py` | which run comes next: orders by estimate, keeps a budget, takes up what finished runs decide |
| `workers.py` | processes that do runs, spread over the GPUs |
| `display.py` | a sweep on a terminal |
| `results.py` | the results file, safe against a kill at any moment |
| `provenance.py`, `budget.py` | device, versions and commit; spans of time |
| `language.py`, `language_data.py` | small language models: the engine, and the token streams it reads |
| `locality.py` | forms of dma and rivals at a small window |
| `ablation.py`, `ablation_mixers.py`, `ablation_report.py` | dma with one thing changed at a time |
| `needle.py`, `needle_data.py`, `needle_report.py` | retrieval by length and depth, the mixture, its section |
| `scaling.py`, `power_law.py` | loss against compute, and the fit |
| `section.py` | what an experiment contributes to the report |
| `mqar.py`, `mqar_data.py`, `mqar_report.py` | multi-query associative recall, its sequences, its section |
"""

from dynamask_lab.studies.ablation.study import ABLATION
from dynamask_lab.studies.locality.study import LOCALITY
from dynamask_lab.studies.mqar.study import MQAR
from dynamask_lab.studies.needle.study import NEEDLE
from dynamask_lab.studies.scaling.study import SCALING
from dynamask_lab.sweeps.registry import EXPERIMENTS, Experiment, get_experiment, register
from dynamask_lab.sweeps.results import Record, read_results, run_key
from dynamask_lab.sweeps.schedule import Observer
from dynamask_lab.sweeps.sweep import SweepReport, run_sweep

__all__ = [
    "ABLATION",
    "EXPERIMENTS",
    "LOCALITY",
    "MQAR",
    "NEEDLE",
    "SCALING",
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
