"""Multiple-choice tasks over local data, through lm-evaluation-harness, on a tiny model of every mechanism.

    python lab/scripts/local_tasks.py                           # all six models; finished lines are kept
    python lab/scripts/local_tasks.py --only mha --steps 50     # one of them, trained more briefly
    python lab/scripts/local_tasks.py --output other.jsonl      # lines to another file

Trains dma, mha, swa, mla, nsa and dma with uneven windows (one wide layer, the same keys in all) on the sources of
Python's standard library without the modules that the task `next_line` asks about: same tokenizer, seed, order of the
data, steps and learning rate. Then asks `next_line` and `plurals` of examples/multiple_choice, and appends one JSON
line per model. It needs dynamask-attention[eval]; set OMP_NUM_THREADS=1 to leave the other cores alone. Killed, it
goes on at the last checkpoint when started again.

The models are very small and briefly trained, and what they get right is to be read against chance (0.25 and 0.5) and
the standard errors: this shows that every mechanism goes through the harness, and ranks none that stand close together.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from dynamask.data.sources import source_files
from dynamask.models import uneven_windows
from dynamask.training import TrainConfig, open_run, train
from dynamask_lab.sweeps import provenance

TASK_FOLDER = Path(__file__).parents[2] / "examples" / "multiple_choice"
TASKS = ("next_line", "plurals")
MODELS: dict[str, dict[str, Any]] = {
    "dma": {"attention": "dma"},
    "dma-uneven": {"attention": "dma", "windows": uneven_windows(4, 64)},
    "mha": {"attention": "mha"},
    "swa": {"attention": "swa"},
    "mla": {"attention": "mla"},
    "nsa": {"attention": "nsa"},
}
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 352,
    "windows": 64,
    "max_position_embeddings": 1024,  # also where the harness cuts a context: none is read longer than in training
}
TRAINING = {"preset": "tiny", "context": 1024, "batch_size": 2, "learning_rate": 3e-3, "seed": 0}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="training steps of each model, of 2048 tokens")
    parser.add_argument("--only", choices=list(MODELS), action="append", help="only this model; repeatable")
    parser.add_argument("--output", type=Path, default=Path("lab/results/tasks/local.jsonl"), help="lines go here")
    parser.add_argument("--work", type=Path, default=Path("runs/local_tasks"), help="folder for the texts and the runs")
    chosen = parser.parse_args(arguments)

    try:
        environment = _environment() | {"commit": provenance.commit()}
    except importlib.metadata.PackageNotFoundError:
        parser.error("the tasks need lm-evaluation-harness: pip install 'dynamask-attention[eval]'")
    lines = chosen.output.read_text().splitlines() if chosen.output.exists() else []
    done = [_identity(json.loads(line)) for line in lines]
    for name in chosen.only or MODELS:
        config = TRAINING | {"steps": chosen.steps, "model": SHAPE | MODELS[name]}
        line = {"model": name, "config": config, "environment": environment}
        if _identity(line) in done:
            print(f"{name}: in {chosen.output} already")
            continue
        work = chosen.work / f"python-{environment['python']}"
        line |= measure(config, work, work / f"{name}-{chosen.steps}")
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        with chosen.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}: {line['loss']:.3f} nats, {line['tasks']}", flush=True)


def measure(config: dict[str, Any], work: Path, run: Path) -> dict[str, Any]:
    """Train one model and ask it the tasks: its parameters, validation loss and figures per task."""
    from dynamask.evaluation.harness import evaluate_tasks  # slow to import, and not needed to list what is done

    settings = TrainConfig(
        **config,
        data=[str(write_texts(work / "texts"))],
        output=str(run),
        corpus=str(work / "corpus"),
        warmup=config["steps"] // 10,
    )
    loss = train(settings, quiet=True).loss
    model, _ = open_run(run)
    found = evaluate_tasks(str(run), TASKS, include_path=TASK_FOLDER)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": loss,
        "tasks": {
            task: {
                "acc": found["results"][task]["acc,none"],
                "acc_stderr": found["results"][task]["acc_stderr,none"],
                "acc_norm": found["results"][task]["acc_norm,none"],
                "n": found["n-samples"][task]["effective"],
            }
            for task in TASKS
        },
    }


def training_files() -> list[tuple[str, Path]]:
    """(path inside the standard library, file) of what training reads: all of it but the modules asked about."""
    root = Path(sysconfig.get_path("stdlib"))
    held_out = set(task_module().HELD_OUT)
    names = [(path.relative_to(root), path) for path in source_files("stdlib")]
    return [(name.as_posix(), path) for name, path in names if name.parts[0].removesuffix(".py") not in held_out]


def write_texts(folder: Path) -> Path:
    """Copy what training reads into a folder, the same texts whenever it is called, and return the folder."""
    for name, path in training_files():
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)  # with its date, by which a prepared corpus is known to be of these texts
    return folder


def task_module() -> ModuleType:
    """examples/multiple_choice/next_line.py, which says what it asks about."""
    spec = importlib.util.spec_from_file_location("next_line", TASK_FOLDER / "next_line.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _environment() -> dict[str, Any]:
    """Versions and processor."""
    return {
        **{name: version for name, version in provenance.versions().items() if name != "triton"},
        "lm_eval": importlib.metadata.version("lm_eval"),
        "device": provenance.device_name(),
    }


def _identity(line: dict[str, Any]) -> str:
    """What makes a line the same measurement: the model, its settings, and the Python whose sources it reads."""
    return json.dumps([line["model"], line["config"], line["environment"]["python"]], sort_keys=True)


if __name__ == "__main__":
    main()
