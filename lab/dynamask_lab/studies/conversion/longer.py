"""The study's list for a context that is twice as long as the model was trained for: distilled there, under YaRN.

    python -m dynamask_lab.studies.conversion.study --plan longer --role trainer ...

What is judged, decided before the run: SmolLM2-135M at 16384 tokens with 1024 keys per KV head, a sixteenth. Ranks and
windows were learned there before, with the model frozen: 29% of the needles of three tasks, dense 45%. Distilled there
for 100 steps at 4e-4, embeddings fixed, the mean of the last quarter of the weights. Reported, no bar: whether what is
missing is the model's to learn.
"""

from __future__ import annotations

from dataclasses import replace

from dynamask_lab.studies.conversion.close import BEST, LONGER
from dynamask_lab.studies.conversion.final import Entry, needles_16k
from dynamask_lab.studies.conversion.jobs import Job
from dynamask_lab.studies.conversion.levers import converted

LAST = converted(1024, steps=100, rope=2, context=16384, rate=BEST, embeddings=False)
DISTILLED = replace(LAST, average=0.25)


def entries() -> list[Entry]:
    """All entries, the most telling first."""
    losses = {
        spec: [Job(spec, "long", {"corpus": c, "length": 16384}) for c in ("text", "code")]
        for spec in (LAST, DISTILLED)
    }
    made = [Entry((losses[LAST][0],), trains=True), needles_16k(DISTILLED), Entry(tuple(losses[DISTILLED]))]
    return [*made, needles_16k(LAST), needles_16k(LONGER)]


def jobs() -> list[Job]:
    """The jobs of all entries."""
    return [job for entry in entries() for job in entry.jobs]
