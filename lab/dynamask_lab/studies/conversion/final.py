"""The study's third list of jobs: the best rate for as long as the goal allows, seeds, budgets, controls and length.

    python -m dynamask_lab.studies.conversion.study --plan final --role trainer|evaluator ...

What is judged, decided before the run. All figures are paired differences over the same documents and examples with 95%
intervals; loss is the mean over the 8192 positions of a block. 512 keys per KV head unless another budget is named.

1. Distilled, 400 steps at a rate of 2e-4, against dense. Goal: text loss at most 0.005 above dense; needle tasks at 1K
   to 4K at least 0.98 of dense; benchmarks equal to dense within their interval. 800 steps at 4e-4 is a second try for
   the loss, which counts only if its training takes at most 300 seconds. Whichever of the two has the lower text loss
   within that time becomes the default of `dynamask convert upcycle`, unless its needles are below 0.98.
2. The converted model trained on the next tokens alone (`label_share=1`) against the dense model trained on the same
   tokens, both 400 steps at 2e-4. Goal: text loss at most 0.010 above it. Beside it, as a row of its own: the dense
   model trained first, then converted and distilled towards itself on the same tokens.
3. Seeds 1 and 2 of what 1 trains: their spread, and whether each meets the bars of 1.
4. Budgets of 1/8 and 1/32, distilled alike. Goal: needle tasks at 1K to 4K at least 1.00 and 0.85 of dense. 1/4 frozen.
5. Choosing: 1 against newest keys in windows allocated for newest keys, distilled alike. The sign is reported.
6. Predictors frozen: linear and value-fed against the hidden layer. Reported, no bar.
7. Longer than trained: dense, frozen and distilled at 16K and 32K under YaRN; weights trained without it. Reported:
   loss above dense of all positions and of the last eighth; needles at 16K, three tasks.
8. Cache bytes and decoded tokens per second of dense and of 1, alone on a GPU.

Added after the first run, which met the bar of 1 with twice the steps at twice the rate, but in more than 300 seconds,
with another run on the card: 400 steps at that rate, at 1/16 and 1/32. Added after the second run, in which one seed
of it met the bar of 1: seeds 1 and 2. That rate becomes the default if the mean of its seeds meets the bar.

A trainer takes entries that train, then the others; an evaluator takes only entries whose weights exist. Each entry is
claimed by a file, so any number of both shares the list.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynamask_lab.studies.conversion.forms import Spec
from dynamask_lab.studies.conversion.jobs import Job, key_of, losses_of, tasks_of
from dynamask_lab.studies.conversion.levers import DENSE, FROZEN, LONG, converted
from dynamask_lab.studies.conversion.measure import BENCHMARKS
from dynamask_lab.studies.conversion.tasks import NEEDLE_TASKS

RATE = 2e-4
ROLES = ("trainer", "evaluator")

DISTILLED = converted(rate=RATE)
LONGER = converted(steps=2 * LONG, rate=2 * RATE)
QUICKER, QUICKER_NARROW = converted(rate=2 * RATE), converted(256, rate=2 * RATE)
LABELLED, ADAPTED = converted(rate=RATE, label_share=1.0), Spec("dense trained", steps=LONG, rate=RATE)
FROM_ADAPTED = converted(rate=RATE, origin="dense trained")
SEEDS = tuple(converted(rate=RATE, seed=seed) for seed in (1, 2))
QUICKER_SEEDS = tuple(converted(rate=2 * RATE, seed=seed) for seed in (1, 2))
NARROW, WIDE = converted(256, rate=RATE), converted(1024, rate=RATE)
NEWEST = converted(rate=RATE, slopes=False, ranks="newest")
LINEAR, VALUES = (converted(steps=0, predictor=kind) for kind in ("linear", "values"))
FROZEN_NARROW, FROZEN_WIDE, FROZEN_QUARTER = (converted(budget, steps=0) for budget in (256, 1024, 2048))

COMPARISONS = (
    ("distilled, against dense", DISTILLED, DENSE),
    ("twice the steps at twice the rate, against dense", LONGER, DENSE),
    ("twice the steps at twice the rate", LONGER, DISTILLED),
    ("the same steps at twice the rate, against dense", QUICKER, DENSE),
    ("1/32 at twice the rate, against dense", QUICKER_NARROW, DENSE),
    ("seed 1, against dense", SEEDS[0], DENSE),
    ("seed 2, against dense", SEEDS[1], DENSE),
    ("the same steps at twice the rate, seed 1, against dense", QUICKER_SEEDS[0], DENSE),
    ("the same steps at twice the rate, seed 2, against dense", QUICKER_SEEDS[1], DENSE),
    ("next tokens alone, against dense trained on them", LABELLED, ADAPTED),
    ("dense trained, then converted, against dense trained", FROM_ADAPTED, ADAPTED),
    ("1/32 distilled, against dense", NARROW, DENSE),
    ("1/8 distilled, against dense", WIDE, DENSE),
    ("1/32 frozen, against dense", FROZEN_NARROW, DENSE),
    ("1/8 frozen, against dense", FROZEN_WIDE, DENSE),
    ("1/4 frozen, against dense", FROZEN_QUARTER, DENSE),
    ("learned ranks, against newest keys in windows of their own", DISTILLED, NEWEST),
    ("linear predictor, frozen", LINEAR, FROZEN),
    ("value-fed predictor, frozen", VALUES, FROZEN),
)
"""What is judged: a name, a form, and the form that it is compared with."""


@dataclass(frozen=True)
class Entry:
    """Jobs of one form that one process does.

    Attributes:
        jobs: in their order.
        trains: whether this entry makes the form's weights, ranks or windows. Others wait for these.
        idle: whether it begins only while nothing trains on the GPU.
    """

    jobs: tuple[Job, ...]
    trains: bool = False
    idle: bool = False

    @property
    def spec(self) -> Spec:
        """The form."""
        return self.jobs[0].spec

    @property
    def key(self) -> str:
        """What stands for the entry in the name of its claim."""
        return key_of([job.key for job in self.jobs])


def entries() -> list[Entry]:
    """All entries but those of speed, the most telling first."""

    def train(spec: Spec) -> Entry:
        return Entry(tuple(losses_of(spec)), trains=True)

    trained = [DISTILLED, LONGER, LABELLED, ADAPTED, NARROW, WIDE, SEEDS[0], NEWEST, LINEAR, SEEDS[1]]
    trained += [QUICKER, *QUICKER_SEEDS, QUICKER_NARROW, FROM_ADAPTED, VALUES]
    made = [train(spec) for spec in trained]
    made += [needles(spec) for spec in (QUICKER, *QUICKER_SEEDS, QUICKER_NARROW)]
    made += [needles(spec) for spec in (DISTILLED, LONGER, NARROW, WIDE)]
    made += [benchmarks(DISTILLED)]
    made += [Entry(tuple(losses_of(spec))) for spec in (FROZEN_NARROW, FROZEN_WIDE, FROZEN_QUARTER)]
    made += [needles(FROZEN_NARROW), needles(FROZEN_WIDE), other_tasks(DISTILLED)]
    made += [needles(spec) for spec in (LABELLED, ADAPTED, *SEEDS, NEWEST)]
    made += [_long(spec) for spec in (DENSE, FROZEN, DISTILLED)]
    made += [needles(LINEAR), needles(FROZEN_QUARTER), other_tasks(FROZEN), benchmarks(FROZEN), benchmarks(LONGER)]
    made += [needles_16k(spec) for spec in (DENSE, FROZEN, DISTILLED)]
    made += [needles(FROM_ADAPTED), needles(VALUES), benchmarks(LABELLED), benchmarks(ADAPTED)]
    return made


def jobs() -> list[Job]:
    """The jobs of all entries, and those of speed."""
    order = [job for entry in entries() for job in entry.jobs]
    order += [Job(spec, "speed", {"batch": batch, "length": 8192}) for spec in (DENSE, DISTILLED) for batch in (1, 16)]
    return list({job.key: job for job in order}.values())


def claimed(
    role: str,
    claims: Path,
    done: Callable[[Job], bool],
    ready: Callable[[Spec], bool],
    fits: Callable[[Spec], bool],
    over: Callable[[], bool],
    listed: Sequence[Entry],
    patience: float = 2.0,
    free: Callable[[], bool] = lambda: True,
) -> Iterator[Job]:
    """Yield the jobs of one entry after another, each claimed for this process.

    Args:
        role: "trainer" takes every entry, "evaluator" only those that do not train.
        claims: folder of the claims. A claim of a process that ended within its entry counts as none.
        done: whether a job has been done already.
        ready: whether what the form needs has been trained.
        fits: whether what the form still needs can be trained in the time that is left.
        over: whether the time is up.
        listed: the entries.
        patience: seconds between two looks, while others train what entries wait for.
        free: whether nothing trains on the GPU.
    """
    claims.mkdir(parents=True, exist_ok=True)
    left = [entry for entry in listed if role == "trainer" or not entry.trains]
    while not over():
        left = [entry for entry in left if not all(map(done, entry.jobs)) and not _held(claims / entry.key)]
        if not left:
            return
        able = (
            each
            for each in left
            if (ready(each.spec) or (each.trains and fits(each.spec))) and (not each.idle or free())
        )
        entry = next(able, None)
        if entry is None:
            time.sleep(patience)
        elif _claim(claims / entry.key):
            yield from (job for job in entry.jobs if not done(job))
            left.remove(entry)
            (claims / entry.key).write_text(_ENDED)


_ENDED = "ended"


def _claim(file: Path) -> bool:
    """Whether the entry is this process's now."""
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(str(os.getpid()))
    try:
        if file.exists() and not _held(file):
            partial.replace(file)
        else:
            os.link(partial, file)
        return True
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)


