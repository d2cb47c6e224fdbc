"""Models of other architectures whose attention runs on dynamask.

Each is the transformers class with its attention modules converted (`dynamask.convert.attention`), under a model_type
of its own ("dynamask_llama", ...), so that `save_pretrained` and `AutoModelForCausalLM.from_pretrained` keep the rank
predictors and the windows. The classes of an architecture are made when they are first needed, because each costs the
import of a transformers module: `DynamaskLlamaForCausalLM` is an attribute of this module like any other.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dynamask.cache import BoundedCache, BoundedLayer, LayeredCache, check_consistent, check_takes_call
from dynamask.convert.architectures import ARCHITECTURES, PREFIX, converted_model_types
from dynamask.convert.attention import (
    IMPLEMENTATION,
    call_facts,
    check_holds,
    check_implementation,
    convert_attention,
    no_mask,
)
from dynamask.convert.converted_config import ConvertedConfig, Windows
from dynamask.convert.decode_step import decode_step
from dynamask.errors import InvalidInputError
from dynamask.integers import check_window, plain_numbers
from dynamask.mixers.rank_loss import RankLosses
from dynamask.mixers.rank_predictor import RankPredictor
from dynamask.models.attention_weights import refuse_attention_weights
from dynamask.models.cache_argument import CACHE_NAME, given_cache
from dynamask.models.cuda_graph import REPLAYED, decode_by_graph
from dynamask.models.decoder import attention_of, decoder_of
from dynamask.models.export import cache_of_export, refuse_onnx_export
from dynamask.models.generation import OwnCacheGeneration, check_not_empty
from dynamask.models.tensor_parallel import TensorParallelLoading, split_attention
from dynamask.models.windows import checked_slopes
from dynamask.ops.context_parallel.shards import current_group


class ConvertedModel(TensorParallelLoading, OwnCacheGeneration):
    """What the converted classes share, mixed in before the transformers class."""

    config: Any
    model: Any
    # Loading in float16 keeps these in float32, and quantisers, which compare the ends of names, leave them out.
    _keep_in_fp32_modules = ["rank_predictor", "rank_predictor.up", "rank_predictor.down"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        config._attn_implementation = IMPLEMENTATION
        super().__init__(config)  # type: ignore[call-arg]
        self._convert_layers()
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, RankPredictor):
                module.apply(self._init_weights)

    def _convert_layers(self) -> None:
        self.config.__dict__["_built_layers"] = len(decoder_of(self).layers)
        for layer in decoder_of(self).layers:
            if self.config.ranking == "paper":
                from dynamask.convert.doge_attention import convert_layer

                convert_layer(layer, self.config, self._init_weights)
            else:
                convert_attention(attention_of(layer), self.config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        initialize = getattr(module, "initialize_parameters", None)
        if initialize is not None:
            initialize()

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse: the attention of a converted model is part of the model."""
        check_implementation(attn_implementation)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Enable gradient checkpointing, but for the kind in which ranks do not learn.

        Raises:
            InvalidInputError: `use_reentrant=True` for a model whose ranks learn: its layers run without gradients.
        """
        reentrant = (gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        if (
            reentrant
            and self.config.rank_loss_weight
            and self.config.ranked_layers
            and self.config.ranking == "learned"
        ):
            raise InvalidInputError(
                "gradient checkpointing with use_reentrant=True runs the layers without gradients, and the ranks' loss "
                "with them: use use_reentrant=False, or set config.rank_loss_weight = 0 where ranks need not learn"
            )
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _new_cache(self) -> Cache:
        """An empty cache of the kinds that the layers decode with."""
        config = self.config
        if config.ranking == "paper" or None not in config.head_windows:
            return BoundedCache(config)
        facts = zip(config.head_windows, config.layer_locals, config.layer_sinks, strict=True)
        layers = [DynamicLayer() if w is None else BoundedLayer(w, local=n, sinks=s) for w, n, s in facts]
        return LayeredCache(layers=layers)

    def _by_graph(self, arguments: dict[str, Any]) -> CausalLMOutputWithPast | None:
        """One more token by a recorded CUDA graph or `decode_step`; None where the model must run itself."""
        cache = given_cache(arguments)
        if cache is None or not isinstance(cache, BoundedCache) or self.config.ranking == "paper":
            return None
        for name, value in arguments.items():
            if name not in REPLAYED and value is not None and value is not False:
                return None  # labels, embeddings, states that are to be returned, ...
        kept = arguments.get("logits_to_keep")
        plain = arguments.get("use_cache") is not False and arguments.get("return_dict") is not False
        plain = plain and (kept is None or isinstance(kept, int))
        config = self.config
        if not plain or config.output_hidden_states or config.output_attentions or current_group() is not None:
            return None
        tokens, mask, positions = (arguments.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        logits = decode_by_graph(
            self,  # type: ignore[arg-type]
            cache,
            tokens,
            mask,
            positions,
            counts_padding=True,
            step=decode_step,
        )
        return None if logits is None else CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache})

    def _prepared(self, arguments: dict[str, Any], cache_name: str) -> dict[str, Any]:
        """Complete the arguments of a forward call: the cache, and the facts that all layers need."""
        refuse_onnx_export()
        refuse_attention_weights(arguments.get("output_attentions"), self.config)
        tokens = arguments.get("input_ids")
        if tokens is None:
            tokens = arguments.get("inputs_embeds")
        cache = given_cache(arguments)
        for name in ("cache", "cache_params", "past_key_values"):
            arguments.pop(name, None)
        arguments[cache_name] = cache
        if cache is not None and tokens is not None:
            check_takes_call(cache, *tokens.shape[:2])
        arguments["use_cache"] = cache_of_export(cache, arguments.get("use_cache"))
        if tokens is None or self.config.ranking == "paper":
            if current_group() is not None:
                raise InvalidInputError("models converted from Doge cannot be split over processes (context_parallel)")
            return arguments
        batch, new = tokens.shape[:2]
        training = self.training and torch.is_grad_enabled()  # type: ignore[attr-defined]
        past = 0 if cache is None else int(cache.get_seq_length())
        # transformers drops the cache of checkpointed layers, before 5.24 also where no gradient is computed.
        drops = self.training and (training or cache_name != "cache")  # type: ignore[attr-defined]
        if cache is not None and drops and getattr(self, "is_gradient_checkpointing", False):
            raise InvalidInputError(
                "gradient checkpointing drops past_key_values: turn one of them off, by "
                "model.gradient_checkpointing_disable(), or model.eval() before generate()"
            )
        if cache is not None:
            check_consistent(cache, self.config.num_hidden_layers)
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        facts = arguments.get("dynamask")
        if facts is None:
            cached = cache is not None or bool(arguments.get("use_cache"))
            facts = call_facts(batch, new, mask, positions, past, tokens.device, cached=cached)
            facts.rules = self.config.layer_rules
            arguments["dynamask"] = facts
        if cache is not None:
            check_holds(cache, self.config, facts, new)
        if facts.shards is not None:
            if cache is not None or arguments.get("use_cache"):
                raise InvalidInputError(
                    "a sequence that is split over processes (context_parallel) leaves no cache: leave past_key_values "
                    "and use_cache out"
                )
            arguments["use_cache"], arguments["position_ids"] = False, facts.position_ids
        self._warn_of_untrained_ranks(facts)
        if cache is None:
            use_cache = arguments.get("use_cache")
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training and facts.segment_ids is None  # type: ignore[attr-defined]
                use_cache = use_cache and facts.observer is None
            elif use_cache and facts.segment_ids is not None:
                raise InvalidInputError(
                    "packed documents (position_ids that start over) leave no cache: use_cache=False"
                )
            arguments["use_cache"] = bool(use_cache)
            if use_cache and not training:
                arguments[cache_name] = self._new_cache()
        if mask is None and arguments.get(cache_name) is None and not torch.compiler.is_compiling():
            # transformers hands a mask of four dimensions on as it is; without one it would look for packed documents,
            # and wait for the device. The layers read the facts.
            arguments["attention_mask"] = no_mask(tokens.device)
        learns = training and cache is None and self.config.rank_loss_weight
        wanted = arguments.get("labels") is not None or arguments.get("loss_of_hidden") is not None
        if learns and not wanted and facts.observer is None:
            self._warn_of_idle_ranks()
        if facts.losses is None and learns and wanted:
            facts.losses = RankLosses()
        return arguments

    def _warn_of_untrained_ranks(self, facts: Any) -> None:
        config = self.config
        if config.trained_ranks or facts.observer is not None or torch.compiler.is_exporting():
            return
        if self.__dict__.get("_warned_of_ranks"):
            return
        narrowest = min((min(config.head_windows[layer] or ()) for layer in config.ranked_layers), default=None)
        if narrowest is not None and facts.length > narrowest:
            self.__dict__["_warned_of_ranks"] = True
            warnings.warn(
                f"the ranks of this {type(self).__name__} are untrained: beyond {narrowest} tokens it sees the first "
                f"{config.sinks} and the newest keys only. Train them with dynamask.convert.learn_ranks",
                stacklevel=4,
            )

    def _warn_of_idle_ranks(self) -> None:
        layers = [attention_of(decoder_of(self).layers[layer]) for layer in self.config.ranked_layers]
        trained = any(p.requires_grad for layer in layers for p in layer.rank_predictor.parameters())
        if trained and all(layer.rank_losses is None for layer in layers) and not self.__dict__.get("_said_idle"):
            self.__dict__["_said_idle"] = True
            warnings.warn(
                "the rank predictors do not learn: they learn by a loss of their own, which a forward pass without "
                "labels does not compute. With a trainer that computes the loss itself (label smoothing, TRL), call "
                "dynamask.training.add_rank_loss(trainer)",
                stacklevel=4,
            )

    def _with_rank_loss(self, outputs: Any, arguments: dict[str, Any]) -> Any:
        """Add the mean loss of the ranks to the loss, as the router's loss of a mixture of experts is added."""
        losses = arguments["dynamask"].losses if "dynamask" in arguments else None
        aux = None if losses is None else losses.mean()
        if aux is None:
            return outputs
        self.config.trained_ranks = True  # from here on they are, by whoever calls backward
        outputs.aux_loss = aux
        if outputs.loss is not None:
            weight = self.config.rank_loss_weight
            whole, labels = arguments.get("num_items_in_batch"), arguments.get("labels")
            if whole is not None and labels is not None:  # a part of a batch: the parts' losses are summed
                shifted = arguments.get("shift_labels")
                weight = weight * ((labels[:, 1:] if shifted is None else shifted) != -100).sum() / whole
            outputs.loss = outputs.loss + weight * aux.to(outputs.loss.device)
        return outputs


