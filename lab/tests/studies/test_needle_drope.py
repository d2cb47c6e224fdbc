"""The lever `drope`, from its training to the model that is tested: windows, causality, positions, cache, and reach."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamask.cache import BoundedCache
from dynamask.data import train_tokenizer
from dynamask.evaluation.retrieval import Haystack, make_example
from dynamask.mixers import dma
from dynamask.models import DynamaskConfig, DynamaskForCausalLM
from dynamask_lab.language.data import CORPORA_FOLDER
from dynamask_lab.language.engine import STATE_FOLDER
from dynamask_lab.studies.needle import study
from dynamask_lab.studies.needle.forced import _likeliest, forced_scores
from dynamask_lab.studies.needle.levers import UnrotatedDynamicMask, lever_mixers
from dynamask_lab.studies.needle.study import NeedleConfig, run_needle

WINDOWS = [6, 40]
CONTEXT = 440


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DynamaskForCausalLM, DynamaskForCausalLM, Any]]:
    """The model that a run with the lever tests, the one it began with, and their tokenizer."""
    found: dict[str, Any] = {}

    def keep(settings: NeedleConfig, folder: Path, corpus: str, name: str, *rest: Any) -> Any:
        found["tested"] = DynamaskForCausalLM.from_pretrained(folder).eval()
        found["tokenizer"] = study.mixture_tokenizer(corpus)
        return own(settings, folder, corpus, name, *rest)

    def kept(config: Any, progress: Any, initial: Path | None = None) -> Any:
        result, folder = own_kept(config, progress, initial)
        if initial is None:
            found["first"] = DynamaskForCausalLM.from_pretrained(folder).eval()
            found["first steps"] = config["steps"]
        return result, folder

    own, own_kept = study._test, study.kept_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CORPORA_FOLDER, str(tmp_path_factory.mktemp("corpora")))
        patch.setenv(STATE_FOLDER, str(tmp_path_factory.mktemp("state")))
        patch.setattr(study, "_test", keep)
        patch.setattr(study, "kept_run", kept)
        shape = {"layers": 2, "width": 32, "heads": 2, "groups": 1, "feed_forward": 48, "vocab_size": 1024}
        data = {"text_tokens": 20_000, "shortest": 220, "context": CONTEXT, "batch_tokens": CONTEXT}
        test = {"tasks": ["single_needle"], "lengths": [256, 880], "depths": [0.0], "samples": 2, "forced": True}
        sparse = {"attention": "dma", "ranking": "learned", "window": 23, "layer_windows": WINDOWS, "local": 4}
        config = NeedleConfig(**{**shape, **data, **test, **sparse, "sinks": 1, "lever": "drope", "steps": 10}).plain()
        result = run_needle(config, lambda share, note: None)
        assert found["first steps"] == 8, "a fifth of the steps is without rotary embedding"
        assert [score["length"] for score in result["scores"]] == [256, 880]
        yield found["tested"], found["first"], found["tokenizer"]


def test_the_tested_model_keeps_its_windows_at_every_length(tested: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = tested
    assert {type(layer.mixer) for layer in model.model.layers} == {UnrotatedDynamicMask}
    kept: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, expiry: Tensor, **other: Any) -> Tensor:
        kept.append(expiry)
        return own(query, key, value, expiry, **other)

    own = dma.attend
    monkeypatch.setattr(dma, "attend", attend)
    for length in (CONTEXT // 2, CONTEXT, 2 * CONTEXT, 8 * CONTEXT):
        kept.clear()
        with torch.no_grad():
            model.model(input_ids=torch.randint(1024, (1, length)), use_cache=False)
        found = [int((expiry.clamp(max=length) - torch.arange(length)).sum()) for expiry in kept]
        assert found == [sum(min(place + 1, window) for place in range(length)) for window in WINDOWS]


def test_the_tested_model_does_not_see_the_future(tested: Any) -> None:
    model, _, _ = tested
    tokens = torch.randint(1024, (2, 2 * CONTEXT))
    for place in (50, CONTEXT, 2 * CONTEXT - 1):
        changed = tokens.clone()
        changed[:, place:] = torch.randint(1024, (2, 2 * CONTEXT - place))
        with torch.no_grad():
            first, second = (model(input_ids=each, use_cache=False).logits for each in (tokens, changed))
        torch.testing.assert_close(first[:, :place], second[:, :place])
        assert not torch.equal(first[:, place:], second[:, place:])


def test_the_tested_model_has_no_rotary_embedding(tested: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rotation does to heads changes what the model says that the run began with, and nothing in the tested."""
    tokens = torch.randint(1024, (1, 200))

    def logits(of: DynamaskForCausalLM) -> Tensor:
        with torch.no_grad():
            return of(input_ids=tokens, use_cache=False).logits

    before = [logits(model) for model in tested[:2]]
    monkeypatch.setattr("dynamask.mixers.base.rotate", lambda heads, angles: torch.zeros_like(heads))
    torch.testing.assert_close(logits(tested[0]), before[0], rtol=0, atol=0)
    assert (logits(tested[1]) - before[1]).abs().max() > 1e-3


