"""The task over Python's own sources: its questions, what training may read, and the benchmark that asks them."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from dynamask.data import train_tokenizer
from tests.conftest import tiny_model

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "multiple_choice"


def _by_path(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def task() -> ModuleType:
    return _by_path(EXAMPLE / "next_line.py")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return _by_path(ROOT / "lab" / "scripts" / "local_tasks.py")


@pytest.fixture(scope="module")
def asked(task: ModuleType) -> list[dict]:
    return task.load()["test"].to_list()


def test_questions_are_the_same_every_time(task: ModuleType, asked: list[dict]) -> None:
    assert asked == task.load()["test"].to_list()
    assert len(asked) == 300
    assert len({(question["module"], question["line"]) for question in asked}) == 300
    assert {question["module"] for question in asked} == set(task.HELD_OUT)
    assert Counter(question["answer"] for question in asked) == dict.fromkeys(range(4), 75)


def test_the_right_answer_is_the_line_that_follows(task: ModuleType, asked: list[dict]) -> None:
    for question in asked:
        text = task.source(question["module"])
        right = question["choices"][question["answer"]]
        assert text.split("\n")[question["line"] - 1] == right
        assert text.count(question["context"] + right + "\n") == 1
        assert question["context"].count("\n") == task.CONTEXT_LINES


def test_wrong_answers_are_lines_of_the_module_that_do_not_give_themselves_away(
    task: ModuleType, asked: list[dict]
) -> None:
    shortest = longest = 0
    for question in asked:
        choices = question["choices"]
        lines = task.source(question["module"]).split("\n")
        read = {line.strip() for line in question["context"].split("\n")}
        bare = [choice.strip() for choice in choices]
        assert len(set(bare)) == 4
        assert not read & set(bare)
        assert all(lines.count(choice) == 1 for choice in choices)
        assert len({choice[: len(choice) - len(choice.lstrip())] for choice in choices}) == 1
        assert max(map(len, bare)) - min(map(len, bare)) < task.LENGTH_BAND
        right = len(choices[question["answer"]])
        shortest += right == min(map(len, choices))
        longest += right == max(map(len, choices))
    # Were length to tell, one of the two would be far from the other; ties make both exceed a quarter.
    assert 0.2 < shortest / len(asked) < 0.5
    assert 0.2 < longest / len(asked) < 0.5


def test_a_short_module_has_no_question(task: ModuleType) -> None:
    assert task.questions("short", "a_line_that_is_long_enough = 1\n" * task.CONTEXT_LINES) == []


def test_training_reads_no_module_that_is_asked_about(
    task: ModuleType, benchmark: ModuleType, asked: list[dict], tmp_path: Path
) -> None:
    folder = benchmark.write_texts(tmp_path / "texts")
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    assert len(texts) == len(benchmark.training_files()) > 100
    assert (folder / "textwrap.py").exists()
    assert not [module for module in task.HELD_OUT if (folder / f"{module}.py").exists()]
    assert not {task.source(module) for module in task.HELD_OUT} & set(texts)
    everything = "\0".join(texts)
    assert not [question for question in asked if question["context"] in everything]


def test_finished_models_are_not_trained_again(benchmark: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    environment = {"python": "3.12.0", "device": "a processor"}
    monkeypatch.setattr(benchmark, "_environment", lambda: environment)
    trained = []
    figures = {"parameters": 1, "loss": 2.0, "tasks": {}}
    monkeypatch.setattr(benchmark, "measure", lambda config, work, run: trained.append(run.name) or figures)
    output = tmp_path / "new" / "lines.jsonl"
    command = ["--output", str(output), "--work", str(tmp_path), "--only", "mha", "--only", "dma-uneven"]
    benchmark.main(command)
    benchmark.main(command)
    assert trained == ["mha-200", "dma-uneven-200"]
    assert "mha: in " in capsys.readouterr().out
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["model"] for line in lines] == ["mha", "dma-uneven"]
    assert lines[1]["config"]["model"]["windows"] == [16, 16, 16, 208]
    assert str(tmp_path) not in output.read_text()
    benchmark.main([*command, "--steps", "9"])  # other settings are another measurement
    environment["python"] = "3.13.0"  # and so are other questions
    benchmark.main(command)
    assert trained == ["mha-200", "dma-uneven-200", "mha-9", "dma-uneven-9", "mha-200", "dma-uneven-200"]


def test_all_six_models_have_about_the_same_size(benchmark: ModuleType) -> None:
    from dynamask.models import DynamaskForCausalLM, preset

    sizes = {
        name: sum(p.numel() for p in DynamaskForCausalLM(preset("tiny", **(benchmark.SHAPE | fields))).parameters())
        for name, fields in benchmark.MODELS.items()
    }
    assert set(sizes) == {"dma", "dma-uneven", "mha", "swa", "mla", "nsa"}
    assert max(sizes.values()) < 1.05 * min(sizes.values())


def test_an_untrained_model_is_asked(task: ModuleType, asked: list[dict], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the optional group dynamask-attention[eval] is not installed")
    from dynamask.evaluation.harness import evaluate_tasks

    tokenizer = train_tokenizer([task.source("textwrap")], 600)
    fields = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 256}
    tiny_model("dma", **fields).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = evaluate_tasks(str(tmp_path), ["next_line"], include_path=EXAMPLE, limit=4)
    assert found["n-samples"]["next_line"] == {"original": len(asked), "effective": 4}
    for metric in ("acc,none", "acc_norm,none"):
        assert found["results"]["next_line"][metric] in (0, 0.25, 0.5, 0.75, 1)
