"""Settings of `dynamask convert upcycle`, and their checks, which need no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynamask.errors import UsageError
from dynamask.hub import check_local_or_hub
from dynamask.integers import check_window

CALIBRATIONS = ("repeats", "facts", "plain")
"""What may be done to the texts that a model is converted with."""

METHODS = ("loss", "threshold")
"""How windows may be set, see `dynamask.convert.allocate_windows`."""


@dataclass(frozen=True)
class Conversion:
    """Settings of a conversion.

    Attributes:
        source: folder or hub name of a dense causal LM.
        target: folder to write, which must not exist.
        window: mean number of keys that a query keeps.
        data: sources of text, as `dynamask.data.documents` takes them; none: the model is written with untrained
            ranks and one window.
        local, sinks: newest and first positions that are always kept.
        dense_layers: indices of layers left dense.
        block: tokens of a block; None: 8192, or what the model is made for if that is less.
        batch: blocks of a step.
        rank_steps, distill_steps: steps of the two trainings; no distillation with 0.
        distill_rate: highest learning rate of the model in the distillation; None: see `distill`.
        allocation: how windows are set, see `allocate_windows`.
        label_share, start_windows: of the distillation, see `distill`.
        calibration: what is done to the texts: "repeats" (half of the blocks repeat their first half), "facts" (facts
            and questions are planted in them, see `dynamask.convert.planted_facts`) or "plain" (nothing).
        needles: examples of each needle task, length and depth; 0 leaves the needles out.
        max_tokens: tokens read from the texts at most.
        seed: of the order of the blocks and of the predictors.
        device: "cuda", "cpu", ...; None: a GPU if there is one.
    """

    source: str
    target: Path
    window: int
    data: Sequence[str] = ()
    local: int = 128
    sinks: int = 4
    dense_layers: Sequence[int] = ()
    block: int | None = None
    batch: int = 4
    rank_steps: int = 300
    distill_steps: int = 0
    distill_rate: float | None = None
    allocation: str = "loss"
    label_share: float = 0.0
    start_windows: float = 1.0
    calibration: str = "repeats"
    needles: int = 2
    max_tokens: int = 20_000_000
    seed: int = 0
    device: str | None = None

    @property
    def work(self) -> Path:
        """The hidden folder beside the target that keeps the state of an unfinished conversion."""
        return self.target.with_name(f".{self.target.name}.conversion")

    def identity(self) -> dict[str, Any]:
        """Return the settings that stages depend on, as JSON has them."""
        fields = asdict(self) | {"target": None, "device": None, "data": list(self.data)}
        return json.loads(json.dumps(fields | {"dense_layers": list(self.dense_layers)}))  # type: ignore[no-any-return]

    def check(self) -> None:
        """Check what needs neither the model nor its configuration.

        Raises:
            UsageError, InvalidInputError: a value outside of its range, a target that exists, or no such source.
        """
        for name, least in (("batch", 1), ("rank_steps", 1), ("distill_steps", 0), ("needles", 0), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(self, name)}")
        if self.distill_steps and not self.data:
            raise UsageError(f"--distill-steps {self.distill_steps} needs texts to train on: give some (--data)")
        if self.distill_rate is not None and not self.distill_rate > 0:
            raise UsageError(f"--distill-rate must be above 0; got {self.distill_rate}")
        if not 0 <= self.label_share <= 1:
            raise UsageError(f"--label-share must be from 0 to 1; got {self.label_share}")
        if not self.start_windows >= 1:
            raise UsageError(f"--start-windows must be at least 1; got {self.start_windows}")
        if self.calibration not in CALIBRATIONS:
            raise UsageError(f"--calibration must be one of {', '.join(CALIBRATIONS)}; got {self.calibration!r}")
        if self.allocation not in METHODS:
            raise UsageError(f"--allocation must be one of {', '.join(METHODS)}; got {self.allocation!r}")
        check_window(self.window, self.local, self.sinks)
        if self.target.exists():
            raise UsageError(f"{self.target} exists already: choose another folder, or delete it")
        check_local_or_hub(self.source, "model")
        check_no_run(self.source)


def check_no_run(source: str) -> None:
    """Refuse the folder of a run of `dynamask train`, whose model is native: there is nothing to convert.

    Raises:
        UsageError: such a folder.
    """
    folder = Path(source).expanduser()
    if (folder / "train.yaml").exists() and not (folder / "config.json").exists():
        raise UsageError(
            f"{source} is a run of dynamask train, whose model is not converted: it has the attention that it was "
            "trained with. Give a dense model of transformers, such as Llama, Mistral or Qwen"
        )
