"""`dynamask convert` as a person types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dynamask.training import open_run
from tests.cli.conftest import Command

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OPTIONS = ["--window", "24", "--local", "8", "--sinks", "2", "--block", "128", "--batch", "2", "--rank-steps", "10"]


@pytest.fixture(scope="session")
def dense(run: Path) -> Path:
    """A folder with a dense model, its tokenizer beside it."""
    folder = run / "dense"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=256, **SHAPE)).save_pretrained(folder)
    open_run(run / "run")[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(run: Path) -> Path:
    """A file of enough text for a few blocks."""
    file = run / "long.txt"
    file.write_text(" ".join(f"{i} works and {i * 7919 % 997} plays, said jack." for i in range(400)))
    return file


def test_upcycle_runs_all_stages_and_writes_a_report(
    dynamask: Command, dense: Path, texts: Path, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "sparse"
    done = dynamask(
        "convert",
        "upcycle",
        str(dense),
        str(target),
        *OPTIONS,
        "--data",
        str(texts),
        "--distill-steps",
        "3",
        "--allocation",
        "loss",
        "--calibration",
        "facts",
    )
    assert done.returncode == 0, done.stderr
    assert "loss, all positions" in done.stdout
    assert "cache of one block" in done.stdout
    assert [path.name for path in target.parent.iterdir()] == ["sparse"]
    report = json.loads((target / "conversion.json").read_text())
    heads = [window for layer in report["windows"] for window in layer]
    assert sum(heads) == 24 * len(heads)
    assert 0 < report["after"]["cache_bytes"] < report["before"]["cache_bytes"]
    card = (target / "README.md").read_text()
    assert "import dynamask" in card
    assert "| loss, all positions |" in card
    loaded: Any = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.config.trained_ranks
    assert [list(layer) for layer in loaded.config.head_windows] == report["windows"]
    assert len(AutoTokenizer.from_pretrained(target)) == len(AutoTokenizer.from_pretrained(dense))
    again = dynamask("convert", "upcycle", str(dense), str(target), *OPTIONS, "--data", str(texts))
    assert (again.returncode, "exists already" in again.said) == (2, True)


def test_a_killed_conversion_continues(
    dynamask: Command, dense: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dynamask.convert.pipeline as pipeline

    arguments = ["convert", "upcycle", str(dense), str(tmp_path / "sparse"), *OPTIONS, "--data", str(texts)]
    arguments += ["--needles", "0"]

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "allocate_windows", killed)
        done = dynamask(*arguments)
    assert done.returncode != 0
    assert not (tmp_path / "sparse").exists()
    other = dynamask(*arguments, "--seed", "1")
    assert (other.returncode, "another seed" in other.said) == (2, True)
    steps = []
    real = pipeline.learn_ranks
    monkeypatch.setattr(
        pipeline, "learn_ranks", lambda *a, **k: real(*a, **{**k, "progress": lambda p: steps.append(p.step)})
    )
    done = dynamask(*arguments)
    assert done.returncode == 0, done.stderr
    assert "continuing the conversion" in done.said
    assert steps == []
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]


def test_without_texts_the_ranks_stay_untrained(dynamask: Command, dense: Path, tmp_path: Path) -> None:
    target = tmp_path / "sparse"
    done = dynamask("convert", "upcycle", str(dense), str(target), *OPTIONS[:6])
    assert done.returncode == 0, done.stderr
    assert "untrained" in done.said
    assert json.loads((target / "config.json").read_text())["model_type"] == "dynamask_llama"
    assert "import dynamask" in (target / "README.md").read_text()
    idle = dynamask("convert", "upcycle", str(dense), str(tmp_path / "x"), *OPTIONS[:6], "--distill-steps", "3")
    assert (idle.returncode, "--distill-steps 3 needs texts" in idle.said) == (2, True)
    assert dynamask("convert", "doge", str(dense), str(tmp_path / "x")).returncode == 2
    assert not (tmp_path / "x").exists()


def no_tokenizer(dense: Path, tmp_path: Path) -> list[str]:
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **SHAPE)).save_pretrained(tmp_path / "bare")
    return [str(tmp_path / "bare"), "--window", "200"]


def not_convertible(dense: Path, tmp_path: Path) -> list[str]:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    return [str(tmp_path / "gpt2")]


def nan(dense: Path, tmp_path: Path) -> list[str]:
    import shutil

    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    shutil.copytree(dense, tmp_path / "nan")
    model.save_pretrained(tmp_path / "nan")
    return [str(tmp_path / "nan"), "--needles", "0"]


Case = Callable[[Path, Path], list[str]]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (lambda dense, _: ["/no/such/model"], "there is no model /no/such/model"),
        (lambda dense, _: [str(dense), "--window", "9"], "local + sinks must be at most window = 9"),
        (lambda dense, _: [str(dense), "--block", "16"], "--block 16 is too short"),
        (lambda dense, _: [str(dense), "--block", "512"], "context of 256 tokens"),
        (lambda dense, _: [str(dense), "--max-tokens", "200"], "200 tokens, fewer than two blocks of 128"),
        (lambda dense, _: [str(dense), "--allocation", "best"], "--allocation must be one of loss, threshold"),
        (lambda dense, _: [str(dense), "--calibration", "x"], "--calibration must be one of repeats, facts, plain"),
        (lambda dense, _: [str(dense), "--device", "tpu"], "--device must be one of cpu"),
        (lambda dense, _: [str(dense), "--device", "cuda:99"], "--device must be one of cpu"),
        (lambda dense, _: [str(dense), "--batch", "0"], "--batch must be at least 1"),
        (lambda dense, _: [str(dense), "--data", "/no/texts"], "/no/texts"),
        (lambda dense, _: [str(dense), "--dense-layer", "2"], "indices of the 2 layers"),
        (no_tokenizer, "has no tokenizer"),
        (not_convertible, "architecture 'gpt2' is not supported"),
        (nan, "holds NaN or infinity in model.layers.1.mlp.up_proj.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_input_leaves_nothing(
    case: Case, message: str, dynamask: Command, dense: Path, texts: Path, tmp_path: Path
) -> None:
    arguments = case(dense, tmp_path)
    before = sorted(tmp_path.iterdir())
    done = dynamask(
        "convert", "upcycle", arguments[0], str(tmp_path / "sparse"), *OPTIONS, "--data", str(texts), *arguments[1:]
    )
    assert done.returncode == 2, done.stderr
    assert message in done.said
    assert "Traceback" not in done.stderr
    assert not done.said.endswith(": )"), "a cause that names nothing"
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_seen_before(
    dynamask: Command, dense: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    done = dynamask("convert", "upcycle", str(dense), str(tmp_path / "sparse"), *OPTIONS, "--data", str(texts))
    assert (done.returncode, "GiB free" in done.said) == (2, True)
    (tmp_path / "file").write_text("")
    done = dynamask("convert", "upcycle", str(dense), str(tmp_path / "file" / "x"), *OPTIONS)
    assert (done.returncode, "is a file" in done.said) == (2, True)


@pytest.mark.parametrize("form", ["gguf", "onnx"])
def test_other_formats_are_refused_with_the_reason(dynamask: Command, form: str) -> None:
    done = dynamask("convert", form, "sparse", "out")
    assert done.returncode == 2
    assert f"cannot be exported to {form.upper()}" in done.said
    assert "Serve it with" in done.said
