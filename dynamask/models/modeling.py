"""The decoder: embeddings, `num_hidden_layers` x (mixer, SwiGLU), norm, output layer. transformers classes."""

from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from dynamask.cache import BoundedCache, LayeredCache, check_consistent, check_takes_call, dropping_layers
from dynamask.errors import InvalidInputError
from dynamask.mixers import Mixer, RMSNorm, SequenceInfo, get_mixer
from dynamask.mixers.base import packed_segments
from dynamask.mixers.rank_loss import RankLosses
from dynamask.models.attention_weights import refuse_attention_weights
from dynamask.models.cache_argument import CACHE_NAME, takes_cache
from dynamask.models.configuration import DynamaskConfig
from dynamask.models.cuda_graph import decode_by_graph
from dynamask.models.export import SavedAsSafetensors, cache_of_export, refuse_onnx_export
from dynamask.models.generation import OwnCacheGeneration
from dynamask.models.tensor_parallel import TensorParallelLoading
from dynamask.ops.checks import check_attention_mask, check_position_ids, check_segment_ids
from dynamask.ops.context_parallel.shards import context_shards, current_group
from dynamask.ops.looks import looks_allowed

logger = logging.get_logger(__name__)

AUXILIARY_WEIGHT = 0.1
"""Weight of the mixers' losses in the loss. The parameters that learn by it learn by nothing else, and Adam is
indifferent to it; clipping by norm is not."""


@dataclass
class DynamaskModelOutput(BaseModelOutputWithPast):
    """Outputs of `DynamaskModel`.

    Attributes:
        aux_loss: () mean over the layers of the losses of mixers that learn beside the language model; None where there
            are none.
    """

    aux_loss: Tensor | None = None


@dataclass
class DynamaskCausalLMOutput(CausalLMOutputWithPast):
    """Outputs of `DynamaskForCausalLM`.

    Attributes:
        aux_loss: as in `DynamaskModelOutput`; `AUXILIARY_WEIGHT` times it is a part of `loss`.
    """

    aux_loss: Tensor | None = None


def new_cache(config: DynamaskConfig) -> Cache:
    """Make an empty cache of the kinds the layers' mixers decode with: a `BoundedCache` where all are bounded."""
    mixers = [get_mixer(name) for name in config.layer_mixers]
    if all(mixer.bounded for mixer in mixers):
        return BoundedCache(config)
    return LayeredCache(layers=[mixer.cache_layer(config, index) for index, mixer in enumerate(mixers)])


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, config: DynamaskConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute (..., hidden) from (..., hidden)."""
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DynamaskDecoderLayer(nn.Module):
    """Pre-norm residual block: mixer, then feed-forward."""

    def __init__(self, config: DynamaskConfig, layer_idx: int) -> None:
        super().__init__()
        self.mixer: Mixer = get_mixer(config.layer_mixers[layer_idx])(config, layer_idx)
        self.mlp = SwiGLU(config)
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, sequence: SequenceInfo, past_key_values: Cache | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute (B, Nq, hidden), and the mixer's loss () where it has one."""
        mixed = self.mixer(self.mixer_norm(hidden_states), sequence, past_key_values)
        mixed, loss = mixed if isinstance(mixed, tuple) else (mixed, None)
        hidden_states = hidden_states + mixed
        hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return hidden_states if loss is None else (hidden_states, loss)


class DynamaskPreTrainedModel(TensorParallelLoading, SavedAsSafetensors, PreTrainedModel):
    """Loading, saving and initialisation shared by the dynamask models."""

    config_class = DynamaskConfig
    config: DynamaskConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DynamaskDecoderLayer"]  # noqa: RUF012 -- transformers reads a list
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Products in float32 whatever the model's dtype: not to be quantised.
    _keep_in_fp32_modules = ["rank_predictor.down", "gate.delta"]  # noqa: RUF012
    # The mixer is chosen by config.attention, not by attn_implementation; these let any value of it pass.
    _supports_sdpa = True
    _supports_flash_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize = getattr(module, "initialize_parameters", None)
        if initialize is not None:  # parameters a mixer owns itself, outside Linear and RMSNorm
            initialize()


