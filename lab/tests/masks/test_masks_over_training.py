"""Masks of a run's checkpoints: each as measured alone, in order, and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from dynamask.errors import UsageError
from dynamask.training import open_run, train
from dynamask_lab.masks.masks import mask_texts, measure_masks
from dynamask_lab.masks.masks_over_training import measure_masks_over_training
from dynamask_lab.report.masks_over_training import masks_over_training_section
from dynamask_lab.report.results import render_results
from tests.training.test_training import settings, text  # noqa: F401 -- a fixture


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("run")
    config = settings(text, folder, steps=8, save_every=4, keep=5, context=64, learning_rate=1e-2)
    config.model |= {"ranking": "paper"}
    train(config, quiet=True)
    return folder


def test_every_checkpoint_is_measured_as_it_would_be_alone(run: Path, tmp_path: Path) -> None:
    _, tokenizer = open_run(run)
    texts = mask_texts(run, tokenizer, None, 40, 3)
    figures = measure_masks_over_training(run, tokenizer, texts)
    assert [step["step"] for step in figures["steps"]] == [4, 8]
    for step in figures["steps"]:
        model = AutoModelForCausalLM.from_pretrained(run / f"checkpoint-{step['step']}")
        alone = measure_masks(model, tokenizer, texts)
        assert {name: alone[name] for name in step if name != "step"} == {k: v for k, v in step.items() if k != "step"}
    assert figures["steps"][0]["loss"] != figures["steps"][1]["loss"]
    named = figures | {"name": "a run", "environment": {"device": "CPU"}}
    section, rows, _ = masks_over_training_section(named, tmp_path)
    lifetimes, choice = section.exhibits
    assert lifetimes.picture is not None
    assert lifetimes.picture.exists()
    assert [row["step"] for row in choice.table] == ["4", "8"]
    assert [rows[key]["step"] for key in choice.keys] == [4, 8]
    folder = tmp_path / "raw" / "masks-over-training"
    folder.mkdir(parents=True)
    (folder / "run.jsonl").write_text(json.dumps(named) + "\n")
    render_results(tmp_path / "raw", tmp_path / "report")
    assert "Lifetimes over training" in (tmp_path / "report" / "masks-over-training.md").read_text()


def test_a_folder_without_checkpoints_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="save_every=STEPS and keep=MANY"):
        measure_masks_over_training(tmp_path, None, [])
