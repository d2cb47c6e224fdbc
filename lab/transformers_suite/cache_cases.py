"""Converted models in transformers' own tests of caches; `run.py` copies this file beside these.

The tests that generate texts take SmolLM2-135M-Instruct, in a folder that the variable SMOLLM2_INSTRUCT names. A
converted copy with windows wider than these texts must write what the dense model does. Tests of `torch.export` take
tiny models. What remains of that file tests transformers' caches by themselves, without a model.
"""

from __future__ import annotations

import os
import types
import unittest
from typing import Any
from unittest import mock

import torch
import transformers

from dynamask import convert

from ..utils import test_cache_utils as original
from .skipped import reason

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


class _Reasons:
    def setUp(self) -> None:
        why = reason(type(self).__name__, self._testMethodName)  # type: ignore[attr-defined]
        if why is not None:
            self.skipTest(why)  # type: ignore[attr-defined]


class TestCacheGeneration(_Reasons, original.CacheIntegrationTest):
    """Every test runs with the dense model, then with the converted one: equal texts."""

    @classmethod
    def setUpClass(cls) -> None:
        folder = os.environ.get("SMOLLM2_INSTRUCT")
        if not folder:
            raise unittest.SkipTest("SMOLLM2_INSTRUCT names no folder of SmolLM2-135M-Instruct")
        cls.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        if cls.tokenizer.pad_token is None:
            cls.tokenizer.pad_token = cls.tokenizer.eos_token
        cls.dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        cls.converted = convert.upcycle(cls.dense, 64, local=16, sinks=2)

    def setUp(self) -> None:
        super().setUp()
        self.texts: list[list[str]] = []
        self.model = self.dense
        getattr(self, self._testMethodName)()
        self.expected, self.texts, self.model = self.texts, [], self.converted

    def assertListEqual(self, found: Any, expected: Any, msg: Any = None) -> None:
        """Remember what a model wrote, in place of comparing it with the texts of the hub's own weights."""
        self.texts.append(found)

    def tearDown(self) -> None:
        assert self.expected
        assert repr(self.texts) == repr(self.expected)


def _tiny(name: str, *args: Any, **kwargs: Any) -> Any:
    """Stand in for a tiny model of the hub: a converted one of its architecture, whose ranks choose."""
    torch.manual_seed(0)
    dense: Any
    if "Gemma3" in name:
        config = transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6)
        dense = transformers.Gemma3ForCausalLM(config)
    elif "Mistral" in name:
        dense = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=None))
    else:
        raise AssertionError(f"the suite asks for another model: {name}")
    model = convert.upcycle(dense.eval(), 6, local=2, sinks=1)
    for index in model.config.ranked_layers:
        torch.nn.init.normal_(model.model.layers[index].self_attn.rank_predictor.down.weight)
    return model


def _tokenizer(*args: Any, **kwargs: Any) -> Any:
    tokens = torch.arange(3, 14)[None]
    return lambda *args, **kwargs: types.SimpleNamespace(input_ids=tokens, attention_mask=torch.ones_like(tokens))


class TestCacheExport(_Reasons, original.CacheExportIntegrationTest):
    def setUp(self) -> None:
        super().setUp()
        for name, made in (("AutoModelForCausalLM", _tiny), ("AutoTokenizer", _tokenizer)):
            patch = mock.patch.object(getattr(original, name), "from_pretrained", made)
            patch.start()
            self.addCleanup(patch.stop)
