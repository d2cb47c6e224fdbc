"""The conversion study: its tasks, measures, files and report, on models of a few thousand parameters."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynamask.data import train_tokenizer
from dynamask.errors import InvalidInputError
from dynamask_lab.studies.conversion import levers, measure, report, study
from dynamask_lab.studies.conversion.adapt import adapt
from dynamask_lab.studies.conversion.forms import Spec
from dynamask_lab.studies.conversion.tasks import GENERATED, NEEDLE_TASKS, TASKS, Tasks, score

ESSAYS = " ".join(f"The {a} {b} went home. It was {b} again?" for a in ("old", "red", "tall") for b in ("fox", "dogs"))
WORDS = " ".join("".join(random.Random(i).choices("abcdefghij", k=6)) for i in range(400))
TEMPLATE = "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = train_tokenizer([ESSAYS * 4, WORDS], 400)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def tasks(tokenizer: Any) -> Tasks:
    return Tasks(tokenizer, ESSAYS * 40 + WORDS, list(range(64)) * 20)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("task", TASKS)
def test_examples_fit_the_length_and_hold_their_answers(task: str, tasks: Tasks, tokenizer: Any) -> None:
    length = 1500 if task in NEEDLE_TASKS else 2500
    examples = [tasks.make(task, length, index) for index in range(3)]
    for example in examples:
        sizes = {len(question) for question in example.questions}
        assert {len(example.context) + size + GENERATED[task] for size in sizes} == {length}
        text = tokenizer.decode(example.context)
        for answers in example.answers:
            assert answers
            assert all(answer in text for answer in answers)
        assert tokenizer.decode(example.context).startswith("<user>")
        assert all("</user><assistant>" in tokenizer.decode(question) for question in example.questions)
    assert examples[0].context != examples[1].context
    assert tasks.make(task, length, 0) == examples[0]


def test_frequent_words_are_the_most_frequent(tasks: Tasks, tokenizer: Any) -> None:
    for task, others in (("common_words", 11), ("frequent_words", 5)):
        example = tasks.make(task, 2500, 0)
        words = tokenizer.decode(example.context).split()
        counts = sorted(((words.count(w), w) for w in set(words) if w.isalpha()), reverse=True)[:others]
        assert set(example.answers[0]) <= {word for _, word in counts}


def test_what_tasks_refuse(tasks: Tasks) -> None:
    with pytest.raises(InvalidInputError, match="tasks are single_1"):
        tasks.make("single_4", 1500, 0)
    with pytest.raises(InvalidInputError, match="longer"):
        tasks.make("single_2", 260, 0)


def test_score_is_the_share_of_answers_found() -> None:
    assert score("it is ABC and 12", ("abc", "12", "13", "14")) == 0.5


def test_losses_by_position_and_behind_a_context_agree(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BIN", 16)
    torch.manual_seed(0)
    blocks = torch.randint(1, 300, (3, 64))
    form = measure.Form("dense", model)
    with torch.no_grad():
        logits = model(blocks).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten(), reduction="none"
    )
    by_token = expected.view(3, 63)
    bins = torch.tensor(measure.loss_by_position(form, blocks, batch=2))
    torch.testing.assert_close(bins[:, 1:], by_token[:, 15:].view(3, 3, 16).mean(2))
    torch.testing.assert_close(bins[:, 0], by_token[:, :15].mean(1))
    behind = torch.tensor(measure.continuation_loss(form, blocks, 40, batch=2))
    torch.testing.assert_close(behind, by_token[:, 39:].mean(1))


def test_answers_are_greedy_continuations(model: Any, tokenizer: Any, tasks: Tasks) -> None:
    examples = [tasks.make("pairs", 700, index) for index in range(2)]
    form = measure.Form("dense", model)
    for number in range(2):
        context = torch.tensor([e.context for e in examples])
        cache, _ = form.read(context)
        question = torch.tensor([e.questions[number] for e in examples])
        made = measure._decode(form, cache, question, context.shape[1], 6)
        whole = model.generate(torch.cat([context, question], 1), max_new_tokens=6, do_sample=False, pad_token_id=0)
        for row, expected in zip(made, whole[:, -6:].tolist(), strict=True):
            stop = expected.index(0) if 0 in expected else 6
            assert row == expected[:stop]
    assert all(len(scores) == 2 for scores in measure.answers(form, tokenizer, examples))


def test_benchmarks_take_the_likelier_ending(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"query": "The old", "choices": [" fox went home", " dogs"], "gold": 0}] * 3
    (tmp_path / "copa.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    choices = measure.read_benchmark(tmp_path, "copa", 2)
    assert len(choices) == 2
    likelihoods = []
    for ending in choices[0].endings:
        first = tokenizer("The old", add_special_tokens=False)["input_ids"]
        last = tokenizer(ending, add_special_tokens=False)["input_ids"]
        begin = [tokenizer.bos_token_id] if tokenizer("")["input_ids"] else []
        ids = torch.tensor([begin + first + last])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        likelihoods.append(sum(float(logs[ids.shape[1] - len(last) - 1 + i, t]) for i, t in enumerate(last)))
    found = measure.benchmark(measure.Form("dense", model), tokenizer, choices)
    assert found["acc"] == [int(likelihoods[0] > likelihoods[1])] * 2


def test_runs_of_pieces_hold_all_and_fit() -> None:
    pieces = [(0, 0, [0] * size, 1) for size in sorted(random.Random(0).choices(range(1, 50), k=100))]
    runs = list(measure._by_tokens(pieces, 128))
    assert [piece for run in runs for piece in run] == pieces
    assert all(len(run) * max(len(piece[2]) for piece in run) <= 128 or len(run) == 1 for run in runs)


def test_adaptation_lowers_the_loss(model: Any) -> None:
    batch = torch.randint(1, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    learner = copy.deepcopy(model)
    with torch.no_grad():
        before = float(model(batch, labels=batch).loss)
    history = adapt(learner, [batch] * 8, steps=8, rate=1e-2)
    assert history[0] == pytest.approx(before, abs=1e-4)
    assert history[-1] < history[0] - 0.1


def test_jobs_are_different_and_begin_with_the_dense_model() -> None:
    made = study.jobs()
    assert len({job.key for job in made}) == len(made)
    assert made[0].spec == Spec("dense")
    assert {study.lane_of(job) for job in made} == {"converted", "dense", "speed"}
    names = {job.spec.name: job.spec for job in made + study.jobs(steps=7)}
    made += [job for job in study.jobs(steps=7) if job.spec.trained]
    assert len(names) == len({job.spec for job in made}), "another form, another name"


def test_results_continue_behind_a_torn_line(tmp_path: Path) -> None:
    job = study.jobs()[0]
    out = tmp_path / "results.jsonl"
    study.Results(out, [], {"device": "cpu"}, [tmp_path / "copy.jsonl"]).append(job.key, {"form": "dense"})
    assert out.read_text() == (tmp_path / "copy.jsonl").read_text()
    out.write_text(out.read_text() + '{"study": "conversion", "key": "torn')
    assert study.Results(out, [tmp_path / "missing.jsonl"], {}).keys == {job.key}


def _rows(jobs: list[Any] | None = None) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = []
    for job in jobs or study.jobs():
        better = 0.2 if job.spec.kind == "dense" else 0.0
        if job.measure == "tasks":
            questions = 2 if job.settings["task"] == "pairs" else 1
            scores = [[0.5 + better + 0.1 * rng.random()] * questions for _ in range(job.settings["count"])]
            result: dict[str, Any] = {"scores": scores}
        elif job.measure in ("loss", "long"):
            result = {"losses": [[2 - better + 0.01 * rng.random()] * 16 for _ in range(9)]}
        elif job.measure == "continuation":
            result = {"losses": [2 - better + 0.01 * rng.random() for _ in range(9)]}
        elif job.measure == "benchmark":
            result = {kind: [rng.randint(0, 1) for _ in range(9)] for kind in ("acc", "acc_norm")}
        else:
            result = {"cache_bytes": 1e6, "read_tokens_per_second": 1e5, "decoded_tokens_per_second": 1e3}
        facts = {"form": job.spec.name, "spec": asdict(job.spec), "measure": job.measure, "settings": job.settings}
        rows.append({"study": "conversion", "key": job.key, **facts, "result": result, "device": "cpu"})
    return rows


def test_report_pairs_what_it_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESAMPLES", 50)
    shown = ("dense", "converted-512-heads-learned-frozen", "snapkv-512")
    file = report.write([row for row in _rows() if row["form"] in shown], tmp_path)
    text = file.read_text()
    assert (tmp_path / "conversion.png").stat().st_size > 10_000
    line = next(line for line in text.split("\n") if line.startswith("| converted-512-heads-learned-frozen "))
    above = float(line.split("|")[3].split()[0])
    assert above == pytest.approx(0.2, abs=0.01)
    assert "Against the best peer" in text


def test_levers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESAMPLES", 50)
    wanted = {levers.FROZEN, levers.DENSE, levers.FLAT}
    text = report.lever_table(report.Study(_rows([job for job in levers.jobs() + study.jobs() if job.spec in wanted])))
    lines = [line for line in text.split("\n") if line.startswith(("| slopes", "| frozen"))]
    assert len(lines) == 2 == text.count("converted-512-heads-learned-loss-slopes-frozen")
    assert lines[0].split("|")[4].strip().startswith(("+0.00", "-0.00"))
    assert lines[1].split("|")[4].strip().startswith("+0.2")
    assert lines[1].split("|")[8].strip().startswith("0.7")
    listed = {job.spec for job in levers.jobs() + study.jobs()}
    assert all(spec in listed for _, *both in levers.COMPARISONS for spec in both)


def test_intervals() -> None:
    values = {i: float(i % 2) for i in range(400)}
    low, high = report.interval(torch.tensor(list(values.values())).numpy())
    assert low < 0.5 < high
    assert 0.06 < high - low < 0.14
    assert report.difference(values, {}) == "–"
    assert report.share(values, dict.fromkeys(values, 0.0)) == "–"
    assert all(a <= b for a, b in pairwise([low, 0.5, high]))
