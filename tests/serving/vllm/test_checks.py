"""What the plugin refuses before a model is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: lab/scripts/vllm_environment.sh makes an environment")

from vllm.model_executor.models import ModelRegistry

from dynamask import DynamaskConfig
from dynamask.convert.models import converted_classes
from dynamask.errors import InvalidInputError
from dynamask.serving.vllm import SERVED, register
from dynamask.serving.vllm.checks import check_model, check_settings


def settings(**changes: Any) -> SimpleNamespace:
    cache = {"enable_prefix_caching": False, "cache_dtype": "auto"}
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1}
    return SimpleNamespace(
        cache_config=SimpleNamespace(**{name: changes.get(name, value) for name, value in cache.items()}),
        parallel_config=SimpleNamespace(**{name: changes.get(name, value) for name, value in parallel.items()}),
        speculative_config=changes.get("speculative_config"),
        kv_transfer_config=changes.get("kv_transfer_config"),
    )


def test_plain_settings_pass() -> None:
    check_settings(settings())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"enable_prefix_caching": True}, "prefix caching cannot be used"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype='fp8' cannot be used"),
        ({"speculative_config": object()}, "speculative decoding cannot be used"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"kv_transfer_config": object()}, "KV transfer"),
    ],
)
def test_settings_that_a_constant_state_cannot_serve_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        check_settings(settings(**change))


def test_layers_left_dense_are_refused() -> None:
    config = converted_classes("llama")[0](num_hidden_layers=2, num_key_value_heads=2, windows=[16, None], local=8)
    with pytest.raises(InvalidInputError, match="layers left dense"):
        check_model(config, "DynamaskLlamaForCausalLM")


def test_mixers_without_a_bound_are_refused() -> None:
    config = DynamaskConfig(num_hidden_layers=2, attention=["dma", "mha"])
    with pytest.raises(InvalidInputError, match="attention mha"):
        check_model(config, "DynamaskForCausalLM")


def test_an_architecture_that_vllm_lacks_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no model of its own for OLMo 2"):
        check_model(None, "DynamaskOlmo2ForCausalLM")


def test_registration_can_be_repeated() -> None:
    register()
    register()
    assert set(SERVED) <= set(ModelRegistry.get_supported_archs())
