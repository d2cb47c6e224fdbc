"""A training run from configuration to saved model."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainingArguments, set_seed

from dynamask.data import Corpus, Document, PackedDataset, prepare
from dynamask.errors import UsageError
from dynamask.models import DynamaskForCausalLM, preset
from dynamask.training.config import TrainConfig
from dynamask.training.trainer import AtomicTrainer, checkpoints
from dynamask.training.window_schedule import ScheduledWindow

# Settings that may change between a run and its resumption: they alter neither weights nor losses so far.
_FREE_TO_CHANGE = {"resume", "keep", "save_every", "log_every", "eval_every", "output", "corpus", "data", "errors"}


_CORPUS_OF_RUN = "corpus.sha256"


@dataclass(frozen=True)
class TrainResult:
    """What a run produced.

    Attributes:
        model_dir: folder of the final model and tokenizer.
        loss: mean validation cross-entropy, nats per token.
        perplexity: its exponential.
        history: the Trainer's log, one dictionary per entry.
        skipped: what errors="skip" left out of the corpus, and why.
    """

    model_dir: Path
    loss: float
    perplexity: float
    history: list[dict[str, Any]]
    skipped: list[str]


def train(
    config: TrainConfig,
    *,
    progress: Callable[[Iterable[Document], str], Iterable[Document]] | None = None,
    callbacks: Iterable[TrainerCallback] = (),
    quiet: bool = False,
) -> TrainResult:
    """Prepare the data, train, evaluate, save. Continues a killed run where its last checkpoint stands.

    Args:
        config: the run.
        progress: wraps the documents while the corpus is prepared.
        callbacks: further Trainer callbacks.
        quiet: no progress bar.

    Raises:
        UsageError: bad data or settings, another run in the same folder, too little disk.
    """
    output = Path(config.output)
    _check_same_run(config, output)
    shape = preset(config.preset, **config.model)
    arguments = _arguments(config, quiet)
    with arguments.main_process_first(local=False):  # the other ranks open what the first one made
        corpus = prepare(
            config.data,
            config.corpus or output / "corpus",
            vocab_size=shape.vocab_size,
            tokenizer=config.tokenizer,
            validation=config.validation,
            errors=config.errors,
            progress=progress,
        )
    _check_same_corpus(corpus, output)
    train_set = PackedDataset(corpus, "train", config.context)
    validation_set = PackedDataset(corpus, "validation", config.context)
    tokenizer = corpus.tokenizer
    shape.eos_token_id = tokenizer.eos_token_id
    shape.bos_token_id = tokenizer.eos_token_id
    set_seed(config.seed)
    model = DynamaskForCausalLM(shape)
    _check_disk(model, output, config.keep)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.process_index == 0:
        # A corpus elsewhere is named in full, so that the run can be evaluated from any folder.
        place = config.corpus and str(Path(config.corpus).resolve())
        replace(config, corpus=place).save(output / "train.yaml")
        (output / _CORPUS_OF_RUN).write_text(corpus.index["content"])

    trainer = AtomicTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=validation_set,
        callbacks=[*callbacks, *([ScheduledWindow(config.window_schedule)] if config.window_schedule else [])],
        keep=config.keep,
    )
    found = checkpoints(output) if config.resume else []
    try:
        trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
        loss = float(trainer.evaluate()["eval_loss"])
        final = output / "model"
        partial = output / ".model.partial"
        model.config.use_cache = True  # the Trainer turned it off for itself; whoever loads the model wants it
        if trainer.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(partial))  # by every rank: gathering a sharded model takes them all
        if trainer.is_world_process_zero():
            tokenizer.save_pretrained(partial)
            trainer.state.save_to_json(str(partial / "trainer_state.json"))
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
        trainer.accelerator.wait_for_everyone()
    except Exception as error:
        if "No space left" in str(error):  # torch, safetensors and the system each have their own class for it
            raise UsageError(
                f"the disk is full: the checkpoint of step {trainer.state.global_step} could not be written to "
                f"{output}. Earlier checkpoints are intact; free some space and run the same command to continue"
            ) from error
        raise
    return TrainResult(final, loss, math.exp(min(loss, 700.0)), trainer.state.log_history, corpus.index["skipped"])


def model_folder(name: str | Path) -> Path:
    """Where the model of a run's folder lies: its `model` folder; anything else is returned as it is."""
    folder = Path(name)
    return folder / "model" if (folder / "model" / "config.json").exists() else folder


def open_run(model_dir: str | Path) -> tuple[DynamaskForCausalLM, Any]:
    """Model and tokenizer of a finished run (its folder, or the `model` folder in it), or of any causal LM.

    Raises:
        UsageError: nothing there that can be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder(model_dir)
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder))
        return model.eval(), AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(
            f"cannot load a model from {model_dir!s}: {str(error).splitlines()[0]}. Give the folder of a finished "
            "run (dynamask train output=FOLDER) or a saved causal LM"
        ) from error


def open_corpus(model_dir: str | Path) -> Corpus:
    """The corpus a run was trained on. Raises UsageError where there is none."""
    folder = Path(model_dir)
    folder = folder.parent if folder.name == "model" else folder
    settings = folder / "train.yaml"
    named = TrainConfig.load(settings).corpus if settings.exists() else None
    return Corpus.open(named or folder / "corpus")


def _arguments(config: TrainConfig, quiet: bool) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    bf16 = config.precision == "bf16" or (config.precision == "auto" and gpu and torch.cuda.is_bf16_supported())
    schedules: dict[str, tuple[str, dict[str, Any]]] = {
        "cosine": ("cosine", {}),
        "constant": ("constant_with_warmup", {}),
        "wsd": ("warmup_stable_decay", {"num_decay_steps": max(1, config.steps // 5), "decay_type": "linear"}),
    }
    schedule, schedule_options = schedules[config.schedule]
    return TrainingArguments(
        output_dir=config.output,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=schedule_options,
        warmup_steps=min(config.warmup, config.steps),
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
        report_to=["tensorboard"],
        disable_tqdm=quiet,
        seed=config.seed,
        data_seed=config.seed,
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        prediction_loss_only=True,
    )


def _check_same_run(config: TrainConfig, output: Path) -> None:
    """A folder belongs to one run: continuing it with other settings would give a loss curve of neither."""
    settings = output / "train.yaml"
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
    before = yaml.safe_load(settings.read_text())
    now = asdict(config)
    changed = [key for key in now if key not in _FREE_TO_CHANGE and before.get(key, now[key]) != now[key]]
    if changed:
        told = ", ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in changed)
        raise UsageError(
            f"{output} holds a run with other settings: {told}. Use the same settings to continue it, or another output"
        )


def _check_same_corpus(corpus: Corpus, output: Path) -> None:
    """Checkpoints know their tokens by number: a corpus made anew from edited texts numbers them otherwise."""
    record = output / _CORPUS_OF_RUN
    if checkpoints(output) and record.exists() and record.read_text() != corpus.index["content"]:
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
            f"checkpoints of {parameters / 1e6:.1f}M parameters need {needed / 1e9:.2f} GB in {output}, and "
            f"{free / 1e9:.2f} GB are free: free some space, choose another output, or keep fewer (keep={keep})"
        )