def _forward_of(original: Any) -> Callable[..., Any]:
    """Make the forward of a converted class, with the signature of the original's."""
    signature = inspect.signature(original.forward)
    names = [name for name in signature.parameters if name != "self"]
    cache_name = "cache" if "cache" in names else "past_key_values"

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in ("input_ids", "inputs_embeds"):
            if isinstance(arguments.get(name), torch.Tensor):
                check_not_empty(arguments[name].shape, "a converted model")
        replayed = self._by_graph(arguments)
        if replayed is not None:
            return replayed
        arguments = self._prepared(arguments, cache_name)
        loss_of_hidden = arguments.pop("loss_of_hidden", None)
        if loss_of_hidden is not None:  # a loss that does without the logits of all positions
            hidden = decoder_of(self)(**arguments).last_hidden_state
            self.config.trained_ranks |= bool(arguments["dynamask"].losses)
            return CausalLMOutputWithPast(loss=loss_of_hidden(hidden, arguments["dynamask"]))
        as_tuple = arguments.get("return_dict") is False
        if as_tuple:
            arguments["return_dict"] = True
        outputs = self._with_rank_loss(original.forward(self, **arguments), arguments)
        return outputs.to_tuple() if as_tuple else outputs

    return forward


@functools.cache
def converted_classes(model_type: str) -> tuple[Any, Any]:
    """Make, name and register the converted configuration and model class of an architecture.

    Args:
        model_type: transformers' ("llama") or the converted one ("dynamask_llama").

    Returns:
        The configuration class and the causal LM class.

    Raises:
        InvalidInputError: an architecture that is not supported.
    """
    if model_type.startswith(PREFIX):
        return converted_classes(model_type.removeprefix(PREFIX))
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InvalidInputError(f"architecture {model_type!r} is not supported; supported: {known}")
    names = ARCHITECTURES[model_type]
    config_class, model_class = getattr(transformers, names.config), getattr(transformers, names.model)
    fields: dict[str, tuple[Any, Any]] = {
        "windows": (int | list[int | list[int] | None], 2048),
        "local": (int, 128),
        "sinks": (int, 4),
        "ranking": (str, "learned"),
        "trained_ranks": (bool, False),
        "rank_predictor_width": (int | None, None),
        "rank_loss_weight": (float | int, 1.0),
        "slopes": (list[list[float] | None] | None, None),
    }
    body: dict[str, Any] = {name: default for name, (_, default) in fields.items()}
    body["__annotations__"] = {name: annotation for name, (annotation, _) in fields.items()}
    body |= {"model_type": PREFIX + model_type, "__module__": __name__}
    body["base_model_tp_plan"] = _tensor_parallel_plan(model_type, config_class)
    if not hasattr(config_class(), "num_key_value_heads"):  # every query head has keys of its own
        aliases = {"num_key_value_heads": "num_attention_heads", **config_class.attribute_map}
        body["attribute_map"] = aliases
    body["__doc__"] = f"`{names.config}` with the windows of dynamic mask attention, see `ConvertedConfig`."
    config: Any = strict(type(f"Dynamask{names.config}", (ConvertedConfig, config_class), body))
    model: Any = type(
        f"Dynamask{names.model}",
        (ConvertedModel, model_class),
        {
            "config_class": config,
            "forward": _forward_of(model_class),
            "__module__": __name__,
            "__annotations__": {"config": config},
            "__doc__": f"`{names.model}` whose attention runs on dynamask.",
        },
    )
    globals()[config.__name__], globals()[model.__name__] = config, model  # picklable by name
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)
    # The Trainer shifts the labels of the models that this table names.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = model.__name__
    return config, model


