"""Small language models, one engine for every experiment that compares mixers by their loss.

Optimizer, schedule, loss, order of the data and operations counted are those of `dynamask.training`: a run here and
`dynamask train` with the same settings have the same losses. This loop is for sweeps of many small models. A run is its
`LanguageConfig`, plain JSON; two runs that differ in the mixer alone see the same tokens in the same order
and start from the same seed. The loop is made for throughput on one device: the corpus lies in its memory, layers are
compiled, steps are recorded as CUDA graphs, and nothing is read back between two looks at the validation split. A run
stops whenever its caller raises from `progress`, and the next call with the same config continues it from the state it
left, to the same numbers.

Documents stand end to end and attention crosses their bounds, for every mixer alike.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamask.convert.allocate_windows import counts_above_threshold
from dynamask.errors import InvalidInputError
from dynamask.mixers.dma import LEARNING_ROWS
from dynamask.models import DynamaskConfig, DynamaskForCausalLM
from dynamask.training import adamw, flops
from dynamask.training.loss import TokenLosses, next_token_losses, plain_losses, training_loss
from dynamask.training.optimizer import GATES
from dynamask.training.schedule import learning_rate_share
from dynamask_lab.language.batches import Batches
from dynamask_lab.language.config import LanguageConfig
from dynamask_lab.language.data import token_streams
from dynamask_lab.language.data_parallel import Group, leading
from dynamask_lab.language.figures import gate_figures, losses_by_last_use, position_buckets, thinned
from dynamask_lab.language.generators import Generators
from dynamask_lab.language.kept_models import keep
from dynamask_lab.language.replayed import ReplayedGradients
from dynamask_lab.legacy import config_of_0_1, set_window
from dynamask_lab.sweeps.registry import Config, Progress
from dynamask_lab.sweeps.results import run_key
from dynamask_lab.sweeps.settings import WINDOWLESS

STATE_FOLDER = "DYNAMASK_STATE"
"""Environment variable: where unfinished runs and kept models lie. Default: runs/experiments."""

_RANKS = ("gate.delta.weight", "gate.log_rank_recency")
"""Of a gate with ranking="attention": they have a loss of their own, so nothing that they do shakes the logits."""

_PROGRESS_EVERY = 10
_SAVE_SECONDS = 120.0
_TIMED_FROM = 5
"""Steps before the clock of tokens/s starts: they compile."""


def build_model(settings: LanguageConfig, vocab_size: int) -> DynamaskForCausalLM:
    """The model of a run, initialised from the CPU's generator, tied embeddings."""
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": settings.width,
        "intermediate_size": settings.feed_forward,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.groups,
        "head_dim": settings.width // settings.heads,
        "max_position_embeddings": settings.length,
        "rope_theta": 10_000.0,
    }
    if settings.native:
        windows = settings.layer_windows or settings.window
        model = DynamaskForCausalLM(
            DynamaskConfig(
                **shape,
                attention=settings.layer_attention or settings.attention,
                windows=windows,
                local=settings.local,
                sinks=settings.sinks,
                ranking="learned",
                slopes=None if settings.slopes is None else [settings.slopes] * settings.layers,
            )
        )
        if settings.random_ranks:
            _randomise_ranks(model)
        return model
    own = {
        name: getattr(settings, name)
        for name in (
            *("window", "local", "recency", "recency_spread", "score_form", "gate_init", "rank_noise"),
            *("rank_recency", "ranking", "rank_power", "distance_penalty", "layer_attention", "layer_windows"),
            "rope_layers",
        )
        if getattr(settings, name) is not None
    }
    return DynamaskForCausalLM(
        config_of_0_1(
            **shape,
            attention=settings.attention,
            **own,
        )
    )


_RANDOM_RANKS = 2.0
"""Standard deviation of random ranks, in nats: about that of learned ones."""


