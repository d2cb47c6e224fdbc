"""Train on two processes and compare with one: `python -m torch.distributed.run --nproc-per-node 2 FILE KIND`.

KIND is "accelerate" (data parallel) or "fsdp2" (`fully_shard`). Every process exits with an error if weights differ.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from tests.ecosystem.conftest import MODELS

STEPS = 3
TOKENS = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(1))


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def _steps(model: Any, optimizer: Any, tokens: torch.Tensor, backward: Any) -> None:
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()


def _alone(make: Any) -> dict[str, torch.Tensor]:
    """Weights after training on both parts in one process: the mean of their losses, ranks' losses among them."""
    model = make().train()
    optimizer = _optimizer(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for part in TOKENS.chunk(2):
            (model(input_ids=part, labels=part).loss / 2).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def main(kind: str) -> None:
    """Run one kind with every model."""
    if kind == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
    else:
        dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world == 2, world
    part = TOKENS.chunk(2)[rank]
    for name, make in MODELS.items():
        model = make()
        if kind == "accelerate":
            prepared, optimizer = accelerator.prepare(model, _optimizer(model))
            _steps(prepared, optimizer, part, accelerator.backward)
            found = dict(model.named_parameters())
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (world,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            _steps(model, _optimizer(model), part, lambda loss: loss.backward())
            found = {key: p.full_tensor() for key, p in model.named_parameters()}
        expected = _alone(make)
        assert set(found) == set(expected)
        for key, value in found.items():
            torch.testing.assert_close(
                value.detach(), expected[key], atol=2e-5, rtol=1e-4, msg=lambda m, at=f"{name} {key}": f"{at}: {m}"
            )
        if rank == 0:
            print(f"{kind}, {name}: {world} processes train as one", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