def _tensor_parallel_plan(model_type: str, config_class: Any) -> dict[str, str]:
    """The original's plan. Where it splits the heads, it splits the ranks by the same heads."""
    plan = dict(config_class.base_model_tp_plan or {})
    if model_type == "doge":  # its mask reads the values of all heads
        return {}
    ranks = [f"{name}.rank_predictor.down" for name in split_attention(plan)]
    return plan | dict.fromkeys(ranks, "colwise")


def __getattr__(name: str) -> Any:
    for model_type, names in ARCHITECTURES.items():
        if name in (f"Dynamask{names.config}", f"Dynamask{names.model}"):
            converted_classes(model_type)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def set_windows(model: Any, windows: Windows | Sequence[Any]) -> None:
    """Set the windows of a converted model.

    Args:
        model: a converted model.
        windows: as `ConvertedConfig.windows`.

    Raises:
        InvalidInputError: a model that is not converted, another number of layers or heads, or a window that is no
            integer or below local + sinks. The model is unchanged.
    """
    if not isinstance(model, ConvertedModel):  # layers of others would not read them, and the saved model would
        raise InvalidInputError(
            f"set_windows takes a converted model; got {type(model).__name__}. A new model takes its windows from "
            "DynamaskConfig(windows=...)"
        )
    config = model.config
    before = config.windows
    plain = plain_numbers(windows)
    for entry in plain if isinstance(plain, list) else [plain]:
        if entry is not None or plain is None:
            check_window(entry, config.local, config.sinks)
    ranked = config.ranked_layers
    try:
        config.windows = plain
        same = config.ranked_layers == ranked
    except Exception:
        config.windows = before
        raise
    if not same:
        config.windows = before
        raise InvalidInputError(
            "windows cannot make a layer dense, or a dense layer choose: use upcycle(dense_layers=)"
        )


