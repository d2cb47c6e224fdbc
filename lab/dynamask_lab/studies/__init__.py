"""Experiments: sweeps of short runs under a budget of time, their figures with where they come from.

| folder | holds |
| --- | --- |
| `mqar` | multi-query associative recall |
| `locality` | forms of dma and rivals at a small window |
| `scaling` | loss by size and compute |
| `scratch` | from scratch on fresh tokens: the paper's form up to a window of the whole context, learned ranks |
| `reading` | long documents: loss of tokens whose last use lies far back |
| `recurrent` | a recurrent model with one layer that attends |
| `needle` | retrieval by length and depth |
| `ablation` | dma with one thing changed at a time |
| `conversion` | a pretrained model with a bounded cache |
| `ceiling` | how far a choice of keys can go on a pretrained dense model |
| `judged.py` | the forms that claims are held against |

The runner, results files and verdicts are in `dynamask_lab.sweeps`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamask.lazy import lazy_names
from dynamask_lab.sweeps import registry
from dynamask_lab.sweeps.registry import (
    Experiment,
    announce,
    check_experiment,
    get_experiment,
    load_announced,
    register,
)
from dynamask_lab.sweeps.results import Record, read_results, run_key

if TYPE_CHECKING:
    from dynamask_lab.studies.ablation.study import ABLATION
    from dynamask_lab.studies.locality.study import LOCALITY
    from dynamask_lab.studies.mqar.study import MQAR
    from dynamask_lab.studies.needle.study import NEEDLE
    from dynamask_lab.studies.reading.study import READING
    from dynamask_lab.studies.recurrent.study import RECURRENT
    from dynamask_lab.studies.scaling.study import SCALING
    from dynamask_lab.studies.scratch.study import SCRATCH
    from dynamask_lab.sweeps.registry import EXPERIMENTS
    from dynamask_lab.sweeps.schedule import Observer
    from dynamask_lab.sweeps.sweep import SweepReport, run_sweep

_STUDIES = ("ablation", "locality", "mqar", "needle", "reading", "recurrent", "scaling", "scratch")
"""Experiments: `study.py` in the folder of that name registers each, as the constant of that name."""

_HOME = {
    **{name.upper(): f"{__name__}.{name}.study" for name in _STUDIES},
    "Observer": "dynamask_lab.sweeps.schedule",
    "SweepReport": "dynamask_lab.sweeps.sweep",
    "run_sweep": "dynamask_lab.sweeps.sweep",
}
"""Public name -> the module that defines it, imported on first use: the name of an experiment needs no torch."""

__all__ = [
    "ABLATION",
    "EXPERIMENTS",
    "LOCALITY",
    "MQAR",
    "NEEDLE",
    "READING",
    "RECURRENT",
    "SCALING",
    "SCRATCH",
    "Experiment",
    "Observer",
    "Record",
    "SweepReport",
    "check_experiment",
    "get_experiment",
    "read_results",
    "register",
    "run_key",
    "run_sweep",
]


def __getattr__(name: str) -> Any:
    if name == "EXPERIMENTS":
        load_announced()
        return registry.EXPERIMENTS
    return _find(name)


_find, __dir__ = lazy_names(__name__, _HOME)
for _name in _STUDIES:
    announce(_name, _HOME[_name.upper()])
