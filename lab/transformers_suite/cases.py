"""dynamask's models as cases of transformers' own test classes; `run.py` copies this file beside these.

A window of few keys, so that the texts of the tests overflow it.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import dynamask
from dynamask.convert.models import converted_classes

from ..generation.test_utils import GenerationTesterMixin
from ..test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from .skipped import reason

# By these names the tests know models without a loss.
MODEL_MAPPING_NAMES["dynamask"] = "DynamaskModel"

SHAPE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS: dict[str, Any] = {"windows": 5, "local": 2, "sinks": 1}


class Tester:
    """What transformers' test classes ask of a model: a small configuration and inputs."""

    __test__ = False
    batch_size, seq_length = 3, 9
    is_training = True
    hidden_size = SHAPE["hidden_size"]
    num_hidden_layers = SHAPE["num_hidden_layers"]
    num_attention_heads = SHAPE["num_attention_heads"]
    vocab_size = SHAPE["vocab_size"]

    def __init__(self, parent: Any) -> None:
        self.parent = parent

    def get_config(self) -> Any:
        return self.parent.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        tokens = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = random_attention_mask([self.batch_size, self.seq_length])
        return self.get_config(), {"input_ids": tokens, "attention_mask": mask}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class Case(ModelTesterMixin, GenerationTesterMixin):
    """The tests of one form."""

    has_attentions = False
    test_resize_embeddings = True
    _is_stateful = False

    def config(self) -> Any:
        raise NotImplementedError

    def setUp(self) -> None:
        why = reason(type(self).__name__, self._testMethodName)  # type: ignore[attr-defined]
        if why is not None:
            self.skipTest(why)  # type: ignore[attr-defined]
        self.model_tester = Tester(self)
        super_setup = getattr(super(), "setUp", None)
        if super_setup is not None:
            super_setup()


class Native(Case):
    """`DynamaskForCausalLM` with one of its mixers."""

    all_model_classes = (dynamask.DynamaskModel, dynamask.DynamaskForCausalLM)
    all_generative_model_classes = (dynamask.DynamaskForCausalLM,)
    attention: Any = "dma"
    options: dict[str, Any] = WINDOWS

    def config(self) -> Any:
        return dynamask.DynamaskConfig(attention=self.attention, **SHAPE, **self.options)


class Converted(Case):
    """A causal LM of transformers with the attention of `upcycle`."""

    architecture = "llama"
    options: dict[str, Any] = {}  # noqa: RUF012

    @property
    def all_model_classes(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (converted_classes(self.architecture)[1],)

    all_generative_model_classes = all_model_classes

    def config(self) -> Any:
        return converted_classes(self.architecture)[0](**SHAPE, **WINDOWS, **self.options)


class TestDma(Native, unittest.TestCase):
    pass


class TestDmaPaper(Native, unittest.TestCase):
    options = {"windows": 5, "ranking": "paper"}  # noqa: RUF012


class TestSwa(Native, unittest.TestCase):
    attention, options = "swa", {"windows": 5, "sinks": 1}


class TestMha(Native, unittest.TestCase):
    attention, options = "mha", {}


class TestMla(Native, unittest.TestCase):
    attention, options = "mla", {}


class TestNsa(Native, unittest.TestCase):
    attention, options = "nsa", {}


class TestLlama(Converted, unittest.TestCase):
    pass


class TestQwen3(Converted, unittest.TestCase):
    architecture = "qwen3"


class TestGemma3(Converted, unittest.TestCase):
    architecture = "gemma3_text"
    options = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}  # noqa: RUF012


del Case, Native, Converted
