"""Tests of transformers that do not apply to dynamask's models, with the reason of each."""

from __future__ import annotations

import re

REASONS: dict[str, str] = {
    r"Test(Dma|DmaPaper|Swa|Llama|Qwen3|Gemma3)\.test_(past_key_values_format|.*_dict_outputs_use_cache)": (
        "compares the shapes of a cache with (batch, heads, length, dim); a bounded cache is a flat pool of live keys"
    ),
    r"Test(Dma|DmaPaper|Swa|Mha|Mla|Nsa)\.test_(gradient_checkpointing_enable|training_gradient_checkpointing).*": (
        "looks for transformers' GradientCheckpointingLayer; DynamaskModel recomputes its layers itself, see "
        "tests/models/test_transformers_calls.py"
    ),
    r"Test(Dma|DmaPaper|Swa)\.test_assisted_decoding_.*": (
        "compares tokens, then the shapes of the greedy run's cache with (batch, heads, length, dim). Tokens, those of "
        "padded prompts too, are compared in tests/convert/test_ecosystem.py"
    ),
    r"Test(Llama|Qwen3|Gemma3)\.test_(generate_.*static_cache|generate_compilation_all_outputs)": (
        "compares the shapes of a static cache; values carry ranks in further channels, and layers that slide hold "
        "their window. Tokens are compared in tests/convert/test_models.py"
    ),
    r"Test(Mla)\.test_(past_key_values_format|.*_dict_outputs_use_cache|assisted_decoding_.*)": (
        "compares the shapes of a cache with (batch, heads, length, dim); latent attention keeps one vector for all"
    ),
    r"Test(Dma|DmaPaper|Swa|Mha|Mla|Nsa)\.test_model_rope_scaling_from_config_1_dynamic": (
        "refused with a sentence: frequencies that change with the length of the text do not fit the keys of a cache"
    ),
    r"Test(Llama|Qwen3|Gemma3)\.test_assisted_decoding_.*": (
        "sets config._attn_implementation, which converted models refuse, and compares the shapes of a cache. Tokens "
        "are compared in tests/convert/test_ecosystem.py"
    ),
    r"Test(Llama|Qwen3|Gemma3)\.test_generate_compile_model_forward_fullgraph": (
        "wants a DynamicCache in a compiled forward; converted models decode from a bounded cache"
    ),
    r"Test(Llama|Qwen3|Gemma3)\.test_can_set_attention_dynamically": (
        "refused with a sentence: a converted model's attention is part of the model"
    ),
    r"Test(Llama|Qwen3|Gemma3)\.test_inherits_generation_mixin": (
        "looks at the direct bases of the class; a converted class inherits the mixin from its original"
    ),
    r"Test(Llama|Qwen3|Gemma3)\.test_training_gradient_checkpointing_use_reentrant_true": (
        "refused with a sentence: reentrant checkpointing runs layers without gradients, so that ranks would not learn"
    ),
    r"TestCacheExport\.test_dynamic_cache_exportability_multiple_run": (
        "continues a cache with a mask that leaves the past out, which is refused with a sentence"
    ),
    r"TestCacheExport\.test_hybrid_cache_exportability": (
        "exports a static cache, which is refused with a sentence: which slots are filled is known at run time only"
    ),
    r"Test\w+\.test_keep_in_fp32_modules_exist": (
        "wants every module that stays in float32 in every form; gates are in the paper's form alone, rank predictors "
        "in that of learned ranks"
    ),
}
"""Pattern of a test's name, `Class.test` -> why it is skipped."""


def reason(case: str, test: str) -> str | None:
    """Return why a test of a case does not apply, or None."""
    for pattern, why in REASONS.items():
        if re.fullmatch(pattern, f"{case}.{test}"):
            return why
    return None
