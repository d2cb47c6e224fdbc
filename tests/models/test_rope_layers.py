"""Layers without rotary embeddings: what they are blind to, what the others still see, and what a saved model keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dynamask import DynamaskConfig, InvalidInputError
from tests.conftest import tiny_config, tiny_model


def _ids(length: int = 24) -> torch.Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(0))


def test_narrow_is_a_word_of_the_configuration(tmp_path: Path) -> None:
    config = DynamaskConfig(num_hidden_layers=6, window=128, layer_windows="uneven", rope_layers="narrow")
    assert config.rope_layers == [True, True, True, False, True, True]
    config.save_pretrained(tmp_path)
    assert DynamaskConfig.from_pretrained(tmp_path).rope_layers == config.rope_layers
    mixed = tiny_config("swa", layer_attention=["mha", "swa"], rope_layers="narrow")
    assert mixed.rope_layers == [False, True]


@pytest.mark.parametrize("attention", ["mha", "mla", "nsa", "swa", "dma"])
@torch.no_grad()
def test_a_layer_without_rope_does_not_read_positions(attention: str) -> None:
    """Positions moved apart change what a rotating layer says, and nothing where none rotates."""
    # A slope is a way of its own to know distance.
    fields = {"recency": 0.0, "local": 2} if attention == "dma" else {}
    spread = torch.arange(24).mul(3).expand(2, -1)
    one_document = torch.zeros(2, 24, dtype=torch.long)
    for rotating, blind in ([False, False], True), ([True, False], False):
        model = tiny_model(attention, rope_layers=rotating, **fields)
        near = model(_ids(), segment_ids=one_document, use_cache=False).logits
        far = model(_ids(), position_ids=spread, segment_ids=one_document, use_cache=False).logits
        assert torch.equal(near, far) == blind


@torch.no_grad()
def test_all_layers_rotating_is_the_default() -> None:
    plain, said = tiny_model("dma"), tiny_model("dma", rope_layers=[True, True])
    assert torch.equal(plain(_ids(), use_cache=False).logits, said(_ids(), use_cache=False).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_layers": [True]}, "each of the 2 layers whether it rotates; got 1"),
        ({"rope_layers": "wide"}, "whether it rotates, or \"narrow\"; got 'wide'"),
        ({"rope_layers": "narrow"}, "and there is none"),
    ],
)
def test_layers_that_do_not_fit_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        tiny_config(**fields)
