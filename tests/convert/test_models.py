"""Converted models compute what the originals do, choose beyond their windows, and survive saving and loading."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from dynamask import BoundedCache, DynamaskConfig, InvalidInputError, convert
from dynamask.convert.architectures import reason_not_convertible
from dynamask.convert.attention import IMPLEMENTATION
from tests.conftest import random_ranks


def _without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {each: value for each, value in fields.items() if each != name}


DENSE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "llama": lambda s: hf.LlamaForCausalLM(hf.LlamaConfig(**s)),
    "mistral": lambda s: hf.MistralForCausalLM(hf.MistralConfig(**s, sliding_window=None)),
    "mistral-sliding": lambda s: hf.MistralForCausalLM(hf.MistralConfig(**s, sliding_window=12)),
    "qwen2": lambda s: hf.Qwen2ForCausalLM(hf.Qwen2Config(**s)),
    "qwen2-mixed": lambda s: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**s, use_sliding_window=True, sliding_window=10, max_window_layers=1)
    ),
    "qwen3": lambda s: hf.Qwen3ForCausalLM(hf.Qwen3Config(**s, head_dim=8)),
    "smollm3": lambda s: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**s, no_rope_layers=[1, 0])),
    "gemma2": lambda s: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**s, head_dim=8, attn_logit_softcapping=None, sliding_window=10)
    ),
    "gemma3": lambda s: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**s, head_dim=8, sliding_window=10, layer_types=["sliding_attention", "full_attention"])
    ),
    "phi3": lambda s: hf.Phi3ForCausalLM(hf.Phi3Config(**s, sliding_window=None)),
    "granite": lambda s: hf.GraniteForCausalLM(hf.GraniteConfig(**s, attention_multiplier=0.2)),
    "gpt_neox": lambda s: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_without(s, "num_key_value_heads"))),
    "olmo2": lambda s: hf.Olmo2ForCausalLM(hf.Olmo2Config(**s)),
}
CHOOSING = [name for name in DENSE if name != "mistral-sliding"]


def tokens_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 300, (rows, length))


@torch.no_grad()
def test_positions_that_rise_are_one_document(llama: Any) -> None:
    """Gaps and other steps split a row where transformers' models split it: with neither a mask nor a cache."""
    dense = llama.double()
    sparse = convert.upcycle(dense, window=64, local=2, sinks=1).double().eval()
    ids = tokens_of(1, 20)
    ones = torch.ones_like(ids)
    for positions in (torch.cat([torch.arange(10), torch.arange(15, 25)]), torch.arange(20) / 2):
        facts: dict[str, Any] = {"position_ids": positions[None]}
        split = dense(ids, use_cache=False, **facts).logits
        torch.testing.assert_close(sparse(ids, use_cache=False, **facts).logits, split)
        whole = dense(ids, attention_mask=ones, **facts).logits
        assert (whole - split).abs().max() > 0.1
        torch.testing.assert_close(sparse(ids, attention_mask=ones, use_cache=False, **facts).logits, whole)
        cache = BoundedCache(sparse.config)
        parts = [
            sparse(ids[:, a:b], attention_mask=ones[:, :b], position_ids=positions[None, a:b], past_key_values=cache)
            for a, b in ((0, 5), (5, 20))
        ]
        torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), whole)
    torch.testing.assert_close(sparse(ids, use_cache=True, **facts).logits, whole)
    packed = torch.arange(10).repeat(2)[None]
    apart = torch.cat([sparse(part).logits for part in ids.split(10, 1)], 1)
    for given in ({}, {"attention_mask": ones}):
        torch.testing.assert_close(sparse(ids, position_ids=packed, **given).logits, apart)


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_within_its_windows_it_is_the_dense_model(name: str, shape: dict[str, Any]) -> None:
    dense = DENSE[name](shape).double().eval()
    sdpa = bool(type(dense)._supports_sdpa)  # not Gemma 2's in transformers 5.24
    if sdpa:
        dense.set_attn_implementation("sdpa")
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    converted = random_ranks(convert.upcycle(dense, 48, local=8, sinks=2))
    tokens = tokens_of(2, 40)
    close = {"atol": 1e-5, "rtol": 1e-5}  # some norms of transformers are float32 in a float64 model
    torch.testing.assert_close(converted(tokens).logits, dense(tokens).logits, **close)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    padded, expected = (model(tokens, attention_mask=mask).logits for model in (converted, dense))
    assert bool(padded.isfinite().all())
    torch.testing.assert_close(padded[0], expected[0], **close)
    if sdpa:  # eager attention of that release gives NaN behind padding in float64
        torch.testing.assert_close(padded[1, 9:], expected[1, 9:], **close)
    position_ids = torch.cat([torch.arange(15), torch.arange(25)])[None].expand(2, -1)
    packed, expected = (m(tokens, position_ids=position_ids, use_cache=False).logits for m in (converted, dense))
    torch.testing.assert_close(packed, expected, **close)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert type(dense) is not type(converted)


