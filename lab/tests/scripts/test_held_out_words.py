"""The tasks over held-out documents: what is asked, and that answers are kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamask_lab.report.tasks import tasks_section
from lab.tests.scripts.test_local_tasks import ROOT, _by_path

NEAR, FAR = (4, 64), (400, 950)


def _module() -> ModuleType:
    return _by_path(ROOT / "lab" / "scripts" / "tasks" / "held_out_words.py")


def _document(distance: int, word: str = "xylophone") -> str:
    """Enough filler, the word, filler, and the word again at that distance, to be asked for."""
    filler = [f"w{number % 7}" for number in range(1500)]
    filler[1200] = filler[1200 - distance] = word
    return " ".join(filler)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 999))
def test_a_word_is_asked_for_where_it_was_last_used_that_long_ago(distance: int) -> None:
    module = _module()
    for since in (NEAR, FAR):
        asked = module.questions([_document(distance)], since)
        assert len(asked) == (since[0] <= distance <= since[1])
        for question in asked:
            words = question["context"].split(" ")
            assert len(words) == module.WORDS
            assert (question["word"], question["since"]) == ("xylophone", distance)
            assert words[-distance] == "xylophone"
            assert f"{question['context']} xylophone w" in _document(distance)


def test_common_words_first_uses_and_long_lists_are_not_asked_for() -> None:
    module = _module()
    once = _document(500).replace("xylophone", "first", 1)
    assert module.questions([once], FAR) == []
    everywhere = [_document(500)] * (2 * module.RARE)
    assert module.questions(everywhere, FAR) == []  # in every document
    assert module.questions([_document(500, "w-19")], FAR) == []  # no plain word
    many = " ".join("xylophone" if number % 450 == 0 else "w" for number in range(5000))
    asked = module.questions([many], FAR)
    assert 0 < len(asked) <= module.PER_DOCUMENT
    often = " ".join("xylophone" if number % 100 < 2 else "w" for number in range(5000))
    assert module.questions([often], NEAR) == []
    assert module.questions([many], FAR) == asked


def test_answers_are_asked_for_once_and_a_line_names_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole path from a kept model to the report, with the harness's answers put in their place."""
    pytest.importorskip("lm_eval", reason="the optional group dynamask-attention[eval] is not installed")
    from dynamask.evaluation import harness
    from dynamask_lab.language.engine import LanguageConfig, build_model
    from dynamask_lab.language.kept_models import KEPT_FOLDER, keep

    config = LanguageConfig("mha", layers=1, width=16, heads=2, groups=1, feed_forward=16, corpus="bytes").plain()
    monkeypatch.setenv(KEPT_FOLDER, str(tmp_path / "kept"))
    keep(build_model(LanguageConfig.of(config), 20), config, 2.5)
    (folder,) = (tmp_path / "kept").iterdir()
    calls = []

    def evaluate(model: str, tasks: list[str], **options: object) -> dict:
        calls.append((Path(model).name, *tasks))
        metrics = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": tasks[0]}
        metrics |= {"perplexity,none": 12.0} if tasks[0].endswith("_word") else {"acc_norm,none": 0.25}
        return {"results": {tasks[0]: metrics}, "n-samples": {tasks[0]: {"effective": 8}}}

    monkeypatch.setattr(harness, "evaluate_tasks", evaluate)
    benchmark = _by_path(ROOT / "lab" / "scripts" / "sweep_tasks.py")
    output = tmp_path / "lines.jsonl"
    command = [str(folder), "--output", str(output), "--work", str(tmp_path / "work"), "--note", "Told so."]
    benchmark.main(command)
    first = output.read_text()
    benchmark.main(command)
    assert output.read_text() == first
    assert [task for _, task in calls] == list(benchmark.TASKS)
    line = json.loads(first)
    assert (line["model"], line["loss"], line["config"]) == ("mha", 2.5, config)
    assert str(tmp_path) not in first
    section, _, _ = tasks_section([line], tmp_path)
    (row,) = section.exhibits[0].table
    assert row["far_word, 8 questions"] == "50.0% ± 10.0%"
    assert row["far_word, perplexity"] == "12.0"
    assert row["next_line, by length"] == "25.0%"
    assert "Told so." in section.exhibits[0].text
    assert "400 words" in section.exhibits[0].text


@pytest.mark.parametrize("task", ["near_word", "far_word"])
def test_the_harness_asks_for_the_word_after_its_space(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the space the models are asked for a word glued to the one before it, which none ever reads."""
    pytest.importorskip("lm_eval", reason="the optional group dynamask-attention[eval] is not installed")
    from lm_eval.tasks import TaskManager

    from dynamask_lab.language import data as language_data

    monkeypatch.setattr(language_data, "held_out_documents", lambda corpus: [_document(20), _document(500, "marimba")])
    manager = TaskManager(include_path=str(ROOT / "lab" / "scripts" / "tasks"))
    (loaded,) = manager.load_task_or_group([task]).values()
    loaded.build_all_requests()
    (request,) = loaded.instances
    context, word = request.arguments
    assert (request.request_type, word) == ("loglikelihood", " xylophone" if task == "near_word" else " marimba")
    assert context.count(word) == 1
    assert not context.endswith(" ")
