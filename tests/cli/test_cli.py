"""Every command but train, in this process: what a person types and sees. One real process shows that it starts."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import processors
from torch import Tensor

from dynamask import DynamaskForCausalLM
from dynamask.data import load_tokenizer
from dynamask.errors import UsageError
from tests.cli.conftest import SMALL, Command, refused_without_torch


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["evaluate"], ["generate"], ["convert"], ["report"], ["retrieval"], ["inspect"], ["chat"]],
)
def test_every_help_teaches(dynamask: Command, command: list[str]) -> None:
    done = dynamask(*command, "--help")
    assert done.returncode == 0
    assert len(done.stdout) > 200


def test_help_and_mistakes_need_no_torch(tmp_path: Path) -> None:
    """Its import takes seconds, and so does that of transformers."""
    mistakes = (
        "train stpes=3",
        "train preset=tny",
        "train recipe=defalt",
        "train model.window=9",
        "train data=nosuch",
        "train init=nosuch",
        "plan --preset tny",
        "plan model.window=9",
        "evaluate nosuch",
        "evaluate nosuch --data .",
        "retrieval nosuch --output x.jsonl",
        "retrieval . --output x.jsonl --task nosuch",
        "generate nosuch x",
        "chat nosuch",
        "inspect nosuch x",
        "report parameters --preset tny",
        "convert upcycle nosuch sparse",
        "convert upcycle . sparse --window 0",
        "convert upcycle . sparse --allocation best",
        "convert upcycle . sparse --data nosuch",
        "convert doge nosuch doge",
        "plan --network 0",
    )
    refused_without_torch(mistakes, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_evaluate(dynamask: Command, run: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = dynamask("evaluate", str(run / "run"), "--output", str(figures))
    assert done.returncode == 0, done.stderr
    written = json.loads(figures.read_text())
    assert written["perplexity"] > 1
    assert written["buckets"][-1]["to"] == 32, "the context that the run was trained with"
    (tmp_path / "bad.jsonl").write_text('{"text": "' + "all work " * 40 + '"}\nnull\n')
    skipped = dynamask("evaluate", str(run / "run"), "--context", "16", "--data", str(tmp_path), "--errors", "skip")
    assert skipped.returncode == 0, skipped.stderr
    assert "left out 1, such as: " in skipped.said
    failed = dynamask("evaluate", str(run / "run"), "--context", "16", "--data", str(tmp_path))
    assert "leave it out with errors=skip" in failed.said
    longer = dynamask("evaluate", str(run / "run"), "--context", "2000", "--data", str(run / "texts"))
    assert "longer than the model's max_position_embeddings=1024" in longer.said


def test_generate(dynamask: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generated = dynamask("generate", str(run / "run"), "all work", "--max-new-tokens", "12")
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("all work")
    assert "tokens/s, cache" in generated.stderr
    folder = tmp_path / "opened"
    shutil.copytree(run / "run" / "model", folder)
    tokenizer = load_tokenizer(folder)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    given = []

    def generate(self: object, input_ids: Tensor, **options: object) -> None:
        given.append(input_ids[0].tolist())
        raise UsageError("stop")

    monkeypatch.setattr(DynamaskForCausalLM, "generate", generate)
    assert dynamask("generate", str(folder), "all work").returncode == 2
    assert given == [tokenizer("all work")["input_ids"]]
    assert given[0][0] == tokenizer.eos_token_id
    broken = dynamask("generate", str(run / "run"), "caf\udce9")
    assert broken.returncode == 2
    assert "the prompt is not UTF-8" in broken.said


def test_retrieval_and_its_picture(dynamask: Command, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    asked = ["--length", "400", "--depths", "2", "--samples", "1", "--task", "passkey", "--data", str(run / "texts")]
    done = dynamask("retrieval", str(run / "run"), *asked, "--output", str(file), "--name", "small")
    assert done.returncode == 0, done.stderr
    assert "passkey" in done.stdout
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["model"], row["length"], row["depth"]) for row in rows] == [("small", 400, 0.0), ("small", 400, 1.0)]
    picture = tmp_path / "needle.png"
    drawn = dynamask("report", "needle", str(file), "--output", str(picture))
    assert drawn.returncode == 0, drawn.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_benchmark_tasks_say_what_to_install(dynamask: Command, run: Path) -> None:
    done = dynamask("evaluate", str(run / "run"), "--tasks", "piqa")
    assert done.returncode == 2
    assert "pip install 'dynamask-attention[eval]'" in done.said


def test_pictures_say_what_to_install(dynamask: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    for arguments in (["curves", str(run / "run")], ["needle", "x.jsonl"], ["mask", str(run / "run"), "x.txt"]):
        done = dynamask("report", *arguments)
        assert done.returncode == 2
        assert "pictures need matplotlib: pip install 'dynamask-attention[plots]'" in done.said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "/no/such/run"], "there is no folder /no/such/run"),
        (["evaluate", "/no/such/run", "--context", "0"], "--context must be at least 2; got 0"),
        (["evaluate", "/no/such/run", "--output", "/no/such/dir/f.json"], "there is no folder /no/such/dir"),
        (["evaluate", "/no/such/run", "--output", "/"], "it is a folder"),
        (["evaluate", "/no/such/run", "--output", "/proc/x.json"], "cannot write to /proc/x.json"),
        (["evaluate", "/no/such/run", "--fewshot", "3"], "belong to --tasks"),
        (["evaluate", "/no/such/run", "--tasks", "piqa", "--data", "x.txt"], "either --tasks or --data"),
        (["evaluate", "/no/such/run", "--tasks", ","], "names no task"),
        (["retrieval", "/no/such/run", "--output", "/no/such/dir/f.jsonl"], "there is no folder /no/such/dir"),
        (["report", "needle", "/no/such.jsonl"], "cannot read the scores"),
        (["report", "curves", "/no/such/run", "--output", "curves.xyz"], "its suffix must be .png"),
        (["report", "needle", "/no/such", "--output", "needle"], "its suffix must be .png"),
        (["report", "curves", "/no/such/run", "--output", "/proc/x.png"], "cannot write to /proc/x.png"),
        (["generate", "/no/such/run", "x", "--max-new-tokens", "0"], "at least 1"),
        (["generate", "/no/such/run", "x", "--temperature", "nan"], "temperature must be >= 0"),
        (["chat", "/no/such/run", "--top-p", "0"], "top-p in (0, 1]"),
        (["generate", "nosuch", "x"], "there is no folder nosuch; a name on the hub is written owner/name"),
        (["report", "parameters", "--preset", "huge"], "unknown preset"),
        (["report", "curves", "/no/such/run"], "no finished run"),
    ],
)
def test_mistakes_end_with_a_message_and_code_2(
    dynamask: Command, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = dynamask(*arguments)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.said
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_run_is_named_beside_those_there_are(
    dynamask: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for command in (
        ["generate", "runs/mien", "x"],
        ["evaluate", "runs/mien"],
        ["evaluate", "runs/mien", "--data", "x"],
    ):
        done = dynamask(*command)
        assert done.returncode == 2
        assert "there is no folder runs/mien; runs/ holds mine" in done.said
    monkeypatch.chdir(tmp_path / "runs")
    assert "there is no folder runs/mien" in dynamask("generate", "runs/mien", "x").said


def test_folders_that_hold_no_finished_run_are_told_apart(dynamask: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "it has no config.json" in dynamask("generate", str(tmp_path / "empty"), "x").said
    begun = tmp_path / "begun"
    (begun / "checkpoint-7").mkdir(parents=True)
    assert (
        "the run is not finished (its newest checkpoint is checkpoint-7)" in dynamask("generate", str(begun), "x").said
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((run / "run" / "model" / name).read_bytes())
    assert "without a tokenizer" in dynamask("generate", str(bare), "x").said
    assert "has no held-out texts: give some (--data)" in dynamask("evaluate", str(bare)).said


def test_report(dynamask: Command, run: Path, tmp_path: Path) -> None:
    for kind, name in (("curves", "c.png"), ("mask", "m.png")):
        extra = [str(run / "texts" / "1.txt")] if kind == "mask" else []
        done = dynamask("report", kind, str(run / "run"), *extra, "--output", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    table = dynamask("report", "parameters", "--preset", "tiny")
    assert table.returncode == 0
    assert "+0.0" in table.stdout


def test_the_mask_of_a_model_with_a_dense_layer(dynamask: Command, run: Path, tmp_path: Path) -> None:
    from dynamask.training import TrainConfig, train

    fields = "model={vocab_size: 300, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, windows: 8, "
    small = [*SMALL[1:3], "steps=1", "save_every=0", "validation=0.3", fields + "attention: [mha, dma]}"]
    train(TrainConfig.load(None, [f"data={run / 'texts'}", f"output={tmp_path / 'run'}", *small]), quiet=True)
    picture = tmp_path / "mask.png"
    done = dynamask("report", "mask", str(tmp_path / "run"), str(run / "texts" / "1.txt"), "--output", str(picture))
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
