"""The forms that the study compares, and the workshop that makes, trains and keeps them."""

from __future__ import annotations

import copy
import fcntl
import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dynamask.convert.calibration import CalibrationBlocks
from dynamask.convert.planted_facts import plant_facts
from dynamask.errors import UsageError
from dynamask.mixers.rank_predictor import Float32Linear, RankPredictor, settle
from dynamask_lab.studies.conversion import peers
from dynamask_lab.studies.conversion.adapt import adapt
from dynamask_lab.studies.conversion.measure import Form
from dynamask_lab.studies.conversion.planted import with_spans

KINDS = ("dense", "dense trained", "converted", "peer")
LOCAL, SINKS = 128, 4
STEPS = 100
"""Batches that a form is trained on, unless its spec says otherwise."""


@dataclass(frozen=True)
class Spec:
    """What one form is.

    Attributes:
        kind: one of `KINDS`.
        budget: mean keys per KV head; None for the dense model.
        seed: of what is trained.
        distilled: whether the model itself is trained after it has been converted.
        windows: "heads" (allocated by calibration) or "equal".
        ranks: "learned" or "newest".
        predictor: "hidden" (one hidden layer on the hidden state), "linear" (on the hidden state), or "values" (one
            hidden layer per head on its value vectors).
        peer: name of a press, for peers.
        rope: factor of YaRN; 1 leaves the positions alone.
        steps: batches that the model is trained on, where it is trained.
        allocation: how windows per head are set: "threshold" or "loss". Under "loss", those of newest keys are set for
            newest keys.
        slopes: whether "loss" may choose slopes.
        label_share, start_windows: of the distillation, see `dynamask.convert.distill`.
        rate: highest learning rate of the model; None: the schedule's.
        origin: "dense trained": convert what that form trained for as many steps in the same loop, not the dense model.
        origin_rate: highest learning rate of the origin; None: the form's.
        loop: of a dense model that is trained: "" for `adapt`, whose rate falls to zero; "distil" for that of
            `dynamask.convert.distill`, with windows as long as the blocks, which is dense attention.
        beginning_share: of the distillation, see `dynamask.convert.distill`.
        embeddings: whether the distillation trains them, too.
        average: share of the steps, the last, over whose weights the mean is taken (of every fifth step); 0: the last
            weights. One of `AVERAGES`.
        mixed: share of what was trained in a straight mixture with the dense model's weights; 1: no mixture.
        context: tokens of a block that ranks, windows and model are trained on, under the positions of `rope`; 0: the
            schedule's, under the model's own positions.
        local: newest keys that are always kept.
        texts, distil_texts: blocks that ranks and windows, and the model, are trained on: "" (half of them repeat their
            first half), "plain", "spans" (`planted`) or "facts" (`dynamask.convert.planted_facts`).
        target: what ranks learn: "" (the largest later attention) or "loss" (`rank_targets.learn_by_loss`).
        width: hidden units of the predictors; 0: the product's default.
        rank_steps: batches that ranks are learned on; 0: the schedule's.
        calibrated: on what windows are set: "" (blocks cut from the texts) or "opening" (these, each beginning as the
            tokenizer begins a text, which a model with a token of beginning needs).
    """

    kind: str
    budget: int | None = None
    seed: int = 0
    distilled: bool = False
    windows: str = "heads"
    ranks: str = "learned"
    predictor: str = "hidden"
    peer: str = ""
    rope: int = 1
    steps: int = STEPS
    allocation: str = "threshold"
    slopes: bool = False
    label_share: float = 0.0
    start_windows: float = 1.0
    rate: float | None = None
    origin: str = ""
    origin_rate: float | None = None
    loop: str = ""
    context: int = 0
    beginning_share: float = 0.0
    embeddings: bool = True
    average: float = 0.0
    mixed: float = 1.0
    local: int = LOCAL
    texts: str = ""
    distil_texts: str = ""
    target: str = ""
    width: int = 0
    rank_steps: int = 0
    calibrated: str = ""

    def facts(self) -> dict[str, Any]:
        """The fields, without later ones that have their default: lines written before they existed stay the same."""
        fields = asdict(self)
        return {name: value for name, value in fields.items() if name not in _LATER or value != _LATER[name]}

    @property
    def trained(self) -> bool:
        """Whether the model itself is trained."""
        return self.distilled or self.kind == "dense trained"

    @property
    def marks(self) -> str:
        """What tells ranks and windows of this form from the product's."""
        made = f"-local{self.local}" if self.local != LOCAL else ""
        made += f"-ranks-on-{self.texts}" if self.texts else ""
        made += f"-by-{self.target}" if self.target else ""
        made += f"-width{self.width}" if self.width else ""
        return made + (f"-rank-steps{self.rank_steps}" if self.rank_steps else "")

    @property
    def name(self) -> str:
        """What the form is called in file names and tables."""
        if self.kind == "peer":
            return f"{self.peer}-{self.budget}" + (f"-of-{_origin(self).name}" if self.origin else "")
        parts = [self.kind.replace(" ", "-")]
        if self.kind == "converted":
            parts += [str(self.budget), self.windows, self.ranks]
            parts += [] if self.predictor == "hidden" else [self.predictor]
            parts += [] if self.allocation == "threshold" else [self.allocation]
            parts += ["slopes"] if self.slopes else []
            parts += ["distilled" if self.distilled else "frozen"]
        parts += [f"seed{self.seed}"] if self.seed else []
        parts += [f"rope{self.rope}"] if self.rope != 1 else []
        parts += [f"steps{self.steps}"] if self.trained and self.steps != STEPS else []
        if self.trained:
            parts += [f"labels{self.label_share}"] if self.label_share else []
            parts += [f"from{self.start_windows}"] if self.start_windows != 1 else []
            parts += [f"rate{self.rate}"] if self.rate is not None else []
        parts += [f"beginning{self.beginning_share}"] if self.beginning_share else []
        parts += [] if self.embeddings else ["fixed-embeddings"]
        parts += [f"average{self.average}"] if self.average else []
        parts += [f"mixed{self.mixed}"] if self.mixed != 1 else []
        parts += [f"on-{self.distil_texts}"] if self.distil_texts else []
        parts += [f"loop-{self.loop}"] if self.loop else []
        parts += [f"context{self.context}"] if self.context else []
        parts += ["of-dense-trained"] if self.origin else []
        parts += [f"at{self.origin_rate}"] if self.origin_rate is not None else []
        parts += [self.marks[1:]] if self.marks else []
        parts += [f"calibrated-{self.calibrated}"] if self.calibrated else []
        return "-".join(parts)


