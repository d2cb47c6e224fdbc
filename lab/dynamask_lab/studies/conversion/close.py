"""The study's last list of jobs: seeds, budgets and controls at the rate that became the default.

    python -m dynamask_lab.studies.conversion.study --plan close --role trainer|evaluator ...

What is judged, decided before the run. All figures are paired differences over the same documents and examples with 95%
intervals; 512 keys per KV head unless another budget is named; 400 steps of 4 blocks of 8192.

1. Seeds 1 and 2, distilled at 4e-4, against dense: text loss at most 0.005 above dense, needle tasks at 1K to 4K at
   least 0.98 of dense, each seed for itself and the mean of seeds 0 to 2.
2. The dense model trained on the same tokens in the same loop, at 4e-4: next tokens alone, optimizer, schedule and
   precision as in `distill`, windows as long as the blocks. Against it: the converted model trained on the next tokens
   (`label_share=1`) at 4e-4, and that dense model converted and distilled towards itself on the same tokens. Goal: text
   loss at most 0.010 above it.
3. 1/32 and 1/8 at 4e-4: needle tasks at least 0.85 and 1.00 of dense.
4. Newest keys in windows of their own, distilled at 4e-4: the sign of the difference is reported.
5. Variable tracking, which distilled forms answer worse than frozen ones: the forms of 1 to 4, and dense trained alike;
   how many of the generated names are those of the worked example at the beginning of the context.
6. Needles at 16K under YaRN, three tasks: frozen with 512, 1024 and 2048 keys, ranks and windows of 8K; then ranks and
   windows learned at 16K under YaRN with 1024 keys, frozen and distilled for 200 steps there. Reported, no bar: whether
   the keys, or what was learned at 8K, bound the needles at 16K.
7. Cache bytes and decoded tokens per second of the forms with slopes, beside dense.
"""

from __future__ import annotations

from dynamask_lab.studies.conversion.final import RATE, Entry, needles, needles_16k, other_tasks
from dynamask_lab.studies.conversion.final import benchmarks as benchmarks_of
from dynamask_lab.studies.conversion.forms import Spec
from dynamask_lab.studies.conversion.jobs import Job, losses_of, tasks_of
from dynamask_lab.studies.conversion.levers import DENSE, LONG, converted

BEST = 2 * RATE
DISTILLED = converted(rate=BEST)
SEEDS = tuple(converted(rate=BEST, seed=seed) for seed in (1, 2))
ADAPTED = Spec("dense trained", steps=LONG, rate=BEST, loop="distil")
LABELLED = converted(rate=BEST, label_share=1.0)
FROM_ADAPTED = converted(rate=BEST, origin="dense trained", loop="distil")
NARROW, WIDE = converted(256, rate=BEST), converted(1024, rate=BEST)
NEWEST = converted(rate=BEST, slopes=False, ranks="newest")
FROZEN_BY_KEYS = tuple(converted(budget, steps=0) for budget in (512, 1024, 2048))
LONGER = converted(1024, steps=0, rope=2, context=16384)
LONGER_DISTILLED = converted(1024, steps=200, rope=2, context=16384, rate=BEST)

COMPARISONS = (
    ("seed 1 at 4e-4, against dense", SEEDS[0], DENSE),
    ("seed 2 at 4e-4, against dense", SEEDS[1], DENSE),
    ("next tokens alone at 4e-4, against dense trained in the same loop", LABELLED, ADAPTED),
    ("dense trained in the same loop, then converted, against dense trained", FROM_ADAPTED, ADAPTED),
    ("1/32 at 4e-4, against dense", NARROW, DENSE),
    ("1/8 at 4e-4, against dense", WIDE, DENSE),
    ("learned ranks at 4e-4, against newest keys in windows of their own", DISTILLED, NEWEST),
)
"""What is judged: a name, a form, and the form that it is compared with."""


def entries() -> list[Entry]:
    """All entries, the most telling first."""
    trained = (SEEDS[0], ADAPTED, FROM_ADAPTED, SEEDS[1], NARROW, LABELLED)
    made = [Entry(tuple(losses_of(spec)), trains=True) for spec in trained]
    made += [Entry((*needles_16k(spec).jobs, *_losses_16k(spec)), trains=True) for spec in (LONGER_DISTILLED, LONGER)]
    made += [Entry(tuple(losses_of(spec)), trains=True) for spec in (NEWEST, WIDE, DISTILLED)]
    made += [each for spec in SEEDS for each in (needles(spec), tracking(spec))]
    made += [needles(NARROW), tracking(ADAPTED), needles(FROM_ADAPTED), tracking(FROM_ADAPTED), needles(WIDE)]
    made += [needles_16k(spec) for spec in FROZEN_BY_KEYS]
    made += [benchmarks_of(SEEDS[0]), needles(ADAPTED), tracking(NEWEST), needles(NEWEST), tracking(LABELLED)]
    made += [other_tasks(SEEDS[0]), benchmarks_of(FROM_ADAPTED), needles(LABELLED)]
    return made


def jobs() -> list[Job]:
    """The jobs of all entries, and those of speed."""
    order = [job for entry in entries() for job in entry.jobs]
    settings = [{"batch": batch, "length": 8192} for batch in (1, 16)]
    order += [Job(spec, "speed", each) for each in settings for spec in (FROZEN_BY_KEYS[0], DENSE)]
    return list({job.key: job for job in order}.values())


def _losses_16k(spec: Spec) -> list[Job]:
    return [Job(spec, "long", {"corpus": corpus, "length": 16384}) for corpus in ("text", "code")]


def tracking(spec: Spec) -> Entry:
    """Variable tracking at all lengths."""
    return Entry(tuple(job for job in tasks_of(spec, range(25)) if job.settings["task"] == "tracking"))
