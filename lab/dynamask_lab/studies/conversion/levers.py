"""The study's second list of jobs: which levers bring a conversion closer to the dense model.

    python -m dynamask_lab.studies.conversion.study --plan levers ...

What is judged, decided before the first run. All figures are paired differences over the same documents and examples,
at 512 keys per KV head, with 95% intervals; loss is the mean over the 8192 positions of a block.

1. Slopes: frozen forms, `allocation="loss"` with slopes against without, text and code, both measures of the loss.
   Slopes stay in the product if the loss falls and the mean over the needle tasks at 1K to 4K does not.
2. Allocation: "loss" without slopes against "threshold", in the same way. The better one becomes the default.
   Goal: text loss of the best frozen form at most 0.040 above dense.
3. Choosing: learned ranks (with slopes) against newest keys whose windows were allocated for newest keys, both
   distilled for as long. The sign is reported whatever it is.
4. Distillation: 400 steps, and windows that start four times as wide. Goal: text loss at most 0.005 above dense; needle
   tasks at 1K to 4K at least 0.98 of dense.
5. Adaptation: the converted model trained on the next tokens alone (`label_share=1`) against the dense model trained
   on the same tokens for as long. Goal: text loss at most 0.010 above it.
6. Seeds 1 and 2, and budgets of 1/32, 1/8 and 1/4, of what 1 to 4 chose, which is taken to be: slopes, 400 steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dynamask_lab.studies.conversion.forms import STEPS, Spec
from dynamask_lab.studies.conversion.jobs import BUDGET, BUDGETS, Job, losses_of, tasks_of
from dynamask_lab.studies.conversion.measure import BENCHMARKS
from dynamask_lab.studies.conversion.tasks import NEEDLE_TASKS

LONG = 400
"""Batches of the longer trainings."""
_NEEDLES = tuple(task for task in NEEDLE_TASKS if task != "multikey_3")
_SECONDS_A_STEP = 0.42
_SECONDS = {"loss": 3.0, "continuation": 3.5, "tasks": 2.5, "benchmark": 1.0}
"""Rough seconds, by which forms are spread over two lanes."""


def converted(budget: int = BUDGET, steps: int = LONG, **options: object) -> Spec:
    """A form of this list: windows and slopes by loss, distilled for that many steps (0: frozen)."""
    options = {"allocation": "loss", "slopes": True, "distilled": steps > 0} | options
    return Spec("converted", budget, steps=steps or STEPS, **options)  # type: ignore[arg-type]


DENSE = Spec("dense")
FROZEN, FLAT = converted(steps=0), converted(steps=0, slopes=False)
BEST, SHRINKING = converted(), converted(start_windows=4.0)
LABELLED, MIXED = converted(label_share=1.0), converted(label_share=0.5)
SHORT, FASTER = converted(steps=STEPS), converted(steps=STEPS, rate=2e-4)
FASTER_LONGER, FASTER_LABELLED = converted(rate=2e-4), converted(rate=2e-4, label_share=1.0)
ADAPTED_FASTER = Spec("dense trained", steps=LONG, rate=2e-4)
NEWEST, NEWEST_LONGER = (converted(steps=steps, slopes=False, ranks="newest") for steps in (0, LONG))
THRESHOLD, THRESHOLD_DISTILLED = Spec("converted", BUDGET), Spec("converted", BUDGET, distilled=True)
EARLIER = Spec("converted", BUDGET, ranks="newest", distilled=True)
ADAPTED, ADAPTED_LONGER = Spec("dense trained"), Spec("dense trained", steps=LONG)

COMPARISONS = (
    ("slopes, model frozen", FROZEN, FLAT),
    ("windows by loss, model frozen", FLAT, THRESHOLD),
    ("windows and slopes by loss, model frozen", FROZEN, THRESHOLD),
    ("windows and slopes by loss, distilled", SHORT, THRESHOLD_DISTILLED),
    ("learned ranks, model frozen", FROZEN, NEWEST),
    ("learned ranks, distilled", BEST, NEWEST_LONGER),
    ("four times the steps", BEST, SHORT),
    ("four times the rate", FASTER, SHORT),
    ("four times the rate, for four times the steps", FASTER_LONGER, BEST),
    ("windows that shrink", SHRINKING, BEST),
    ("half next tokens", MIXED, BEST),
    ("next tokens, against dense trained on them", LABELLED, ADAPTED_LONGER),
    ("the same at four times the rate", FASTER_LABELLED, ADAPTED_FASTER),
    ("frozen, against dense", FROZEN, DENSE),
    ("distilled, against dense", BEST, DENSE),
    ("distilled at four times the rate, against dense", FASTER_LONGER, DENSE),
)
"""What is judged: a name, a form, and the form that it is compared with."""


def jobs() -> list[Job]:
    """All jobs, the most telling first."""
    seeds = [converted(seed=seed, steps=steps) for seed in (1, 2) for steps in (0, LONG)]
    budgets = [converted(budget) for budget in (256, 1024, 2048) if budget in BUDGETS]
    ablations = [converted(steps=0, predictor=kind) for kind in ("linear", "values")]

    order: list[Job] = []
    for spec in (FROZEN, FLAT, NEWEST):
        order += losses_of(spec)
    for spec in (EARLIER, ADAPTED):
        order += losses_of(spec) + _needles(spec)
    order += losses_of(BEST) + losses_of(LABELLED) + losses_of(ADAPTED_LONGER)
    for spec in (BEST, FROZEN, LABELLED, ADAPTED_LONGER):
        order += _needles(spec)
    for spec in (SHRINKING, NEWEST_LONGER):
        order += losses_of(spec) + _needles(spec)
    order += _needles(FASTER)
    for spec in (SHORT, FASTER, MIXED):
        order += losses_of(spec)
    for spec in (FASTER_LONGER, FASTER_LABELLED, ADAPTED_FASTER):  # after the first run, which found the rate too low
        order += losses_of(spec) + _needles(spec)
    for spec in seeds:
        order += losses_of(spec) + (_needles(spec) if spec.distilled else [])
    for spec in budgets:
        order += losses_of(spec) + _needles(spec)
    for spec in ablations:
        order += losses_of(spec)
    for spec in (BEST, EARLIER, ADAPTED, FLAT, MIXED):
        order += tasks_of(spec, range(25))
    order += [
        Job(spec, "benchmark", settings)
        for spec in (BEST, LABELLED, ADAPTED_LONGER, FASTER_LONGER)
        for settings in _benchmarks()
    ]
    order += [Job(spec, "speed", {"batch": batch, "length": 8192}) for spec in (DENSE, BEST) for batch in (1, 16)]
    return list({job.key: job for job in order}.values())


def lanes(listed: Iterable[Job], names: Sequence[str] = ("converted", "dense")) -> dict[Spec, str]:
    """Spread forms over lanes, in the order of the jobs, by rough seconds.

    Forms of one seed other than 0 share a lane, because they share what is trained first.
    """
    spent = dict.fromkeys(names, 0.0)
    found: dict[Spec, str] = {}
    of_seed: dict[int, str] = {}
    for job in listed:
        if job.measure == "speed":
            continue
        if job.spec not in found:
            least = min(spent, key=lambda lane: spent[lane])
            found[job.spec] = of_seed.setdefault(job.spec.seed, least) if job.spec.seed else least
            spent[found[job.spec]] += job.spec.steps * _SECONDS_A_STEP if job.spec.trained else 8.0
        spent[found[job.spec]] += _SECONDS.get(job.measure, 0.0)
    return found


def _needles(spec: Spec) -> list[Job]:
    """The needle tasks that count, at the lengths that the goals name."""
    jobs = tasks_of(spec, range(25))
    return [job for job in jobs if job.settings["task"] in _NEEDLES and job.settings["length"] <= 4096]


def _benchmarks() -> list[dict[str, object]]:
    return [{"name": name, "limit": 1000} for name in BENCHMARKS]
