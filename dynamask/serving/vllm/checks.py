"""What the plugin refuses before a model is loaded, and the settings that it needs."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from dynamask.errors import InvalidInputError
from dynamask.serving.vllm.names import NOT_SERVED

logger = init_logger(__name__)


class ServedConfig(VerifyAndUpdateConfig):
    """Called by vLLM with its whole configuration, for the architectures that the plugin registers."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Refuse what cannot be served; set what a state of constant size needs.

        Raises:
            InvalidInputError: a model or a setting that the plugin does not serve.
        """
        check_model(vllm_config.model_config.hf_config, vllm_config.model_config.architecture)
        check_settings(vllm_config)
        cache, compilation = vllm_config.cache_config, vllm_config.compilation_config
        cache.enable_prefix_caching = False
        cache.mamba_cache_mode = "none"
        cache.mamba_block_size = vllm_config.model_config.max_model_len
        from vllm.config import CUDAGraphMode

        # The step looks at the lengths of its sequences, which a recorded graph cannot.
        compilation.cudagraph_mode = CUDAGraphMode.NONE


def check_model(config: Any, architecture: str) -> None:
    """Refuse a model that the plugin does not serve.

    Args:
        config: its configuration.
        architecture: its name in `config.json`.

    Raises:
        InvalidInputError: layers left dense, mixers that keep no bounded number of keys, or an architecture without a
            model in vLLM.
    """
    if architecture in NOT_SERVED:
        raise InvalidInputError(
            f"{architecture} cannot be served by vLLM: {NOT_SERVED[architecture]}. Use generate() of transformers"
        )
    names = getattr(config, "layer_mixers", None)
    if names is not None:
        from dynamask.mixers import get_mixer

        other = sorted({name for name in names if name not in ("dma", "swa") or not get_mixer(name).bounded})
        if other:
            raise InvalidInputError(
                f"this model has layers of attention {', '.join(other)}; the plugin serves dma and swa, which keep a "
                "bounded number of keys. Use generate() of transformers"
            )
    if any(windows is None for windows in config.head_windows):
        raise InvalidInputError(
            "this model has layers left dense, whose queries see every past key: a state of constant size does not "
            "hold them. Convert it without dense_layers to serve it by vLLM"
        )


def check_settings(vllm_config: Any) -> None:
    """Refuse settings of vLLM that a state of constant size does not serve.

    Args:
        vllm_config: vLLM's configuration.

    Raises:
        InvalidInputError: the setting, and what to do instead.
    """
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    if cache.enable_prefix_caching:
        raise InvalidInputError(
            "prefix caching cannot be used with a dynamask model: a sequence drops keys in place, and those dropped "
            "since the end of a shared prefix are gone. Leave --enable-prefix-caching out"
        )
    if cache.cache_dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise InvalidInputError(
            f"kv_cache_dtype={cache.cache_dtype!r} cannot be used with a dynamask model: live keys are held in the "
            "model's dtype. Leave --kv-cache-dtype out"
        )
    if vllm_config.speculative_config is not None:
        raise InvalidInputError(
            "speculative decoding cannot be used with a dynamask model: a rejected token may have pushed out a key "
            "that the accepted text still needs. Leave --speculative-config out"
        )
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            raise InvalidInputError(
                f"{name}={size}: a dynamask model is served by one device per replica. Use --data-parallel-size"
            )
    if vllm_config.kv_transfer_config is not None:
        raise InvalidInputError(
            "KV transfer (disaggregated prefill, offloading connectors) is not supported for dynamask models: leave "
            "--kv-transfer-config out"
        )