class DynamaskModel(DynamaskPreTrainedModel):
    """The decoder without an output layer."""

    rank_losses: RankLosses | None = None
    """Where a trainer computes the loss, it collects the ranks' losses here, see `training.add_rank_loss`."""

    def __init__(self, config: DynamaskConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DynamaskDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self._built_slopes = deepcopy(config.slopes)
        self.post_init()

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DynamaskModelOutput | tuple:
        """Run the decoder.

        Args:
            input_ids: (B, Nq) int64 tokens, or
            inputs_embeds: (B, Nq, hidden) their embeddings.
            attention_mask: (B, past + Nq), 1 = real token, 0 = padding. None: no padding.
            position_ids: (B, Nq) position of each token in its document. Default: counted, skipping padding.
                Positions that start over mark packed documents; without a mask and a cache positions that rise by
                another step than 1 do so, too, as in transformers.
            past_key_values: a cache to continue from and to update (`cache` since transformers 5.24; both names work).
            use_cache: return a cache; default `config.use_cache` outside training, and never for packed documents.
            segment_ids: (B, Nq) non-decreasing integers of packed documents; default: read off position_ids.
            output_hidden_states: return the (num_hidden_layers + 1) residual streams.
            output_attentions: not available: attention weights are never materialised.
            return_dict: False for a tuple.

        Raises:
            InvalidInputError: both or neither of input_ids and inputs_embeds, no token, a mask of another length,
                packed documents with a cache, a cache made for another model, one that slides, or one left behind by an
                interrupted forward, output_attentions, or a configuration whose slopes were changed after the model was
                built.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InvalidInputError("give exactly one of input_ids and inputs_embeds")
        if not torch.compiler.is_compiling() and self.config.slopes != self._built_slopes:
            raise InvalidInputError(
                f"config.slopes was changed to {self.config.slopes!r} after the model was built with "
                f"{self._built_slopes!r}, and its layers do not see that: build DynamaskForCausalLM(config) and load "
                "the weights into it"
            )
        refuse_attention_weights(output_attentions, self.config)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if hidden_states.shape[1] == 0:
            raise InvalidInputError(
                f"a forward pass needs at least one token per row; got shape {tuple(hidden_states.shape[:2])}"
            )
        check_position_ids(position_ids, *hidden_states.shape[:2])
        learns = self.training and torch.is_grad_enabled()
        # Recomputing a layer in the backward pass would extend its cache twice: with a cache nothing is recomputed.
        checkpoints = self.gradient_checkpointing and learns and past_key_values is None
        split = current_group() is not None
        if split:
            use_cache = _without_cache(past_key_values, use_cache)
        use_cache = cache_of_export(past_key_values, use_cache)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
            if use_cache and past_key_values is None and _packed(attention_mask, position_ids, segment_ids):
                use_cache = False
        if checkpoints and use_cache:
            logger.warning_once("gradient checkpointing computes layers twice: use_cache=True has no effect")
            use_cache = False
        if self.gradient_checkpointing and learns and past_key_values is not None:
            logger.warning_once("gradient checkpointing has no effect in a forward that continues a cache")
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        if past_key_values is not None:
            check_takes_call(past_key_values, *hidden_states.shape[:2])
            check_consistent(past_key_values, self.config.num_hidden_layers)
        sequence = sequence_info(hidden_states, attention_mask, position_ids, segment_ids, past_key_values)
        if past_key_values is not None:
            self._check_holds(past_key_values, hidden_states.shape[1])

        # Once for all layers that rotate by the same angles.
        mixers = [cast(DynamaskDecoderLayer, layer).mixer for layer in self.layers]
        if split and not all(mixer.bounded for mixer in mixers):
            raise InvalidInputError(
                "layers that see every past key cannot be split over processes by their live keys; got "
                f"attention={self.config.attention!r}: context parallelism serves dma and swa"
            )
        angles = mixers[0].angles(sequence, hidden_states.dtype)
        sequence = replace(sequence, angles=angles, learns=learns and past_key_values is None)
        for kind in {type(mixer): mixer for mixer in mixers}.values():
            sequence = kind.prepared(sequence)

        states: tuple[Tensor, ...] = ()
        losses: list[Tensor] = []
        want_states = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        for layer in itertools.islice(self.layers, self.config.num_hidden_layers):  # fewer for an early exit
            if want_states:
                states += (hidden_states,)
            if checkpoints:
                output = self._gradient_checkpointing_func(layer.__call__, hidden_states, sequence)
            else:
                output = layer(hidden_states, sequence, past_key_values=past_key_values)
            if isinstance(output, tuple):
                hidden_states, loss = output
                losses.append(loss)
            else:
                hidden_states = output
        hidden_states = self.norm(hidden_states)
        if want_states:
            states += (hidden_states,)
        aux_loss = _mean(losses)
        if self.rank_losses is not None and aux_loss is not None:
            self.rank_losses.append(aux_loss)
        outputs = DynamaskModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=states or None,
            aux_loss=aux_loss,
            **{CACHE_NAME: past_key_values if use_cache else None},
        )
        return outputs if return_dict is not False else outputs.to_tuple()

    def _check_holds(self, cache: Cache, new: int) -> None:
        """Refuse a cache that keeps other keys than the layers see, as another model's, before a layer writes to it."""
        if not torch.compiler.is_compiling():
            for layer in itertools.islice(self.layers, self.config.num_hidden_layers):
                cast(DynamaskDecoderLayer, layer).mixer.check_cache(cache)
        for index, held, length in dropping_layers(cache, new):
            if index < self.config.num_hidden_layers:
                own = cast(DynamaskDecoderLayer, self.layers[index]).mixer.cache_layer(self.config, index)
                if not getattr(own, "is_sliding", False):
                    raise InvalidInputError(
                        f"{type(cache).__name__} keeps {held} of {length} keys of layer {index}: it slides, as the "
                        "model that it was made for. Use dynamask.models.new_cache(model.config) or DynamicCache()"
                    )


class DynamaskForCausalLM(DynamaskPreTrainedModel, OwnCacheGeneration, GenerationMixin):
    """The decoder with an output layer over the vocabulary."""

    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DynamaskConfig) -> None:
        super().__init__(config)
        self.model = DynamaskModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DynamaskCausalLMOutput | tuple:
        """Compute logits and, with labels, the loss.

        Args:
            labels: (B, Nq) int64; the loss compares the logits at t with the label at t + 1. -100 is ignored. In
                training, `AUXILIARY_WEIGHT` times `aux_loss` is added to it.
            logits_to_keep: compute logits for the last so many positions only (0: all), or at these indices.

        The other arguments are those of `DynamaskModel.forward`.

        Returns:
            logits (B, Nq, vocab_size), and loss, past_key_values and hidden_states where asked for.
        """
        plain = labels is None and inputs_embeds is None and segment_ids is None and use_cache is not False
        plain = plain and not (output_attentions or self.config.output_attentions)
        if plain and not (output_hidden_states or self.config.output_hidden_states) and return_dict is not False:
            logits = decode_by_graph(self, past_key_values, input_ids, attention_mask, position_ids)
            if logits is not None:
                return DynamaskCausalLMOutput(logits=logits, **{CACHE_NAME: past_key_values})
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss, aux_loss = None, outputs.aux_loss
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if aux_loss is not None:
                loss = loss + AUXILIARY_WEIGHT * _share(labels, kwargs) * aux_loss.to(loss)
                if self.model.rank_losses is not None:
                    self.model.rank_losses.drop(aux_loss)
        elif aux_loss is not None and self.model.rank_losses is None:
            logger.warning_once(
                "this model learns ranks in training, by a loss of its own: without labels it is in outputs.aux_loss "
                "alone, and whoever computes the loss must add it. dynamask.training.add_rank_loss(trainer) does so"
            )
        output = DynamaskCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            aux_loss=aux_loss,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )
        return output if return_dict is not False else output.to_tuple()

    def _new_cache(self) -> Cache:
        return new_cache(self.config)