_LATER = {
    "allocation": "threshold",
    "slopes": False,
    "label_share": 0.0,
    "start_windows": 1.0,
    "rate": None,
    "origin": "",
    "origin_rate": None,
    "loop": "",
    "context": 0,
    "beginning_share": 0.0,
    "embeddings": True,
    "average": 0.0,
    "mixed": 1.0,
    "local": LOCAL,
    "texts": "",
    "distil_texts": "",
    "target": "",
    "width": 0,
    "rank_steps": 0,
    "calibrated": "",
}
"""Fields of `Spec` that came after the first lines were written, with their defaults."""


AVERAGES = (0.1, 0.25, 0.5)
"""Means of the last weights that are kept of every distillation."""


class TailMeans:
    """Means of a model's weights over the last steps of a training.

    Args:
        model: the model that trains.
        steps: of the training.
        shares: of the steps, the last.
    """

    def __init__(self, model: nn.Module, steps: int, shares: Sequence[float] = AVERAGES) -> None:
        self.model, self.steps = model, steps
        self.means: dict[float, list[Tensor]] = {share: [] for share in shares}
        self.counts = dict.fromkeys(shares, 0)

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights behind a step, from 1 on."""
        own = [p.detach() for p in self.model.parameters()]
        for share, mean in self.means.items():
            if step <= (1 - share) * self.steps:
                continue
            self.counts[share] += 1
            if mean:
                torch._foreach_lerp_(mean, own, 1 / self.counts[share])
            else:
                mean += [p.clone() for p in own]

    def state(self, share: float, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state `like` with a mean in place of the parameters; the mean is then let go."""
        names = [name for name, _ in self.model.named_parameters()]
        found = {n: m.to(like[n].dtype) for n, m in zip(names, self.means.pop(share), strict=True)}
        tied = {p.data_ptr(): n for n, p in self.model.named_parameters()}
        return {n: found[tied[v.data_ptr()]] if v.data_ptr() in tied else v for n, v in like.items()}