def test_forced_scores_are_those_of_decoding_from_the_bounded_cache(tested: Any) -> None:
    """Behind prompts longer than every window and than the trained length, token by token."""
    model, _, tokenizer = tested
    haystack = Haystack(tokenizer, None)
    for length in (256, 2 * CONTEXT):
        example = make_example("single_needle", tokenizer, length, 0.3, "decode", haystack=haystack)
        cache = BoundedCache(model.config)
        made: list[int] = []
        with torch.no_grad():
            logits = torch.cat(
                [
                    model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
                    for token in example.prompt
                ],
                1,
            )
            whole = model(input_ids=torch.tensor([example.prompt]), use_cache=False).logits
            torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
            while len(made) < len(example.answer):
                made.append(int(logits[0, -1].argmax()))
                logits = model(input_ids=torch.tensor([made[-1:]]), past_key_values=cache, use_cache=True).logits
        decoded = type(example)(example.task, example.prompt, made, example.values, example.depth, example.position)
        assert _likeliest(model, [decoded]) == [made]


@pytest.mark.parametrize("task", ["single_needle", "multi_key"])
def test_haystacks_beyond_the_trained_length_hold_the_answer_once(task: str) -> None:
    """Every model is asked the same, whatever its form: the example follows from seed, task, length and depth alone."""
    tokenizer = train_tokenizer(["A room of ledgers, each with a number of its own. " * 30], 400)
    haystack = Haystack(tokenizer, None)
    for length, depth in itertools.product((1024, 4096, 8192), (0.0, 0.5, 1.0)):
        example = make_example(task, tokenizer, length, depth, "0 1", haystack=haystack)
        again = make_example(task, tokenizer, length, depth, "0 1", haystack=Haystack(tokenizer, None))
        assert (again.prompt, again.answer) == (example.prompt, example.answer)
        assert len(example.prompt) + len(example.answer) == length
        text = tokenizer.decode(example.prompt)
        (value,) = example.values
        assert text.count(value) == 1
        assert value in tokenizer.decode(example.prompt[example.position :])
        assert value not in tokenizer.decode(example.prompt[: example.position])


def test_every_form_is_asked_the_same(tested: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, first, tokenizer = tested
    asked: list[list[list[int]]] = [[], []]
    for number, form in enumerate((model, first)):

        def answers(of: Any, examples: Any, number: int = number) -> list[list[int]]:
            asked[number] += [[*example.prompt, *example.answer] for example in examples]
            return [list(example.answer) for example in examples]

        monkeypatch.setattr("dynamask_lab.studies.needle.forced._likeliest", answers)
        forced_scores(form, tokenizer, [880], [0.0, 0.5], 2, tasks=["single_needle"], seed=1)
    assert asked[0] == asked[1]
    assert len({tuple(row) for row in asked[0]}) == 4


NOISE, VALUES, REACH = 4, 8, 3
"""Tokens of noise and of values; positions behind a token that see it in the narrow layer."""


def _needles(count: int, length: int, places: Tensor, generator: torch.Generator) -> Tensor:
    """(count, length) noise with one key and its value at a place, the question and the value at the end."""
    tokens = (torch.arange(length)[None] + torch.randint(NOISE, (count, 1), generator=generator)) % NOISE
    rows, values = torch.arange(count), NOISE + 2 + torch.randint(VALUES, (count,), generator=generator)
    tokens[rows, places], tokens[rows, places + 1] = NOISE, values
    tokens[:, -2], tokens[:, -1] = NOISE + 1, values
    return tokens


def _far_model() -> DynamaskForCausalLM:
    config = DynamaskConfig(
        vocab_size=NOISE + 2 + VALUES,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        attention="dma",
        windows=[REACH + 1, 8],
        local=REACH,
        sinks=1,
        max_position_embeddings=24,
    )
    torch.manual_seed(0)
    return DynamaskForCausalLM(config)


def _teach(model: DynamaskForCausalLM, steps: int, rate: float, generator: torch.Generator) -> None:
    """Train on answers to needles in 24 tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        tokens = _needles(32, 24, torch.randint(2, 19, (32,), generator=generator), generator)
        labels = tokens.clone()
        labels[:, :-1] = -100
        model(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _found(model: DynamaskForCausalLM, length: int, dropped: int | None = None) -> float:
    """Share of needles found in texts of a length, the needle at position 2; the wide layer's keys from position
    `dropped` on that may hold a needle written there never win a place."""

    def drop(module: Any, arguments: Any, ranks: Tensor) -> Tensor:
        assert dropped is not None
        ranks = ranks.clone()
        ranks[..., dropped : dropped + 2 + REACH] = -1e9
        return ranks

    tokens = _needles(64, length, torch.full((64,), 2), torch.Generator().manual_seed(1))
    wide = model.model.layers[1].mixer.rank_predictor
    hook = None if dropped is None else wide.register_forward_hook(drop)
    model.eval()
    with torch.no_grad():
        made = model(input_ids=tokens[:, :-1], use_cache=False).logits[:, -1].argmax(-1)
    if hook is not None:
        hook.remove()
    return float((made == tokens[:, -1]).float().mean())


@pytest.mark.slow
def test_answers_from_far_back_come_through_the_keys_of_the_wide_layer() -> None:
    """Without rotary embedding, needles eight times as far back as any in training are found, and only while the wide
    layer keeps what the needle wrote."""
    generator = torch.Generator().manual_seed(0)
    rotated = _far_model()
    _teach(rotated, 120, 1e-2, generator)
    with lever_mixers("drope"):
        model = _far_model()
    model.load_state_dict(rotated.state_dict())
    _teach(model, 30, 2.5e-3, generator)
    assert {type(layer.mixer) for layer in model.model.layers} == {UnrotatedDynamicMask}
    for length in (24, 192):
        assert _found(model, length) > 0.9
        assert _found(model, length, dropped=2) < 0.4, "one value in eight by chance"
        assert _found(model, length, dropped=12) > 0.9
