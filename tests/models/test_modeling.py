"""DynamaskForCausalLM as a transformers model."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, MistralConfig, StaticCache

from dynamask import BoundedCache, DynamaskConfig, DynamaskForCausalLM, InvalidInputError
from dynamask.errors import UsageError
from dynamask.inspect import parameter_counts
from dynamask.mixers import MIXERS
from dynamask.mixers.base import Mixer
from dynamask.mixers.swa import SlidingWindowAttention
from dynamask.models import PRESETS, new_cache, preset
from dynamask.models.field_names import field_names
from dynamask.models.presets import check_fields
from tests.conftest import tiny_config, tiny_model

IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def test_saves_and_loads(model: DynamaskForCausalLM, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, DynamaskForCausalLM)
    first, second = (m.config.to_dict() | {"_name_or_path": ""} for m in (loaded, model))
    assert first == second
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert AutoConfig.from_pretrained(tmp_path).attention == model.config.attention
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "DynamaskModel"


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"num_beams": 3}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "beam", "sampling", "several"],
)
def test_generates_the_same_with_and_without_cache(model: DynamaskForCausalLM, options: dict) -> None:
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    results = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        results.append(
            model.generate(IDS, attention_mask=mask, max_new_tokens=15, pad_token_id=0, use_cache=use_cache, **options)
        )
    assert torch.equal(*results)


@pytest.mark.parametrize("attention", MIXERS)
def test_gradient_checkpointing_changes_no_gradient(attention: str) -> None:
    model = tiny_model(attention).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def test_outputs_people_ask_for() -> None:
    model = tiny_model("dma")
    output = model(IDS, output_hidden_states=True, logits_to_keep=1)
    assert output.logits.shape == (2, 1, 50)
    assert len(output.hidden_states) == 3
    assert isinstance(model(IDS, return_dict=False), tuple)
    embedded = model(inputs_embeds=model.get_input_embeddings()(IDS)).logits
    torch.testing.assert_close(embedded, model(IDS).logits)


def test_bfloat16_runs_and_scores_stay_float32() -> None:
    model = tiny_model("dma").bfloat16()
    assert model(IDS, labels=IDS).loss.isfinite()
    predictor = model.model.layers[0].mixer.rank_predictor
    assert predictor(torch.randn(1, 5, 32, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.slow
def test_compiles() -> None:
    model = tiny_model("dma").float()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(
        compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 11)}, "attention_mask covers"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 12, 12)}, "must be \\(batch, length\\)"),
        ({"input_ids": IDS, "segment_ids": torch.arange(12).flip(0).expand(2, 12)}, "must not decrease"),
    ],
)
def test_bad_calls_are_named(call: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        tiny_model("dma")(**call)


def test_packed_documents_and_caches() -> None:
    model = tiny_model("dma")
    cache = model(IDS, use_cache=True).past_key_values
    packed = {"segment_ids": torch.arange(12).div(5, rounding_mode="floor").expand(2, 12)}
    starts_over = {"position_ids": torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]).expand(2, 12)}
    expected = model(IDS, use_cache=False, **packed)
    for facts in (packed, starts_over):
        for given in ({"past_key_values": cache}, {"past_key_values": new_cache(model.config)}, {"use_cache": True}):
            with pytest.raises(InvalidInputError, match="cannot use a cache"):
                model(IDS, **given, **facts)
        # By default there is none.
        output = model(IDS, **facts)
        assert output.past_key_values is None
        torch.testing.assert_close(output.logits, expected.logits)


@torch.no_grad()
def test_positions_that_rise_are_one_document() -> None:
    """A gap or another step beside a mask or a cache is none between documents."""
    model = tiny_model("dma")
    ids, ones = IDS[:1], torch.ones_like(IDS[:1])
    positions = torch.cat([torch.arange(6), 2 * torch.arange(5, 11)])[None]
    whole = model(ids, position_ids=positions, segment_ids=torch.zeros_like(ids)).logits
    assert (model(ids, position_ids=positions).logits - whole).abs().max() > 0.01
    for given in ({"attention_mask": ones, "use_cache": False}, {"use_cache": True}):
        torch.testing.assert_close(model(ids, position_ids=positions, **given).logits, whole)
    cache = new_cache(model.config)
    parts = [
        model(ids[:, a:b], attention_mask=ones[:, :b], position_ids=positions[:, a:b], past_key_values=cache)
        for a, b in ((0, 4), (4, 12))
    ]
    torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), whole)


@torch.no_grad()
def test_packed_documents_with_padding_are_separate_documents() -> None:
    model = tiny_model("dma")
    ids = IDS[:1]
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0]])
    positions = torch.tensor([[1, 1, 0, 1, 2, 1, 0, 1, 2, 3, 1, 1]])
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for a, b in ((2, 5), (6, 10)):
        torch.testing.assert_close(logits[:, a:b], model(ids[:, a:b]).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "flash"}, "attention must be one of dma"),
        ({"attention": ["dma"]}, "one for each of the 2 layers; got 1"),
        ({"windows": 0}, "at least 1"),
        ({"ranking": "attention"}, "ranking must be one of learned, paper"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"head_dim": 7}, "must be even"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1; got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"hidden_size": -1}, "hidden_size must be at least 1; got -1"),
        ({"attention": "mla", "mla": {"kv_lora_rang": 8}}, "did you mean 'kv_lora_rank'"),
        ({"nsa": {"window": 0}}, "at least 1; got 0"),
        ({"window": 6}, "window: use windows"),
        ({"recency": 0.1}, "ranks are learned from the hidden state"),
    ],
)
def test_bad_configurations_are_named(fields: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        tiny_config(**fields)


def test_attention_weights_are_refused_in_words() -> None:
    with pytest.raises(InvalidInputError, match="attention weights are never materialised"):
        tiny_model("dma")(IDS, output_attentions=True)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_fair(name: str) -> None:
    counts = parameter_counts(name)
    assert max(abs(count / counts["mha"] - 1) for count in counts.values()) < 0.02


@pytest.mark.parametrize("rank", [None, 64, 96, 128])
def test_mla_is_as_large_as_mha_whatever_its_query_rank(rank: int | None) -> None:
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in DynamaskForCausalLM(preset("tiny", **fields)).model.layers.parameters())
            for fields in ({"attention": "mla", "mla": {"q_lora_rank": rank}}, {"attention": "mha"})
        ]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02


def test_largest_preset_has_qwen3s_shape() -> None:
    config = preset("1.7b")
    shape = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert (shape, heads) == ((2048, 6144, 28, 151_936), (16, 8, 128))


def test_unknown_presets_and_fields_name_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'tiny'"):
        preset("tinny")
    with pytest.raises(UsageError, match="did you mean 'windows'"):
        preset("tiny", windw=3)
    with pytest.raises(UsageError, match="did you mean 'windows'"):
        check_fields(["hidden_size", "windw"])


def test_names_of_fields_read_from_source_are_those_of_the_class() -> None:
    assert sorted(field_names() or ()) == sorted(field.name for field in dataclasses.fields(DynamaskConfig))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("windows", "abc", "windows must be an integer or a list; got 'abc'"),
        ("hidden_size", "x", "hidden_size must be int; got 'x'"),
        ("hidden_size", True, "hidden_size must be int; got True"),
        ("local", "low", "local must be a number"),
        ("attention", 3, "attention must be a name or a list of names; got 3"),
        ("mla", 3, "mla must be a mapping; got 3"),
    ],
)
def test_model_fields_of_the_wrong_kind_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        preset("tiny", **{field: value})


def test_model_fields_of_the_right_kind_pass() -> None:
    config = preset("tiny", rope_theta=500, local=None, mla={"q_lora_rank": 8}, tie_word_embeddings=False)
    assert (config.rope_theta, config.local, config.mla["q_lora_rank"]) == (500, 32, 8)


def test_fields_given_survive_a_round_trip() -> None:
    config = DynamaskConfig(windows=64, local=3, sinks=0, mixer_options={"a": [1]}, nsa={"block_size": 8})
    again = DynamaskConfig.from_dict(config.to_dict())
    names = ("windows", "local", "sinks", "mixer_options", "nsa", "mla", "rope_parameters")
    assert [getattr(again, name) for name in names] == [getattr(config, name) for name in names]


@pytest.mark.parametrize("attention", ["dma", "mha", "swa"])
def test_one_compiled_graph_serves_every_layer(attention: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(attention, num_hidden_layers=3).train()
    tokens = torch.randint(0, 50, (2, 24))
    expected = model(tokens, labels=tokens, use_cache=False).loss
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True, dynamic=False)
    actual = model(tokens, labels=tokens, use_cache=False).loss
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, list(model.parameters())), wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize("attention", ["mha", "dma", "swa", "mla"])
@torch.no_grad()
def test_unwritten_slots_of_a_static_cache_are_not_seen(attention: str) -> None:
    model = tiny_model(attention).eval()
    tokens = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = model(tokens, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=32)
    parts = [
        model(tokens[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 12), (12, 19), (19, 20))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


@torch.no_grad()
def test_a_call_that_one_layer_refuses_leaves_all_layers() -> None:
    """What does not fit is told of all layers before the first one writes."""
    tokens = torch.cat([IDS, IDS], 1)[:, :14]
    model, sliding, mixed = tiny_model("dma"), tiny_model("swa"), tiny_model(["dma", "mha"])
    ranks = {"local": model.config.local, "sinks": model.config.sinks}
    recent = {"local": 6 - sliding.config.sinks, "sinks": sliding.config.sinks}
    static = StaticCache(config=model.config, max_cache_len=20)
    model(tokens, past_key_values=static)
    cases = [
        (model, BoundedCache(windows=[6, 14], **ranks), 2, "made for windows 14"),
        (sliding, BoundedCache(windows=[6, 14], **recent), 2, "made for windows 14"),
        (mixed, BoundedCache(windows=[6, 6], **ranks), 2, r"layer 1 \(.*\) sees every past key"),
        (model, static, 2, "has room for 20 positions; it holds 14 and was given 14"),
        (model, static, 1, "holds 2 sequences and was given 1"),
    ]
    for taken, cache, rows, message in cases:
        before = [int(layer.get_seq_length()) for layer in cache.layers]
        with pytest.raises(InvalidInputError, match=message):
            taken(tokens[:rows], past_key_values=cache)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == before, message
    with pytest.raises(InvalidInputError, match="must be a cache of transformers or dynamask; got tuple"):
        model(tokens, past_key_values=((torch.zeros(2, 2, 3, 8),) * 2,) * 2)
    for wrong in (torch.arange(3)[None], torch.arange(14), torch.zeros(2, 1), torch.zeros(3, 14)):
        with pytest.raises(InvalidInputError, match="position_ids must be of shape"):
            model(tokens, position_ids=wrong)


@pytest.mark.parametrize("bounded", [True, False])
def test_mixers_that_check_no_cache_get_bounded_layers_where_they_take_them(
    bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixer of one's own says by `bounded` whether it does; its forward compares windows, or it does not."""
    model = tiny_model("swa")
    monkeypatch.setattr(SlidingWindowAttention, "check_cache", Mixer.check_cache)
    cache = BoundedCache(model.config)
    monkeypatch.setattr(SlidingWindowAttention, "bounded", bounded)
    with nullcontext() if bounded else pytest.raises(InvalidInputError, match="sees every past key"):
        model(IDS, past_key_values=cache)
    assert cache.get_seq_length() == (12 if bounded else 0)


@pytest.mark.parametrize("attention", MIXERS)
@torch.no_grad()
def test_caches_that_slide_by_positions_are_refused(attention: str) -> None:
    model, tokens = tiny_model(attention), IDS[:1]
    shape = MistralConfig(num_hidden_layers=model.config.num_hidden_layers, sliding_window=6)
    whole = model(tokens, use_cache=False).logits
    for cache in (DynamicCache(config=shape), StaticCache(config=shape, max_cache_len=40)):
        read = [model(tokens[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 4), (4, 6))]
        torch.testing.assert_close(torch.cat(read, 1), whole[:, :6])
        with pytest.raises(InvalidInputError, match="keeps 6 of 7 keys of layer 0: it slides"):
            model(tokens[:, 6:7], past_key_values=cache, use_cache=True)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [6] * len(cache.layers)


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"at least one token per row; got shape \(2, 0\)"):
        tiny_model()(IDS[:, :0])
    for shape in ((2, 0), (0, 5)):
        with pytest.raises(InvalidInputError, match=r"generate\(\) needs at least one row and one token"):
            tiny_model("dma").generate(torch.zeros(shape, dtype=torch.long), max_new_tokens=2)