@dataclass(frozen=True)
class Schedule:
    """How long and how fast things are trained.

    Attributes:
        block, batch: tokens of a block, and blocks of a batch.
        rank_steps, rank_rate: of the predictors alone.
        distil_rate, distil_rank_rate: of the model, and of the predictors beside it.
        calibration: blocks that windows are allocated by.
    """

    block: int = 8192
    batch: int = 4
    rank_steps: int = 300
    rank_rate: float = 3e-3
    distil_rate: float = 5e-5
    distil_rank_rate: float = 3e-4
    calibration: int = 8


class ValueFed(nn.Module):
    """Ranks from the value vectors of the layer, one small network per KV head: the ablation of what is read.

    Args:
        value: the layer's value projection, which stays the layer's.
        heads, head_dim: G and D.
        width: hidden units per head.
    """

    def __init__(self, value: nn.Linear, heads: int, head_dim: int, width: int = 64) -> None:
        super().__init__()
        self._value = [value]  # in a list: not a parameter of this module
        self.heads = heads
        self.up = nn.Parameter(torch.empty(heads, head_dim, width))
        self.down = nn.Linear(width, heads)  # one row per head; `learn_ranks` begins with its bias
        nn.init.normal_(self.up, std=head_dim**-0.5)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, hidden) -> (B, G, N) float32."""
        with torch.no_grad():
            values = self._value[0](hidden_states)
        values = values.unflatten(-1, (self.heads, -1)).transpose(1, 2).float()
        values = torch.nn.functional.rms_norm(values, values.shape[-1:])
        hidden = torch.nn.functional.silu(values @ self.up.float())
        ranks = torch.einsum("bgnw,gw->bgn", hidden, self.down.weight.float())
        return settle(ranks + self.down.bias.float()[:, None])


class Turn:
    """The right to fill the GPU, which one process has at a time: others compile, record or load meanwhile.

    Args:
        file: stands for the GPU.

    Attributes:
        waited: seconds.
    """

    def __init__(self, file: Path) -> None:
        self._path, self.waited = file, 0.0
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Wait for it, once."""
        if self._file is None:
            start = time.perf_counter()
            self._file = open(self._path, "w")  # noqa: SIM115
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self.waited += time.perf_counter() - start

    def free(self) -> bool:
        """Whether no process has it."""
        with open(self._path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class OutOfTime(Exception):
    """A training would end after `Workshop.deadline`."""


class Workshop:
    """Makes forms from one pretrained model, and keeps what has been trained in a folder.

    Args:
        model: folder of the pretrained model.
        data: folder that `lab/scripts/conversion_data.py` wrote.
        state: folder for what is trained; a second run takes it from there.
        schedule: how long things are trained.
        device: where models live.
        report: receives (spec, seconds and losses) of every training.

    Attributes:
        deadline: of `time.monotonic()`; a training that would end later is not started.

    Raises:
        UsageError: the folder holds what another schedule trained.
    """

    def __init__(
        self,
        model: Path,
        data: Path,
        state: Path,
        schedule: Schedule,
        device: str,
        report: Callable[[Spec, str, dict[str, Any]], None],
    ) -> None:
        self.folder, self.state, self.schedule, self.device, self.report = model, state, schedule, device, report
        self.train_tokens = np.load(data / "train.npy", mmap_mode="r")
        self.calibration_tokens = np.load(data / "validation.npy").reshape(-1)
        record = data / "data.json"
        self.begin = json.loads(record.read_text()).get("begin", []) if record.exists() else []
        self._dense: dict[int, Any] = {}
        self._tokenizer: Any = None
        self._kept: tuple[Spec, Any] | None = None
        self.deadline = math.inf
        state.mkdir(parents=True, exist_ok=True)
        record, now = state / "schedule.json", json.dumps(asdict(schedule))
        if record.exists() and record.read_text() != now:
            raise UsageError(f"{state} holds what {record.read_text()} trained, not {now}: give another folder")
        partial = state / f"schedule.{os.getpid()}"
        partial.write_text(now)
        partial.replace(record)  # another lane may be reading it

    def form(self, spec: Spec) -> Form:
        """Make the form, training what it needs."""
        if spec.kind == "dense":
            return Form(spec.name, self.dense(spec.rope), settings=spec.facts())
        if spec.kind == "peer":
            model = self._source(spec)
            assert spec.budget is not None
            return Form(spec.name, model, peers.compressing(model, spec.peer, spec.budget), spec.facts())
        if self._kept is None or self._kept[0] != spec:
            self._kept = None
            gc.collect()
            self._kept = (spec, self._trained_dense(spec) if spec.kind == "dense trained" else self.converted(spec))
        return Form(spec.name, self._kept[1], settings=spec.facts())

    def forget(self) -> None:
        """Free the memory of the last converted or trained form."""
        self._kept = None
        gc.collect()
        torch.cuda.empty_cache()

    def seconds_to_make(self, spec: Spec) -> float:
        """Roughly how long the training takes that the form still needs, on one H200 that an evaluator shares."""
        seconds = 0.0
        if _ranks(spec) and not self._ranks_file(spec).exists():
            seconds += 0.16 * (spec.rank_steps or self.schedule.rank_steps)
        if spec.trained and not self._file(spec).exists():
            seconds += 25 + 0.2 * spec.steps
        if spec.origin and not self._file(_origin(spec)).exists():
            seconds += 15 + 0.3 * spec.steps
        return seconds

    def founded(self, spec: Spec) -> bool:
        """Whether what the form is converted from is there."""
        return not spec.origin or self._file(_origin(spec)).exists()

    def ready(self, spec: Spec) -> bool:
        """Whether nothing has to be trained for the form."""
        needed = [self._file(spec)] if spec.trained else []
        needed += [self._ranks_file(spec)] if _ranks(spec) else []
        return self.founded(spec) and all(file.exists() for file in needed)

    def _file(self, spec: Spec) -> Path:
        """What was trained at the model's own positions also serves where they are scaled."""
        spec = replace(spec, mixed=1.0)
        return self.state / f"model-{spec.name if spec.context else replace(spec, rope=1).name}.pt"

    def _ranks_file(self, spec: Spec) -> Path:
        return self.state / f"ranks-{spec.predictor}-seed{spec.seed}{_longer(spec)}.pt"

    def dense(self, rope: int = 1) -> Any:
        """The pretrained model in bfloat16."""
        if rope not in self._dense:
            config = AutoConfig.from_pretrained(self.folder)
            if rope != 1:
                context = config.max_position_embeddings
                config.rope_parameters = {
                    **config.rope_parameters,
                    "rope_type": "yarn",
                    "factor": float(rope),
                    "original_max_position_embeddings": context,
                }
                config.max_position_embeddings = context * rope
            model = AutoModelForCausalLM.from_pretrained(self.folder, config=config, dtype=torch.bfloat16)
            self._dense[rope] = model.to(self.device).eval()
        return self._dense[rope]

    def blocks(self, seed: int, step: int = 0, context: int = 0, texts: str = "") -> Iterator[Tensor]:
        """Training batches (batch, block) on the device, of the kind `texts` (`Spec.texts`).

        Each block begins as the tokenizer begins a text. Blocks of a longer `context` are fewer, not more tokens.
        """
        schedule = self.schedule
        block = context or schedule.block
        batch_size = max(1, schedule.batch * schedule.block // block)
        share = 0.0 if texts else 0.5
        made = CalibrationBlocks(self.train_tokens, block, batch=batch_size, repeat_share=share, seed=seed)
        for number, batch in enumerate(made.from_step(step), step):
            batch = self._planted(texts, batch, seed, number)
            batch[:, : len(self.begin)] = torch.tensor(self.begin, dtype=batch.dtype)
            yield batch.to(self.device)

    def calibration(self, context: int = 0, texts: str = "", *, opening: bool = False) -> list[Tensor]:
        """Blocks (1, block) of validation text and code, of the kind `texts`.

        With `opening` each begins as the tokenizer begins a text.
        """
        share = 0.0 if texts else 0.5
        made = CalibrationBlocks(self.calibration_tokens, context or self.schedule.block, repeat_share=share, seed=1)
        batches = [batch for batch, _ in zip(made, range(self.schedule.calibration), strict=False)]
        planted = [self._planted(texts, batch, 1, number) for number, batch in enumerate(batches)]
        for batch in planted if opening else ():
            batch[:, : len(self.begin)] = torch.tensor(self.begin, dtype=batch.dtype)
        return [batch.to(self.device) for batch in planted]

    def _planted(self, texts: str, batch: Tensor, seed: int, step: int) -> Tensor:
        if texts == "spans":
            return with_spans(batch, seed, step)
        if texts == "facts":
            if self._tokenizer is None:
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder)
            return plant_facts(batch, self._tokenizer, seed=seed, step=step)
        return batch

    def converted(self, spec: Spec) -> Any:
        """The converted model of that spec."""
        assert spec.budget is not None
        dense = self._source(spec)
        shape: dict[str, Any] = {"local": spec.local, "width": spec.width or None}
        model = upcycled(dense, spec.budget, copy_weights=spec.distilled, **shape)
        exchange_predictors(model, spec.predictor)
        if _ranks(spec):
            load_predictors(model, self.ranks(spec))
        if spec.ranks == "newest" and spec.allocation == "loss":
            silence_predictors(model)
        if spec.windows == "heads":
            windows, slopes = self.windows(spec, model)
            set_windows(model, windows)
            model.config.slopes = slopes
        if spec.ranks == "newest":
            silence_predictors(model)
        if spec.distilled:
            self._train(spec, model, teacher=dense)
        return model.eval()

    def _source(self, spec: Spec) -> Any:
        """The dense model that the form is converted from."""
        return self._trained_dense(_origin(spec)) if spec.origin else self.dense(spec.rope)

    def ranks(self, spec: Spec) -> dict[str, Tensor]:
        """The learned predictors of that seed and kind, trained with the model frozen."""
        file = self._ranks_file(spec)
        if not file.exists():
            from dynamask.convert import learn_ranks
            from dynamask_lab.studies.conversion.rank_targets import learn_by_loss

            learn = learn_by_loss if spec.target else learn_ranks
            shape: dict[str, Any] = {"local": spec.local, "width": spec.width or None}
            model = upcycled(self.dense(spec.rope if spec.context else 1), 512, **shape)
            torch.manual_seed(spec.seed)
            exchange_predictors(model, spec.predictor)
            start = time.perf_counter()
            blocks = self.blocks(spec.seed, context=spec.context, texts=spec.texts)
            steps, rate = spec.rank_steps or self.schedule.rank_steps, self.schedule.rank_rate
            history = learn(model, blocks, steps=steps, learning_rate=rate)
            _synchronise(self.device)
            seconds = time.perf_counter() - start
            found = {name: p.detach().cpu() for name, p in predictor_parameters(model).items()}
            _save(found, file)
            told = Spec("converted", None, spec.seed, predictor=spec.predictor, context=spec.context, **_levers(spec))
            self.report(told, "learn_ranks", {"seconds": seconds, "history": _plain(history)})
        return dict(torch.load(file, map_location=self.device, weights_only=True))

    def windows(self, spec: Spec, model: Any) -> tuple[list[Any], list[Any] | None]:
        """The windows per layer and KV head, `spec.budget` on the mean, and the slopes or None."""
        assert spec.budget is not None
        name = f"windows-{spec.budget}-{spec.predictor}-seed{spec.seed}"
        if spec.allocation != "threshold":
            name += f"-{spec.allocation}-{spec.ranks}" + ("-slopes" if spec.slopes else "")
        name += _longer(spec) + (f"-{spec.calibrated}" if spec.calibrated else "")
        file = self.state / f"{name}.json"
        if not file.exists():
            from dynamask.convert import allocate_windows

            options: dict[str, Any] = {"method": spec.allocation}
            if not spec.slopes:
                options["slopes"] = (0.0,)
            start = time.perf_counter()
            blocks = self.calibration(spec.context, spec.texts, opening=spec.calibrated == "opening")
            made = allocate_windows(model, blocks, spec.budget, **options)
            _synchronise(self.device)
            seconds = time.perf_counter() - start
            windows = [layer and [int(window) for window in layer] for layer in made]
            slopes = model.config.slopes
            kept = windows if slopes is None else {"windows": windows, "slopes": slopes}
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(kept))
            partial.replace(file)
            untrained: dict[str, Any] = {"distilled": False, "steps": STEPS, "label_share": 0.0, "start_windows": 1.0}
            untrained |= {"beginning_share": 0.0, "embeddings": True, "average": 0.0, "mixed": 1.0}
            told = replace(spec, **untrained, rate=None, origin="", origin_rate=None, loop="", distil_texts="")
            told = (
                told
                if spec.allocation != "threshold"
                else Spec("converted", spec.budget, spec.seed, predictor=spec.predictor)
            )
            found = {"seconds": seconds, "windows": windows} | ({} if slopes is None else {"slopes": slopes})
            self.report(told, "allocate_windows", found)
        kept = json.loads(file.read_text())
        return (kept["windows"], kept["slopes"]) if isinstance(kept, dict) else (kept, None)

    def _trained_dense(self, spec: Spec) -> Any:
        model = copy.deepcopy(self.dense())
        self._train(spec, model)
        return model.eval()

    def _train(self, spec: Spec, model: Any, teacher: Any = None) -> None:
        """Train the model, or load what an earlier run trained."""
        file = self._file(spec)
        if file.exists():
            state = torch.load(file, map_location=self.device, weights_only=True)
            if spec.mixed != 1:
                dense = self.dense().state_dict()
                state = {n: dense[n].float().lerp(v.float(), spec.mixed) if n in dense else v for n, v in state.items()}
            model.load_state_dict(state, strict=False)
            return
        if spec.average or spec.mixed != 1:
            raise OutOfTime(f"{spec.name} is made beside another form, which was not trained")
        with self._alone():
            if time.monotonic() + self.seconds_to_make(spec) > self.deadline:
                raise OutOfTime(spec.name)
            self._train_now(spec, model, file, teacher)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until no other lane trains in this slot of the GPU, whose memory may hold no further training."""
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace(",", "-") + os.environ.get("CONVERSION_SLOT", "")
        with open(self.state / f"training-{gpu}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
            gc.collect()
            torch.cuda.empty_cache()

    def turn(self) -> Turn:
        """Of this process's GPU."""
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace(",", "-")
        return Turn(self.state / f"turn-{gpu}.lock")

    def _train_now(self, spec: Spec, model: Any, file: Path, teacher: Any) -> None:
        with self.turn() as turn:
            self._train_in(turn, spec, model, file, teacher)

    def _train_in(self, turn: Turn, spec: Spec, model: Any, file: Path, teacher: Any) -> None:
        schedule = self.schedule
        rate = schedule.distil_rate if spec.rate is None else spec.rate
        start = time.perf_counter()
        # Not the batches that the ranks were learned on.
        batches = self.blocks(spec.seed + 1000, context=spec.context, texts=spec.distil_texts)
        from dynamask.convert import distill

        means = TailMeans(model, spec.steps) if spec.kind == "converted" else None
        times: list[tuple[int, float]] = []

        def watch(progress: Any) -> None:
            turn.take()  # the first step has compiled and recorded; from here on the GPU is full
            if means is not None:
                means.add(progress.step)
            times.append((progress.step, round(time.perf_counter() - start - turn.waited, 3)))

        if spec.kind == "dense trained" and spec.loop == "distil":
            # Windows as long as the blocks: dense attention, in the loop that converted models are trained in.
            student = upcycled(model, schedule.block)
            options: dict[str, Any] = {"steps": spec.steps, "learning_rate": rate, "label_share": 1.0}
            options |= {"train_embeddings": True, "average_share": 0.0}
            history = distill(student, self.dense(), batches, rank_learning_rate=0.0, progress=watch, **options)
            model.load_state_dict(student.state_dict(), strict=False)
        elif spec.kind == "dense trained":
            turn.take()
            history = adapt(model, batches, steps=spec.steps, rate=rate)
        else:
            # Where ranks stand for the newest keys, they must stay equal. Beside the model, ranks learn the largest
            # attention; those that learned another target stay.
            ranks = schedule.distil_rank_rate if spec.ranks == "learned" and not spec.target else 0.0
            history = distill(
                model,
                teacher,
                batches,
                steps=spec.steps,
                learning_rate=rate,
                rank_learning_rate=ranks,
                label_share=spec.label_share,
                start_windows=spec.start_windows,
                beginning_share=spec.beginning_share,
                train_embeddings=spec.embeddings,
                average_share=0.0,
                progress=watch,
            )
        _synchronise(self.device)
        seconds = time.perf_counter() - start - turn.waited
        if means is not None:
            for share in AVERAGES:
                _save(means.state(share, model.state_dict()), self._file(replace(spec, average=share)))
        _save(model.state_dict(), file)
        tokens = spec.steps * schedule.batch * schedule.block
        found = {"seconds": seconds, "tokens": tokens, "history": history, "times": times}
        if os.environ.get("CONVERSION_WARM"):  # the compilers' caches were filled before
            found |= {"warm": True, "waited": round(turn.waited, 1)}
        self.report(spec, "train", found)


