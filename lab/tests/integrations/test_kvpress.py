"""The product's press for kvpress. It stands here because the laboratory knows how to import kvpress beside a newer
transformers (`dynamask_lab.studies.conversion.peers`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynamask import InvalidInputError, convert
from dynamask.mixers import RankPredictor

if importlib.util.find_spec("kvpress") is None:
    pytest.skip("needs kvpress: pip install --no-deps kvpress==0.5.5", allow_module_level=True)

WINDOWS = [[6, 12], [20, 9]]
LENGTH = 32
IDS = torch.arange(LENGTH)[None] * 7 % 50


def dense_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def press_class() -> Iterator[Any]:
    from dynamask_lab.studies.conversion import peers

    functions = dict(ALL_ATTENTION_FUNCTIONS.items())
    peers.load()
    from dynamask.integrations.kvpress import DynamaskPress

    yield DynamaskPress
    for name, function in functions.items():  # kvpress has wrapped them, for other tests too
        ALL_ATTENTION_FUNCTIONS[name] = function


@pytest.fixture(scope="module")
def dense() -> Any:
    return dense_model()


@pytest.fixture(scope="module")
def converted(dense: Any) -> Any:
    model = convert.upcycle(dense, 4, local=2, sinks=1).eval()
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, RankPredictor):
            torch.nn.init.normal_(module.down.weight, std=1.0)
    convert.set_windows(model, WINDOWS)
    convert.set_slopes(model, [[0.01, 0.0], None])
    model.config.trained_ranks = True
    return model


@pytest.fixture(scope="module")
def ranks(converted: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(convert.save_ranks(converted, tmp_path_factory.mktemp("ranks") / "ranks.safetensors"))


def compressed(model: Any, press: Any) -> Any:
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model(IDS, past_key_values=cache)
    return cache


def rows(keys: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(round(float(x), 5) for x in key) for key in keys}


def test_the_first_layer_keeps_what_the_converted_model_keeps(
    dense: Any, converted: Any, ranks: Path, press_class: Any
) -> None:
    cache = compressed(dense, press_class(ranks=ranks, head_windows=True))
    with torch.no_grad():
        bounded: Any = converted(IDS, use_cache=True).past_key_values
    layer = bounded.layers[0]  # later ones read what other masks made
    for head, window in enumerate(WINDOWS[0]):
        kept = rows(layer.keys[0, layer.offsets[head] : layer.offsets[head + 1]])
        assert rows(cache.layers[0].keys[0, head, :window]) == kept
        assert len(kept) == window
    assert [each.keys.shape[2] for each in cache.layers] == [12, 20], "the widest head of each layer"
    masked = dense.model.layers[0].self_attn.masked_key_indices
    assert set(zip(masked[1].tolist(), masked[2].tolist(), strict=True)) == {(0, place) for place in range(6, 12)}
    with torch.no_grad():
        logits = dense(IDS[:, :1], past_key_values=cache, position_ids=torch.tensor([[LENGTH]])).logits
    assert bool(logits.isfinite().all())


def test_a_compression_ratio_keeps_the_same_number_in_all_heads(dense: Any, ranks: Path, press_class: Any) -> None:
    cache = compressed(dense, press_class(ranks=ranks, compression_ratio=0.5))
    assert [layer.keys.shape[2] for layer in cache.layers] == [LENGTH // 2] * 2
    whole = compressed(dense, press_class(ranks=ranks))
    assert whole.layers[0].keys.shape[2] == LENGTH
    first, newest = rows(whole.layers[0].keys[0, 0, :1]), rows(whole.layers[0].keys[0, 0, -2:])
    assert first | newest <= rows(cache.layers[0].keys[0, 0])


def test_files_of_other_models_are_refused(dense: Any, ranks: Path, press_class: Any, tmp_path: Path) -> None:
    def apply(model: Any, **settings: Any) -> None:
        with press_class(compression_ratio=0.5, **settings)(model):
            pass

    with pytest.raises(InvalidInputError, match="other weights"):
        apply(dense_model(seed=5), ranks=ranks)
    with pytest.raises(InvalidInputError, match="needs ranks=FILE"):
        apply(dense)
    with pytest.raises(InvalidInputError, match="there is no file"):
        apply(dense, ranks=tmp_path / "nosuch.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"xxxx")
    with pytest.raises(InvalidInputError, match="damaged"):
        apply(dense, ranks=tmp_path / "damaged.safetensors")
