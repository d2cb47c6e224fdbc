"""The random state of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Generators:
    """The random state of a run (rank noise draws from it): its own inside `with`, the caller's outside."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        with self._forked():
            torch.manual_seed(seed + 1)
            self._cpu, self._cuda = torch.get_rng_state(), self._device_state()

    def _forked(self) -> Any:
        return torch.random.fork_rng(devices=self.devices)

    def _device_state(self) -> Tensor | None:
        return torch.cuda.get_rng_state(self.devices[0]) if self.devices else None

    def state(self) -> dict[str, Tensor | None]:
        """The state now, inside `with`."""
        return {"cpu": torch.get_rng_state(), "cuda": self._device_state()}

    def restore(self, state: dict[str, Tensor | None]) -> None:
        """The state to enter the next `with` with."""
        cpu, cuda = state["cpu"], state["cuda"]
        assert cpu is not None
        self._cpu, self._cuda = cpu.cpu(), None if cuda is None else cuda.cpu()

    def __enter__(self) -> Generators:
        self._fork = self._forked()
        self._fork.__enter__()
        torch.set_rng_state(self._cpu)
        if self.devices and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self.devices[0])
        return self

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)