def _ranks(spec: Spec) -> bool:
    """Whether the form needs learned ranks, if only to set its windows by."""
    return spec.kind == "converted" and (spec.ranks == "learned" or spec.windows == "heads")


def _longer(spec: Spec) -> str:
    """What marks the files of what was trained at another length than the schedule's."""
    return (f"-rope{spec.rope}-context{spec.context}" if spec.context else "") + spec.marks


def _levers(spec: Spec) -> dict[str, Any]:
    """The fields that ranks depend on beside seed and kind."""
    return {name: getattr(spec, name) for name in ("local", "texts", "target", "width", "rank_steps")}


def _origin(spec: Spec) -> Spec:
    """The form that `spec.origin` names."""
    rate = spec.rate if spec.origin_rate is None else spec.origin_rate
    return Spec("dense trained", seed=spec.seed, steps=spec.steps, rate=rate, loop=spec.loop)


def upcycled(
    dense: Any, window: int, *, copy_weights: bool = False, local: int = LOCAL, width: int | None = None
) -> Any:
    """A converted model with equal windows and untrained ranks: a sliding window with sinks."""
    from dynamask.convert import upcycle

    options: dict[str, Any] = {"rank_predictor_width": width, "copy_weights": copy_weights}
    return upcycle(dense, window, local=local, sinks=SINKS, **options).eval()