def _mean(losses: list[Tensor]) -> Tensor | None:
    """The mean of the layers' losses, which may be on several devices."""
    if not losses:
        return None
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def _share(labels: Tensor, arguments: dict[str, Any]) -> Tensor | float:
    """The share of this call in a loss that is summed over several: the auxiliary loss is scaled like the other."""
    items = arguments.get("num_items_in_batch")
    if items is None:
        return 1.0
    shifted = arguments.get("shift_labels")
    counted = labels[:, 1:] if shifted is None else shifted
    return (counted != -100).sum() / items


def _packed(attention_mask: Tensor | None, position_ids: Tensor | None, segment_ids: Tensor | None) -> bool:
    """Whether rows hold several documents."""
    if segment_ids is not None:
        return True
    if position_ids is None or position_ids.shape[1] < 2 or torch.compiler.is_compiling():
        return False
    mask = None
    if attention_mask is not None and attention_mask.shape == position_ids.shape:
        mask = attention_mask.to(device=position_ids.device, dtype=torch.bool)
    return packed_segments(position_ids, mask, gaps_split=attention_mask is None) is not None


def _without_cache(cache: Cache | None, use_cache: bool | None) -> bool:
    """Return False: shards of a sequence leave no cache. Refuse one that was asked for."""
    if cache is not None or use_cache:
        raise InvalidInputError(
            "a sequence that is split over processes (context_parallel) leaves no cache: leave past_key_values and "
            "use_cache out"
        )
    return False


