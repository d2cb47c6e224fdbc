"""A process that shares the run of another: `python -m dynamask_lab.language.follower TASK`, see `data_parallel`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path

from dynamask_lab.language.data_parallel import Stopped, following
from dynamask_lab.language.engine import train_together

_LOOK_EVERY = 1.0
"""Seconds after which a process notices that its leader is gone."""


def _end_with(leader: int) -> None:
    """A process that waits for gradients of a leader that is gone would hold its GPU."""
    while os.getppid() == leader:
        time.sleep(_LOOK_EVERY)
    os._exit(1)


def main() -> None:
    task = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=(task["leader"],), daemon=True).start()
    initial = None if task["initial"] is None else Path(task["initial"])
    with following(task) as group, contextlib.suppress(Stopped):
        train_together(group, task["config"], lambda share, note: None, initial)


if __name__ == "__main__":
    main()
