"""What a training will take: counts against the definition, and what follows from more GPUs, tokens or context."""

from __future__ import annotations

import pytest

from dynamask import DynamaskForCausalLM
from dynamask.errors import UsageError
from dynamask.models import preset
from dynamask.training.plan import GPU_BYTES, launch_command, parameters_of, plan, work_of


def test_parameters_are_the_models() -> None:
    config = preset("tiny")
    assert parameters_of(config) == sum(p.numel() for p in DynamaskForCausalLM(config).parameters())


def test_operations_are_counted_pair_by_pair() -> None:
    config = preset("tiny", windows=[[3, 7], 64, 64, 64], local=1, sinks=1, max_position_embeddings=20)
    work = work_of(config, 20, sequences=3, recompute=False, learns=False)

    def pairs(window: int) -> int:
        return sum(min(i + 1, window) for i in range(20))

    ratio = config.num_attention_heads // config.num_key_value_heads
    assert work.interval == 12 * config.head_dim * ratio * 3 * (pairs(3) + pairs(7))
    assert work.dense == 12 * config.head_dim * ratio * 3 * 6 * pairs(20)
    assert work.products == pytest.approx(6 * parameters_of(config) * 60, rel=0.01)
    assert work.useful == work.products + work.interval + work.dense
    again = work_of(config, 20, sequences=3, recompute=True, learns=True)
    assert again.products == pytest.approx(work.products * 4 / 3)
    assert again.dense == pytest.approx(work.dense * 4 / 3)
    assert again.learning > 0 == work.learning
    assert again.useful == work.useful


def test_more_gpus_take_less_time_and_memory_and_as_many_operations() -> None:
    config = preset("1.7b", local=128, sinks=4)
    one, many = (plan(config, gpus=gpus, tokens=40e9, context=8192, sequences=2) for gpus in (8, 64))
    assert one.flops == many.flops
    assert 6 < one.days / many.days <= 8.01
    assert many.memory["peak"] < one.memory["peak"] < 0.9 * GPU_BYTES
    assert one.steps * one.tokens_per_step >= 40e9
    assert 0.1 < many.share_of_peak < 0.6
    assert one.error < 0.15


def test_slow_networks_and_large_batches_are_noticed() -> None:
    config = preset("1.7b", local=128, sinks=4)
    fast, slow = (plan(config, gpus=64, tokens=1e9, context=2048, network=speed) for speed in (50e9, 1e9))
    assert slow.exposed_seconds > 10 * fast.exposed_seconds
    assert slow.step_seconds > slow.exposed_seconds + 0.1
    assert not plan(config, gpus=1, tokens=1e9, context=40960, sequences=8).fits
    with pytest.raises(UsageError, match="gpus must be at least 1"):
        plan(config, gpus=0, tokens=1e9, context=2048)
    with pytest.raises(UsageError, match=r"set model\.max_position_embeddings=50000"):
        plan(config, gpus=1, tokens=1e9, context=50000)


def test_launch_commands() -> None:
    assert launch_command("a=1", 1) == "dynamask train a=1"
    assert launch_command("a=1", 4).startswith("torchrun --standalone --nproc-per-node 4 -m dynamask train")
    assert launch_command("a=1", 64).startswith("srun --nodes 8 ")
    assert "--nproc-per-node 8" in launch_command("a=1", 64)
