"""Windows that hold the whole context are named when a training begins."""

from __future__ import annotations

from dynamask.training.run import _dense_layers
from tests.conftest import tiny_config


def test_layers_that_are_dense_under_a_sparse_name_are_named() -> None:
    config = tiny_config(windows=[[6, 40], 32])
    assert _dense_layers(config, 32) == [
        "warning: layer 0 sees 40 of 32 in 1 of 2 heads: dense attention",
        "warning: layer 1 sees 32 of 32: dense attention",
    ]
    assert _dense_layers(config, 41) == []
    assert _dense_layers(tiny_config("mha"), 4) == []
