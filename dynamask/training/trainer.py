"""transformers' Trainer with dynamask's optimizer, schedule and loss, and checkpoints that are whole or not there."""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dynamask.errors import UsageError
from dynamask.ops.context_parallel import context_parallel
from dynamask.training.checkpointing import checkpoints, write_checksums
from dynamask.training.loss import TokenLosses, plain_losses, use_chunked_loss
from dynamask.training.optimizer import adamw
from dynamask.training.processes import neighbours, shards_of_all
from dynamask.training.recorded_steps import RecordedSteps
from dynamask.training.sampler import ShuffledBlocks
from dynamask.training.schedule import learning_rate_share
from dynamask.training.watch import LossWatch, Pace, pace_of_all, save_batch


class _Epochs(TrainerCallback):
    """Tells the sampler which epoch begins."""

    def __init__(self, trainer: AtomicTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.sampler is not None:
            self.trainer.sampler.epoch = int(state.epoch or 0)


class _Judge(TrainerCallback):
    """Looks at every step before the weights change."""

    def __init__(self, trainer: AtomicTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.judge_step()


class AtomicTrainer(Trainer):
    """Trains a causal LM; writes each checkpoint beside its place and renames it when every file is on disk.

    Differs from transformers' Trainer in the parameter groups (`parameter_groups`), the schedule
    (`learning_rate_share`), the loss (`use_chunked_loss`), the validation loss, which is the mean over all predicted
    tokens, and the order of the data (`ShuffledBlocks`). It prints nothing.

    Args:
        keep: checkpoints kept; older ones are deleted once a newer one is whole.
        schedule: see `learning_rate_share`.
        gate_rate, rank_rate: see `parameter_groups`.
        token_losses: see `use_chunked_loss`.
        context_parallel: processes that split every sequence between them, see `TrainConfig`.
        recorded: whether steps are replayed as CUDA graphs, see `record_steps`. None: where nothing is known to be in
            the way.
        spike: see `LossWatch`. A step whose loss or gradient is no number, or whose loss jumps, ends the training
            before the weights change; its batch is saved.
        skip: optimizer steps, from 1, whose batches are left out.
    """

    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    is_fsdp_enabled: bool

    def __init__(
        self,
        *args: Any,
        keep: int = 2,
        schedule: str = "cosine",
        gate_rate: float = 1.0,
        rank_rate: float = 1.0,
        token_losses: TokenLosses = plain_losses,
        context_parallel: int = 1,
        recorded: bool | None = None,
        spike: float = 0.0,
        skip: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        self._gradient_norm: Any = None
        self.sampler: ShuffledBlocks | None = None
        super().__init__(*args, **kwargs)
        self.keep = keep
        self.schedule = schedule
        self.gate_rate, self.rank_rate = gate_rate, rank_rate
        self._staging: str | None = None
        self._first_step = 0
        self._row_sums: list[Tensor] = []
        self._sharing = None if context_parallel == 1 else neighbours(context_parallel)
        self.watch, self.skip, self.pace = LossWatch(spike), frozenset(skip), Pace()
        self._batches: list[Any] = []
        self._step_losses: list[Tensor] = []
        step = super().training_step
        plain = recorded is False or self._sharing is not None
        self._steps: Any = step if plain else RecordedSteps(self, step, wanted=bool(recorded))
        use_chunked_loss(self.model, token_losses)
        self.add_callback(_Epochs(self))
        self.add_callback(_Judge(self))
        for printer in {DEFAULT_PROGRESS_CALLBACK, ProgressCallback, PrinterCallback}:
            self.remove_callback(printer)

    def create_accelerator_and_postprocess(self) -> None:
        """Set up accelerate; where parameters are split, with gradients reduced in float32, and on CPUs too."""
        super().create_accelerator_and_postprocess()
        clip = self.accelerator.clip_grad_norm_

        def noting(*args: Any, **kwargs: Any) -> Any:
            self._gradient_norm = clip(*args, **kwargs)
            return self._gradient_norm

        self.accelerator.clip_grad_norm_ = noting
        if not self.args.fsdp:
            return
        state = self.accelerator.state
        if not self.is_fsdp_enabled:  # accelerate's list of what FSDP runs on lacks CPUs, on which it runs
            from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState  # an extra

            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            state._shared_state["distributed_type"] = PartialState._shared_state["distributed_type"] = (
                DistributedType.FSDP
            )
            self.is_fsdp_enabled = True
        if self.args.bf16:
            # Casting inputs would round rotary angles, and copy the facts of a call, where layers leave their losses.
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Take the micro-batches of a step, and note how long that took."""
        begun = time.perf_counter()
        taken = super().get_batch_samples(*args, **kwargs)
        self.pace.waited += time.perf_counter() - begun
        self._batches, self._step_losses = taken[0], []
        return taken

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-batch, split over processes where they share sequences; note its loss, see `judge_step`."""
        if self._sharing is None:
            loss: Tensor = self._steps(*args, **kwargs)
        else:
            model, inputs, *rest = args
            parts = []
            for shard in shards_of_all(self._prepare_inputs(inputs), self._sharing):
                with context_parallel(self._sharing):
                    parts.append(super().training_step(model, shard, *rest, **kwargs))
            loss = torch.stack(parts).sum()
        self._step_losses.append(loss.detach())
        return loss

    def judge_step(self) -> None:
        """Leave out a step that is to be skipped; stop at one that would spoil the weights.

        Raises:
            UsageError: in all processes, with the place of the batch, which each has saved.
        """
        step = self.state.global_step + 1
        if step in self.skip:
            self.model.zero_grad()  # a parameter without a gradient stays as it is
            return
        loss = torch.stack(self._step_losses).sum().float()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(loss)
            loss = loss / self.args.world_size
        norm = None if self._gradient_norm is None else float(self._gradient_norm)
        problem = self.watch.problem(float(loss), norm)
        if problem is None:
            return
        process = f"-{self.args.process_index}" if self.args.world_size > 1 else ""
        file = Path(self.args.output_dir) / f"stopped-at-step-{step}{process}.pt"
        losses = [float(each) for each in self._step_losses]
        save_batch(file, self._batches, step=step, loss=float(loss), losses=losses, gradient_norm=norm, problem=problem)
        kept = checkpoints(Path(self.args.output_dir))
        last = f"The newest checkpoint is {kept[-1].name}. " if kept else ""
        raise UsageError(
            f"stopped at step {step}: {problem}. The weights were not changed by it, and its batch is in {file}. {last}"
            f"Run the same command with skip=[{step}] to leave this batch out, or with spike=0 for a loss that may jump"
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build AdamW over dynamask's parameter groups."""
        if self.optimizer is None:
            self.optimizer = adamw(
                self.model if model is None else model,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                gate_rate=self.gate_rate,
                rank_rate=self.rank_rate,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the schedule of `learning_rate_share`."""
        if self.lr_scheduler is None:
            share = functools.partial(
                learning_rate_share,
                self.schedule,
                steps=num_training_steps,
                warmup=self.args.get_warmup_steps(num_training_steps),
            )
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        self.sampler = ShuffledBlocks(len(dataset), self.args.data_seed or self.args.seed)
        return self.sampler

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Count the targets: those of `shift_labels` where the data has them."""
        counted = [
            {**batch, "labels": F.pad(batch["shift_labels"], (1, 0), value=-100)} if "shift_labels" in batch else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Note the loss and the number of tokens of each row; see `evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        rows = torch.stack([outputs["row_losses"].double(), outputs["row_counts"].double()], dim=-1)
        self._row_sums.append(self.accelerator.gather_for_metrics(rows).sum(0).cpu())
        return outputs["loss"].detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with the mean loss over all predicted tokens, where transformers takes a mean of batches' means."""
        self._row_sums = []
        output = super().evaluation_loop(*args, **kwargs)
        if self._row_sums:
            loss, count = torch.stack(self._row_sums).sum(0).tolist()
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss / max(1.0, count)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the pace; the summary at the end of a resumed training is of the steps that it ran."""
        if "loss" in logs:
            own = torch.tensor(self.pace.take(self.args.device), device=self.args.device)
            table = [own]
            if self.args.world_size > 1:
                table = [torch.empty_like(own) for _ in range(self.args.world_size)]
                torch.distributed.all_gather(table, own)
            logs |= pace_of_all(torch.stack(table).tolist())
        if "train_runtime" in logs:
            steps = self.state.global_step - self._first_step
            seconds = max(logs["train_runtime"], 1e-9)
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            logs["train_steps_per_second"] = round(steps / seconds, 3)
            logs["train_samples_per_second"] = round(steps * batch / seconds, 3)
            logs["train_loss"] = self._total_loss_scalar / max(1, steps)
        super().log(logs, start_time)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        resumed = kwargs.get("resume_from_checkpoint")
        self._first_step = 0 if resumed is None else int(str(resumed).rsplit("-", 1)[-1])
        return super()._inner_training_loop(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of missing weights, of which tied ones are none."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))

    def restore(self, checkpoint: Path) -> None:
        """Take model and state from a checkpoint, to evaluate and save without training on."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.is_fsdp_enabled:  # accelerate splits a model only beside its optimizer
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.create_optimizer())
            self.model_wrapped = self.model

    def save_whole(self, folder: Path) -> None:
        """Save the model as one, for `from_pretrained`, also where processes split it; all of them call this."""
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self.save_model(str(folder))

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        final = Path(super()._get_output_dir(trial))
        staging = final / ".partial"
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()  # no process writes to what the first one is removing
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()  # every process writes its own part
        write_checksums(staging / name)
        if self.args.should_save:
            for file in (staging / name).rglob("*"):
                flush(file)
            if (final / name).exists():
                shutil.rmtree(final / name)
            os.replace(staging / name, final / name)
            flush(final)
            shutil.rmtree(staging, ignore_errors=True)
            for old in checkpoints(final)[: -self.keep]:
                shutil.rmtree(old)


def flush(path: Path) -> None:
    """Force a file or a folder's entries to disk, so that a rename cannot overtake what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