def sequence_info(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    cache: Cache | None,
    past: int | None = None,
) -> SequenceInfo:
    """Check the facts about the batch once, and fill in those not given.

    Args:
        hidden_states: (B, Nq, hidden); its shape and device are read.
        attention_mask, position_ids, segment_ids, cache: as in `DynamaskModel.forward`.
        past: positions that the cache holds; None: those of its first layer.

    Raises:
        InvalidInputError: as `DynamaskModel.forward`.
    """
    refuse_onnx_export()
    batch, new = hidden_states.shape[:2]
    if past is None:
        past = int(cache.get_seq_length()) if cache is not None else 0
    device = hidden_states.device

    key_mask = None
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise InvalidInputError(
                f"attention_mask must be (batch, length) with 1 for real tokens; got shape "
                f"{tuple(attention_mask.shape)}. For packed documents pass segment_ids or position_ids."
            )
        if attention_mask.shape != (batch, past + new):
            raise InvalidInputError(
                f"attention_mask covers {tuple(attention_mask.shape)}, expected {(batch, past + new)}: "
                f"{past} cached positions and {new} new ones"
            )
        check_attention_mask(attention_mask)
        key_mask = attention_mask.to(device=device, dtype=torch.bool)
        if looks_allowed() and bool(key_mask.all()):
            key_mask = None  # the unpadded paths are faster

    group = current_group()
    if group is not None:
        if key_mask is not None:
            raise InvalidInputError(
                "padding cannot be split over processes (context_parallel): pack the documents instead"
            )
        given = None if segment_ids is not None or position_ids is None else position_ids.expand(batch, new)
        shards = context_shards(group, batch, new, device, segment_ids=segment_ids, position_ids=given)
        if position_ids is None:
            position_ids = shards.positions(batch, new, device)
        return SequenceInfo(position_ids.expand(batch, new), shards.segment_ids, shards=shards)
    if position_ids is None:
        if key_mask is not None:
            position_ids = (key_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        elif segment_ids is not None:
            position_ids = _positions_in_segments(segment_ids)
        else:
            position_ids = torch.arange(past, past + new, device=device).unsqueeze(0)
    elif segment_ids is None and new > 1 and not (past and torch.compiler.is_compiling()):
        new_mask = None if key_mask is None else key_mask[:, past:]
        gaps_split = attention_mask is None and cache is None
        segment_ids = packed_segments(position_ids.expand(batch, new), new_mask, gaps_split=gaps_split)
    if segment_ids is not None:
        # Keys of several documents in one cache would be seen by whatever comes next. While compiling, segments are
        # there whether documents are packed or not.
        if cache is not None and not torch.compiler.is_compiling():
            raise InvalidInputError(
                "packed documents (segment_ids, or position_ids that start over) cannot use a cache: leave use_cache "
                "and past_key_values out, or run the documents as rows of a padded batch"
            )
        check_segment_ids(segment_ids, batch, new, device)
    length = None if cache is None else past + new
    return SequenceInfo(position_ids.expand(batch, new), segment_ids, key_mask, length)


def _positions_in_segments(segment_ids: Tensor) -> Tensor:
    position = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    opens = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    return position - torch.where(opens, position, 0).cummax(-1).values


# By these names transformers' Trainer knows which models shift their labels (label smoothing).
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["dynamask"] = "DynamaskForCausalLM"
AutoConfig.register("dynamask", DynamaskConfig)
AutoModel.register(DynamaskConfig, DynamaskModel)
AutoModelForCausalLM.register(DynamaskConfig, DynamaskForCausalLM)
