"""What a run of the laboratory's language engine is: one dataclass, plain JSON in result files."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from dynamask.errors import InvalidInputError
from dynamask.mixers import get_mixer
from dynamask.models.window_schedule import check_window_schedule
from dynamask_lab.legacy import scheduled_window
from dynamask_lab.sweeps.registry import Config
from dynamask_lab.sweeps.settings import WINDOWLESS, plain_settings, read_settings

SCHEDULES = ("cosine", "wsd")

_FIRST_LOOK = 25


@dataclass(frozen=True)
class LanguageConfig:
    """One run.

    Attributes:
        attention, window, local, recency, recency_spread, score_form, gate_init, rank_noise, rank_recency, ranking,
            rank_power, distance_penalty, layer_attention, layer_windows, rope_layers: of the model, see
            `DynamaskConfig`. A window only for mixers that choose.
        gate_rate: learning rate of what is added to logits (Delta, A and slopes) over that of the other weights.
        rank_rate: the same of ranks with ranking="attention".
        window_schedule: [share of the training, factor on the window] in rising order: from that share on, the window
            is so many times the config's, until the next. The validation loss is always at the config's window.
        layers, width, heads, groups, feed_forward: decoder layers, hidden size, query heads, key/value heads, width of
            the feed-forward. A head has width / heads dimensions.
        corpus: see `token_streams`.
        length: tokens of a sequence.
        steps: optimizer steps, or None: as many as `tokens_per_parameter` asks for.
        tokens_per_parameter: training tokens per non-embedding parameter of the mha model of this shape, the same
            number for every mixer.
        batch_tokens: tokens of a step, a multiple of `length`.
        learning_rate, weight_decay, beta2, clip: AdamW's, and the norm that gradients are clipped to.
        warmup: share of the steps in which the rate rises.
        schedule: "cosine" (to a tenth) or "wsd" (constant, then linear to zero over the last fifth).
        validation_tokens: so many of the held-out split, spread over it, the same for every run.
        test_share: share of the held-out documents that are kept for a test split, on which no form is chosen; the
            result then has its loss, over as many tokens.
        slopes: how much learned ranks rise per token, in nats, one number per key/value head of every layer; None: not.
        random_ranks: instead of learned ranks, those of a random network of the same shape that never learns.
        sinks: first positions that are always kept, by dma with ranking="learned" and by swa. These two are dynamask's
            mixers, not those of 0.1, and `layer_windows` may then give a list of one window per key/value head.
        calibrate_at: share of the training after which windows per key/value head of the same mean are set by one
            threshold on the learned ranks of validation text; 0: never.
        by_last_use: with `test_share`, the test loss also by how far back a token's last use lies.
        compile: compile the layers (on a GPU).
        keep_model: save the trained model, for a look at its masks.
        seed: of the weights and the order of the data.

    Raises:
        InvalidInputError: values no model can be built or trained from.
    """

    attention: str
    window: int | None = None
    local: int | None = None
    recency: float | None = None
    recency_spread: float = 1.0
    score_form: str = "exp"
    gate_init: str = "gate"
    rank_noise: float = 0.0
    rank_recency: float | None = None
    ranking: str = "score"
    rank_rate: float = 1.0
    rank_power: float = 1.0
    distance_penalty: float = 0.0
    layer_attention: list[str] | None = None
    layer_windows: list[Any] | None = None
    rope_layers: list[bool] | None = None
    gate_rate: float = 1.0
    window_schedule: list[list[float]] = field(default_factory=list)
    layers: int = 6
    width: int = 256
    heads: int = 4
    groups: int = 2
    feed_forward: int = 704
    corpus: str = "code"
    length: int = 2048
    steps: int | None = None
    tokens_per_parameter: float = 20.0
    batch_tokens: int = 65_536
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0
    warmup: float = 0.02
    schedule: str = "cosine"
    validation_tokens: int = 524_288
    test_share: float = 0.0
    sinks: int = 0
    slopes: list[float] | None = None
    random_ranks: bool = False
    calibrate_at: float = 0.0
    by_last_use: bool = False
    compile: bool = True
    keep_model: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "groups", "length", "batch_tokens", "validation_tokens"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise InvalidInputError(f"steps must be at least 1, or None to follow the parameters; got {self.steps}")
        if self.batch_tokens % self.length:
            raise InvalidInputError(
                f"batch_tokens must be a multiple of length={self.length}: whole sequences; got {self.batch_tokens}"
            )
        if self.width % (2 * self.heads):
            raise InvalidInputError(
                f"width must be a multiple of twice the heads, for rotary embeddings; got {self.width} and {self.heads}"
            )
        if self.schedule not in SCHEDULES:
            raise InvalidInputError(f"schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}")
        if not 0 <= self.warmup < 1:
            raise InvalidInputError(f"warmup is a share of the steps, from 0 to below 1; got {self.warmup}")
        check_window_schedule(self.window_schedule)
        if self.calibrate_at and (self.ranking != "learned" or not 0 < self.calibrate_at < 1):
            raise InvalidInputError(
                f"calibrate_at is a share of the training of a model with ranking='learned'; got {self.calibrate_at} "
                f"and ranking={self.ranking!r}"
            )
        if self.layer_windows is not None and (len(self.layer_windows) != self.layers or self.window is None):
            raise InvalidInputError(
                f"layer_windows gives the window of each of the {self.layers} layers, beside `window`; got "
                f"{self.layer_windows} and window={self.window}"
            )
        for name in self.mixers:
            get_mixer(name)
            if self.window is None and name not in WINDOWLESS:
                raise InvalidInputError(f"attention={name!r} chooses among keys: give it a window")

    @classmethod
    def of(cls, config: Config) -> LanguageConfig:
        """From plain JSON. Raises InvalidInputError for an unknown setting, with the nearest known one."""
        return read_settings(cls, config, "a language run")

    def plain(self) -> Config:
        """As plain JSON, from which `of` reads it."""
        return plain_settings(
            self,
            (
                "ranking",
                "rank_rate",
                "rank_power",
                "layer_windows",
                "rope_layers",
                "test_share",
                "sinks",
                "calibrate_at",
                "by_last_use",
                "slopes",
                "random_ranks",
            ),
        )

    @property
    def native(self) -> bool:
        """Whether the mixers are dynamask's, not those of 0.1."""
        return self.ranking == "learned" or self.sinks > 0

    @property
    def mixers(self) -> list[str]:
        """The attention of each layer."""
        return self.layer_attention or [self.attention] * self.layers

    @property
    def parameters(self) -> int:
        """Non-embedding parameters of the mha model of this shape, norms left out: what runs are matched by."""
        dim = self.width // self.heads
        return self.layers * self.width * (2 * dim * (self.heads + self.groups) + 3 * self.feed_forward)

    @property
    def total_steps(self) -> int:
        """Optimizer steps."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.tokens_per_parameter * self.parameters / self.batch_tokens))

    def window_at(self, step: int) -> int | None:
        """Keys per query in that step, the first being 0."""
        if self.window is None:
            return None
        return min(self.length, scheduled_window(self.window, self.window_schedule, step, self.total_steps))

    def looks(self) -> set[int]:
        """After how many steps the validation loss is taken: 25, 50, 100, ... and the last."""
        steps = self.total_steps
        doubling = (_FIRST_LOOK << i for i in itertools.count())
        return {steps, *itertools.takewhile(lambda look: look < steps, doubling)}
