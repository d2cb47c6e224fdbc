"""Where a figure comes from: the processor, the versions and the commit behind it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import dynamask

_TOGETHER = " runs at a time"


def device_name(runs_at_a_time: int = 1) -> str:
    """The GPU's name, or the processor's; with the runs that share it where there are several: times depend on that."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    return name if runs_at_a_time == 1 else f"{name} ({runs_at_a_time}{_TOGETHER})"


def shared(device: str) -> bool:
    """Whether runs shared that device, as `device_name` says, and so their times."""
    return device.rstrip(")").endswith(_TOGETHER)  # some lines have a bracket too many


def processor_name() -> str:
    """The CPU's name, as exact as the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what decides a run's outcome: torch, triton (if there), transformers, dynamask, Python."""
    found = {"python": platform.python_version(), "dynamask": dynamask.__version__, "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout dynamask runs from, "-dirty" behind it where the package's files differ.

    Without a history, what the environment variable DYNAMASK_COMMIT says, or None.
    """
    package = Path(dynamask.__file__).parent
    # A package installed into another project's folder must not be given that project's commit.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return os.environ.get("DYNAMASK_COMMIT")  # a copied tree may lack its history
    head = _git(package, "rev-parse", "HEAD")
    if head is None:
        return os.environ.get("DYNAMASK_COMMIT")
    return f"{head}-dirty" if _git(package, "status", "--porcelain", ".") else head


def short_commit(commit: str | None) -> str:
    """What `commit` said, of nine digits; "unknown" for None."""
    head, dash, dirty = (commit or "unknown").partition("-")
    return head[:9] + dash + dirty


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints about the folder, or None where it has nothing to say or is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
