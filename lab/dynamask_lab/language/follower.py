"""A process that shares the run of another: `python -m dynamask_lab.language.follower TASK`, see `data_parallel`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from dynamask_lab.language.data_parallel import Stopped, following
from dynamask_lab.language.engine import train_together


def main() -> None:
    task = json.loads(sys.argv[1])
    initial = None if task["initial"] is None else Path(task["initial"])
    with following(task) as group, contextlib.suppress(Stopped):
        train_together(group, task["config"], lambda share, note: None, initial)


if __name__ == "__main__":
    main()
