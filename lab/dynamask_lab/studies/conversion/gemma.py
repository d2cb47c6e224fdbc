"""The study's list for Gemma 3 270M, whose global layers alone are converted: then its whole cache is bounded.

    python -m dynamask_lab.studies.conversion.study --plan gemma --model MODEL --role trainer|evaluator ...

What is judged, decided before the run, at 512 keys per KV head of the three global layers and 8192 tokens: text loss of
the frozen form at most 0.040 and of the distilled form (200 steps at 2e-4) at most 0.005 above dense; its needle tasks
at 1K to 4K at least 0.98 of dense; learned ranks against newest keys in windows of their own, frozen. The model is
quantised to 4 bits, and its vocabulary may be cut down to what the data use; dense and converted are the same model.

Named before the second run: 200 steps at 4e-4, judged alike. The rate whose text loss is lower here and, at 400 steps,
in SmolLM2-135M becomes the product's default; where the two models differ, the lower rate stays.

Named before the third run, which looks for what bounds the model: 1024 and 2048 keys per global head, frozen. If their
loss and needles reach the bars, the bound is what three heads of 512 keys can hold, and not the conversion.
"""

from __future__ import annotations

from dynamask_lab.studies.conversion.final import RATE, Entry, needles
from dynamask_lab.studies.conversion.jobs import Job, losses_of
from dynamask_lab.studies.conversion.levers import DENSE, FROZEN, NEWEST, converted

DISTILLED = converted(steps=200, rate=RATE)
QUICKER = converted(steps=200, rate=2 * RATE)
WIDER = tuple(converted(budget, steps=0) for budget in (1024, 2048))
WIDER_DISTILLED = converted(2048, steps=200, rate=2 * RATE)


def entries() -> list[Entry]:
    """All entries, the most telling first."""
    made = [Entry(tuple(losses_of(FROZEN)), trains=True), Entry(tuple(losses_of(DISTILLED)), trains=True)]
    made += [each for spec in WIDER for each in (Entry(tuple(losses_of(spec)), trains=True), needles(spec))]
    made += [Entry(tuple(losses_of(spec)), trains=True) for spec in (QUICKER, WIDER_DISTILLED)]
    made += [needles(QUICKER), needles(WIDER_DISTILLED)]
    made += [Entry(tuple(losses_of(DENSE))), needles(DENSE), needles(DISTILLED), needles(FROZEN)]
    made += [Entry(tuple(losses_of(NEWEST))), needles(NEWEST)]
    return made


def jobs() -> list[Job]:
    """The jobs of all entries."""
    return [job for entry in entries() for job in entry.jobs]
