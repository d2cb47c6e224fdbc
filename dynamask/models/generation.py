"""`generate()` from the model's own cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from dynamask.models.cache_argument import CACHE_NAME, given_cache


class OwnCacheGeneration:
    """Mixed in before transformers' `GenerationMixin`: `generate()` takes `_new_cache()` unless told otherwise."""

    def _new_cache(self) -> Cache:
        """An empty cache of the kind the model decodes with."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        cache = given_cache(model_kwargs)
        if cache is not None:
            for name in ("past_key_values", "cache", "cache_params"):
                model_kwargs.pop(name, None)
            model_kwargs[CACHE_NAME] = cache
        chosen = cache is not None or generation_config.cache_implementation
        if chosen or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, *args, **kwargs
            )
        else:
            model_kwargs[CACHE_NAME] = self._new_cache()

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Hand the (B, length) mask through where transformers would build a 4-D one, for static caches."""
        return attention_mask
