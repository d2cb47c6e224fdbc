"""`generate()` from the model's own cache."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.configuration_utils import GenerationMode

from dynamask.cache import BoundedLayer
from dynamask.errors import InvalidInputError
from dynamask.models.auto_code import KeepsOwnCode
from dynamask.models.cache_argument import CACHE_NAME, given_cache
from dynamask.models.export import SavedAsSafetensors


def check_not_empty(shape: Sequence[int], caller: str) -> None:
    """Raise `InvalidInputError` for token ids (B, N) or embeddings (B, N, hidden) of no row or no token."""
    if 0 in tuple(shape[:2]):
        raise InvalidInputError(
            f"{caller} needs at least one row and one token in each; got an input of shape {tuple(shape)}: leave empty "
            "batches and empty prompts out"
        )


class OwnCacheGeneration(SavedAsSafetensors, KeepsOwnCode):
    """Mixed in before transformers' `GenerationMixin`: `generate()` takes `_new_cache()` unless told otherwise."""

    def _new_cache(self) -> Cache:
        """An empty cache of the kind the model decodes with."""
        raise NotImplementedError

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: transformers' paged cache of continuous batching keeps neither ranks nor windows."""
        raise InvalidInputError(
            f"{type(self).__name__} cannot serve continuous batching: transformers' paged cache keeps no ranks. "
            "Use generate() on a padded batch"
        )

    init_continuous_batching = generate_batch
    continuous_batching_context_manager = generate_batch

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any, Any]:
        prepared: tuple[Tensor, Any, Any] = super()._prepare_model_inputs(*args, **kwargs)  # type: ignore[misc]
        check_not_empty(prepared[0].shape, "generate()")
        return prepared

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        cache = given_cache(model_kwargs)
        takes_back = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        if takes_back and cache is not None and any(isinstance(layer, BoundedLayer) for layer in cache.layers):
            raise InvalidInputError(
                "assisted generation takes tokens back, and a bounded cache has evicted keys by then: leave "
                "past_key_values out, or give a DynamicCache()"
            )
        if cache is not None:
            for name in ("past_key_values", "cache", "cache_params"):
                model_kwargs.pop(name, None)
            model_kwargs[CACHE_NAME] = cache
        chosen = cache is not None or generation_config.cache_implementation
        if chosen or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, *args, **kwargs
            )
        elif takes_back:
            model_kwargs[CACHE_NAME] = DynamicCache()
            if not self.__dict__.get("_said_full_cache"):
                self.__dict__["_said_full_cache"] = True
                warnings.warn(
                    "assisted generation takes tokens back, which a bounded cache cannot: it uses a cache of all keys, "
                    "which grows with the text",
                    stacklevel=4,
                )
        else:
            model_kwargs[CACHE_NAME] = self._new_cache()

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Hand the (B, length) mask through where transformers would build a 4-D one, for static caches."""
        return attention_mask
