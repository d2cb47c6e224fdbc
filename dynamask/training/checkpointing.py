"""The checkpoints of a run: which there are, and which of them can be read."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def checkpoints(output: Path) -> list[Path]:
    """List the whole checkpoints of a run, oldest first."""
    found = [
        (int(match[1]), path)
        for path in output.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def damage(checkpoint: Path) -> str | None:
    """Say what of a checkpoint cannot be read; None where it is whole.

    Weights are checked by the sizes that their header gives, the optimizer's state and the random states by their
    checksums.
    """
    from safetensors import SafetensorError, safe_open

    required = ["trainer_state.json", "optimizer.pt", "scheduler.pt"]
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights and not list(checkpoint.glob("*.bin")) and not list(checkpoint.glob("*/")):
        return "there are no weights"
    try:
        for name in required[:1] if list(checkpoint.glob("*/")) else required:  # sharded states lie in folders
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if state["global_step"] != checkpoint_step(checkpoint):
            return f"trainer_state.json is of step {state['global_step']}"
        for file in weights:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        for file in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
            with zipfile.ZipFile(file) as archive:
                if (bad := archive.testzip()) is not None:
                    return f"{file.name}: {bad} has another checksum"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, zipfile.BadZipFile) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None
