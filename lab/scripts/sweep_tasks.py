"""Tasks over local data, through lm-evaluation-harness, on models that a sweep has kept.

    dynamask experiment scaling --size small --results scaling.jsonl --where width=512 --keep-models models
    python lab/scripts/sweep_tasks.py models/* --output lab/results/tasks/scaling.jsonl

Asks every model `next_line` and `plurals` of examples/multiple_choice, and `near_word` and `far_word` of
lab/scripts/tasks over what the corpora hold out, and writes one JSON line per model. A model's answers to a task are on
the disk when they are complete, so a killed run goes on there. It needs dynamask-attention[eval], and the corpora that
the models were trained on where DYNAMASK_CORPORA says; about half an hour per model of 20M parameters on two cores.

Python's standard library, which `next_line` asks about, is not among the sources of lab/scripts/corpora.py, but its
documentation is, for every model alike.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from dynamask_lab.language.kept_models import kept
from dynamask_lab.studies.locality.study import variant_name
from dynamask_lab.sweeps import provenance

ROOT = Path(__file__).parents[2]
TASKS = {
    "next_line": ROOT / "examples" / "multiple_choice",
    "plurals": ROOT / "examples" / "multiple_choice",
    "near_word": ROOT / "lab" / "scripts" / "tasks",
    "far_word": ROOT / "lab" / "scripts" / "tasks",
}
"""Task -> folder that defines it."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders that `--keep-models` left")
    parser.add_argument("--task", choices=list(TASKS), action="append", help="only this one; repeatable")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one per model; written anew")
    parser.add_argument("--work", type=Path, default=Path("runs/sweep_tasks"), help="folder for finished answers")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per forward pass")
    parser.add_argument("--limit", type=int, help="questions per task, for trying things out; kept apart")
    parser.add_argument("--note", help="what a reader should know of these models; stands in every line")
    chosen = parser.parse_args(arguments)

    environment = {
        **{name: version for name, version in provenance.versions().items() if name != "triton"},
        "lm_eval": _harness_version(parser),
        "device": provenance.device_name(),
        "commit": provenance.commit(),
    }
    lines = []
    for folder in chosen.models:
        config, loss = kept(folder)
        line = {"model": variant_name(config, any_depth=True), "config": config, "loss": loss, "note": chosen.note}
        model = AutoModelForCausalLM.from_pretrained(folder)
        line["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        del model
        line["tasks"] = {
            task: answers(folder, task, chosen.work, chosen.batch_size, chosen.limit) for task in chosen.task or TASKS
        }
        lines.append(line | {"environment": environment})
        print(f"{line['model']}: {loss:.3f} nats, {line['tasks']}", flush=True)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    partial = chosen.output.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial.rename(chosen.output)


def answers(folder: Path, task: str, work: Path, batch_size: int, limit: int | None = None) -> dict[str, float]:
    """A model's figures for a task: what the harness calls acc, perplexity and so on, their errors, and "n".

    Args:
        folder: of the model.
        task: one of `TASKS`.
        work: where answers are kept, and found again.
        batch_size, limit: see `evaluate_tasks`.
    """
    from dynamask.evaluation.harness import evaluate_tasks

    file = work / f"{folder.name}-{task}{'' if limit is None else f'-{limit}'}.json"
    if not file.exists():
        found = evaluate_tasks(str(folder), [task], include_path=TASKS[task], limit=limit, batch_size=batch_size)
        work.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({key: found[key] for key in ("results", "n-samples")}))
        partial.rename(file)
    told = json.loads(file.read_text())
    figures: dict[str, Any] = {
        name.removesuffix(",none"): value
        for name, value in told["results"][task].items()
        if name.endswith(",none") and isinstance(value, float)
    }
    return figures | {"n": told["n-samples"][task]["effective"]}


def _harness_version(parser: argparse.ArgumentParser) -> str:
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        parser.error("the tasks need lm-evaluation-harness: pip install 'dynamask-attention[eval]'")


if __name__ == "__main__":
    main()
