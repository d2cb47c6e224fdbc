"""The default rate of a distillation follows the size of the weights."""

from __future__ import annotations

from typing import Any

import torch

from dynamask import convert
from dynamask.convert.learning_rate import RATE_SHARE, scaled_rate


@torch.no_grad()
def test_it_is_a_share_of_the_weights_of_the_layers(llama: Any) -> None:
    model = convert.upcycle(llama, 24, local=4, sinks=2)
    for layer in model.model.layers:
        for name, parameter in layer.named_parameters():
            if parameter.ndim == 2:
                parameter.fill_(5.0 if "rank_predictor" in name else 0.2)
    model.get_input_embeddings().weight.fill_(9.0)
    assert scaled_rate(model) == float(f"{0.2 * RATE_SHARE:.0e}") == 4e-4
    for parameter in model.parameters():
        parameter.mul_(0.2)
    assert scaled_rate(model) == 8e-5
    for parameter in model.parameters():
        parameter.zero_()
    assert scaled_rate(model) == 4e-4


def test_distilling_takes_it_where_none_is_given(llama: Any) -> None:
    tokens = [torch.randint(3, 300, (1, 48))]

    def history(**options: Any) -> list[float]:
        torch.manual_seed(0)
        model = convert.upcycle(llama, 24, local=4, sinks=2, copy_weights=True)
        return list(convert.distill(model, llama, tokens, steps=4, **options))

    rate = scaled_rate(convert.upcycle(llama, 24, local=4, sinks=2))
    assert history() == history(learning_rate=rate) != history(learning_rate=50 * rate)