def _randomise_ranks(model: DynamaskForCausalLM) -> None:
    """Let every rank predictor be a random function of the hidden state that stays as it is."""
    layers: Any = model.model.layers
    for layer in layers:
        predictor = layer.mixer.rank_predictor
        predictor.requires_grad_(False)
        nn.init.normal_(predictor.up.weight, std=predictor.up.in_features**-0.5)
        # The hidden units' silu has a mean square of about 0.36.
        nn.init.normal_(predictor.down.weight, std=_RANDOM_RANKS * (0.36 * predictor.width) ** -0.5)


def learning_rate_at(settings: LanguageConfig, step: int) -> float:
    """The rate of a step, the first being 0."""
    steps = settings.total_steps
    warmup = max(1, round(settings.warmup * steps))
    return settings.learning_rate * learning_rate_share(settings.schedule, step, steps, warmup)


def training_flops(settings: LanguageConfig, model: DynamaskForCausalLM) -> float:
    """Useful floating-point operations of the whole run, see `dynamask.training.flops`."""
    counts = parameter_counts(model)
    steps = (_windows(settings, settings.window_at(step)) for step in range(settings.total_steps))
    return flops.training_flops(
        parameters=counts["non_embedding"] + counts["embedding"],
        query_width=settings.width,
        length=settings.length,
        tokens=settings.batch_tokens,
        pairs=(
            [
                _pairs(settings, model.config, name, window)
                for name, window in zip(settings.mixers, windows, strict=True)
            ]
            for windows in steps
        ),
    )


def _windows(settings: LanguageConfig, window: int | None) -> list[int | None]:
    """Of each layer, where the config's own is `window` for the time being."""
    if settings.layer_windows is None or window is None or settings.window is None:
        return [window] * settings.layers
    means = [round(np.mean(own)) for own in settings.layer_windows]
    return [own * window // settings.window for own in means]


def _pairs(settings: LanguageConfig, config: DynamaskConfig, mixer: str, window: int | None) -> float:
    """Query-key pairs of one sequence in one head."""
    if mixer == "nsa":
        assert config.nsa is not None
        return flops.block_sparse_pairs(settings.length, **config.nsa)
    return flops.causal_pairs(settings.length, None if window is None or mixer in WINDOWLESS else window)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """ "embedding" (shared with the output layer), "non_embedding", and of the latter "gates"."""
    embedding = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" in name)
    rest = sum(p.numel() for name, p in model.named_parameters()) - embedding
    gates = sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in GATES))
    return {"embedding": embedding, "non_embedding": rest, "gates": gates}


def run_language(config: Config, progress: Progress, initial: Path | None = None) -> dict[str, Any]:
    """Train one model, or go on training it, and measure it.

    Args:
        config: fields of `LanguageConfig`, as plain JSON.
        progress: told every few steps. What it raises ends the call after the state has been saved.
        initial: folder of a kept model of this shape whose weights the training begins with; gates that it lacks keep
            their own initial values, which is how a dense model is upcycled.

    Returns:
        "loss": final validation loss, nats per token; "test" (with `test_share`): the same on the test split;
        "curve": validation loss after so many steps and tokens;
        "positions": final loss by position in the sequence; "training": loss of the batches, thinned; "diverged": the
        step at which the loss was found not to be a number, or None; "tokens_per_second" (training alone, without
        compilation), "peak_memory" (bytes; None on a CPU), "parameters", "flops", "precision", "corpus_content" (digest
        of the tokens), "corpus_tokens" (to train on; where the run takes more, they are read again), "gates" (A, slopes
        and norms of Delta at the end, per layer), "seconds" of all calls, "processes" (if several share the run, see
        `data_parallel`).

    Raises:
        InvalidInputError: settings that do not fit together.
        UsageError: a corpus that is not there.
    """
    with leading(config, initial) as group:
        return train_together(group, config, progress, initial)


