"""`generate()` from the model's own cache."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache


class OwnCacheGeneration:
    """Mixed in before transformers' `GenerationMixin`: `generate()` takes `_new_cache()` unless told otherwise."""

    def _new_cache(self) -> Cache:
        """An empty cache of the kind the model decodes with."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        chosen = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation
        if chosen or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, *args, **kwargs
            )
        else:
            model_kwargs["past_key_values"] = self._new_cache()
