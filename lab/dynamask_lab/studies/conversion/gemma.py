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

Named before the fourth run, after distilling had lowered the loss a little and lost needles. In training, the second
halves of repeated blocks had most of the divergence: to copy 4096 tokens takes more keys than three heads of 512 hold,
and the rest of the gradient was small beside that. Levers, 200 steps, each beside the form of the second run:

1. Distilled on plain text instead (`PLAIN`), the embeddings held still or trained, at 2e-4 and 4e-4.
2. Distilled on text with copied spans of 32 tokens (`SPANS`), embeddings held still.
3. Frozen: ranks learned on plain text or copied spans, by their effect on the loss, in wider predictors for twice the
   steps, and 32 newest keys instead of 128.

That run measured only what `bound` writes, beside other jobs on the card: with 512 keys, the best keys of each query
lose almost nothing, an oracle's static ranks lose 0.096 in the product's windows (0.122 by effect on the loss), which
are more than the bar and no proof that nothing better exists. For the runs after it, embeddings held still, 2e-4: ranks
and windows on texts with planted facts (`RANKS_FACTS`), distilled on these (`FACTS`), `PLAIN` beside it, and the same
with 1024 and 2048 keys.

What that run found: on plain text and on planted facts the divergence of the training texts fell by half, most of it
from step 122 on, where the stream of 4M tokens begins again, and the held-out loss did not fall; it rose first, as far
as the rate rises; needles were lost. Ranks from planted facts find more with the model frozen (.82 of dense), by the
task with UUIDs alone, which a quarter of the planted values are.
Named before the last run, therefore: one pass over the texts (120 steps) at 5e-5, planted facts, 512, 1024 and 2048
keys, and these ranks frozen at 1024 and 2048 keys.

Named before the run after that. Every test block, training block and needle prompt began with the token of beginning
already; the blocks that windows and slopes were set on did not, and do now (`OPENING`). Weights of this model have a
root mean square of 0.04, those of SmolLM2-135M of 0.2, and Adam moves every weight by about the rate: what 4e-4 is
there, 8e-5 is here (`SCALED`), 2e-4 was five halves of it. On 12M tokens instead of 4M, none of which trains twice,
without the documents that share passages with the test blocks; planted facts, 512 and 1024 keys. Windows and slopes are
those of `allocate_windows`, which measures slopes now, on blocks that begin as texts do; beside it, windows and slopes
searched by measured loss (`search`).

That run measured the frozen forms; 260 steps did not end beside other jobs of the card. With slopes of 4/8192 in place
of 16/8192 the frozen form with 512 keys found .95 of dense instead of .82, and its loss was lower. Named for the last
run: 120 steps, as many as `GENTLE`, with 512 keys, then with 1024. It did not end in the time that others left either.

The form of the lowest text loss among those of 1 and 2 whose needles are not below the frozen form's, with whatever of
3 lowers the frozen loss, is trained for 400 steps and judged by the bars above.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dynamask_lab.studies.conversion.final import RATE, Entry, needles
from dynamask_lab.studies.conversion.forms import Spec
from dynamask_lab.studies.conversion.jobs import Job, losses_of
from dynamask_lab.studies.conversion.levers import FROZEN, converted

DISTILLED = converted(steps=200, rate=RATE)
WIDER = tuple(converted(budget, steps=0) for budget in (1024, 2048))


_HELD: dict[str, Any] = {"rate": RATE, "embeddings": False}
PLAIN, SPANS = (converted(steps=200, distil_texts=texts, **_HELD) for texts in ("plain", "spans"))
_FACTS: dict[str, Any] = {"texts": "facts", "distil_texts": "facts", **_HELD}
RANKS_FACTS = converted(steps=0, texts="facts")
FACTS, FACTS_LONGER = (converted(steps=steps, **_FACTS) for steps in (200, 400))
FACTS_WIDER = tuple(converted(budget, steps=200, **_FACTS) for budget in (1024, 2048))
FACTS_LABELS = converted(steps=200, label_share=0.5, **_FACTS)
GENTLE = tuple(converted(budget, steps=120, **_FACTS | {"rate": 5e-5}) for budget in (512, 1024, 2048))
FACTS_FROZEN = tuple(converted(budget, steps=0, texts="facts") for budget in (1024, 2048))
SCALED_RATE = 8e-5
"""2e-3 of the root mean square of the matrices' weights, as 4e-4 is in SmolLM2-135M."""
OPENING = tuple(converted(budget, steps=0, texts="facts", calibrated="opening") for budget in (512, 1024, 2048))
OPENING_REPEATS = converted(steps=0, calibrated="opening")
_SCALED: dict[str, Any] = _FACTS | {"rate": SCALED_RATE, "calibrated": "opening"}
SCALED = tuple(converted(budget, steps=120, **_SCALED) for budget in (512, 1024))
NEAR, WIDE_PREDICTOR = converted(steps=0, local=32), converted(steps=0, width=1024, rank_steps=600)


def averaged(spec: Spec) -> Spec:
    """The mean of the last quarter of its weights, which is what `distill` returns."""
    return replace(spec, average=0.25)


JUDGED = (
    ("frozen", FROZEN),
    ("frozen, texts with planted facts", RANKS_FACTS),
    ("distilled, 200 steps", DISTILLED),
    ("distilled on plain text, 200 steps", PLAIN),
    ("distilled on text with copied spans, 200 steps", SPANS),
    ("distilled on text with planted facts, 200 steps", FACTS),
    ("distilled on text with planted facts, 400 steps", FACTS_LONGER),
    ("the same, half next tokens, 200 steps", FACTS_LABELS),
    ("frozen, 32 newest keys", NEAR),
    ("frozen, wider predictors", WIDE_PREDICTOR),
    *((f"frozen, {spec.budget:,} keys", spec) for spec in WIDER),
    *((f"frozen, texts with planted facts, {spec.budget:,} keys", spec) for spec in FACTS_FROZEN),
    *((f"one pass over text with planted facts at 5e-5, {spec.budget:,} keys", averaged(spec)) for spec in GENTLE),
    ("frozen, slopes measured on repeated blocks, which left none", OPENING_REPEATS),
    *((f"frozen, facts, slopes measured, {spec.budget:,} keys", spec) for spec in OPENING),
    *((f"distilled on facts at 8e-5, {spec.steps} steps, {spec.budget:,} keys", averaged(spec)) for spec in SCALED),
    *(
        (f"distilled on text with planted facts, {spec.budget:,} keys, 200 steps", averaged(spec))
        for spec in FACTS_WIDER
    ),
)
"""What the report judges: names and forms."""


def entries() -> list[Entry]:
    """The entries of the last run, the most telling first; earlier runs had those of their forms."""
    made = [Entry((losses_of(spec)[0],), trains=True) for spec in SCALED]
    for spec in (averaged(SCALED[0]), OPENING[0], averaged(SCALED[1]), OPENING[1], OPENING[2], OPENING_REPEATS):
        made += [Entry((losses_of(spec)[0],)), needles(spec)]
    made += [Entry((losses_of(spec)[1],)) for spec in (averaged(SCALED[0]), OPENING[0], averaged(SCALED[1]))]
    return made


def jobs() -> list[Job]:
    """The jobs of all entries."""
    return [job for entry in entries() for job in entry.jobs]