def train_together(group: Group, config: Config, progress: Progress, initial: Path | None = None) -> dict[str, Any]:
    """Do the part of one process in a run, see `run_language`; only the leader's result holds anything."""
    run = _Run(LanguageConfig.of(config), state_folder(config), group)
    try:
        if initial is not None:
            run.begin_with(initial)
        run.resume()
        return run.train(progress)
    finally:
        run.close()


def kept_run(config: Config, progress: Progress, initial: Path | None = None) -> tuple[dict[str, Any], Path]:
    """`run_language` with `keep_model`, at most once: its result waits beside the model for whoever needs both.

    Args:
        config, progress, initial: see `run_language`.

    Returns:
        The result, and the model's folder; delete the folder around it when both have served.

    Raises:
        InvalidInputError: without keep_model, or if the run diverged, which leaves no model.
    """
    if not config["keep_model"]:
        raise InvalidInputError("a run whose model is needed afterwards must have keep_model=True")
    folder = state_folder(config)
    kept = folder / "result.json"
    if not kept.exists():
        result = run_language(config, progress, initial)
        if result["diverged"] is not None:
            raise InvalidInputError(
                f"the run diverged at step {result['diverged']}, so there is no model: lower learning_rate"
            )
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.rename(kept)
    return json.loads(kept.read_text()), folder / "model"


def evaluate_language(config: Config, folder: Path) -> float:
    """Validation loss of a kept model, nats per token, under the attention of another config of its shape.

    Args:
        config: fields of `LanguageConfig`.
        folder: of the model.

    Raises:
        InvalidInputError: a model of another shape.
    """
    run = _Run(LanguageConfig.of(config), state_folder(config))
    try:
        run.begin_with(folder)
        return float(run._validate().mean())
    finally:
        run.close()


def language_cost(config: Config) -> float:
    """Operations of a run as a GPU's time goes: with something for starting the kernels of each step."""
    settings = LanguageConfig.of(config)
    seen = settings.length if settings.window is None else min(settings.window, settings.length)
    if settings.layer_windows:
        seen = round(float(np.mean([np.mean(own) for own in settings.layer_windows])))
    if set(settings.mixers) & {*WINDOWLESS, "nsa"}:
        seen = settings.length // 2
    per_token = 6.0 * settings.parameters + 6.0 * settings.width * 8192 + 12.0 * settings.layers * settings.width * seen
    launches = 2e11 * settings.layers
    return settings.total_steps * (per_token * settings.batch_tokens + launches)


def language_kind(config: Config) -> str:
    """Mixer and shape: what runs of one speed share."""
    settings = LanguageConfig.of(config)
    mixers = "+".join(dict.fromkeys(settings.mixers))
    bias = " biased" if settings.distance_penalty else ""
    uneven = " uneven" if settings.layer_windows else ""
    return f"{mixers}{bias} {settings.layers}x{settings.width} {settings.length} {settings.window}{uneven}"


