"""The data of the task `plurals`: found beside this file, whatever folder the harness is started from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets


def load(**metadata: Any) -> dict[str, datasets.Dataset]:
    """The only split, "test": singular, choices (list of str), answer (index of the right one)."""
    return {"test": datasets.Dataset.from_json(str(Path(__file__).with_name("plurals.jsonl")))}