def set_windows(model: Any, windows: Sequence[Sequence[int] | None]) -> None:
    """Give the converted model these windows per layer and KV head."""
    from dynamask.convert import set_windows as setter

    setter(model, windows)


def predictors(model: Any) -> dict[str, nn.Module]:
    """The rank predictors by name."""
    kinds = (RankPredictor, ValueFed)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def predictor_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of all rank predictors by name."""
    return {
        f"{name}.{inner}": p for name, module in predictors(model).items() for inner, p in module.named_parameters()
    }


def load_predictors(model: Any, parameters: dict[str, Tensor]) -> None:
    """Copy parameters that `predictor_parameters` listed."""
    own = predictor_parameters(model)
    if own.keys() != parameters.keys():
        raise ValueError(f"other predictors: {sorted(own.keys() ^ parameters.keys())[:4]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(parameters[name])
    model.config.trained_ranks = True


def silence_predictors(model: Any) -> None:
    """Make all ranks equal: each head keeps its newest keys."""
    with torch.no_grad():
        for module in predictors(model).values():
            for parameter in module.parameters():
                parameter.zero_()


def exchange_predictors(model: Any, kind: str) -> None:
    """Replace the predictors of the layers that rank by another kind of network."""
    if kind == "hidden":
        return
    for name, module in list(predictors(model).items()):
        assert isinstance(module, RankPredictor)
        parent = model.get_submodule(name.rpartition(".")[0])
        heads = module.down.out_features
        source = module.up if module.up is not None else module.down
        if kind == "linear":
            new: nn.Module = RankPredictor(source.in_features, heads, width=0)
            assert isinstance(new, RankPredictor)
            new.initialize_parameters()
        else:
            new = ValueFed(parent.v_proj, heads, parent.v_proj.out_features // heads)
        weight = source.weight if not isinstance(source, Float32Linear) else module.down.weight
        setattr(parent, name.rpartition(".")[2], new.to(device=weight.device, dtype=weight.dtype))


def _save(value: Any, file: Path) -> None:
    """Save whole or not at all."""
    partial = file.with_suffix(".partial")
    torch.save(value, partial)
    partial.replace(file)


def _plain(history: Any) -> Any:
    """What a training function returned, as far as JSON holds it."""
    try:
        return json.loads(json.dumps(history, default=lambda item: getattr(item, "__dict__", str(item))))
    except (TypeError, ValueError):
        return str(history)


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
