"""What a training run is: one dataclass, read from a preset, a YAML file and `key=value` overrides, in that order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dynamask.errors import InvalidInputError, UsageError, did_you_mean
from dynamask.models.window_schedule import check_window_schedule
from dynamask.training.schedule import SCHEDULES


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
        recipe: which attention, see `dynamask.recipes`; None: "default", unless `model` chooses the attention itself.
        init: folder of a run, or of a saved or converted causal LM, or its hub name: training starts from that model,
            with its tokenizer, and preset, recipe and model are not used.
        teacher: folder or hub name of a dense causal LM whose distributions a converted model (`init`) is trained
            towards, in place of the text itself.
        preset: model size, see `dynamask.models.PRESETS`.
        model: fields of `DynamaskConfig` to override, written `model.windows=128` on the command line.
        data: sources of text, see `dynamask.data.documents`.
        tokenizer: folder or hub name; None trains one on the data.
        validation: share of the documents held out.
        errors: "fail" or "skip", for files that cannot be read.
        output: folder of the run: corpus, checkpoints, logs, final model.
        corpus: folder of the prepared corpus; None: `output`/corpus.
        context: tokens per training sequence, at least 2; None: the model's `max_position_embeddings`.
        batch_size: sequences per device and step.
        gradient_accumulation: micro-steps per optimizer step.
        steps: optimizer steps.
        window_schedule: [share of the training, factor on the window] in rising order, the last factor 1, see
            `ScheduledWindow`; empty: one window throughout.
        learning_rate: peak learning rate of AdamW.
        gate_rate: learning rate of gates and slopes, divided by `learning_rate`.
        rank_rate: the same of rank predictors.
        schedule: "cosine" to a tenth, "wsd" (warm-up, stable, linear to zero over the last fifth), "constant".
        warmup: steps of linear warm-up, fewer than `steps`; None: a tenth of the steps, at most 50.
        weight_decay: of matrices; see `dynamask.training.parameter_groups`.
        beta1, beta2: AdamW's.
        clip: largest norm of the gradient; 0: no limit.
        precision: "auto" (bfloat16 on a GPU that has it, else float32), "bf16", "fp32".
        gradient_checkpointing: recompute layers in the backward pass.
        compile: run the model through torch.compile.
        recorded: replay the steps as CUDA graphs, see `dynamask.training.record_steps`. None: on one GPU, where nothing
            known is in the way.
        shard: with several processes, split parameters, gradients and optimizer over them (FSDP2), and checkpoints with
            them; otherwise every process holds a replica.
        context_parallel: processes, neighbours by rank, that split every sequence between them: each holds
            context / context_parallel tokens at a time. They take turns through each other's batches, so a step sees
            the same sequences as without. It divides the number of processes.
        spike: nats by which the loss of a step may exceed the median of the last 50 before the training stops, as it
            does at a loss or gradient that is no number; 0: no limit.
        skip: optimizer steps whose batches are left out.
        seed: of weights and data order.
        log_every, eval_every, save_every: in steps; 0 means only at the end.
        keep: checkpoints kept, at least 1.
        resume: continue from the run's newest checkpoint if there is one.
    """

    preset: str = "tiny"
    recipe: str | None = None
    init: str | None = None
    teacher: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    data: list[str] = field(default_factory=lambda: ["stdlib"])
    tokenizer: str | None = None
    validation: float = 0.02
    errors: str = "fail"
    output: str = "runs/tiny"
    corpus: str | None = None
    context: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    steps: int = 500
    window_schedule: list[list[float]] = field(default_factory=list)
    learning_rate: float = 1e-3
    gate_rate: float = 1.0
    rank_rate: float = 1.0
    schedule: str = "cosine"
    warmup: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    recorded: bool | None = None
    shard: bool = True
    context_parallel: int = 1
    spike: float = 3.0
    skip: list[int] = field(default_factory=list)
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 100
    keep: int = 2
    resume: bool = True

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 2:
            raise UsageError(f"context must be at least 2: a token and the next one; got {self.context}")
        for name in ("batch_size", "gradient_accumulation", "steps", "keep", "log_every", "context_parallel"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("warmup_steps", "save_every", "eval_every", "weight_decay", "spike", "clip"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name.removesuffix('_steps')} must be at least 0; got {getattr(self, name)}")
        if self.warmup_steps >= self.steps:
            raise UsageError(
                f"warmup ({self.warmup_steps} steps) must be shorter than the training ({self.steps} steps): the "
                "rate would never reach learning_rate"
            )
        for name in ("learning_rate", "gate_rate", "rank_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name} must be a positive number; got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 0 and below 1; got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed must be at least 0 and below 2**32; got {self.seed}")
        if not 0 < self.validation < 1:
            raise UsageError(f"validation is the share held out, above 0 and below 1; got {self.validation}")
        if self.init is not None and (self.model or self.recipe or self.preset != "tiny"):
            raise UsageError(
                f"init={self.init} brings its own shape and attention: leave out preset, recipe and model.*"
            )
        if self.teacher is not None and self.init is None:
            raise UsageError("teacher=MODEL trains a converted model: name it by init=FOLDER (dynamask convert)")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}")
        try:
            check_window_schedule(self.window_schedule)
        except InvalidInputError as error:
            raise UsageError(str(error)) from error
        if self.precision not in ("auto", "bf16", "fp32"):
            raise UsageError(f"precision must be auto, bf16 or fp32; got {self.precision!r}")

    @property
    def warmup_steps(self) -> int:
        """Return the steps of linear warm-up."""
        return min(50, self.steps // 10) if self.warmup is None else self.warmup

    @classmethod
    def load(cls, file: str | Path | None = None, overrides: Iterable[str] = ()) -> TrainConfig:
        """Read a YAML file, then apply overrides.

        Args:
            file: YAML with fields of this class, or None.
            overrides: "key=value" each; the value is YAML ("data=[a.txt,b.txt]"), "model.x=..." goes to `model`.

        Raises:
            UsageError: unreadable file, unknown key (naming the nearest), value of the wrong type.
        """
        values: dict[str, Any] = {}
        if file is not None:
            try:
                loaded = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig"))
            except OSError as error:
                raise UsageError(f"cannot read the configuration {file}: {error.strerror}") from error
            except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
                raise UsageError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
            if not isinstance(loaded, dict):
                raise UsageError(f"{file} must hold keys and values; got {type(loaded).__name__}")
            values.update(loaded)
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise UsageError(f"{override!r} is not an override: write key=value, such as steps=200")
            try:
                value = yaml.safe_load(text)
            except (yaml.YAMLError, RecursionError) as error:
                raise UsageError(
                    f"{override!r}: the value is not valid YAML: {' '.join(str(error).split())}"
                ) from error
            if key.startswith("model."):
                values["model"] = values.get("model") or {}
                if not isinstance(values["model"], dict):
                    raise UsageError(f"model must hold keys and values; got {values['model']!r}, so {key} has no place")
                values["model"][key.removeprefix("model.")] = value
            else:
                values[key] = value
        return cls(**{key: _typed(key, value) for key, value in values.items()})

    def save(self, path: Path) -> None:
        """Write as YAML."""
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), encoding="utf-8")


def _typed(key: str, value: Any) -> Any:
    """The value in the field's type. Raises UsageError for an unknown key or a value that does not fit."""
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    if key not in fields:
        raise UsageError(f"unknown setting {key!r}{did_you_mean(key, fields)}; there are {', '.join(fields)}")
    kind = str(fields[key].type)
    if kind.endswith("| None") and value is None:
        return None
    kind = kind.removesuffix(" | None")
    if kind == "list[str]" and isinstance(value, str):
        return [value]
    if kind == "float" and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as a string
            return float(value)
        except ValueError:
            pass
    kinds = {"int": int, "float": float, "bool": bool, "str": str, "dict[str, Any]": dict}
    expected = kinds.get(kind, list)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise UsageError(f"{key} must be {expected.__name__}; got {value!r}")
    return value
