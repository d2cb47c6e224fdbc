"""Launches that are ready before the launch before them has ended (programmatic dependent launch, Hopper and later).

A kernel launched so begins as soon as all programs of the one before have begun, and waits inside for its end. Short
kernels in a row save the time between two launches.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
from triton.language.extra import cuda

ALLOWED = False
"""Whether any launch is early. Not before a GPU has shown that results stay the same and steps become shorter."""


def early_launch(device: torch.device) -> dict[str, Any]:
    """Return what a launch of a kernel with the constant EARLY takes beside its arguments."""
    return {"EARLY": True, "launch_pdl": True} if ALLOWED and _is_able(device) else {"EARLY": False}


@functools.cache
def _is_able(device: torch.device) -> bool:
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def wait_for_the_launch_before():
    """Wait until all that the launch before has written can be read; then let the launch behind begin.

    Nothing may be read or written before: what waits here relies on all earlier launches having ended, too.
    """
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()


__all__ = ["early_launch", "wait_for_the_launch_before"]