def set_slopes(model: Any, slopes: Sequence[Sequence[float] | None] | None) -> None:
    """Set how much the ranks of a converted model rise per token.

    Args:
        model: a converted model.
        slopes: as `ConvertedConfig.slopes`; rounded to the grid of `dynamask.mixers.rank_predictor.slope_on_grid`.

    Raises:
        InvalidInputError: a model that is not converted or has no layer that ranks, another number of layers or heads,
            or a number that is not finite, below 0, or so small that the grid rounds it to 0. The model is unchanged.
    """
    if not is_converted(model):  # layers of others would not read them, and the saved model would
        raise InvalidInputError(
            f"set_slopes takes a model made by dynamask.convert.upcycle; got {type(model).__name__}. A new model takes "
            "its slopes from DynamaskConfig(slopes=...)"
        )
    config = model.config
    checked = checked_slopes(slopes, config.num_hidden_layers, config.num_key_value_heads)
    if any(checked) and not config.ranked_layers:
        raise InvalidInputError("set_slopes: no layer of this model chooses its keys (all slide or are left dense)")
    config.slopes = None if not any(checked) else [None if entry is None else list(entry) for entry in checked]


def is_converted(model: Any) -> bool:
    """Whether a model is one that `upcycle` made, with learned ranks."""
    return isinstance(model, ConvertedModel) and model.config.ranking == "learned"


def check_converted(model: Any, caller: str) -> None:
    """Raise `InvalidInputError` unless `model` is one that `upcycle` made, with a layer that ranks."""
    if not is_converted(model):
        raise InvalidInputError(f"{caller} takes a model made by dynamask.convert.upcycle; got {type(model).__name__}")
    if not model.config.ranked_layers:
        raise InvalidInputError(f"{caller}: no layer of this model chooses its keys (all slide or are left dense)")


__all__ = [
    "ARCHITECTURES",
    "ConvertedConfig",
    "ConvertedModel",
    "converted_classes",
    "converted_model_types",
    "set_slopes",
    "set_windows",
]
