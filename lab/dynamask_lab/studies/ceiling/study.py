"""Run the study: how much is left to win for a choice of keys, on one pretrained dense model.

    python -m dynamask_lab.studies.ceiling.study --model MODEL --data DATA --out ceiling.jsonl

MODEL is a folder of transformers, DATA what `lab/scripts/conversion_data.py` wrote. A job is a rule (`rules.RULES`), a
mean window, windows that are even or per head, and a measure: loss on held-out blocks, or needles. Windows per head
come from one threshold on the true future attention of validation blocks, and are the same for every rule. A needle
counts where every token of the answer is the likeliest behind the true ones before it, which is where greedy decoding
writes the answer. Lines that are in `--out` already are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynamask.convert.calibration import CalibrationBlocks
from dynamask.errors import UsageError
from dynamask.mixers.rank_predictor import RankPredictor
from dynamask_lab.studies.ceiling.rules import RULES, SINKS, Choice, Chooser, local_of
from dynamask_lab.studies.conversion.measure import Form, loss_by_position, token_losses
from dynamask_lab.studies.conversion.tasks import Example, Tasks
from dynamask_lab.sweeps.provenance import commit, device_name, versions

STUDY = "ceiling"
BUDGETS = (512, 64, 128, 256)
"""Mean windows, the most telling first."""
WINDOWS = ("even", "heads")
CORPORA = ("text", "code")
NEEDLES = ("single_2", "multikey_1")
LENGTH = 4096


@dataclass(frozen=True)
class Job:
    """A rule and a measure.

    Attributes:
        rule: one of `RULES`.
        budget: mean window; None for `dense`.
        windows: "even", "heads" or "" for `dense`.
        measure: "loss" or "needle".
        of: the corpus, or the task.
        count: blocks or examples.
        length: tokens of each.
    """

    rule: str
    budget: int | None
    windows: str
    measure: str
    of: str
    count: int
    length: int

    @property
    def key(self) -> str:
        """16 hexadecimal digits that stand for the job."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def jobs(blocks: int, examples: int, *, block: int, length: int = LENGTH, learned: bool = True) -> list[Job]:
    """All jobs, the most telling first: dense, then every rule at one window, then the next window."""
    measures = [("loss", corpus, blocks, block) for corpus in CORPORA]
    measures += [("needle", task, examples, length) for task in NEEDLES]
    measures = [each for each in measures if each[2]]
    made = [Job("dense", None, "", *each) for each in measures]
    rules = [rule for rule in RULES if rule != "dense" and (learned or rule != "learned")]
    for budget in BUDGETS:
        for each in measures:
            made += [Job(rule, budget, windows, *each) for rule in rules for windows in WINDOWS]
    return made


class Runner:
    """Do jobs on one model.

    Args:
        model: the dense model, in eval mode.
        tokenizer: the model's.
        data: folder of the token arrays and of essays.txt.
        predictors: per layer, for the rule `learned`.
        budgets: mean windows that are run.
        block: tokens of a block.
        calibration: validation blocks that windows per head are allocated by.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data: Path,
        predictors: dict[int, nn.Module],
        budgets: Sequence[int],
        block: int,
        calibration: int,
    ) -> None:
        self.model, self.tokenizer, self.data, self.predictors = model, tokenizer, data, predictors
        self.chooser = Chooser(model)
        self.device = next(model.parameters()).device
        tokens = np.load(data / "validation.npy").reshape(-1)
        batches = zip(CalibrationBlocks(tokens, block, seed=1), range(calibration), strict=False)
        self.heads = self.chooser.allocate((batch.to(self.device) for batch, _ in batches), budgets)
        self._tasks: Tasks | None = None
        self._examples: dict[tuple[str, int, int], list[Example]] = {}

    @torch.no_grad()
    def run(self, job: Job) -> dict[str, Any]:
        """The result of one job: losses by position of every block, or whether each answer was found."""
        if job.budget is None:
            self.chooser.choice = Choice()
        else:
            windows = self.heads[job.budget] if job.windows == "heads" else self.chooser.even(job.budget)
            local = local_of(job.budget)
            self.chooser.choice = Choice(job.rule, windows, local, SINKS, self.predictors)
        if job.measure == "loss":
            array = np.load(self.data / f"test-{job.of}.npy")[: job.count, : job.length].astype(np.int64)
            blocks = torch.from_numpy(array).to(self.device)
            if job.length % 512:
                return {"losses": [token_losses(self.model, row[None]).mean().item() for row in blocks]}
            return {"losses": loss_by_position(Form(job.rule, self.model), blocks, batch=1)}
        examples = self._made(job.of, job.length, job.count)
        return {"found": [self._finds(example) for example in examples], "depths": [e.depth for e in examples]}

    def _made(self, task: str, length: int, count: int) -> list[Example]:
        if self._tasks is None:
            essays = (self.data / "essays.txt").read_text(encoding="utf-8")
            self._tasks = Tasks(self.tokenizer, essays, [0])
        key = (task, length, count)
        if key not in self._examples:
            self._examples[key] = [self._tasks.make(task, length, index) for index in range(count)]
        return self._examples[key]

    def _finds(self, example: Example) -> int:
        answer = self.tokenizer(f" {example.answers[0][0]}", add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([example.context + example.questions[0] + answer], device=self.device)
        return int(bool((answer_choices(self.model, tokens, len(answer)) == tokens[0, -len(answer) :]).all()))


def answer_choices(model: Any, tokens: Tensor, count: int) -> Tensor:
    """The likeliest token at each of the last `count` places of tokens (1, N), given the true ones before it."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return model.lm_head(hidden[0, -count - 1 : -1]).argmax(-1)


