"""Train a converted model to give the next-token distribution of the dense model it was made from."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamask.convert.compiled_layers import check_compilable, compiled_layers, is_compilable
from dynamask.convert.distillation_loss import distillation_losses
from dynamask.convert.learning_rate import scaled_rate
from dynamask.convert.models import check_converted
from dynamask.convert.progress import Clock, Report, check_training, load_state, save_state, token_blocks
from dynamask.convert.recorded_step import RecordedStep
from dynamask.convert.teacher import check_teacher, separate_teacher
from dynamask.errors import InvalidInputError
from dynamask.training.optimizer import adamw
from dynamask.training.recorded_gradients import clear_gradients, free_recordings
from dynamask.training.schedule import learning_rate_share

_WORTH_COMPILING = 50
"""Steps from which on compiling the layers saves more time than it takes."""

_REPORT_EVERY = 5
"""Steps between two looks at the loss; each look waits for the GPU."""


def distill(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks: Iterable[Tensor],
    *,
    steps: int = 400,
    learning_rate: float | None = None,
    rank_learning_rate: float = 3e-4,
    warmup: int | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
    label_share: float = 0.0,
    beginning_share: float = 0.0,
    train_embeddings: bool | None = None,
    average_share: float = 0.25,
    start_windows: float = 1.0,
    shrink_share: float = 0.5,
    gradient_checkpointing: bool = False,
    compiled: bool | None = None,
    recorded: bool | None = None,
    checkpoint: str | Path | None = None,
    save_every: float = 120.0,
    progress: Report | None = None,
) -> list[float]:
    """Train a converted model, with its windows on, towards the teacher's distribution at every position.

    The loss is KL(teacher || student), see `chunked_kl`. The rank predictors go on learning beside it by their own
    loss, from the student's attention, at their own rate. AdamW without weight decay; a short warm-up, then a cosine to
    a tenth; the mean of the last weights is returned. On a GPU in bfloat16 over float32 weights.

    With `start_windows` above 1 the first steps see wider windows, which shrink to the model's: far from the teacher a
    small step learns less than near it. With `label_share` above 0 the model also adapts to the texts, as the dense
    model would if it were trained on them: a part of the loss is the cross-entropy of the next token.

    Args:
        model: made by `dynamask.convert.upcycle`, with trained ranks. Trained in place, in float32, and returned to its
            dtype.
        teacher: the dense model, or any causal LM with the same vocabulary. Not changed. If it shares weights with
            `model`, as after `upcycle(copy_weights=False)`, a copy of it is made first.
        blocks: iterable of (B, N) token ids; a list is read again from its beginning.
        steps: batches to train on. The default is that of the conversion study, with batches of 4 blocks of 8,192.
        learning_rate: highest rate of the model. None: a share of the size of its weights
            (`dynamask.convert.learning_rate.scaled_rate`), 4e-4 for SmolLM2-135M, with which it met its goals.
        rank_learning_rate: highest rate of the rank predictors; 0 leaves them as they are.
        warmup: steps of linear warm-up; None: a twentieth of the steps, at most 20.
        temperature: of both distributions.
        chunk: positions whose logits are in memory at a time.
        label_share: share of the cross-entropy of the next token in the loss, from 0 to 1. At 1 the teacher is not run.
        beginning_share: share of the divergence that the first positions of a block have, as many as the windows hold
            on the mean, if that is above their share of the positions. There the model sees nearly all keys: more
            weight keeps its answers to short texts as they are.
        train_embeddings: whether the embeddings and the output layer learn, too. None: with a `label_share` alone. The
            loss of keys is made up for by the layers; embeddings that follow the texts change what the model answers to
            other texts.
        average_share: share of the steps, the last, over whose weights the mean is returned; 0: the last weights.
        start_windows: factor of all windows at the first step, at least 1. No window rises above the block.
        shrink_share: share of the steps after which the windows are the model's, above 0 to 1.
        gradient_checkpointing: compute the layers again in the backward pass instead of keeping what they computed.
        compiled: whether the decoder layers of both models run compiled (`dynamask.convert.compiled_layers`), which
            takes some ten seconds at the start. None: on a GPU, for 50 steps or more, and of a teacher without a list
            of decoder layers (GPT-2) not.
        recorded: replay forward and backward as a CUDA graph, which spares the host its launches. The first replay is
            compared with the step as it is. Blocks of another shape than the first run as they are. Not with
            `start_windows` above 1, whose windows change, nor with `gradient_checkpointing`. None: where that holds,
            with compiled layers and the model on one GPU; a warning says where recording failed.
        checkpoint: file that keeps the state of the training. If it exists, training continues from it.
        save_every: seconds between two writes of the checkpoint.
        progress: called every few steps.

    Returns:
        The loss of every step, in nats per token: the divergence, or with `label_share` its mixture.

    Raises:
        InvalidInputError: a number out of its range, a model that is not converted, a teacher with another vocabulary,
            blocks that are too few or no token ids, a loss that is not finite, or a checkpoint of another run.
    """
    check_converted(model, "distill")
    learning_rate = scaled_rate(model) if learning_rate is None else learning_rate
    steps = check_training("distill", steps, learning_rate=learning_rate, temperature=temperature)
    _check_numbers(rank_learning_rate, chunk, label_share, beginning_share, average_share, start_windows, shrink_share)
    if train_embeddings is None:
        train_embeddings = label_share > 0
    recordable = start_windows == 1 and not gradient_checkpointing and _on_one_gpu(model)
    if recorded and not recordable:
        raise InvalidInputError(
            "distill: recorded=True needs a model on one GPU, start_windows=1 and gradient_checkpointing=False; got a "
            f"model on {next(model.parameters()).device}, {start_windows} and {gradient_checkpointing}"
        )
    check_teacher(model, teacher)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    teacher = separate_teacher(model, teacher)
    student: Any = model
    identity = {
        "stage": "distill",
        "steps": steps,
        "learning_rate": learning_rate,
        "label_share": label_share,
        "beginning_share": beginning_share,
        "train_embeddings": train_embeddings,
        "average_share": average_share,
        "start_windows": start_windows,
        "shrink_share": shrink_share,
    }
    state = load_state(checkpoint, identity)
    device = next(student.parameters()).device
    if compiled is None:
        compiled = device.type == "cuda" and steps >= _WORTH_COMPILING
    elif compiled:
        check_compilable(teacher)
    learns_ranks = rank_learning_rate > 0
    losses_of = functools.partial(
        distillation_losses,
        student,
        teacher,
        temperature=temperature,
        chunk=chunk,
        ranks=learns_ranks,
        label_share=label_share,
        beginning_share=beginning_share,
    )
    windows = student.config.windows
    with ExitStack() as running:
        for each in (student, teacher):
            if compiled and is_compilable(each):
                running.callback(compiled_layers(each).remove)
        running.enter_context(_trainable(student, learns_ranks, train_embeddings, gradient_checkpointing))
        optimizer = adamw(
            student, learning_rate=learning_rate, weight_decay=0.0, rank_rate=rank_learning_rate / learning_rate
        )
        mean = _Mean(p for p in student.parameters() if p.requires_grad)
        run = _Run(student, optimizer, mean, identity, steps, checkpoint, save_every, progress)
        start = run.resume(state)
        warmup = min(20, steps // 20) if warmup is None else warmup
        rates = [group["lr"] for group in adamw_rates(optimizer, learning_rate)]
        recording: RecordedStep | None = None
        source = token_blocks(blocks, start, "distill", model.config.vocab_size)
        for step in range(start, steps):
            tokens = next(source).to(device, non_blocking=True)
            if start_windows > 1:
                _widen_windows(student, windows, start_windows, step / (steps * shrink_share), tokens.shape[1])
            now = learning_rate_share("cosine", step, steps, warmup)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * now
            if step == start and (recordable and compiled if recorded is None else recorded):
                recording = _recording(student, losses_of, tokens, wanted=bool(recorded))
            if recording is not None and recording.serves(tokens):
                loss = recording(tokens)
            else:
                loss, ranks = losses_of(tokens)
                (loss if ranks is None else loss + ranks).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step >= steps - round(average_share * steps):
                mean.add()
            run.took(step, loss.detach(), tokens.numel())
        mean.put()
    if learns_ranks:
        student.config.trained_ranks = True
    return run.history.tolist()  # type: ignore[no-any-return]


def _check_numbers(
    rank_learning_rate: float,
    chunk: int,
    label_share: float,
    beginning_share: float,
    average_share: float,
    start_windows: float,
    shrink_share: float,
) -> None:
    """Raise `InvalidInputError` for an option of `distill` out of its range."""
    if not 0 <= rank_learning_rate < math.inf or chunk < 1:
        raise InvalidInputError(
            "distill: rank_learning_rate must be a finite number of at least 0, chunk at least 1; got "
            f"{rank_learning_rate} and {chunk}"
        )
    if not 0 <= label_share <= 1 or not start_windows >= 1 or not 0 < shrink_share <= 1:
        raise InvalidInputError(
            "distill: label_share must be from 0 to 1, start_windows at least 1, shrink_share above 0 and at most 1; "
            f"got {label_share}, {start_windows} and {shrink_share}"
        )
    if not 0 <= beginning_share < 1 or not 0 <= average_share < 1:
        raise InvalidInputError(
            "distill: beginning_share and average_share must be at least 0 and below 1; "
            f"got {beginning_share} and {average_share}"
        )


@contextmanager
def _trainable(student: Any, ranks: bool, embeddings: bool, gradient_checkpointing: bool) -> Iterator[None]:
    """Make a model trainable in float32 with what learns; put back its dtypes, flags, windows and mode afterwards."""
    config, training = student.config, student.training
    windows = config.windows
    wanted_grad = [parameter.requires_grad for parameter in student.parameters()]
    dtypes = [parameter.dtype for parameter in student.parameters()]
    checkpointed = bool(getattr(student, "is_gradient_checkpointing", False))
    try:
        _widen(student)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(ranks or "rank_predictor" not in name)
        if not embeddings:
            for module in (student.get_input_embeddings(), student.get_output_embeddings()):
                module.requires_grad_(False)
        if gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        student.train()
        yield
    finally:
        config.windows = windows
        if gradient_checkpointing and not checkpointed:
            student.gradient_checkpointing_disable()
        for parameter, dtype, wanted in zip(student.parameters(), dtypes, wanted_grad, strict=True):
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(wanted)
            parameter.grad = None
        student.train(training)


class _Run:
    """What a training has done so far: its losses, its reports and its checkpoints.

    Args:
        student, optimizer, mean: what is saved.
        identity: of the training; a checkpoint of another one is refused.
        steps: of the training.
        checkpoint: file, or None.
        save_every: seconds between two writes.
        progress: called every few steps, or None.

    Attributes:
        history: the loss of every step.
    """

    def __init__(
        self,
        student: Any,
        optimizer: torch.optim.Optimizer,
        mean: _Mean,
        identity: dict[str, Any],
        steps: int,
        checkpoint: Path | None,
        save_every: float,
        progress: Report | None,
    ) -> None:
        self._student, self._optimizer, self._mean, self._identity = student, optimizer, mean, identity
        self._steps, self._checkpoint, self._save_every, self._progress = steps, checkpoint, save_every, progress
        self.history = torch.zeros(steps)
        self._losses: list[Tensor] = []  # on the device: each look at one waits for it

    def resume(self, state: dict[str, Any] | None) -> int:
        """Continue from what a checkpoint holds, or begin; return the first step."""
        self._start = 0
        if state is not None:
            self._student.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._start, self.history = state["step"], state["losses"]
            self._mean.load(state["mean"])
        self._clock, self._saved = Clock("distill", self._steps, self._start), time.perf_counter()
        return self._start

    def took(self, step: int, loss: Tensor, tokens: int) -> None:
        """Take in the loss of a step; every few steps look at it, report and save.

        Raises:
            InvalidInputError: a loss that is not finite.
        """
        self._losses.append(loss)
        self._clock.tokens += tokens
        done = step + 1
        last = done == self._steps
        if not last and step != self._start and done % _REPORT_EVERY:
            return
        self.history[done - len(self._losses) : done] = torch.stack(self._losses).cpu()
        self._losses.clear()
        now = float(self.history[step])
        if not math.isfinite(now):
            raise InvalidInputError(
                f"distill: the {'loss' if self._identity['label_share'] else 'divergence'} is {now} at step {done}: "
                "the student or the teacher computes NaN or infinity. Check both on this text, or lower learning_rate"
            )
        if self._progress is not None:
            self._progress(self._clock.progress(done, now))
        if self._checkpoint is not None and (last or time.perf_counter() - self._saved > self._save_every):
            kept = {"model": self._student.state_dict(), "optimizer": self._optimizer.state_dict()}
            kept["mean"] = self._mean.state()
            save_state({"identity": self._identity, "step": done, "losses": self.history, **kept}, self._checkpoint)
            self._saved = time.perf_counter()


class _Mean:
    """The mean of parameters over steps."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._mean: list[Tensor] = []
        self._count = 0

    @torch.no_grad()
    def add(self) -> None:
        """Take in the parameters as they are now."""
        self._count += 1
        if self._count == 1:
            self._mean = [parameter.detach().clone() for parameter in self._parameters]
        else:
            torch._foreach_lerp_(self._mean, [p.detach() for p in self._parameters], 1 / self._count)

    @torch.no_grad()
    def put(self) -> None:
        """Set the parameters to their mean, if any step was taken in."""
        if self._count:
            torch._foreach_copy_([p.detach() for p in self._parameters], self._mean)

    def state(self) -> tuple[int, list[Tensor]]:
        return self._count, self._mean

    def load(self, state: tuple[int, list[Tensor]]) -> None:
        count, mean = state
        self._count, self._mean = count, [m.to(p.device) for m, p in zip(mean, self._parameters, strict=bool(mean))]


