"""The laboratory and `dynamask train` are one engine: the same small run has the same losses in both."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from dynamask.data import Corpus, prepare
from dynamask.training import TrainConfig, train
from dynamask_lab.language import engine
from dynamask_lab.language.data import TokenStreams
from dynamask_lab.language.engine import LanguageConfig, run_language

STEPS, BATCH, LENGTH = 25, 4, 32


@pytest.mark.parametrize("attention", ["swa", "mha"])
def test_the_same_run_has_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str) -> None:
    """One document, so that no bound of documents is crossed in either."""
    monkeypatch.setenv(engine.STATE_FOLDER, str(tmp_path / "state"))
    words = np.random.default_rng(0).choice(["to", "be", "or", "not", "that", "is", "the", "question"], 4000)
    (tmp_path / "text.txt").write_text(" ".join(words))
    source = [str(tmp_path / "text.txt")]
    corpus = prepare(source, tmp_path / "corpus", vocab_size=300, validation=0.02, block=LENGTH + 1)
    monkeypatch.setattr(engine, "token_streams", lambda name, test_share: streams(corpus))
    window = None if attention == "mha" else 8
    settings = LanguageConfig(
        attention=attention,
        window=window,
        layers=2,
        width=32,
        heads=4,
        groups=2,
        feed_forward=48,
        length=LENGTH,
        batch_tokens=BATCH * LENGTH,
        steps=STEPS,
        learning_rate=1e-2,
        warmup=0.08,
        seed=3,
    )
    lab = run_language(asdict(settings), lambda share, note: None)
    model = engine.build_model(settings, 300).config.to_dict()
    fields = ("attention", "windows", "local", "sinks", "hidden_size", "intermediate_size", "num_hidden_layers")
    fields += ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta")
    product = train(
        TrainConfig(
            preset="tiny",
            model={name: model[name] for name in fields} | {"vocab_size": lab_vocabulary(corpus)},
            data=source,
            output=str(tmp_path / "run"),
            corpus=str(tmp_path / "corpus"),
            context=LENGTH,
            batch_size=BATCH,
            steps=STEPS,
            warmup=2,
            learning_rate=1e-2,
            seed=3,
            log_every=1,
            eval_every=STEPS,
            save_every=0,
        ),
        quiet=True,
    )
    losses = [entry["loss"] for entry in product.history if "loss" in entry]
    assert len(losses) == STEPS
    assert losses == pytest.approx(lab["training"], rel=1e-5)
    assert losses[-1] < losses[0] - 0.5
    assert product.loss == pytest.approx(lab["loss"], rel=1e-5)


def lab_vocabulary(corpus: Corpus) -> int:
    return len(corpus.tokenizer)


def streams(corpus: Corpus) -> TokenStreams:
    parts = {split: np.concatenate(corpus.tokens(split)) for split in ("train", "validation")}
    return TokenStreams(parts["train"], parts["validation"], lab_vocabulary(corpus), corpus.index["content"])
