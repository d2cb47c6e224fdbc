"""The command line, in processes of its own: what a person types and sees."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

SMALL = [
    "model={vocab_size: 300, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, window: 8}",
    "context=32",
    "batch_size=2",
    "steps=4",
    "warmup=1",
    "save_every=2",
    "validation=0.3",
]


def dynamask(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dynamask", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "texts").mkdir()
    for i in range(10):
        (folder / "texts" / f"{i}.txt").write_text(f"{i}: " + "all work and no play makes jack a dull boy. " * 10)
    done = dynamask("train", f"data={folder / 'texts'}", f"output={folder / 'run'}", *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "perplexity" in done.stdout
    return folder


def test_every_help_teaches() -> None:
    for command in ([], ["train"], ["evaluate"], ["generate"], ["experiment"], ["convert"], ["report"], ["benchmark"]):
        done = dynamask(*command, "--help")
        assert done.returncode == 0
        assert len(done.stdout) > 200


def test_evaluate_generate_and_report(run) -> None:
    figures = run / "figures.json"
    assert dynamask("evaluate", str(run / "run"), "--context", "32", "--output", str(figures)).returncode == 0
    assert json.loads(figures.read_text())["perplexity"] > 1
    other = dynamask("evaluate", str(run / "run"), "--context", "16", "--data", str(run / "texts" / "0.txt"))
    assert other.returncode == 0, other.stderr
    generated = dynamask("generate", str(run / "run"), "all work", "--max-new-tokens", "12")
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("all work")
    assert "tokens/s, cache" in generated.stderr
    for kind, name in (("curves", "c.png"), ("mask", "m.png")):
        extra = [str(run / "texts" / "1.txt")] if kind == "mask" else []
        done = dynamask("report", kind, str(run / "run"), *extra, "--output", str(run / name))
        assert done.returncode == 0, done.stderr
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    done = dynamask(
        "report", "masks", str(run / "run"), "--length", "32", "--texts", "2", "--output", str(run / "masks")
    )
    assert done.returncode == 0, done.stderr
    assert "newest keys" in done.stdout
    assert (run / "masks" / "maps.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "masks" / "masks.jsonl").read_text())["length"] == 32
    table = dynamask("report", "parameters", "--preset", "tiny")
    assert table.returncode == 0
    assert "+0.0" in table.stdout


def test_retrieval_and_its_picture(run) -> None:
    file = run / "scores.jsonl"
    asked = ["--length", "400", "--depths", "2", "--samples", "1", "--task", "passkey", "--data", str(run / "texts")]
    done = dynamask("retrieval", str(run / "run"), *asked, "--output", str(file), "--name", "small")
    assert done.returncode == 0, done.stderr
    assert "passkey" in done.stdout
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["model"], row["length"], row["depth"]) for row in rows] == [("small", 400, 0.0), ("small", 400, 1.0)]
    picture = run / "needle.png"
    drawn = dynamask("report", "needle", str(file), "--output", str(picture))
    assert drawn.returncode == 0, drawn.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_benchmark_tasks_say_what_to_install(run) -> None:
    done = dynamask("evaluate", str(run / "run"), "--tasks", "piqa")
    assert done.returncode == 2
    assert "pip install 'dynamask[eval]'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_convert(run) -> None:
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2))  # fmt: skip
    dense.save_pretrained(run / "dense")
    target = run / "sparse"
    done = dynamask("convert", "upcycle", str(run / "dense"), str(target), "--window", "8")
    assert done.returncode == 0, done.stderr
    assert json.loads((target / "config.json").read_text())["model_type"] == "dynamask_llama"
    again = dynamask("convert", "upcycle", str(run / "dense"), str(target), "--window", "8")
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    assert dynamask("convert", "doge", str(run / "dense"), str(run / "x")).returncode == 2
    assert not (run / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "stpes=3"], "did you mean 'steps'"),
        (["train", "preset=tny"], "did you mean 'tiny'"),
        (["train", "model.windw=3"], "did you mean 'window'"),
        (["train", "data=/no/such/folder"], "no such file or folder"),
        (["train", "model.attention=flash"], "attention must be one of"),
        (["train", "data=./[/gone]"], "no such file or folder: ./[/gone]"),
        (["evaluate", "/no/such/run"], "cannot load a model"),
        (["evaluate", "/no/such/run", "--context", "0"], "--context must be at least 2; got 0"),
        (["evaluate", "/no/such/run", "--output", "/no/such/dir/f.json"], "there is no folder"),
        (["evaluate", "/no/such/run", "--fewshot", "3"], "belong to --tasks"),
        (["evaluate", "/no/such/run", "--tasks", "piqa", "--data", "x.txt"], "either --tasks or --data"),
        (["evaluate", "/no/such/run", "--tasks", ","], "names no task"),
        (["retrieval", "/no/such/run", "--output", "/no/such/dir/f.jsonl"], "there is no folder"),
        (["report", "needle", "/no/such.jsonl"], "cannot read the scores"),
        (["benchmark", "cpu", "--length", "0"], "--length must be at least 1"),
        (["generate", "/no/such/run", "x", "--max-new-tokens", "0"], "at least 1"),
        (["report", "parameters", "--preset", "huge"], "unknown preset"),
        (["report", "curves", "/no/such/run"], "no finished run"),
        (["convert", "upcycle", "/no/such/model", "/tmp/y"], "cannot load a causal LM"),
    ],
)
def test_mistakes_end_with_a_message_and_code_2(arguments: list[str], message: str, tmp_path) -> None:
    extra = [f"output={tmp_path / 'run'}"] if arguments[0] == "train" else []
    done = dynamask(*arguments, *extra)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_cpu_benchmark_runs(tmp_path) -> None:
    file = tmp_path / "cpu.json"
    done = dynamask("benchmark", "cpu", "--length", "256", "--window", "32", "--repeats", "1", "--output", str(file))
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["rows"][0]["error"] < 1e-4
