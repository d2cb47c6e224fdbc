"""The study's first list of jobs, and what a job is: a form and a measure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

from dynamask_lab.studies.conversion import measure
from dynamask_lab.studies.conversion.forms import STEPS, Spec
from dynamask_lab.studies.conversion.peers import PEERS
from dynamask_lab.studies.conversion.tasks import NEEDLE_TASKS, TASKS

BUDGET = 512
BUDGETS = (2048, 1024, 512, 256)
LENGTHS = (1024, 2048, 4096, 8192)
CONTEXT = 7680
"""Tokens that are read, and compressed, before `continuation` measures the loss of the next 512."""


@dataclass(frozen=True)
class Job:
    """One form and one measure.

    Attributes:
        spec: the form.
        measure: "loss", "continuation", "divergence", "tasks", "benchmark", "long" or "speed".
        settings: of the measure; decides, with form and measure, whether a job has been done.
    """

    spec: Spec
    measure: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """16 hexadecimal digits that stand for the job."""
        return key_of(self.spec.facts(), self.measure, self.settings)


def key_of(*parts: Any) -> str:
    """16 hexadecimal digits that stand for what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def jobs(steps: int = STEPS) -> list[Job]:
    """All jobs, the most telling first; forms that are trained are trained on `steps` batches."""
    dense = Spec("dense")
    frozen, distilled = Spec("converted", BUDGET), Spec("converted", BUDGET, distilled=True)
    newest = [Spec("converted", BUDGET, ranks="newest", distilled=d) for d in (False, True)]
    sinks = [Spec("converted", BUDGET, windows="equal", ranks="newest", distilled=d) for d in (False, True)]
    equal = Spec("converted", BUDGET, windows="equal")
    rivals = [Spec("peer", BUDGET, peer=peer) for peer in PEERS]
    other = [Spec("converted", b, distilled=d) for d in (False, True) for b in BUDGETS if b != BUDGET]
    seeds = [Spec("converted", BUDGET, seed=s, distilled=d) for s in (1, 2) for d in (False, True)]
    ablations = [Spec("converted", BUDGET, predictor=p) for p in ("linear", "values")]
    adapted = Spec("dense trained")

    first = range(0, 25), range(25, 100)
    made = [*losses_of(dense), *losses_of(frozen), *losses_of(distilled)]
    made += [*tasks_of(dense, first[0]), *tasks_of(frozen, first[0]), *tasks_of(distilled, first[0])]
    for spec in rivals[:5]:
        made += [*tasks_of(spec, first[0]), *_continuations(spec)]
    for spec in [newest[1], sinks[1], newest[0], sinks[0], equal]:
        made += losses_of(spec)
    made += [*losses_of(adapted)]
    for spec in [newest[1], newest[0], sinks[0]]:
        made += tasks_of(spec, first[0])
    for spec in [dense, distilled, frozen, adapted]:
        made += [Job(spec, "benchmark", {"name": name, "limit": 1000}) for name in measure.BENCHMARKS]
    for spec in [dense, frozen, distilled, sinks[0]]:
        made += [Job(spec, "speed", {"batch": batch, "length": 8192}) for batch in (1, 16)]
    for spec in rivals[5:]:  # they mask keys by a search that finds nothing for as many queries as a continuation has
        made += tasks_of(spec, first[0])
    for spec in other:
        made += losses_of(spec)
    for spec in other:
        made += tasks_of(spec, first[0])
    made += [job for spec in [*seeds, *ablations] for job in losses_of(spec)]
    made += [job for spec in [*seeds, *ablations] for job in tasks_of(spec, first[0])]
    for spec in [dense, frozen, distilled, *rivals[:5]]:
        made += [*tasks_of(spec, first[1]), *tasks_of(spec, first[0], "documents")]
    for rope, length in ((2, 16384), (4, 32768)):
        for spec in (Spec("dense", rope=rope), Spec("converted", BUDGET, rope=rope)):
            made += [Job(spec, "long", {"corpus": corpus, "length": length}) for corpus in ("text", "code")]
    made = [replace(job, spec=replace(job.spec, steps=steps)) if job.spec.trained else job for job in made]
    return list({job.key: job for job in made}.values())


def losses_of(spec: Spec) -> list[Job]:
    """Both measures of a form's loss, on text and code."""
    return [Job(spec, "loss", {"corpus": c, "blocks": 100}) for c in ("text", "code")] + _continuations(spec)


def _continuations(spec: Spec) -> list[Job]:
    return [Job(spec, "continuation", {"corpus": c, "blocks": 100, "context": CONTEXT}) for c in ("text", "code")]


def tasks_of(spec: Spec, indices: range, haystack: str = "essays") -> list[Job]:
    """All tasks and lengths of a form."""
    tasks = [t for t in TASKS if haystack == "essays" or t in NEEDLE_TASKS[1:4] + NEEDLE_TASKS[6:]]
    return [
        Job(
            spec, "tasks", {"task": t, "length": n, "haystack": haystack, "first": indices.start, "count": len(indices)}
        )
        for n in LENGTHS
        for t in tasks
    ]


def lane_of(job: Job) -> str:
    """The lane that a job belongs to. Speed is measured with the GPU to itself."""
    if job.measure == "speed":
        return "speed"
    return "converted" if job.spec.kind in ("converted", "dense trained") else "dense"
