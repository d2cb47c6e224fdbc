"""Configurations saved by dynamask 0.1: their fields in today's terms, where today's model computes the same."""

from __future__ import annotations

from typing import Any

from dynamask.errors import InvalidInputError

_LEARNED = 'ranks are learned from the hidden state now (ranking="learned")'
_MLA = "give it in mla={...}"
_NSA = "give it in nsa={...}, without the prefix nsa_"

REMOVED = {
    "window": "use windows",
    "layer_windows": "use windows=[...] (dynamask.models.uneven_windows makes uneven ones)",
    "layer_attention": "use attention=[...]",
    "recency": _LEARNED,
    "recency_spread": _LEARNED,
    "rank_noise": _LEARNED,
    "rank_recency": _LEARNED,
    "rank_power": _LEARNED,
    "gate_init": 'the gates of ranking="paper" start as in the paper',
    "score_form": 'ranking="paper" is the paper\'s exponential form',
    "distance_penalty": "removed",
    "rope_layers": "removed",
    "kv_lora_rank": _MLA,
    "q_lora_rank": _MLA,
    "qk_nope_head_dim": _MLA,
    "qk_rope_head_dim": _MLA,
    "v_head_dim": _MLA,
    "nsa_block_size": _NSA,
    "nsa_block_counts": _NSA,
    "nsa_window": _NSA,
}
"""Field of 0.1 -> what to use now."""

_WINDOW = 1024  # 0.1's default, which it did not save
_LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_BLOCKS = ("nsa_block_size", "nsa_block_counts", "nsa_window")


def fields_of_0_1(old: dict[str, Any], attention: Any, local: int | None) -> dict[str, Any]:
    """Translate the attention fields of a configuration saved by dynamask 0.1.

    Args:
        old: those of `REMOVED` that were saved, and `ranking` where it was "attention".
        attention: its `attention`.
        local: its `local`.

    Returns:
        Fields of today's `DynamaskConfig` under which the saved weights give the same outputs.

    Raises:
        InvalidInputError: an attention that today's models do not have; the message names the fields.
    """
    mixers = old.get("layer_attention") or attention
    names = set(mixers) if isinstance(mixers, list) else {mixers}
    unlike = {"distance_penalty": old.get("distance_penalty"), "rope_layers": old.get("rope_layers")}
    if isinstance(unlike["rope_layers"], list) and all(unlike["rope_layers"]):
        del unlike["rope_layers"]
    window = old.get("window", _WINDOW)
    if "dma" in names:
        # 0.1 derived these two where they were not given, and saved what it derived.
        unlike["recency"] = old.get("recency", 1.0 / window)
        unlike["local"] = window // 2 if local is None else local
        unlike["rank_recency"] = old.get("rank_recency")
        unlike["ranking"] = old.get("ranking")
        if old.get("score_form", "exp") != "exp":
            unlike["score_form"] = old["score_form"]
    unlike = {name: value for name, value in unlike.items() if value}
    if unlike:
        given = ", ".join(f"{name}={value!r}" for name, value in unlike.items())
        raise InvalidInputError(
            f"this model was saved by dynamask 0.1 with {given}, which dynamask 0.2 no longer has: keys are ranked by "
            'the hidden state (ranking="learned") or by the paper\'s scores alone (ranking="paper"). Use dynamask 0.1 '
            "for this model, or train it anew"
        )
    fields: dict[str, Any] = {
        "attention": mixers,
        "windows": old.get("layer_windows") or window,
        "local": 0,
        "sinks": 0,
        "ranking": "paper",
    }
    if "mla" in names:
        fields["mla"] = {name: old[name] for name in _LATENT if old.get(name) is not None}
    if "nsa" in names:
        fields["nsa"] = {name.removeprefix("nsa_"): old[name] for name in _BLOCKS if old.get(name) is not None}
    return fields
