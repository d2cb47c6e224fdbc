"""`DynamaskConfig`: a Qwen3-shaped decoder whose attention is chosen by name."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from dynamask.errors import InvalidInputError
from dynamask.models.layer_windows import resolved_windows
from dynamask.models.rope_layers import resolved_rope_layers
from dynamask.ops.checks import check_window

SCORE_FORMS = ("exp", "linear")
GATE_INITS = ("gate", "delta")
RANKINGS = ("score", "attention")


@strict
class DynamaskConfig(PreTrainedConfig):
    r"""Configuration of a dynamask language model.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU feed-forward.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: query heads H.
        num_key_value_heads: key/value heads G; H is a multiple of G.
        head_dim: width of a head, D.
        max_position_embeddings: longest context the model is meant for, in tokens. Not enforced.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: whether the output layer shares the embedding's weights.
        attention: "dma", "mha", "swa", "mla", "nsa", or a name given to `dynamask.mixers.register`.
        window: keys each query keeps (dma, swa), at least 1.
        local: dma: how many of them are the newest positions; None: half the window. 0 is the paper's form.
        recency: dma: initial recency slope per position, learned; None: 1 / window. 0 is the paper's form.
        recency_spread: dma, and `distance_penalty`: how far the heads' initial slopes are spread, geometrically as
            ALiBi's: from recency · spread (a head nearly of a sliding window) to recency / spread (one nearly ruled by
            content). 1: all alike.
        score_form: dma: "exp" (paper) or "linear" (later released code).
        gate_init: dma: which factor of the score starts at zero. "gate": A, Delta random (the paper's); "delta": Delta,
            with A = 1, so that the first step already says which contents to keep. Untrained, both slide.
        rank_noise: dma, in training only: Gumbel noise of this scale on the ranks (not on the logits), so that now and
            then a query sees keys that the gates would have dropped. Scale 1 samples the kept keys in proportion to
            exp(score). 0: none.
        rank_recency: dma: slope of the ranks per position, where it is not to be that of the logits; None: the same. A
            flatter one lets small differences of score keep keys for long; 0: content alone ranks. With
            ranking="attention", where it is learned, what it starts from.
        ranking: dma: "score": what ranks the keys is added to their logits (paper). "attention": ranks of their own,
            which learn how much attention keys get, from a few queries per batch that look at everything; needs a
            rank_recency or recency to start from.
        rank_power: dma, with ranking="attention": the ranks learn the attention to this power. 1: who gets most of it
            in all. 4: who is looked at sharply, if only now and then, as what a text later asks for is; for models that
            attend already (upcycled, or begun with a wide window), since attention still diffuse misleads it.
        distance_penalty: mha, swa: initial slope of a learned penalty per position of distance on the logits, the same
            that dma's recency adds to them; 0: none.
        layer_attention: attention of each layer, where they differ: num_hidden_layers names. None: `attention` in all.
        layer_windows: window of each layer, where they differ: num_hidden_layers integers, of which mha's are not read,
            or "uneven": `window` on average, one layer in six wide and the others narrow (`uneven_windows`), which has
            done far better than `window` everywhere. `local` and all slopes are then those of a layer whose window is
            `window`; the others' go with their own. None: `window` in all.
        rope_layers: which layers rotate queries and keys by their positions (RoPE): num_hidden_layers booleans, or
            "narrow": those that look no further than `window`, so that a layer that looks far finds by content alone,
            at distances that training has never shown, too. Of mla, what is left out is the rotation of the shared
            key. None: all.
        kv_lora_rank, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: mla's dimensions; None:
            chosen so that the model has as many parameters as with mha (`dynamask report parameters`).
        nsa_block_size, nsa_block_counts, nsa_window: nsa's block length, selected blocks per query and sliding
            window; None: chosen so that a query sees about `window` keys in all.

    Raises:
        InvalidInputError: values that contradict each other, named.
    """

    model_type = "dynamask"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 -- transformers adds lists to it

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    attention: str = "dma"
    window: int = 1024
    local: int | None = None
    recency: float | None = None
    recency_spread: float = 1.0
    score_form: str = "exp"
    gate_init: str = "gate"
    rank_noise: float = 0.0
    rank_recency: float | None = None
    ranking: str = "score"
    rank_power: float = 1.0
    distance_penalty: float = 0.0
    layer_attention: list[str] | None = None
    layer_windows: list[int] | str | None = None
    rope_layers: list[bool] | str | None = None

    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None

    nsa_block_size: int | None = None
    nsa_block_counts: int | None = None
    nsa_window: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        from dynamask.mixers import get_mixer

        mixers = [get_mixer(name) for name in dict.fromkeys([self.attention, *(self.layer_attention or [])])]
        if self.layer_attention is not None:
            if len(self.layer_attention) != self.num_hidden_layers:
                raise InvalidInputError(
                    f"layer_attention names the attention of each of the {self.num_hidden_layers} layers; got "
                    f"{len(self.layer_attention)} names"
                )
            if "mla" in self.layer_attention and set(self.layer_attention) != {"mla"}:
                raise InvalidInputError(
                    "mla rotates fewer dimensions than the other mixers, and all layers share their angles: "
                    "layer_attention cannot mix it with others"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InvalidInputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InvalidInputError(f"head_dim must be even for rotary embeddings; got {self.head_dim}")
        if self.score_form not in SCORE_FORMS:
            raise InvalidInputError(f"score_form must be one of {', '.join(SCORE_FORMS)}; got {self.score_form!r}")
        if self.gate_init not in GATE_INITS:
            raise InvalidInputError(f"gate_init must be one of {', '.join(GATE_INITS)}; got {self.gate_init!r}")
        if self.ranking not in RANKINGS:
            raise InvalidInputError(f"ranking must be one of {', '.join(RANKINGS)}; got {self.ranking!r}")
        check_window(self.window, 0)
        if self.local is None:
            self.local = self.window // 2
        check_window(self.window, self.local)
        self.layer_windows = resolved_windows(self.layer_windows, self.num_hidden_layers, self.window)
        if self.layer_windows is not None and "nsa" in self.layer_mixers:
            raise InvalidInputError("nsa takes the same window in all layers: leave layer_windows out")
        self.rope_layers = resolved_rope_layers(self.rope_layers, self.layer_mixers, self.layer_windows, self.window)
        if self.recency is None:
            self.recency = 1.0 / self.window
        if self.recency < 0:
            raise InvalidInputError(f"recency is a slope and cannot be negative; got {self.recency}")
        if self.recency_spread < 1:
            raise InvalidInputError(
                f"recency_spread is a factor of at least 1 (1: no spread); got {self.recency_spread}"
            )
        if self.ranking == "attention" and not (self.recency if self.rank_recency is None else self.rank_recency):
            raise InvalidInputError(
                'ranking="attention" learns the slope of the ranks from a first one: give rank_recency > 0, or none '
                f"and recency > 0; got {self.rank_recency} and {self.recency}"
            )
        if self.rank_power <= 0:
            raise InvalidInputError(f"rank_power is a power above 0 (1: attention as it is); got {self.rank_power}")
        for name in ("rank_noise", "rank_recency", "distance_penalty"):
            if (getattr(self, name) or 0.0) < 0:
                raise InvalidInputError(f"{name} cannot be negative (0: none); got {getattr(self, name)}")
        for mixer in mixers:
            default_dimensions = getattr(mixer, "default_dimensions", None)
            if default_dimensions is not None:
                for name, value in default_dimensions(self).items():
                    if getattr(self, name) is None:
                        setattr(self, name, value)
        super().__post_init__(**kwargs)

    @property
    def layer_mixers(self) -> list[str]:
        """The attention of each layer."""
        return self.layer_attention or [self.attention] * self.num_hidden_layers

    @property
    def layer_locals(self) -> list[int] | None:
        """Of each layer's window, how many keys are the newest ones; None where all layers have one window."""
        if self.layer_windows is None:
            return None
        assert self.local is not None
        assert not isinstance(self.layer_windows, str)  # resolved when the configuration was made
        return [
            window if mixer == "swa" else self.local * window // self.window
            for mixer, window in zip(self.layer_mixers, self.layer_windows, strict=True)
        ]
