"""The checkpoints of a run: which there are, and which of them can be read."""

from __future__ import annotations

import hashlib
import json
import os
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


CHECKSUMS = "checksums.json"
"""File of a checkpoint with the size and SHA-256 of every other file in it."""

_MODEL = "pytorch_model_fsdp_0"
"""Folder in which accelerate puts the weights of a model that is split."""


def is_sharded(checkpoint: Path) -> bool:
    """Return whether a checkpoint is of a model that was split over processes."""
    return (checkpoint / _MODEL).is_dir()


def write_checksums(checkpoint: Path) -> None:
    """Write `CHECKSUMS`. Every process of a training calls it, when all files are written; each reads its share."""
    import torch.distributed as dist

    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank, size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    files = sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())
    sums = {name: _checksum(checkpoint / name) for name in files[rank::size]}
    if together:
        parts: list[dict[str, list[int | str]] | None] = [None] * size
        dist.all_gather_object(parts, sums)
        sums = {name: value for part in parts if part for name, value in part.items()}
    if rank == 0:
        (checkpoint / CHECKSUMS).write_text(json.dumps(sums, indent=1, sort_keys=True), encoding="utf-8")


def _checksum(file: Path) -> list[int | str]:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return [os.path.getsize(file), digest.hexdigest()]


def _wrong_checksum(checkpoint: Path) -> str | None:
    sums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
    for name, (size, _) in sums.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if (found := os.path.getsize(checkpoint / name)) != size:
            return f"{name} has {found} bytes in place of {size}"
    for name, expected in sums.items():
        if _checksum(checkpoint / name) != expected:
            return f"{name} has another checksum"
    return None


def damage(checkpoint: Path) -> str | None:
    """Say what of a checkpoint cannot be read; None where it is whole.

    Every file is checked by its checksum. A checkpoint of an older release has none: its weights are checked by the
    sizes that their header gives, the optimizer's state and the random states by the checksums of their archives.
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
        if (checkpoint / CHECKSUMS).is_file():
            return _wrong_checksum(checkpoint)
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
