"""Models that a sweep keeps: complete folders that everything else reads, and none unless asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynamask.data import prepare
from dynamask.errors import UsageError
from dynamask_lab.language.data import held_out_documents, token_streams
from dynamask_lab.language.engine import STATE_FOLDER, LanguageConfig, build_model, run_language
from dynamask_lab.language.kept_models import KEPT_FOLDER, keep, kept
from dynamask_lab.studies import SCALING, run_key, run_sweep
from lab.tests.language.test_language import quiet
from lab.tests.test_cli import Command, dynamask  # noqa: F401 -- a fixture

TEXTS = [f"Document {number}: the quick brown fox jumps over the lazy dog.\n" * 20 for number in range(30)]


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared corpus "text", and nothing kept."""
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    prepare([str(tmp_path / "texts")], tmp_path / "corpora" / "text", vocab_size=300, validation=0.3)
    monkeypatch.setenv("DYNAMASK_CORPORA", str(tmp_path / "corpora"))
    monkeypatch.setenv(STATE_FOLDER, str(tmp_path / "state"))
    monkeypatch.delenv(KEPT_FOLDER, raising=False)
    return tmp_path


def _config(**settings: object) -> dict:
    shape = {"attention": "swa", "window": 8, "layers": 1, "width": 32, "heads": 2, "groups": 1, "feed_forward": 32}
    shape |= {"length": 32, "batch_tokens": 64, "steps": 2, "validation_tokens": 64, "corpus": "text"}
    return LanguageConfig(**{**shape, **settings}).plain()


def test_a_kept_folder_has_the_trained_model_its_tokenizer_and_what_it_is(
    corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_language(_config(), quiet)
    assert not (corpora / "kept").exists()
    monkeypatch.setenv(KEPT_FOLDER, str(corpora / "kept"))
    result = run_language(_config(), quiet)
    assert result["loss"] == plain["loss"]
    folder = corpora / "kept" / run_key("language", _config())
    assert kept(folder) == (_config(), result["loss"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    validation = torch.from_numpy(token_streams("text").validation[:65].astype("int64"))
    assert tokenizer.decode(validation[:20], skip_special_tokens=True) in TEXTS[0] + "".join(TEXTS)
    windows = validation[:65].unfold(0, 33, 32)
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    untrained = build_model(LanguageConfig.of(_config()), len(tokenizer))
    assert any(
        not torch.equal(ours, fresh) for ours, fresh in zip(model.parameters(), untrained.parameters(), strict=True)
    )
    assert float(loss) == pytest.approx(result["loss"], abs=0.3)  # other blocks of the same split


def test_a_diverged_run_leaves_no_model(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEPT_FOLDER, str(corpora / "kept"))
    result = run_language(_config(learning_rate=1e30, clip=1e30, steps=30), quiet)
    assert result["diverged"] is not None
    assert not (corpora / "kept").exists()


def test_half_a_model_never_has_a_models_name(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(parents=True)
            raise KeyboardInterrupt

    monkeypatch.setenv(KEPT_FOLDER, str(corpora / "kept"))
    with pytest.raises(KeyboardInterrupt):
        keep(Killed(), _config(), 1.0)
    assert not (corpora / "kept" / run_key("language", _config())).exists()


def test_a_sweep_on_bytes_keeps_models_without_a_tokenizer(corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEPT_FOLDER, str(corpora / "kept"))
    configs = [each for each in SCALING.configs("smoke") if each["attention"] == "mha"]
    run_sweep(SCALING, configs, corpora / "r.jsonl")
    (folder,) = (corpora / "kept").iterdir()
    assert kept(folder)[0] == configs[0]
    assert not (folder / "tokenizer.json").exists()


def test_what_is_no_kept_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--keep-models FOLDER"):
        kept(tmp_path)


def test_the_command_keeps_them_where_there_are_any(
    dynamask: Command,  # noqa: F811
    corpora: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEPT_FOLDER, "")  # set by the command for its workers; put back after the test
    models = str(corpora / "kept")
    refused = dynamask("mqar", "--size", "smoke", "--results", str(corpora / "m.jsonl"), "--keep-models", models)
    assert (refused.returncode, "mqar trains none" in refused.stderr) == (2, True)
    done = dynamask(
        *("scaling", "--size", "smoke", "--results", str(corpora / "r.jsonl"), "--keep-models", models),
        *("--where", "attention=swa", "--where", "width=16", "--where", "layer_windows=null"),
    )
    assert done.returncode == 0, done.stderr
    names = {json.loads((folder / "run.json").read_text())["config"]["attention"] for folder in Path(models).iterdir()}
    assert names == {"swa"}


def test_held_out_documents_are_whole_and_in_no_training_token(corpora: Path) -> None:
    documents = held_out_documents("text")
    assert documents
    assert set(documents) <= set(TEXTS)
    assert len(token_streams("text").validation) > 0
    with pytest.raises(UsageError, match=r"lab/scripts/corpora\.py"):
        held_out_documents("nothing")
