"""Serve dynamask models in stock vLLM.

vLLM finds `register` by the entry point group `vllm.general_plugins` and calls it in each of its processes. To vLLM,
the keys that a sequence keeps are a state of constant size, like that of a Mamba model: one block of the KV cache
memory per sequence, whatever its length.

vLLM's interfaces move. This plugin is written for, and tested with, the release named in `TESTED_VLLM`.
"""

from __future__ import annotations

import logging

from dynamask.serving.vllm.names import BACKEND, MODELS, NOT_SERVED, SERVED, TESTED_VLLM


def vllm_version() -> str:
    """Return the version of the installed vLLM, whatever its package is called."""
    import vllm

    return str(vllm.__version__)


def register() -> None:
    """Make vLLM know dynamask's models. May be called more than once."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    import dynamask  # noqa: F401 -- lets AutoConfig read the configurations
    from dynamask.serving.vllm.checks import ServedConfig

    version = vllm_version()
    if not version.startswith(f"{TESTED_VLLM}."):
        logging.getLogger(__name__).warning(
            "dynamask's plugin is tested with vLLM %s and this is %s: check its outputs", TESTED_VLLM, version
        )
    for architecture in SERVED:
        ModelRegistry.register_model(architecture, f"{MODELS}:{architecture}")
    for architecture in (*SERVED, *NOT_SERVED):
        MODELS_CONFIG_MAP[architecture] = ServedConfig
    if BACKEND not in MambaAttentionBackendEnum.__members__:
        register_backend(BACKEND, "dynamask.serving.vllm.backend.BoundedBackend", is_mamba=True)


__all__ = ["NOT_SERVED", "SERVED", "TESTED_VLLM", "register", "vllm_version"]