def _check_shareable(settings: LanguageConfig, group: Group) -> None:
    """Raise InvalidInputError where processes that share a run would not have the numbers of one."""
    rows = len(group.part(settings.batch_tokens // settings.length))
    if group.size > 1 and settings.rank_noise:
        raise InvalidInputError(
            f"rank_noise={settings.rank_noise} draws noise for whole batches: {group.size} processes cannot share such "
            "a run"
        )
    if group.size > 1 and settings.ranking == "learned" and rows % LEARNING_ROWS:
        raise InvalidInputError(
            f"learned ranks learn from one sequence in {LEARNING_ROWS}: with {group.size} processes a batch must hold "
            f"a multiple of {group.size * LEARNING_ROWS} sequences; got {rows * group.size}"
        )


class _Run:
    """A training run: what changes from step to step, and how to keep it."""

    def __init__(self, settings: LanguageConfig, folder: Path, group: Group | None = None) -> None:
        self.settings, self.folder = settings, folder
        self.group = group or Group()
        _check_shareable(settings, self.group)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.streams = token_streams(settings.corpus, settings.test_share)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = build_model(settings, self.streams.vocab_size).to(self.device)
        self.generators = Generators(settings.seed, self.device)
        self.optimizer = adamw(
            self.model,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=(0.9, settings.beta2),
            gate_rate=settings.gate_rate,
            rank_rate=settings.rank_rate,
            ranks=_RANKS if settings.ranking == "attention" else (),
        )
        steps = settings.total_steps
        # Filled on the device and read at looks alone: reading a number every step would stop the device every step.
        self.losses = torch.zeros(steps, device=self.device)
        self.step = 0
        self.curve: list[dict[str, Any]] = []
        self.by_position: Tensor | None = None
        self.diverged: int | None = None
        self.seconds, self._began = 0.0, time.perf_counter()
        self.timed_steps, self.timed_seconds = 0, 0.0
        self.peak = 0
        self.token_losses: TokenLosses = plain_losses
        self.gradients = ReplayedGradients(self.model, self._loss, record=False)

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> None:
        """Write the state beside its file and rename it: a kill leaves the old state or the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.state_file.with_suffix(".partial")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": self.generators.state(),
            "losses": self.losses,
            "step": self.step,
            "curve": self.curve,
            "diverged": self.diverged,
            "timing": (self.timed_steps, self.timed_seconds, self.peak),
            "seconds": self.seconds + time.perf_counter() - self._began,
            "content": self.streams.content,
            "windows": self.model.config.windows,
        }
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.state_file)

    def resume(self) -> None:
        """Take up the state that an earlier call left, if it did and the corpus is still the same."""
        if not self.state_file.exists():
            return
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        if state["content"] != self.streams.content:
            raise InvalidInputError(
                f"{self.folder} holds a run on another version of the corpus {self.settings.corpus!r}: delete that "
                "folder to start the run anew"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generators.restore(state["generators"])
        self.losses = state["losses"]
        self.step, self.curve = state["step"], state["curve"]
        self.diverged, self.seconds = state["diverged"], state["seconds"]
        self.timed_steps, self.timed_seconds, self.peak = state["timing"]
        self.model.config.windows = state.get("windows", self.model.config.windows)

    def begin_with(self, folder: Path) -> None:
        """Take the weights of another run's kept model; only gates may be missing in it."""
        weights = DynamaskForCausalLM.from_pretrained(folder).state_dict()
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        left = unexpected + [name for name in missing if not any(part in name for part in GATES)]
        if left:
            raise InvalidInputError(f"{folder} holds a model of another shape: {', '.join(left[:5])} do not fit")

    def close(self) -> None:
        """Free the device: the next run of a sweep needs it."""
        del self.model, self.optimizer, self.losses, self.token_losses, self.gradients
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prepare(self) -> None:
        """Compile the layers where the settings say so; on a GPU, steps are recorded."""
        if self.settings.compile and self.device.type == "cuda":
            self.token_losses = compile_training(self.model)
        self.gradients = ReplayedGradients(self.model, self._loss)

    def train(self, progress: Progress) -> dict[str, Any]:
        settings = self.settings
        steps, looks = settings.total_steps, settings.looks()
        self.prepare()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        batches = Batches(settings, self.streams.train, self.device, self.group)
        if self.group.lead(lambda: self.step) != self.step:
            raise RuntimeError("the processes of this run have read different states")
        saved = time.monotonic()
        begun: tuple[int, float] | None = None  # step and time since which the clock has run undisturbed
        first = self.step
        with self.generators:
            while self.step < steps and self.diverged is None:
                if begun is None and self.step >= first + _TIMED_FROM:
                    self._synchronize()
                    begun = (self.step, time.perf_counter())
                self._train_step(batches)
                look = self.step in looks
                if look or self.step % _PROGRESS_EVERY == 0:
                    pause = look or time.monotonic() - saved > _SAVE_SECONDS
                    if pause and begun is not None:
                        self._synchronize()
                        self.timed_steps += self.step - begun[0]
                        self.timed_seconds += time.perf_counter() - begun[1]
                        begun = None
                        first = self.step - _TIMED_FROM
                    if look:
                        self.group.check_alike(self.model.parameters())
                        if self.group.leads:
                            self._look()
                    if self.group.leads and time.monotonic() - saved > _SAVE_SECONDS:
                        self.save()
                        saved = time.monotonic()
                    self.diverged = self.group.lead(lambda: self._tell(progress))
        return self._result() if self.group.leads else {}

    def _tell(self, progress: Progress) -> int | None:
        """Tell how far the run is, and save its state if that ends it; returns the step at which it diverged."""
        try:
            note = f"loss {self.curve[-1]['loss']:.3f}" if self.curve else ""
            progress(self.step / self.settings.total_steps, note)
        except BaseException:
            self._note_peak()
            self.save()
            raise
        return self.diverged

    def _train_step(self, batches: Batches) -> None:
        settings, step = self.settings, self.step
        if settings.calibrate_at and step == round(settings.calibrate_at * settings.total_steps):
            self._calibrate()
        set_window(self.model, settings.window_at(step))
        self.model.train()
        rate = learning_rate_at(settings, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        tokens = batches(step)
        loss = self.group.average(self.model.parameters(), self.gradients(tokens))
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses[step] = loss
        self.step += 1

    def _loss(self, tokens: Tensor) -> Tensor:
        with self._autocast():
            return training_loss(self.model, tokens, self.token_losses)

    def _calibrate(self) -> None:
        """Set windows per key/value head of the same mean, by the ranks of validation text."""
        settings = self.settings
        assert settings.window is not None
        window = settings.window
        rows = self._rows(self.streams.validation, min(8, len(self.streams.validation) // settings.length - 1))
        self.model.eval()

        def found() -> list[list[int]]:
            with self._autocast():
                return windows_by_rank(self.model, rows[:, :-1], window)

        self.model.config.windows = self.group.lead(found)

    def _look(self) -> None:
        """Take the validation loss, at the config's own window."""
        by_position = self._validate()
        loss = float(by_position.mean())
        entry = {"step": self.step, "tokens": self.step * self.settings.batch_tokens, "loss": loss}
        self.curve.append(entry)
        if not math.isfinite(loss):
            self.diverged = self.step
        self.by_position = by_position

    @torch.no_grad()
    def _validate(self, split: str = "validation", kept: list[Tensor] | None = None) -> Tensor:
        """(length,) mean loss at each position of that split; appends the losses (rows, length) to `kept`."""
        settings = self.settings
        set_window(self.model, settings.window)
        self.model.eval()
        stream: np.ndarray = getattr(self.streams, split)
        count = min(len(stream) - 1, settings.validation_tokens) // settings.length
        if count < 1:
            raise InvalidInputError(
                f"the {split} split has {len(stream)} tokens and validation_tokens={settings.validation_tokens}: "
                f"both must be at least length={settings.length}"
            )
        rows = self._rows(stream, count)
        total = torch.zeros(settings.length, dtype=torch.float64, device=self.device)
        # Batches of one size, that of training in this process: another size would compile another graph.
        size = len(self.group.part(settings.batch_tokens // settings.length))
        for start in range(0, count, size):
            part = rows[start : start + size]
            padded = F.pad(part, (0, 0, 0, size - len(part)))
            with self._autocast():
                losses = next_token_losses(self.model, padded, self.token_losses)[: len(part)]
            total += losses.double().sum(0)
            if kept is not None:
                kept.append(losses)
        return (total / count).cpu()

    def _rows(self, stream: np.ndarray, count: int) -> Tensor:
        """(count, length + 1) sequences spread over a split, which may hold one corpus after another."""
        length = self.settings.length
        starts = np.arange(count) * ((len(stream) - 1) // length) // count * length
        blocks = np.stack([stream[start : start + length + 1] for start in starts]).astype(np.int64)
        return torch.from_numpy(blocks).to(self.device)

    def _result(self) -> dict[str, Any]:
        settings = self.settings
        self._note_peak()
        if settings.keep_model and self.diverged is None:
            self.model.save_pretrained(self.folder / "model")
        if self.diverged is None:
            keep(self.model, settings.plain(), self.curve[-1]["loss"])
        counts = parameter_counts(self.model)
        by_position = self._validate() if self.by_position is None else self.by_position
        result = {
            "loss": self.curve[-1]["loss"],
            "diverged": self.diverged,
            "curve": self.curve,
            "positions": position_buckets(by_position),
            "training": thinned(self.losses[: self.step].cpu().tolist()),
            "tokens_per_second": self.timed_steps * settings.batch_tokens / self.timed_seconds
            if self.timed_seconds
            else None,
            "peak_memory": self.peak or None,
            "parameters": counts,
            "flops": training_flops(settings, self.model),
            "precision": "bf16" if self.device.type == "cuda" else "fp32",
            "corpus_content": self.streams.content,
            "corpus_tokens": len(self.streams.train),
            "gates": gate_figures(self.model),
            "seconds": self.seconds + time.perf_counter() - self._began,
        }
        if self.group.size > 1:
            result["processes"] = self.group.size
        if settings.test_share and self.diverged is None:
            rows: list[Tensor] | None = [] if settings.by_last_use else None
            result["test"] = float(self._validate("test", rows).mean())
            if rows:
                stream = self.streams.test
                tokens = self._rows(stream, min(len(stream) - 1, settings.validation_tokens) // settings.length)
                result["last_use"] = losses_by_last_use(torch.cat(rows).cpu().numpy(), tokens.cpu().numpy())
        if settings.calibrate_at:
            result["head_windows"] = [list(layer) for layer in self.model.config.head_windows]
        self.state_file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a kept model stays
            self.folder.rmdir()
        return result

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    def _note_peak(self) -> None:
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def compile_training(model: DynamaskForCausalLM) -> TokenLosses:
    """Compile the layers, and losses for `next_token_losses`: eager, float32 logits cost more than several layers."""
    torch._dynamo.reset()  # a sweep of many mixers would run into dynamo's limit of graphs per function
    # With windows per head every layer has a graph for training and one for validation.
    torch._dynamo.config.recompile_limit = max(8, 6 * len(model.model.layers))
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    return torch.compile(plain_losses, dynamic=False)


@torch.no_grad()
def windows_by_rank(model: DynamaskForCausalLM, tokens: Tensor, window: int) -> list[list[int]]:
    """Windows per key/value head with a given mean, by one threshold on the learned ranks of all heads.

    Args:
        model: with ranking="learned" in every layer.
        tokens: (B, N).
        window: the mean.
    """
    config: Any = model.config
    layers: Any = model.model.layers
    least = config.local + config.sinks
    found: list[Tensor] = []

    def note(module: nn.Module, arguments: Any, ranks: Tensor) -> None:
        found.append(ranks[:, :, config.sinks : ranks.shape[-1] - config.local].float())

    hooks = [layer.mixer.rank_predictor.register_forward_hook(note) for layer in layers]
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled layer has no place for a hook
            model.model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    counts = counts_above_threshold([torch.cat(found, 1).transpose(0, 1)], window - least)
    groups = config.num_key_value_heads
    return [[least + n for n in counts[start : start + groups]] for start in range(0, len(counts), groups)]


def state_folder(config: Config) -> Path:
    """Where the run's state lies until it is done, and its model after that if `keep_model` is set."""
    return Path(os.environ.get(STATE_FOLDER, "runs/experiments")) / run_key("language", config)
