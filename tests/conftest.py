"""Small models every test file may ask for."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reached for the network would fail, not hang

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; Triton reads it when it is imported

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:  # the process that hands tests to the workers needs no models, whose import takes seconds
    from dynamask import DynamaskConfig, DynamaskForCausalLM


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="K/N", help="every N-th test, from the K-th on (K from 0): one process of N")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard = config.getoption("--shard")
    if shard is not None:
        own, of = (int(part) for part in shard.split("/"))
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % of != own])
        items[:] = items[own::of]


def pytest_configure(config: pytest.Config) -> None:
    # Tests of whole models take as many examples. Every run draws others, so the quick suite needs few.
    settings.register_profile("models", max_examples=4 if "not slow" in config.option.markexpr else 12, deadline=None)
    if config.getoption("--shard") is not None:
        config.pluginmanager.register(_FailuresAtOnce(config))


class _FailuresAtOnce:
    """Tells a failure as it happens: a process of several may be killed before pytest comes to its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line(f"\n{report.nodeid}\n{report.longreprtext}")


def tiny_config(attention: str | list[str] = "dma", **fields: object) -> DynamaskConfig:
    """Two layers of four heads over 50 tokens, with a window that a 40-token text overflows."""
    from dynamask import DynamaskConfig

    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 100.0,
        "windows": 6,
        "initializer_range": 0.2,
    }
    return DynamaskConfig(attention=attention, **(shape | fields))


def tiny_model(attention: str | list[str] = "dma", **fields: object) -> DynamaskForCausalLM:
    """A float64 model whose ranks choose by content: untrained ones would make DMA a sliding window."""
    from torch import nn

    from dynamask import DynamaskForCausalLM
    from dynamask.mixers import DynamicMaskGate, RankPredictor

    torch.manual_seed(0)
    model = DynamaskForCausalLM(tiny_config(attention, **fields)).double().eval()
    for module in model.modules():
        if isinstance(module, DynamicMaskGate):
            nn.init.normal_(module.gate, std=2.0)
            nn.init.normal_(module.delta.weight, std=1.0)
        if isinstance(module, RankPredictor):
            nn.init.normal_(module.down.weight, std=1.0)
    return model


def random_ranks(model: Any) -> Any:
    """Let the ranks of a converted model choose by content, in place: untrained ones would be a sliding window."""
    from torch import nn

    from dynamask.models.decoder import attention_of, decoder_of

    for layer in model.config.ranked_layers:
        nn.init.normal_(attention_of(decoder_of(model).layers[layer]).rank_predictor.down.weight)
    model.config.trained_ranks = True
    return model


VARIANTS = {
    "dma": {},
    "dma-paper": {"ranking": "paper"},
    "dma-ranks-alone": {"local": 0, "sinks": 0},
    "dma-one": {"windows": 1},
    "dma-layers": {"attention": ["swa", "dma"]},
    "dma-dense": {"attention": ["mha", "dma"]},
    "dma-latent": {"attention": ["mla", "dma"]},
    "dma-windows": {"windows": [3, 9], "local": 1, "sinks": 1},
    "dma-heads": {"windows": [[3, 9], [12, 4]], "local": 1, "sinks": 2},
    "dma-heads-paper": {"windows": [[3, 9], 5], "ranking": "paper"},
    "swa": {"sinks": 0},
    "swa-sinks": {"windows": [6, [3, 9]], "sinks": 2},
    "mha": {},
    "mla": {},
    "nsa": {},
}


def variant(name: str) -> DynamaskForCausalLM:
    """The model of that name."""
    return tiny_model(**({"attention": name.split("-")[0]} | VARIANTS[name]))


@pytest.fixture(scope="session", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> DynamaskForCausalLM:
    """Each mixer, DMA in its variants."""
    return variant(request.param)
