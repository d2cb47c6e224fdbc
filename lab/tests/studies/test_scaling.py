"""The scaling study: its models suit the kernels that they are timed with."""

from __future__ import annotations

import pytest
import torch

from dynamask_lab.language.engine import LanguageConfig, build_model
from dynamask_lab.studies.scaling.study import PLANS


@pytest.mark.parametrize(
    ("size", "shape"), [(size, shape) for size in ("quick", "paper") for shape in PLANS[size].shapes]
)
def test_the_scaling_experiments_nsa_suits_flas_kernels(size: str, shape: str) -> None:
    settings = PLANS[size].config({"attention": "nsa"}, shape, seed=0, rate=1e-3)
    with torch.device("meta"):
        config = build_model(LanguageConfig.of(settings), 8192).config
    block = config.nsa["block_size"]
    assert block >= 16
    assert block & (block - 1) == 0
    assert 16 <= config.head_dim <= 256
    assert config.nsa["block_counts"] * block + config.nsa["window"] == settings["window"]