def _held(file: Path) -> bool:
    """Whether a process that runs has claimed the entry, or one has ended it."""
    try:
        text = file.read_text()
    except OSError:
        return False
    return text == _ENDED or (text.isdigit() and Path(f"/proc/{text}").exists())


def needles(spec: Spec) -> Entry:
    """The needle tasks that count, at the lengths that the goals name."""
    made = tasks_of(spec, range(25))
    return Entry(tuple(j for j in made if j.settings["task"] in _COUNTED and j.settings["length"] <= 4096))


def other_tasks(spec: Spec) -> Entry:
    """All tasks and lengths that `needles` leaves out: first the needles at 8K, and the second question."""
    skipped = {job.key for job in needles(spec).jobs}
    made = [job for job in tasks_of(spec, range(25)) if job.key not in skipped]
    made.sort(key=lambda j: (j.settings["task"] not in _COUNTED, j.settings["task"] != "pairs"))
    return Entry(tuple(made))


def benchmarks(spec: Spec) -> Entry:
    return Entry(tuple(Job(spec, "benchmark", {"name": name, "limit": 1000}) for name in BENCHMARKS))


def _long(spec: Spec) -> Entry:
    made = [
        Job(replace(spec, rope=rope), "long", {"corpus": corpus, "length": length})
        for rope, length in ((2, 16384), (4, 32768))
        for corpus in ("text", "code")
    ]
    return Entry(tuple(made))


def needles_16k(spec: Spec) -> Entry:
    settings = {"length": 16384, "haystack": "essays", "first": 0, "count": 25}
    tasks = ("single_1", "single_2", "multikey_1")
    return Entry(tuple(Job(replace(spec, rope=2), "tasks", {"task": task, **settings}) for task in tasks))


_COUNTED = tuple(task for task in NEEDLE_TASKS if task != "multikey_3")