@pytest.mark.parametrize("name", CHOOSING)
@torch.no_grad()
def test_beyond_its_windows_cached_equals_uncached_and_the_ranks_decide(name: str, shape: dict[str, Any]) -> None:
    model = convert.upcycle(DENSE[name](shape).double().eval(), 12, local=4, sinks=2)
    model.config.trained_ranks = True
    tokens = tokens_of(2, 40)
    untrained = model(tokens, use_cache=False).logits
    whole = random_ranks(model)(tokens, use_cache=False).logits
    assert (whole - untrained).abs().max() > 1e-3
    for cache in (DynamicCache(), model._new_cache()):
        parts = [model(tokens[:, :18], past_key_values=cache, use_cache=True).logits]
        parts += [model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(18, 24)]
        parts += [model(tokens[:, 24:], past_key_values=cache, use_cache=True).logits]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=1e-6)
    # Causal: what follows changes nothing.
    torch.testing.assert_close(model(tokens[:, :30], use_cache=False).logits, whole[:, :30], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_window_per_head_padding_with_holes_and_packing(llama: Any) -> None:
    model = random_ranks(convert.upcycle(llama.double(), 12, local=4, sinks=2))
    convert.set_windows(model, [[9, 15], [24, 6]])
    tokens = tokens_of(2, 40)
    whole = model(tokens, use_cache=False).logits
    packed_positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    both = torch.cat([tokens[:1, :15], tokens[1:, :25]], 1)
    packed = model(both, position_ids=packed_positions).logits
    torch.testing.assert_close(packed[0, :15], whole[0, :15])
    torch.testing.assert_close(packed[0, 15:], whole[1, :25])
    # Padding between packed documents: the second starts at position 0.
    between, mask = torch.cat([tokens[:1, :15], tokens[:1, :4], tokens[1:, :25]], 1), torch.ones(1, 44).long()
    mask[0, 15:19] = 0
    positions = torch.cat([torch.arange(15), torch.ones(4).long(), torch.arange(25)])[None]
    packed = model(between, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[0, :15], whole[0, :15])
    torch.testing.assert_close(packed[0, 19:], whole[1, :25])
    # A hole is as if its tokens were not there.
    mask, positions = torch.ones(1, 46).long(), torch.zeros(1, 46).long()
    mask[0, :3], mask[0, 20:23] = 0, 0
    holes = tokens_of(1, 46)
    holes[mask.bool()] = tokens[0]
    positions[mask.bool()] = torch.arange(40)
    holed = model(holes, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(holed[0, mask[0].bool()], whole[0])
    for cache in (DynamicCache(), model._new_cache()):
        parts = [
            model(
                holes[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            ).logits
            for start, end in ((0, 21), (21, 22), (22, 30), (30, 31), (31, 46))
        ]
        torch.testing.assert_close(torch.cat(parts, 1)[0, mask[0].bool()], whole[0])


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2-mixed", "gpt_neox"])
@torch.no_grad()
def test_saves_loads_and_generates(name: str, shape: dict[str, Any], tmp_path: Any) -> None:
    model = random_ranks(convert.upcycle(DENSE[name](shape).double().eval(), 12, local=4, sinks=2))
    heads = [9, 15] * (model.config.num_key_value_heads // 2)
    windows = [heads if layer in model.config.ranked_layers else None for layer in range(2)]
    convert.set_windows(model, windows if None not in windows else [w or [10] * len(heads) for w in windows])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(model)
    assert loaded.config.head_windows == model.config.head_windows
    tokens = tokens_of(2, 16)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "attention_mask": mask}
    greedy = loaded.generate(tokens, **options)
    assert torch.equal(greedy, loaded.generate(tokens, use_cache=False, **options))
    assert torch.equal(greedy, loaded.generate(tokens, past_key_values=DynamicCache(), **options))


@torch.no_grad()
def test_a_whole_model_is_pickled(llama: Any, tmp_path: Any) -> None:
    model = random_ranks(convert.upcycle(llama, 12, local=4, sinks=2))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(loaded) is type(model)
    tokens = tokens_of(2, 30)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_a_static_cache_carries_ranks(llama: Any) -> None:
    model = random_ranks(convert.upcycle(llama.double(), 12, local=4, sinks=2))
    tokens = tokens_of(1, 16)
    greedy = model.generate(tokens, max_new_tokens=12, do_sample=False)
    cache = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(greedy, model.generate(tokens, max_new_tokens=12, do_sample=False, past_key_values=cache))


@torch.no_grad()
def test_caches_that_slide_by_positions_refuse_padding_inside_of_a_row(shape: dict[str, Any]) -> None:
    dense = DENSE["mistral-sliding"](shape | {"num_hidden_layers": 1}).double().eval()
    model = convert.upcycle(dense, window=12, local=2, sinks=1).double().eval()
    ids = tokens_of(2, 30)
    left, hole = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :5], hole[1, 6:10] = 0, 0

    def run(mask: torch.Tensor, cache: Any) -> torch.Tensor:
        ends = [16, 17, 30]
        cuts = zip([0, *ends], ends, strict=False)
        calls = [model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits for a, b in cuts]
        return torch.cat(calls, 1)[mask.bool()]

    whole = model(ids, attention_mask=left, use_cache=False).logits[left.bool()]
    torch.testing.assert_close(run(left, DynamicCache(config=model.config)), whole)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        with pytest.raises(InvalidInputError, match="counts padding inside of a row"):
            run(hole, cache)
        assert cache.get_seq_length() == 16, "the call that was refused has written nothing"


@torch.no_grad()
@pytest.mark.parametrize("call", ["model", "decoder"])
def test_a_refused_call_leaves_every_layer_of_a_cache_that_slides(shape: dict[str, Any], call: str) -> None:
    model = convert.upcycle(DENSE["gemma3"](shape).double().eval(), window=12, local=2, sinks=1).double().eval()
    run = model if call == "model" else model.model
    ids = tokens_of(2, 30)
    mistral = hf.MistralConfig(**shape, sliding_window=10)  # its second layer slides, too, and the model's ranks
    for cache in (DynamicCache(config=mistral), StaticCache(config=mistral, max_cache_len=40)):
        run(ids[:, :16], past_key_values=cache)
        before = [(int(layer.get_seq_length()), layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        with pytest.raises(InvalidInputError, match="of 17 keys of layer 1, which chooses its keys itself"):
            run(ids[:, 16:17], past_key_values=cache)
        for layer, (length, keys, values) in zip(cache.layers, before, strict=True):
            assert int(layer.get_seq_length()) == length
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)


def _held(cache: Any) -> list[Any]:
    """Lengths and copies of the tensors of a cache."""
    tensors = [[getattr(layer, name, None) for name in ("keys", "values", "ranks", "clock")] for layer in cache.layers]
    copies = [[None if each is None else each.clone() for each in layer] for layer in tensors]
    return [[int(layer.get_seq_length()), *copy] for layer, copy in zip(cache.layers, copies, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("call", ["model", "decoder"])
@pytest.mark.parametrize("new", [1, 20])
def test_a_call_that_one_layer_refuses_leaves_all_layers(llama: Any, new: int, call: str) -> None:
    """What does not fit is told of all layers before the first one writes."""
    model = random_ranks(convert.upcycle(llama, 12, local=4, sinks=2))
    first_dense, last_dense = (
        random_ranks(convert.upcycle(llama, 12, local=4, sinks=2, dense_layers=[layer])) for layer in (0, 1)
    )
    rules = {"local": 4, "sinks": 2}
    begun, other_slopes, by_dense = BoundedCache(model.config), BoundedCache(model.config), DynamicCache()
    for cache in (begun, other_slopes):
        model(tokens_of(2, 20), past_key_values=cache)
    llama(tokens_of(2, 20), past_key_values=by_dense)
    steep = random_ranks(convert.upcycle(llama, 12, local=4, sinks=2))
    convert.set_slopes(steep, [[0, 0], [0.1, 0]])
    static = StaticCache(config=model.config, max_cache_len=20)
    model(tokens_of(2, 20), past_key_values=static)
    cases = [
        (model, BoundedCache(windows=[12, 16], **rules), 2, "made for windows 16"),
        (last_dense, BoundedCache(windows=[12, 12], **rules), 2, "layer 1 is dense"),
        (steep, other_slopes, 2, "slopes were changed"),
        (first_dense, by_dense, 2, "keys that have no ranks"),
        (model, static, 2, "has room for 20 positions; it holds 20"),
        *((model, cache, 3, "holds 2 sequences and was given 3") for cache in (begun, static, by_dense)),
    ]
    for taken, cache, rows, message in cases:
        if call == "decoder" and ("sequences" in message or "room" in message):
            continue  # the causal LM looks at these
        before = _held(cache)
        with pytest.raises(InvalidInputError, match=message):
            (taken if call == "model" else taken.model)(tokens_of(rows, new), past_key_values=cache)
        for one, other in zip(before, _held(cache), strict=True):
            assert one[0] == other[0], message
            for was, now in zip(one[1:], other[1:], strict=True):
                assert (was is None) == (now is None), message
                assert was is None or torch.equal(was, now), message
    with pytest.raises(InvalidInputError, match="must be a cache of transformers or dynamask; got tuple"):
        model(tokens_of(2, 2), past_key_values=((torch.zeros(2, 2, 3, 8),) * 2,) * 2)


@torch.no_grad()
def test_layers_left_dense(llama: Any) -> None:
    dense = llama.double()
    same = convert.upcycle(dense, 8, local=2, sinks=1, dense_layers=range(-2, 0))
    tokens = tokens_of(2, 40)
    torch.testing.assert_close(same(tokens).logits, dense(tokens).logits)
    half = random_ranks(convert.upcycle(dense, 8, local=2, sinks=1, dense_layers=[-1]))
    assert half.config.head_windows == ((8, 8), None)
    assert half.model.layers[1].self_attn.rank_predictor is None
    whole = half(tokens, use_cache=False).logits
    assert (whole - dense(tokens).logits).abs().max() > 1e-3
    cache = half._new_cache()
    parts = [half(tokens[:, :20], past_key_values=cache).logits, half(tokens[:, 20:], past_key_values=cache).logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_an_untrained_model_says_so_once(llama: Any) -> None:
    model = convert.upcycle(llama, 12, local=4, sinks=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens_of(1, 12))
    with pytest.warns(UserWarning, match=r"untrained: beyond 12 tokens .*learn_ranks"):
        model(tokens_of(1, 13))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens_of(1, 14))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_training_predictors_learn_beside_the_model(llama: Any, checkpointing: bool) -> None:
    model = random_ranks(convert.upcycle(llama, 12, local=4, sinks=2)).train()
    model.config.trained_ranks = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = tokens_of(2, 40)
    outputs = model(tokens, labels=tokens)
    torch.testing.assert_close(outputs.loss, model.loss_function(outputs.logits, tokens, 300) + outputs.aux_loss)
    outputs.loss.backward()
    assert model.config.trained_ranks
    predictor = model.model.layers[0].self_attn.rank_predictor
    assert predictor.up.weight.grad.abs().max() > 0
    # The auxiliary loss scales with the loss it belongs to, and moves nothing but the predictors.
    expected = predictor.down.weight.grad.clone()
    embedding = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    (model(tokens, labels=tokens).loss * 0).backward()
    assert predictor.down.weight.grad.abs().max() == 0
    model.zero_grad()
    model.config.rank_loss_weight = 0.0
    model(tokens, labels=tokens).loss.backward()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, embedding)
    assert predictor.down.weight.grad is None or predictor.down.weight.grad.abs().max() == 0
    assert expected.abs().max() > 0


def test_parts_of_a_batch_add_up_to_its_auxiliary_loss(llama: Any) -> None:
    model = random_ranks(convert.upcycle(llama, 12, local=4, sinks=2)).train()
    tokens = tokens_of(4, 40)
    items = torch.tensor(4 * 39)
    tokens[1:] = tokens[:1]  # some rows of a batch teach the ranks: let them be alike
    whole = model(tokens, labels=tokens, num_items_in_batch=items).loss
    parts = sum(model(part, labels=part, num_items_in_batch=items).loss for part in tokens.split(1))
    torch.testing.assert_close(parts, whole)


def test_label_smoothing_shifts_the_labels(llama: Any) -> None:
    from transformers.trainer import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model = convert.upcycle(llama, 12, local=4, sinks=2)
    assert model._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def test_what_cannot_be_served_is_refused(llama: Any) -> None:
    model = random_ranks(convert.upcycle(llama, 12, local=4, sinks=2))
    tokens = tokens_of(1, 20)
    with pytest.raises(InvalidInputError, match="continuous batching"):
        model.generate_batch([[5, 6, 7]])
    with pytest.raises(InvalidInputError, match="output_attentions"):
        model(tokens, output_attentions=True)
    with pytest.raises(InvalidInputError, match="sdpa"):
        model.set_attn_implementation("sdpa")
    model.config._attn_implementation = "eager"
    with pytest.raises(InvalidInputError, match="eager"):
        model(tokens)
    model.config._attn_implementation = IMPLEMENTATION
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 0)
    cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 1)
    with pytest.raises(InvalidInputError, match="keys that have no ranks"):
        model(tokens, past_key_values=cache)
    with pytest.raises(InvalidInputError, match="attention_mask must be"):
        model(tokens, attention_mask=torch.ones(1, 19))
    model.train().gradient_checkpointing_enable()
    with pytest.raises(InvalidInputError, match="gradient checkpointing drops"):
        model(tokens, past_key_values=cache)
    model.gradient_checkpointing_disable()
    greedy = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(greedy, model.eval().generate(tokens, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("shape_of_input", [(0, 5), (2, 0), (0, 0)])
def test_empty_batches_are_refused(llama: Any, shape_of_input: tuple[int, int]) -> None:
    model = random_ranks(convert.upcycle(llama, 12, local=4, sinks=2))
    empty = torch.zeros(shape_of_input, dtype=torch.long)
    begun = BoundedCache(model.config)
    model(tokens_of(2, 20), past_key_values=begun)
    before = [layer.keys.clone() for layer in begun.layers]
    calls: dict[str, Callable[[], Any]] = {
        "ids": lambda: model(empty),
        "embeddings": lambda: model(inputs_embeds=torch.zeros(*shape_of_input, 32)),
        "labels": lambda: model(empty, labels=empty),
        "cache": lambda: model(empty, past_key_values=begun),
        "decoder": lambda: model.model(empty),
        "generate": lambda: model.generate(empty, max_new_tokens=2),
    }
    for name, call in calls.items():
        with pytest.raises(InvalidInputError, match="at least one row and one token in each; got") as refused:
            call()
        assert str(shape_of_input)[:-1] in str(refused.value), name
    assert begun.get_seq_length() == 20
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(begun.layers, before, strict=True))


def test_windows_are_checked(llama: Any) -> None:
    model = convert.upcycle(llama, 12, local=4, sinks=2)
    for wrong, message in (
        ([12], "each of the 2 layers; got 1"),
        ([[12, 12, 12], 12], "one per key/value head"),
        ([5, 12], "local . sinks must be at most"),
        ([None, 12], "dense layer"),
        ([12.0, 12], "must be an integer"),
        ("12", "must be an integer"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            convert.set_windows(model, wrong)
        assert model.config.windows == 12


@pytest.mark.parametrize("form", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_numbers_of_arrays_and_tensors_are_saved(form: Any, llama: Any, tmp_path: Any) -> None:
    model = convert.upcycle(llama, form(12), local=form(4), sinks=form(2), dense_layers=form([0]))
    assert model.config.windows == [None, 12]
    model = convert.upcycle(llama, form(12), local=form(4), sinks=form(2))
    convert.set_windows(model, form([[8, 9], [10, 11]]))
    convert.set_slopes(model, form([[0.5, 0.25], [0.0, 1.0]]))
    model.save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert config.head_windows == ((8, 9), (10, 11))
    assert config.head_slopes == ((0.5, 0.25), (0.0, 1.0))
    native = DynamaskConfig(num_hidden_layers=2, num_key_value_heads=2, windows=form([[8, 9], [10, 11]]), local=form(2))
    assert DynamaskConfig.from_dict(json.loads(native.to_json_string())).windows == [[8, 9], [10, 11]]


def test_a_model_converted_by_0_1_loads_with_a_message(llama: Any, tmp_path: Any) -> None:
    model = convert.upcycle(llama, 12, local=4, sinks=2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    for name in ("windows", "sinks", "trained_ranks", "rank_predictor_width", "rank_loss_weight"):
        fields.pop(name)
    fields |= {"window": 12, "local": 6, "layer_windows": [12, 12], "layer_locals": [6, 6], "ranking": "attention"}
    file.write_text(json.dumps(fields))
    with pytest.warns(UserWarning, match="dynamask 0.1"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.head_windows == ((12, 12), (12, 12))
    assert (loaded.config.local, loaded.config.sinks, loaded.config.trained_ranks) == (6, 0, False)


def test_reasons_are_given(shape: dict[str, Any]) -> None:
    config = hf.Gemma2Config(**shape)
    assert "attn_logit_softcapping=50" in str(reason_not_convertible(config))
    with pytest.raises(InvalidInputError, match="attn_logit_softcapping"):
        convert.upcycle(hf.Gemma2ForCausalLM(config), 12, local=4, sinks=2)
    assert "sink in every head" in str(reason_not_convertible(hf.GptOssConfig()))
    assert "Supported: gemma2" in str(reason_not_convertible(hf.GPT2Config()))


def test_gpt_neox_goes_through_the_whole_conversion(shape: dict[str, Any], tmp_path: Any) -> None:
    """Its modules have other names: `attention` with one projection, `gpt_neox` for the decoder."""
    dense = DENSE["gpt_neox"](shape | {"initializer_range": 0.1}).eval()
    model = convert.upcycle(dense, 12, local=4, sinks=2, copy_weights=True)
    blocks = [tokens_of(4, 48)]
    losses = convert.learn_ranks(model, blocks, steps=3)
    assert losses[-1] < losses[0]
    windows = convert.allocate_windows(model, blocks, 16, method="loss")
    assert 8 <= sum(map(sum, windows)) / 8 <= 16
    convert.distill(model, dense, blocks, steps=1)
    file = convert.save_ranks(model, tmp_path / "ranks.safetensors")
    again = convert.upcycle(dense, 12, local=4, sinks=2)
    convert.load_ranks(again, file)
    assert again.config.head_windows == model.config.head_windows
    assert (again(blocks[0]).logits - dense(blocks[0]).logits).abs().max() > 1e-4