def _on_one_gpu(model: Any) -> bool:
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and next(iter(devices)).type == "cuda"


def _recording(student: Any, losses_of: Any, tokens: Tensor, *, wanted: bool) -> RecordedStep | None:
    """Record the step. Where that fails: raise if it was `wanted`, else warn and return None."""
    try:
        return RecordedStep(losses_of, [p for p in student.parameters() if p.requires_grad], tokens)
    except (InvalidInputError, RuntimeError) as error:
        if wanted:
            raise
        reason = " ".join(str(error).split())[:300]
    warnings.warn(f"the step is not recorded as a CUDA graph, and slower: {reason}", stacklevel=3)
    clear_gradients(student.parameters())
    free_recordings()
    return None


_SHRINKINGS = 8
"""Sizes that windows go through: each may be compiled for."""


def _widen_windows(model: Any, windows: Any, factor: float, share: float, length: int) -> None:
    """Set windows that fall from `factor` times the model's to the model's, as `share` rises from 0 to 1."""
    config = model.config
    done = min(_SHRINKINGS, math.floor(share * _SHRINKINGS))
    factor = factor ** (1 - done / _SHRINKINGS)

    def wide(window: int) -> int:
        return max(window, min(length, round(window * factor)))

    config.windows = windows
    if factor > 1:
        config.windows = [
            None if entry is None else [wide(window) for window in entry] for entry in config.head_windows
        ]


def adamw_rates(optimizer: torch.optim.Optimizer, learning_rate: float) -> list[dict[str, float]]:
    """Return the highest rate of every group of an optimizer that `adamw` built."""
    return [{"lr": learning_rate * float(group["factor"])} for group in optimizer.param_groups]


def _widen(model: Any) -> None:
    """Train in float32: the steps of AdamW are smaller than bfloat16 resolves."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()
