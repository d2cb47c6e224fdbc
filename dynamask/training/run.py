"""A training run from configuration to saved model."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

from dynamask import recipes
from dynamask.data import Corpus, Document, PackedDataset, prepare
from dynamask.errors import UsageError
from dynamask.hub import check_local_or_hub
from dynamask.lock import locked
from dynamask.mixers import get_mixer
from dynamask.models import DynamaskConfig, DynamaskForCausalLM, preset
from dynamask.training.checkpointing import checkpoint_step, checkpoints, damage, is_sharded
from dynamask.training.config import TrainConfig
from dynamask.training.folder import SETTINGS, model_folder, open_run
from dynamask.training.interruption import StopAtSignal
from dynamask.training.model_card import trained_card
from dynamask.training.processes import agreed, is_first, launched, note_processes, processes, processes_of
from dynamask.training.trainer import AtomicTrainer, flush
from dynamask.training.watch import pace_lines
from dynamask.training.window_schedule import ScheduledWindow

# Settings that may change between a run and its resumption: they alter neither weights nor losses so far.
_FREE_TO_CHANGE = {
    "resume",
    "shard",
    "spike",
    "skip",
    "keep",
    "save_every",
    "log_every",
    "eval_every",
    "output",
    "corpus",
    "data",
    "errors",
    "recorded",
}


_CORPUS_OF_RUN = "corpus.sha256"

Report = Callable[[str], None]
"""Takes one line about the run, for a person to read."""


@dataclass(frozen=True)
class TrainResult:
    """What a run produced.

    Attributes:
        model_dir: folder of the final model and tokenizer.
        loss: mean validation cross-entropy, nats per token; with a teacher, the divergence from it.
        perplexity: exponential of the cross-entropy; NaN with a teacher.
        history: the Trainer's log, one dictionary per entry.
        skipped: what errors="skip" left out of the corpus, and why.
        trained: optimizer steps that this call ran; 0 for a run that was finished before.
    """

    model_dir: Path
    loss: float
    perplexity: float
    history: list[dict[str, Any]]
    skipped: list[str]
    trained: int = 0


def train(
    config: TrainConfig,
    *,
    progress: Callable[[Iterable[Document], str], Iterable[Document]] | None = None,
    callbacks: Iterable[TrainerCallback] = (),
    report: Report | None = None,
    quiet: bool = False,
    trainer: Callable[..., AtomicTrainer] = AtomicTrainer,
) -> TrainResult:
    """Prepare the data, train, evaluate, save. Continues a killed run where its last checkpoint stands.

    A finished run is left as it is. Ctrl-C or SIGTERM ends the training at the next step's end, with a checkpoint.

    Args:
        config: the run.
        progress: wraps the documents while the corpus is prepared.
        callbacks: further Trainer callbacks.
        report: takes lines about the run; None: they go to standard error.
        quiet: no lines.
        trainer: makes the trainer, with the arguments of `AtomicTrainer`.

    Raises:
        UsageError: bad data or settings, another run or another process in the same folder, too little disk, a package
            that training needs and that is not installed.
        Interrupted: a signal ended the training before its last step.
    """
    require_training()
    output = Path(config.output)
    first_rank = is_first()
    tell = report or _print_line
    if quiet or not first_rank:
        tell = _ignore_line
    config, start = _resolved(config)
    if config.teacher is not None and trainer is AtomicTrainer:
        raise UsageError("teacher= is for dynamask.convert.train_towards, which `dynamask train` calls")
    if output.exists() and not output.is_dir():
        raise UsageError(f"cannot write a run to {output}: it is a file; choose another output")
    if not first_rank:
        return _train(config, start, output, progress, callbacks, tell, trainer)
    with locked(output / ".lock", f"a training in {output}"):
        return _train(config, start, output, progress, callbacks, tell, trainer)


def _print_line(line: str) -> None:
    print(line, file=sys.stderr)


def _ignore_line(line: str) -> None:
    pass


def require_training() -> None:
    """Raise UsageError where a package is missing that training needs."""
    missing = [name for name in ("accelerate",) if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"training needs {', '.join(missing)}: pip install 'dynamask-attention[train]'")


def _train(
    config: TrainConfig,
    start: DynamaskConfig | str,
    output: Path,
    progress: Callable[[Iterable[Document], str], Iterable[Document]] | None,
    callbacks: Iterable[TrainerCallback],
    tell: Report,
    make_trainer: Callable[..., AtomicTrainer],
) -> TrainResult:
    assert config.context is not None
    _check_same_run(config, output)
    if (finished := _finished(config, output)) is not None:
        tell(f"this run is finished: {output} holds the model of step {config.steps}; nothing was trained")
        before = TrainConfig.load(output / SETTINGS).data
        if before != config.data:
            tell(f"it was trained on {before}, not on {config.data}: choose another output for a model of these texts")
        return finished
    _check_context_parallel(config, start)
    arguments = _arguments(config, _split(config, output))
    with arguments.main_process_first(local=False):  # the other ranks open what the first one made
        corpus = prepare(
            config.data,
            config.corpus or output / "corpus",
            vocab_size=_vocabulary(start),
            tokenizer=config.tokenizer,
            validation=config.validation,
            block=config.context + 1,
            errors=config.errors,
            progress=progress,
        )
    _check_same_corpus(corpus, output)
    train_set = PackedDataset(corpus, "train", config.context)
    validation_set = PackedDataset(corpus, "validation", config.context)
    tokenizer = corpus.tokenizer
    set_seed(config.seed)
    model = _model(start, tokenizer)
    _check_disk(model, output, config.keep)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.process_index == 0:
        # A corpus elsewhere is named in full, so that the run can be evaluated from any folder.
        place = config.corpus and str(Path(config.corpus).resolve())
        replace(config, corpus=place).save(output / SETTINGS)
        (output / _CORPUS_OF_RUN).write_text(corpus.index["content"], encoding="utf-8")
        note_processes(output)

    stop = StopAtSignal()
    trainer = make_trainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=validation_set,
        callbacks=[
            *callbacks,
            *([ScheduledWindow(config.window_schedule)] if config.window_schedule else []),
            stop,
            _Lines(tell, config.context, "loss" if config.teacher is None else "divergence from the teacher"),
        ],
        keep=config.keep,
        schedule=config.schedule,
        gate_rate=config.gate_rate,
        rank_rate=config.rank_rate,
        context_parallel=config.context_parallel,
        recorded=config.recorded,
        spike=config.spike,
        skip=config.skip,
    )
    tell(_about(model, corpus, arguments))
    for line in _dense_layers(model.config, config.context):
        tell(line)
    checkpoint = agreed(lambda: _newest_readable(output, tell))
    if checkpoint is not None:
        _check_same_attention(model, checkpoint)
    begun = 0 if checkpoint is None else checkpoint_step(checkpoint)
    try:
        if begun >= config.steps:
            # Killed between the last checkpoint and the final save: the Trainer would run one step more.
            assert checkpoint is not None
            trainer.restore(checkpoint)
        else:
            if checkpoint is not None:
                tell(f"continuing from step {begun} of {config.steps}")
            with stop:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            stop.raise_if_stopped(trainer.state.global_step, config.steps, config.output)
        loss = float(trainer.evaluate()["eval_loss"])
        final = output / "model"
        partial = output / ".model.partial"
        model.config.use_cache = True  # the Trainer turned it off for itself; whoever loads the model wants it
        if getattr(model.config, "rank_loss_weight", None):
            model.config.trained_ranks = True  # a converted model's, which learned beside it
        if trainer.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_whole(partial)  # by every rank: gathering a sharded model takes them all
        if trainer.is_world_process_zero():
            tokenizer.save_pretrained(partial)
            trainer.state.save_to_json(str(partial / "trainer_state.json"))
            (partial / "README.md").write_text(trained_card(config, model, loss), encoding="utf-8")
            for file in partial.iterdir():
                flush(file)
            partial.rename(final)
            flush(output)
        trainer.accelerator.wait_for_everyone()
    except Exception as error:
        if "No space left" in str(error):  # torch, safetensors and the system each have their own class for it
            raise UsageError(
                f"the disk is full: the checkpoint of step {trainer.state.global_step} could not be written to "
                f"{output}. Earlier checkpoints are intact; free some space and run the same command to continue"
            ) from error
        raise
    history, skipped = trainer.state.log_history, corpus.index["skipped"]
    return TrainResult(final, loss, _perplexity(loss, config), history, skipped, trainer.state.global_step - begun)


_ATTENTION = frozenset({"attention", "windows", "local", "sinks", "ranking", "mla", "nsa"})
"""Fields of a model that choose its attention."""


def _resolved(config: TrainConfig) -> tuple[TrainConfig, DynamaskConfig | str]:
    """Fill in what recipe, preset or initial model decide.

    Returns:
        The settings with recipe, context and tokenizer given, and what the training starts from: the configuration of
        a new model, or the folder or name of a saved one.
    """
    if config.init is not None:
        check_local_or_hub(config.init, "folder")
        folder = str(model_folder(config.init))
        longest = saved_config(folder).max_position_embeddings
        tokenizer = config.tokenizer or folder
        return replace(config, tokenizer=tokenizer, context=_context(config, longest)), folder
    if config.recipe is None and not _ATTENTION & set(config.model):
        config = replace(config, recipe="default")
    if config.recipe is None:
        shape = preset(config.preset, **config.model)
        return replace(config, context=_context(config, shape.max_position_embeddings)), shape
    recipe = recipes.get(config.recipe)
    longest = preset(config.preset, **config.model).max_position_embeddings
    context = _context(config, longest)
    shape = recipes.apply(config.recipe, config.preset, context, **config.model)
    schedule = config.window_schedule or recipe.training.get("window_schedule", [])
    return replace(config, context=context, window_schedule=[list(pair) for pair in schedule]), shape


def saved_config(folder: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise UsageError(f"cannot load a model from init={folder}: {' '.join(first)}") from error


def _vocabulary(start: DynamaskConfig | str) -> int:
    return int((saved_config(start) if isinstance(start, str) else start).vocab_size)


def _model(start: DynamaskConfig | str, tokenizer: Any) -> Any:
    """The model that the training starts from, in float32."""
    if isinstance(start, str):
        return open_run(start)[0].float().train()
    start.eos_token_id = tokenizer.eos_token_id
    start.bos_token_id = tokenizer.eos_token_id
    return DynamaskForCausalLM(start)


def _perplexity(loss: float, config: TrainConfig) -> float:
    """Exponential of a cross-entropy; NaN with a teacher, whose divergence has none."""
    return math.exp(min(loss, 700.0)) if config.teacher is None else math.nan


def _context(config: TrainConfig, longest: int) -> int:
    """Tokens of a training sequence. Raises UsageError for more than the model is made for."""
    if config.context is None:
        return longest
    if config.context > longest:
        raise UsageError(
            f"context={config.context} is longer than the model's max_position_embeddings={longest}: shorten it, or "
            f"set model.max_position_embeddings={config.context}"
        )
    return config.context


def _finished(config: TrainConfig, output: Path) -> TrainResult | None:
    """The result of a run whose model is saved."""
    model = output / "model"
    if not model.exists():
        return None
    try:
        history = json.loads((model / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        loss = next(float(entry["eval_loss"]) for entry in reversed(history) if "eval_loss" in entry)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise UsageError(
            f"{model} holds a model whose training log cannot be read ({type(error).__name__}: {error}): choose "
            "another output, or delete that folder to save the model again from the newest checkpoint"
        ) from error
    return TrainResult(model, loss, _perplexity(loss, config), history, [])


def _newest_readable(output: Path, tell: Report) -> Path | None:
    """The newest checkpoint that is whole; None without checkpoints. Raises UsageError where all are damaged."""
    found = checkpoints(output)
    for checkpoint in reversed(found):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        tell(f"{checkpoint} is damaged ({problem}): an older one is used")
    if found:
        raise UsageError(f"every checkpoint in {output} is damaged: delete {output} to start anew")
    return None


def _check_context_parallel(config: TrainConfig, start: DynamaskConfig | str) -> None:
    size, count = config.context_parallel, processes()
    if size == 1:
        return
    assert config.context is not None
    if count % size:
        raise UsageError(
            f"context_parallel={size} must divide the number of processes; there are {count}: start them by torchrun "
            f"--nproc-per-node {size}, or a multiple of it"
        )
    if config.context < size:
        raise UsageError(f"context_parallel={size} cannot split a context of {config.context} tokens")
    dense = isinstance(start, DynamaskConfig) and [name for name in start.layer_mixers if not get_mixer(name).bounded]
    if dense:
        raise UsageError(f"context_parallel splits sequences of dma and swa; this model has layers of {dense[0]}")


def _split(config: TrainConfig, output: Path) -> bool:
    """Whether processes split the model: as the run's checkpoints do, or as it is set.

    Raises:
        UsageError: checkpoints of a model that was split, and no launcher of processes.
    """
    found = checkpoints(output)
    if not found:
        return config.shard and launched()
    if not is_sharded(found[-1]):
        return False
    if not launched():
        raise UsageError(
            f"{found[-1]} is of a model that was split over processes: continue it by torchrun, with any number of "
            "them, such as torchrun --nproc-per-node 1 -m dynamask train ..."
        )
    return True


def _about(model: torch.nn.Module, corpus: Corpus, arguments: TrainingArguments) -> str:
    """One line: what is trained, on what, where."""
    splits = corpus.index["splits"]
    parameters = sum(p.numel() for p in model.parameters())
    precision = "bf16" if arguments.bf16 else "fp32"
    processes = f" x {arguments.world_size}" if arguments.world_size > 1 else ""
    return (
        f"model: {_count(parameters)} parameters, {model.config.num_hidden_layers} layers; corpus: "  # type: ignore[union-attr]
        f"{_count(splits['train']['tokens'])} tokens, {_count(splits['validation']['tokens'])} held out; device: "
        f"{arguments.device.type}{processes}, {precision}"
    )


def _dense_layers(config: Any, context: int) -> list[str]:
    """Warnings of layers whose windows hold the whole context: what is trained under a sparse name is dense there."""
    windows: Any = getattr(config, "head_windows", None) or ()
    sparse = getattr(config, "layer_mixers", None)
    lines = []
    for layer, each in enumerate(windows):
        if each is None or (sparse is not None and sparse[layer] not in ("dma", "swa")):
            continue  # dense by choice
        wide = [window for window in each if window >= context]
        if wide:
            heads = "" if len(wide) == len(each) else f" in {len(wide)} of {len(each)} heads"
            lines.append(f"warning: layer {layer} sees {max(wide)} of {context}{heads}: dense attention")
    return lines


def _count(number: int) -> str:
    for size, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.1f}{suffix}"
    return str(number)


def _bytes(number: float) -> str:
    for size, suffix in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if number >= size:
            return f"{number / size:.1f} {suffix}"
    return f"{number:.0f} bytes"


class _Lines(TrainerCallback):
    """A line per log entry: step, losses, tokens per second."""

    def __init__(self, tell: Report, context: int, measured: str = "loss") -> None:
        self.tell, self.context, self.measured = tell, context, measured
        self.began: tuple[int, float] = (0, 0.0)
        self.said = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when the steps since the last line began."""
        if not self.began[1]:
            self.began = (state.global_step, time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the line."""
        logs = logs or {}
        place = f"step {state.global_step} of {state.max_steps}"
        if "eval_loss" in logs:
            line = f"{place}: validation {self.measured} {logs['eval_loss']:.4f}"
            if line != self.said:  # the end of a run is evaluated once more
                self.tell(line)
            self.said = line
        elif "loss" in logs and self.began[1]:
            step, since = self.began
            batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * self.context
            speed = (state.global_step - step) * batch / max(time.perf_counter() - since, 1e-9)
            self.tell(f"{place}: loss {logs['loss']:.4f}, rate {logs['learning_rate']:.2e}, {speed:,.0f} tokens/s")
            for line in pace_lines(logs):
                self.tell(f"{place}: {line}")
        self.began = (state.global_step, 0.0)


def _arguments(config: TrainConfig, split: bool) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    bf16 = config.precision == "bf16" or (config.precision == "auto" and gpu and torch.cuda.is_bf16_supported())
    sharding: dict[str, Any] = {}
    if split:
        # Older releases of transformers know the word alone.
        modern = TrainingArguments.__dataclass_fields__["fsdp"].default is None
        sharding["fsdp"] = True if modern else "full_shard"
        sharding["fsdp_config"] = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
    return TrainingArguments(
        **sharding,
        output_dir=config.output,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        max_grad_norm=config.clip,
        bf16=bf16,
        use_cpu=not gpu and not torch.backends.mps.is_available(),
        gradient_checkpointing=config.gradient_checkpointing,
        torch_compile=config.compile,
        logging_steps=config.log_every,
        logging_first_step=True,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=None,  # AtomicTrainer deletes old checkpoints, and only once a newer one is whole
        report_to=_reports(),
        disable_tqdm=True,
        seed=config.seed,
        data_seed=config.seed,
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        prediction_loss_only=True,
    )


def _reports() -> list[str]:
    """Where metrics go: TensorBoard where it is installed, Weights & Biases where it is set up."""
    found = ["tensorboard"] if importlib.util.find_spec("tensorboard") is not None else []
    configured = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE"))
    if configured and importlib.util.find_spec("wandb") is not None:
        found.append("wandb")
    return found


def _check_same_run(config: TrainConfig, output: Path) -> None:
    """A folder belongs to one run: continuing it with other settings would give a loss curve of neither."""
    settings = output / SETTINGS
    if not checkpoints(output) and not (output / "model").exists():
        return
    if not settings.exists():
        # Training would continue these checkpoints, prune them and replace the model, and they are not ours.
        raise UsageError(
            f"{output} holds checkpoints or a model that no run of dynamask left there (no train.yaml): choose another "
            "output"
        )
    if not config.resume:
        raise UsageError(f"{output} holds checkpoints or the model of a run: choose another output, or delete it")
    before, now = asdict(TrainConfig.load(settings)), asdict(config)
    sequences = [run["batch_size"] * run["gradient_accumulation"] for run in (before, now)]
    then = processes_of(output)
    if sequences[0] * then != sequences[1] * processes():
        raise UsageError(
            f"{output} holds a run of {sequences[0] * then} sequences a step ({sequences[0]} in each of {then} "
            f"processes), and these settings give {sequences[1] * processes()} ({sequences[1]} in each of "
            f"{processes()}): change batch_size or gradient_accumulation so that they agree"
        )
    for name in ("batch_size", "gradient_accumulation"):  # the same sequences, divided in another way
        before[name] = now[name]
    changed = [key for key in now if key not in _FREE_TO_CHANGE and before[key] != now[key]]
    if changed:
        told = ", ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in changed)
        raise UsageError(
            f"{output} holds a run with other settings: {told}. Use the same settings to continue it, or another output"
        )


_MASK = ("attention", "windows", "local", "sinks", "ranking", "slopes")
"""Fields of a native model's configuration that decide its mask, and which weights it has."""


def _check_same_attention(model: Any, checkpoint: Path) -> None:
    """A recipe may give another attention in another version; loading the checkpoint's weights would not notice it."""
    file = checkpoint / "config.json"
    if not isinstance(model.config, DynamaskConfig) or not file.exists():
        return
    saved, now = json.loads(file.read_text(encoding="utf-8")), json.loads(model.config.to_json_string(use_diff=False))
    changed = [name for name in _MASK if name in saved and saved[name] != now.get(name)]
    if changed:
        told = ", ".join(f"{name} was {saved[name]!r} and is {now.get(name)!r}" for name in changed)
        raise UsageError(
            f"{checkpoint} was trained with other attention: {told}. Continue it with the dynamask that began it, or "
            "begin anew in another output; model.NAME=VALUE sets these fields by hand"
        )


def _check_same_corpus(corpus: Corpus, output: Path) -> None:
    """Checkpoints know their tokens by number: a corpus made anew from edited texts numbers them otherwise."""
    record = output / _CORPUS_OF_RUN
    if checkpoints(output) and record.exists() and record.read_text(encoding="utf-8") != corpus.index["content"]:
        raise UsageError(
            f"the texts of the run in {output} changed since its checkpoints were written, and with them the tokenizer "
            "and the order of the data: restore the texts to continue it, or choose another output"
        )


def _check_disk(model: torch.nn.Module, output: Path, keep: int) -> None:
    """Weights and AdamW's two moments, float32, for the checkpoints kept, the one being written and the model."""
    parameters = sum(p.numel() for p in model.parameters())
    needed = parameters * 4 * (3 * (keep + 1) + 1)
    place = output
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UsageError(
            f"checkpoints of {_count(parameters)} parameters need {_bytes(needed)} in {output}, and "
            f"{_bytes(free)} are free: free some space, choose another output, or keep fewer (keep={keep})"
        )
