"""Whether a choice of keys serves a recurrent model: Gated DeltaNet with one layer of six that attends.

After HOLA, which at 340M parameters gives a Gated DeltaNet an exact cache of 64 tokens. Judged by the test loss, named
before the run: `gdn + learned` below `gdn` and below `gdn + sliding` of as many keys, by intervals that exclude zero
and at least 0.02 nats; how much of what `gdn + dense` wins over `gdn` it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynamask_lab.language.engine import language_cost, language_kind, run_language
from dynamask_lab.studies.recurrent.mixer import GDN, recurrent_mixer
from dynamask_lab.studies.scratch.study import SHAPES, SINKS, config
from dynamask_lab.sweeps.registry import Config, Experiment, Progress, register
from dynamask_lab.sweeps.results import Record

WINDOW = 64
_PLACE = 3
"""The layer that attends, of six."""


def _layers(attention: str) -> list[str]:
    return [attention if place == _PLACE else GDN for place in range(6)]


def forms() -> dict[str, Config]:
    """Name of a form -> its settings."""
    chosen: Config = {"window": WINDOW, "sinks": SINKS}
    return {
        "gdn": {"attention": GDN, "sinks": SINKS, "window": WINDOW},
        "gdn + learned": {
            **chosen,
            "attention": "dma",
            "ranking": "learned",
            "local": WINDOW // 4,
            "layer_attention": _layers("dma"),
        },
        "gdn + sliding": {**chosen, "attention": "swa", "layer_attention": _layers("swa")},
        "gdn + dense": {**chosen, "attention": "mha", "layer_attention": _layers("mha")},
    }


def recurrent_name(settings: Config) -> str:
    """The name of a run's form."""
    names = {"dma": "gdn + learned", "swa": "gdn + sliding", "mha": "gdn + dense"}
    return names.get(settings["attention"], "gdn")


def run_recurrent(settings: Config, progress: Progress) -> dict[str, Any]:
    """See `run_language`."""
    with recurrent_mixer():
        return run_language(settings, progress)


def _probe() -> list[Config]:
    """4M parameters, 4096 tokens, 10 fresh tokens a parameter, two seeds; minutes of a large GPU."""
    return _runs("4M", 2.1e-3, (0, 1), tokens_per_parameter=10.0)


def _tiny() -> list[Config]:
    """1M parameters, 20 tokens each, three seeds."""
    return _runs("1M", 3e-3, (0, 1, 2))


def _smoke() -> list[Config]:
    """Every form of "tiny" for a few steps on bytes, which need no corpus: shows on a GPU that it runs."""
    few = {"corpus": "bytes", "steps": 60, "validation_tokens": 65_536}
    return [{**settings, **few} for settings in _runs("1M", 3e-3, (0,))]


def _runs(shape: str, rate: float, seeds: Sequence[int], **more: Any) -> list[Config]:
    with recurrent_mixer():
        return [
            config(form, SHAPES[shape], seed, rate, 4096, compile=False, **more)
            for seed in seeds
            for form in forms().values()
        ]


def _cost(settings: Config) -> float:
    with recurrent_mixer():
        return language_cost(settings)


def _kind(settings: Config) -> str:
    with recurrent_mixer():
        return language_kind(settings)


def recurrent_summary(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row per form: mean test loss and parameters."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(recurrent_name(record.config), []).append(record)
    return [
        {
            "form": name,
            "parameters": f"{runs[0].result['parameters']['non_embedding'] / 1e6:.2f}M",
            "runs": str(len(runs)),
            "test loss": f"{np.mean([run.result['test'] for run in runs]):.4f}",
        }
        for name, runs in sorted(groups.items())
    ]


RECURRENT = Experiment(
    name="recurrent",
    description="a Gated DeltaNet with one layer of six that attends: dense, sliding, or the best learned ranks",
    run=run_recurrent,
    sizes={"smoke": _smoke, "tiny": _tiny, "4M": _probe},
    cost=_cost,
    kind=_kind,
    summary=recurrent_summary,
    interruptible=True,
)
register(RECURRENT)

__all__ = ["RECURRENT", "forms", "recurrent_name", "recurrent_summary", "run_recurrent"]
