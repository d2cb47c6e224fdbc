"""The card beside a trained model."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamask.convert.report import plain_card
from dynamask.training import TrainConfig, train
from dynamask.training.model_card import trained_card
from tests.conftest import tiny_model

_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
{}
tags: [dynamask, sparse-attention, long-context]
---
"""


@pytest.mark.slow
def test_a_run_writes_its_card(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{i}: " + "all work and no play makes jack a dull boy. " * 8)
    shape = "model={vocab_size: 300, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, windows: 16}"
    settings = [shape, "context=32", "batch_size=2", "steps=2", "validation=0.3", f"data={tmp_path / 'texts'}"]
    result = train(TrainConfig.load(None, [*settings, f"output={tmp_path / 'run'}"]), quiet=True)
    card = (Path(result.model_dir) / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "import dynamask" in card
    assert f"{result.loss:.3f} nats per token" in card
    assert "| budget: mean window of a key/value head | 16 keys |" in card
    assert "| data | local files |" in card
    assert str(tmp_path) not in card, "paths of this machine stay here"


def test_public_sources_are_named() -> None:
    settings = TrainConfig(data=["stdlib", "owner/texts", "./mine"], init="owner/base", context=64)
    card = trained_card(settings, tiny_model(["swa", "dma"]), 2.5)
    assert card.startswith(f"{_HEAD.format('base_model: owner/base')}\n# A model trained by dynamask\n")
    assert "| data | stdlib, owner/texts, local files |" in card
    assert "| attention | swa, dma |" in card


def test_a_converted_model_names_its_source_but_no_folder_above_it(tmp_path: Path) -> None:
    card = plain_card("owner/base", "About it.")
    assert card.startswith(f"{_HEAD.format('base_model: owner/base')}\n# owner/base, converted by dynamask\n")
    (tmp_path / "dense").mkdir()
    card = plain_card(str(tmp_path / "dense"), "About it.")
    assert "# dense, converted by dynamask\n\nAbout it.\n" in card
    assert "base_model" not in card
    assert str(tmp_path) not in card