def load_predictors(file: Path, hidden_size: int, device: Any) -> dict[int, nn.Module]:
    """The rank predictors that the study `conversion` kept, by layer.

    Raises:
        UsageError: the file holds other parameters.
    """
    loaded = torch.load(file, map_location=device, weights_only=True)
    by_layer: dict[int, dict[str, Tensor]] = {}
    for name, parameter in loaded.items():
        place, _, inner = name.partition(".self_attn.rank_predictor.")
        if not inner:
            raise UsageError(f"{file} holds {name}, which is not a rank predictor's parameter")
        by_layer.setdefault(int(place.rpartition(".")[2]), {})[inner] = parameter
    made: dict[int, nn.Module] = {}
    for layer, parameters in by_layer.items():
        width = len(parameters["up.weight"]) if "up.weight" in parameters else 0
        predictor = RankPredictor(hidden_size, len(parameters["down.weight"]), width=width)
        predictor.load_state_dict(parameters)
        made[layer] = predictor.to(device).eval()
    return made


def read_rows(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The study's lines; a last one that a kill cut off is left out, missing files are empty."""
    rows = []
    for file in files:
        for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and row.get("study") == STUDY:
                rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--data", type=Path, required=True, help="token arrays, and essays.txt")
    parser.add_argument("--out", type=Path, required=True, help="results file, appended to")
    parser.add_argument("--copy", type=Path, help="a file that receives the same lines")
    parser.add_argument("--ranks", type=Path, help="predictors of the study `conversion`, for the rule `learned`")
    parser.add_argument("--blocks", type=int, default=16, help="held-out blocks of each corpus")
    parser.add_argument("--block", type=int, default=8192, help="tokens of a block")
    parser.add_argument("--examples", type=int, default=32, help="needles of each task; 0: none")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a needle's text")
    parser.add_argument("--calibration", type=int, default=8, help="blocks that windows per head are allocated by")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no job after so long")
    parser.add_argument("--rules", nargs="*", choices=RULES, help="only these rules")
    parser.add_argument("--list", action="store_true", help="print the jobs instead of running them")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    made = jobs(
        arguments.blocks,
        arguments.examples,
        block=arguments.block,
        length=arguments.length,
        learned=arguments.ranks is not None,
    )
    chosen = [job for job in made if not arguments.rules or job.rule in arguments.rules]
    done = {row["key"] for row in read_rows([arguments.out])}
    left = [job for job in chosen if job.key not in done]
    if arguments.list or not left:
        for job in left:
            print(job.key, *asdict(job).values())
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    predictors = load_predictors(arguments.ranks, model.config.hidden_size, device) if arguments.ranks else {}
    budgets = [budget for budget in BUDGETS if any(job.budget == budget for job in left)]
    runner = Runner(model, tokenizer, arguments.data, predictors, budgets, arguments.block, arguments.calibration)
    print(f"{time.monotonic() - start:6.1f} s  windows allocated", flush=True)
    digest = json.loads((arguments.data / "data.json").read_text())["arrays"]
    facts = {
        "commit": commit() or os.environ.get("DYNAMASK_COMMIT"),
        "versions": versions(),
        "device": device_name(),
        "model": arguments.model.name,
        "data": hashlib.sha256(json.dumps([digest], sort_keys=True).encode()).hexdigest()[:16],
    }
    failed: set[str] = set()
    for number, job in enumerate(left):
        if time.monotonic() - start > arguments.seconds:
            print(f"out of time: {number} of {len(left)} jobs done", flush=True)
            break
        if job.rule in failed:
            continue
        began = time.monotonic()
        try:
            result = runner.run(job)
        except Exception:
            # One rule that fails must not cost the others their time on the machine.
            print(f"{job} failed:\n{traceback.format_exc()}", flush=True)
            failed.add(job.rule)
            continue
        seconds = round(time.monotonic() - began, 3)
        row = {"study": STUDY, "key": job.key, **asdict(job), "seconds": seconds, "result": result, **facts}
        if job.windows == "heads":
            row["head_windows"] = runner.heads[job.budget]  # type: ignore[index]
        for file in filter(None, (arguments.out, arguments.copy)):
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        figure = np.nanmean(np.array(result.get("losses", result.get("found"))))
        settings = f"{job.rule} {job.budget or ''} {job.windows} {job.measure} {job.of}"
        print(f"{time.monotonic() - start:6.1f} s  {settings}: {figure:.4f}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
