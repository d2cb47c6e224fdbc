"""`DynamaskConfig`: a Qwen3-shaped decoder whose attention is chosen by name."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from dynamask.errors import InvalidInputError, did_you_mean
from dynamask.integers import plain_numbers
from dynamask.mixers import get_mixer
from dynamask.mixers.head_shard import HeadShard
from dynamask.mixers.rotary import check_rope_parameters
from dynamask.models.auto_code import CarriesAutoCode
from dynamask.models.saved_by_0_1 import REMOVED, fields_of_0_1
from dynamask.models.windows import (
    check_kept_keys,
    checked_slopes,
    default_local,
    default_sinks,
    resolved_head_windows,
)

RANKINGS = ("learned", "paper")

_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
_SUB_CONFIGURATIONS = ("mla", "nsa")


@strict
class DynamaskConfig(CarriesAutoCode, PreTrainedConfig):
    r"""Configuration of a dynamask language model.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU feed-forward.
        num_hidden_layers: number of decoder layers, L.
        num_attention_heads: query heads H.
        num_key_value_heads: key/value heads G; H is a multiple of G.
        head_dim: width of a head, D.
        max_position_embeddings: longest context the model is meant for, in tokens. Not enforced.
        rope_theta: base of the rotary frequencies, where `rope_parameters` does not give one.
        rope_parameters: rotary embeddings as in transformers' Qwen3: {"rope_type": "default", "linear", "yarn" or
            "llama3", ...}. None: default frequencies of base `rope_theta`.
        rms_norm_eps: added to the mean square.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: whether the output layer shares the embedding's weights.
        attention: "dma", "mha", "swa", "mla", "nsa", or a name given to `dynamask.mixers.register`; one for all
            layers, or a list of L names.
        windows: keys that each query keeps (dma, swa), at least 1: one number, a list of one per layer, or a list of
            one list of G numbers per layer.
        local: dma: newest positions that are kept whatever their rank. None: half the smallest window, at most 128;
            with ranking="paper" 0.
        sinks: dma, swa: first positions of each document that are kept whatever their rank; they count towards the
            window. None: 4, or a quarter of the smallest window where that is less; with ranking="paper" 0.
        ranking: dma: what ranks the keys. "learned": a small network on the layer's hidden state, trained to predict
            future attention (`dynamask.mixers.RankPredictor`). "paper": the scores of arXiv 2508.02124, which are
            added to the logits; without `local` and `sinks`.
        slopes: dma with ranking="learned": how much the ranks of each head rise per token, in nats, so that a key loses
            against newer ones as it ages. None: not at all; or a list of one entry per layer, each None or a list of G
            numbers (`dynamask.mixers.rank_predictor.sloped_ranks`). Layers of other attention do not read theirs. Build
            a new model to change them: one that exists refuses to run.
        mixer_options: options of mixers that were registered by others, by name; dynamask's mixers read none.
        mla: dimensions of mla: kv_lora_rank, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim. What is left
            out is chosen so that the model has as many parameters as with mha.
        nsa: dimensions of nsa: block_size, block_counts (selected blocks per query) and window (of the sliding branch).
            What is left out is chosen so that a query sees about `windows` keys in all.

    Raises:
        InvalidInputError: values that contradict each other, named; a configuration saved by dynamask 0.1 whose
            attention no longer exists.
    """

    model_type = "dynamask"
    auto_module = "dynamask.models"
    base_model_tp_plan = {  # noqa: RUF012 -- transformers adds to it
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.o_proj": "rowwise",
        "layers.*.mixer.rank_predictor.down": "colwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache", "aux_loss"]  # noqa: RUF012 -- transformers adds to it

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rope_theta: float | int = 1_000_000.0
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    attention: str | list[str] = "dma"
    windows: int | list[int | list[int]] = 1024
    local: int | None = None
    sinks: int | None = None
    ranking: str = "learned"
    slopes: list[list[float] | None] | None = None
    mixer_options: dict | None = None

    mla: dict | None = None
    nsa: dict | None = None

    def auto_classes(self) -> dict[str, str]:
        """See `CarriesAutoCode`."""
        return {
            "AutoConfig": "DynamaskConfig",
            "AutoModel": "DynamaskModel",
            "AutoModelForCausalLM": "DynamaskForCausalLM",
        }

    def __post_init__(self, **kwargs: Any) -> None:
        self._take_over_0_1(kwargs)
        for name in ("windows", "local", "sinks", "slopes"):  # tensors and arrays, which a saved configuration lacks
            setattr(self, name, plain_numbers(getattr(self, name)))
        self._check_shape()
        names = self.layer_mixers
        if len(names) != self.num_hidden_layers:
            raise InvalidInputError(
                f"attention is one name, or one for each of the {self.num_hidden_layers} layers; got {len(names)} names"
            )
        for name in dict.fromkeys(names):
            get_mixer(name)
        if self.ranking not in RANKINGS:
            raise InvalidInputError(f"ranking must be one of {', '.join(RANKINGS)}; got {self.ranking!r}")
        smallest = min(min(windows) for windows in self.head_windows)
        paper = self.ranking == "paper"
        if self.local is None:
            self.local = 0 if paper else default_local(smallest)
        if self.sinks is None:
            self.sinks = 0 if paper else default_sinks(smallest)
        if paper and (self.local or self.sinks):
            raise InvalidInputError(
                f'ranking="paper" keeps the best-scored keys alone; got local={self.local} and sinks={self.sinks}. '
                'Leave them out, or use ranking="learned"'
            )
        check_kept_keys(smallest, self.local, self.sinks)
        if any(self.head_slopes) and paper:
            raise InvalidInputError(
                'ranking="paper" ranks by the scores alone: slopes are for ranking="learned". Leave them out'
            )
        if any(self.head_slopes) and not any(get_mixer(name).ranks_keys for name in names):
            raise InvalidInputError(
                f"slopes raise the ranks of keys, and no layer ranks any: attention is {self.attention!r}. Leave "
                'slopes out, or use attention="dma"'
            )
        self._fill_sub_configurations()
        super().__post_init__(**kwargs)
        check_rope_parameters(self)
        self.rope_theta = self.rope_parameters["rope_theta"]  # type: ignore[index]

    @property
    def layer_mixers(self) -> list[str]:
        """Return the attention of each layer."""
        return [self.attention] * self.num_hidden_layers if isinstance(self.attention, str) else list(self.attention)

    @property
    def head_windows(self) -> tuple[tuple[int, ...], ...]:
        """Return the keys that each query keeps, L x G; of a model split by tensor parallelism, this process's G."""
        windows = resolved_head_windows(self.windows, self.num_hidden_layers, self.num_key_value_heads)
        shard: HeadShard | None = self.__dict__.get("_head_shard")
        return windows if shard is None else tuple(shard.of(layer) for layer in windows)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, without the heads that this process holds."""
        fields: dict[str, Any] = super().to_dict()
        fields.pop("_head_shard", None)
        return fields

    @property
    def head_slopes(self) -> tuple[tuple[float, ...] | None, ...]:
        """Return how much ranks rise per token, L x G; None for a layer whose ranks do not rise."""
        slopes = checked_slopes(self.slopes, self.num_hidden_layers, self.num_key_value_heads)
        shard: HeadShard | None = self.__dict__.get("_head_shard")
        return slopes if shard is None else tuple(None if layer is None else shard.of(layer) for layer in slopes)

    @property
    def budget(self) -> float | None:
        """Return the mean window over the KV heads of bounded layers; None where no layer is bounded."""
        kept = [
            window
            for name, windows in zip(self.layer_mixers, self.head_windows, strict=True)
            if get_mixer(name).bounded
            for window in windows
        ]
        return sum(kept) / len(kept) if kept else None

    def bounded_cache_layers(self) -> list[Any]:
        """Make the empty layers of a `BoundedCache` for this model.

        Raises:
            InvalidInputError: a layer's mixer does not keep a bounded number of keys.
        """
        from dynamask.mixers import get_mixer

        for name in self.layer_mixers:
            if not get_mixer(name).bounded:
                raise InvalidInputError(
                    "a bounded cache serves mixers that keep a bounded number of keys; this model has attention "
                    f"{name!r}, whose queries see every past key: use dynamask.models.new_cache(config) or DynamicCache"
                )
        return [get_mixer(name).cache_layer(self, index) for index, name in enumerate(self.layer_mixers)]

    def dense_layers(self, context: int) -> list[str]:
        """Describe the layers whose windows hold the whole context, so that their attention is dense.

        Args:
            context: length of the texts, in tokens.

        Returns:
            A message for each such layer, in the order of the layers.
        """
        found = []
        for index, (name, windows) in enumerate(zip(self.layer_mixers, self.head_windows, strict=True)):
            if get_mixer(name).bounded and min(windows) >= context:
                found.append(f"layer {index} sees {min(windows)} of {context}: dense")
        return found

    def _take_over_0_1(self, kwargs: dict[str, Any]) -> None:
        """Translate the fields of a configuration saved by dynamask 0.1."""
        old = {name: kwargs.pop(name) for name in list(kwargs) if name in REMOVED}
        if not old:
            return
        if self.transformers_version is None:  # not from a file
            names = "; ".join(f"{name}: {REMOVED[name]}" for name in old)
            raise InvalidInputError(f"fields of dynamask 0.1 that DynamaskConfig no longer has. {names}")
        if self.ranking == "attention":
            old["ranking"] = self.ranking
        for name, value in fields_of_0_1(old, self.attention, self.local).items():
            setattr(self, name, value)

    def _check_shape(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.intermediate_size < 0:  # 0: no feed-forward
            raise InvalidInputError(f"intermediate_size must be at least 0; got {self.intermediate_size}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InvalidInputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InvalidInputError(f"head_dim must be even for rotary embeddings; got {self.head_dim}")

    def _fill_sub_configurations(self) -> None:
        for mixer in (get_mixer(name) for name in dict.fromkeys([*self.layer_mixers, *_SUB_CONFIGURATIONS])):
            name = mixer.sub_configuration
            if name is None:
                continue
            given = getattr(self, name) or {}
            derived = mixer.default_dimensions(self, given)
            for key, value in given.items():
                if key not in derived:
                    raise InvalidInputError(
                        f"{name} has no dimension {key!r}{did_you_mean(key, derived)}; it has {', '.join(derived)}"
                    )
                if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                    raise InvalidInputError(f"{name}[{key!r}] must be an integer of at least 1; got {value!r}")
            if given or any(get_mixer(each) is mixer for each in self.layer_mixers):
                setattr(self, name, derived)
