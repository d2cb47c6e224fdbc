"""The language-model engine: exact resumption, one data order for all, a loss that is the model's own."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynamask import DynamaskForCausalLM
from dynamask.errors import InvalidInputError, UsageError
from dynamask.training import loss
from dynamask.training.loss import next_token_losses
from dynamask_lab.language import engine as language
from dynamask_lab.language.data import TokenStreams, token_streams
from dynamask_lab.language.engine import (
    Batches,
    LanguageConfig,
    build_model,
    learning_rate_at,
    position_buckets,
    run_language,
    training_flops,
)

VOCABULARY = 20


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State and corpora away from the working directory; the corpus a text with a rule to learn."""
    monkeypatch.setenv(language.STATE_FOLDER, str(tmp_path / "state"))
    monkeypatch.setenv("DYNAMASK_CORPORA", str(tmp_path / "corpora"))
    random = np.random.default_rng(0)
    stream = random.integers(0, VOCABULARY // 2, 4000).repeat(2).astype(np.uint16)
    stream[1::2] += VOCABULARY // 2  # every second token follows from the one before
    streams = TokenStreams(stream[:6000], stream[6000:], VOCABULARY, "digest")
    monkeypatch.setattr(language, "token_streams", lambda corpus, test_share=0.0: _split(streams, test_share))
    return tmp_path


def _split(streams: TokenStreams, test_share: float) -> TokenStreams:
    cut = round((1 - test_share) * len(streams.validation))
    return replace(streams, validation=streams.validation[:cut], test=streams.validation[cut:])


def config(**settings: Any) -> dict[str, Any]:
    shape = {"attention": "dma", "window": 8, "layers": 2, "width": 32, "heads": 4, "groups": 2, "feed_forward": 48}
    shape |= {"length": 32, "batch_tokens": 128, "steps": 30, "validation_tokens": 512, "learning_rate": 1e-2}
    if settings.get("attention") in ("mha", "mla"):
        shape["window"] = None
    return asdict(LanguageConfig(**{**shape, **settings}))


def quiet(share: float, note: str) -> None:
    pass


def comparable(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("seconds", "tokens_per_second")}


@pytest.mark.parametrize("attention", ["dma", "swa", "mha", "mla", "nsa"])
def test_every_mixer_learns_the_rule(attention: str) -> None:
    told: list[float] = []
    result = run_language(config(attention=attention, steps=60), lambda share, note: told.append(share))
    # Half of the tokens are certain, the other half one of ten: 1.15 nats are left of 3.0.
    assert result["loss"] < 2.0 < result["curve"][0]["loss"] + 0.5
    assert [look["step"] for look in result["curve"]] == [25, 50, 60]
    assert [look["tokens"] for look in result["curve"]] == [25 * 128, 50 * 128, 60 * 128]
    assert result["diverged"] is None
    assert told == sorted(told)
    assert told[-1] == 1
    assert result["parameters"]["gates"] == (0 if attention != "dma" else 2 * (2 * 16 + 2 + 2))
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("stop_at", [10, 20])
def test_an_interrupted_run_goes_on_to_the_same_numbers(folders: Path, noise: float, stop_at: int) -> None:
    settings = config(rank_noise=noise, window_schedule=[[0.0, 2.0], [0.5, 1.0]], gate_init="delta")
    whole = run_language(settings, quiet)

    class Stop(Exception):
        pass

    def stop(share: float, note: str) -> None:
        if round(share * 30) == stop_at:
            raise Stop

    with pytest.raises(Stop):
        run_language(settings, stop)
    assert len(list(folders.glob("state/*/state.pt"))) == 1
    torch.rand(7)  # the generator of the process is not the run's
    resumed = run_language(settings, quiet)
    assert comparable(resumed) == comparable(whole)
    assert not list(folders.glob("state/*"))  # a finished run leaves nothing behind


def test_a_test_split_is_measured_beside_the_validation_split() -> None:
    plain = run_language(config(steps=3), quiet)
    assert "test" not in plain
    assert "test_share" not in LanguageConfig.of(config(steps=3)).plain()  # keys of recorded runs stay
    both = run_language(config(steps=3, test_share=0.5), quiet)
    assert 0 < both["test"] != both["loss"]
    assert both["curve"][0]["loss"] == pytest.approx(plain["curve"][0]["loss"], rel=0.05)


def test_the_test_split_is_the_last_documents_of_the_held_out_ones() -> None:
    whole, halved = token_streams("bytes"), token_streams("bytes", 0.5)
    assert np.array_equal(np.concatenate([halved.validation, halved.test]), whole.validation)
    assert halved.validation[-1] == halved.test[-1] == 256  # the end of a document
    documents = [int((part == 256).sum()) for part in (halved.validation, halved.test)]
    assert abs(documents[0] - documents[1]) <= 1
    assert len(whole.test) == 0
    with pytest.raises(InvalidInputError, match="test_share"):
        token_streams("bytes", 1.0)


def test_a_kept_state_of_another_corpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(share: float, note: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_language(config(), stop)
    other = language.token_streams("code")
    changed = TokenStreams(other.train, other.validation, VOCABULARY, "another")
    monkeypatch.setattr(language, "token_streams", lambda *_: changed)
    with pytest.raises(InvalidInputError, match="another version of the corpus"):
        run_language(config(), quiet)


def test_a_run_that_diverges_is_a_result() -> None:
    result = run_language(config(learning_rate=1e30, clip=1e30), quiet)
    assert result["diverged"] == 25
    assert len(result["training"]) == 25


def test_the_callers_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    run_language(config(rank_noise=1.0, steps=2), quiet)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kept_model_is_the_trained_one(folders: Path) -> None:
    result = run_language(config(keep_model=True), quiet)
    (saved,) = folders.glob("state/*/model")
    model = DynamaskForCausalLM.from_pretrained(saved).eval()
    stream = torch.from_numpy(language.token_streams("code").validation[: 15 * 32 + 1].astype(np.int64))
    assert model.config.windows == 8
    with torch.no_grad():
        loss = next_token_losses(model, stream.unfold(0, 33, 32)).mean()
    assert float(loss) == pytest.approx(result["loss"], abs=0.1)  # other blocks of the same split


def test_batches_are_the_seeds_alone_and_every_sequence_comes_once_an_epoch() -> None:
    stream = np.arange(10 * 32 + 1, dtype=np.uint16)
    device = torch.device("cpu")
    mixers = [config(attention="mha"), config(attention="swa", width=64)]
    batches = [Batches(LanguageConfig.of(each), stream, device) for each in mixers]
    assert all(torch.equal(batches[0](step), batches[1](step)) for step in range(8))
    seen = torch.cat([batches[0](step) for step in range(5)])  # 20 sequences: two epochs
    first, second = seen[:10, 0].tolist(), seen[10:, 0].tolist()
    assert sorted(first) == sorted(second) == list(range(0, 320, 32))
    assert first != second
    assert (seen[:, 1:] == seen[:, :-1] + 1).all()
    other = Batches(LanguageConfig.of(config(seed=1)), stream, device)
    assert not torch.equal(other(0), batches[0](0))


def test_the_loss_in_parts_is_the_models_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build_model(LanguageConfig.of(config()), VOCABULARY)
    tokens = torch.randint(VOCABULARY, (3, 33))
    expected = model(tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
    losses = next_token_losses(model, tokens)
    assert losses.shape == (3, 32)
    # transformers' loss knows no target for the last position.
    torch.testing.assert_close(losses[:, :-1].mean(), expected)
    monkeypatch.setattr(loss, "MOST_LOGITS", VOCABULARY * 10)
    torch.testing.assert_close(next_token_losses(model, tokens), losses)


def test_rates_rise_and_fall() -> None:
    cosine = LanguageConfig.of(config(steps=100, warmup=0.1))
    rates = [learning_rate_at(cosine, step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == pytest.approx(1e-2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3, rel=0.01)
    wsd = LanguageConfig.of(config(steps=100, warmup=0.1, schedule="wsd"))
    rates = [learning_rate_at(wsd, step) for step in range(100)]
    assert rates[10:81] == [1e-2] * 71
    assert rates[-1] == pytest.approx(1e-2 / 20)


def test_windows_follow_their_schedule() -> None:
    settings = LanguageConfig.of(config(steps=100, window_schedule=[[0.0, 100.0], [0.25, 2.0], [0.5, 1.0]]))
    assert [settings.window_at(step) for step in (0, 24, 25, 49, 50, 99)] == [32, 32, 16, 16, 8, 8]


def test_compute_counts_what_each_mixer_sees() -> None:
    flops = {}
    for attention in ("mha", "swa", "dma"):
        settings = LanguageConfig.of(config(attention=attention, steps=1))
        flops[attention] = training_flops(settings, build_model(settings, VOCABULARY))
    dense, sparse = 32 * 33 / 2, 8 * 9 / 2 + 24 * 8
    assert flops["mha"] - flops["swa"] == pytest.approx(12 * 32 * 2 * (dense - sparse) / 32 * 128)
    gates = 2 * (2 * 16 + 2 + 2)
    assert flops["dma"] - flops["swa"] == pytest.approx(6 * gates * 128)


def test_positions_are_summed_up_in_doubling_buckets() -> None:
    buckets = position_buckets(torch.arange(300.0))
    assert [(b["from"], b["to"]) for b in buckets] == [(0, 64), (64, 128), (128, 256), (256, 300)]
    assert buckets[1]["loss"] == pytest.approx(95.5)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"windw": 3}, "did you mean 'window'"),
        ({"window": None}, "give it a window"),
        ({"batch_tokens": 100}, "multiple of length"),
        ({"schedule": "linear"}, "schedule must be one of"),
        ({"window_schedule": [[0.5, 1.0], [0.0, 2.0]]}, "rising order"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"warmup": 1.0}, "share of the steps"),
    ],
)
def test_settings_that_make_no_run_are_refused(field: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        run_language({**config(), **field}, quiet)


def test_corpora_by_name(folders: Path) -> None:
    from dynamask.data import prepare, train_tokenizer

    texts = {"code": "def f(x):\n    return x + 1\n" * 50, "text": "A quiet page about nothing much. " * 50}
    train_tokenizer(texts.values(), 300).save_pretrained(folders / "tokenizer")
    for name, content in texts.items():
        (folders / f"{name}.txt").write_text(content)
        common = {"vocab_size": 300, "validation": 0.1}
        prepare(
            [str(folders / f"{name}.txt")], folders / "corpora" / name, tokenizer=str(folders / "tokenizer"), **common
        )
    code, text, both = (token_streams(name) for name in ("code", "text", "code+text"))
    assert both.train.tolist() == [*code.train.tolist(), *text.train.tolist()]
    assert both.vocab_size == code.vocab_size <= 300
    prepare([str(folders / "text.txt")], folders / "corpora" / "other", vocab_size=280, validation=0.1)
    with pytest.raises(UsageError, match="different tokenizers"):
        token_streams("code+other")
    with pytest.raises(UsageError, match=r"corpora\.py"):
        token_streams("nowhere")


def test_bytes_are_the_standard_library_itself() -> None:
    streams = token_streams("bytes")
    assert streams.vocab_size == 257
    assert 3e6 < len(streams.train) + len(streams.validation) < 6e6
    assert b"import" in bytes(streams.train[streams.train < 256].astype(np.uint8))
