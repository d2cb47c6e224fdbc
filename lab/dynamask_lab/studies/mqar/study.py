"""Multi-query associative recall (arXiv 2312.04927): two layers of each mixer, and what they remember.

The task, the mixture of lengths and the recipe are those of HazyResearch/zoology (commit d88d6f5,
`data/multiquery_ar.py`, `train.py`, `experiments/paper_configs`): 2 layers, no feed-forward, tied embeddings, 8192
tokens; AdamW with weight decay 0.1, constant within an epoch and cosine from epoch to epoch, no warm-up, no clipping,
float32, batches of at most 65536 tokens in the mixture's order, stopped at 99% accuracy; learning rates
`np.logspace(-4, -2, 4)`, of which the best counts. Different here, for all mixers alike: dynamask's layers (RoPE and
q/k norm instead of learned positions, heads of 64 instead of one), no dropout, no convolution in the first layer.

Judged in the size "published", named before it ran: the mean accuracy of `dma, learned, slopes, head windows` and of
`dma, learned, head windows` (best forms) and of `dma, paper` (the plain form) against `mha` and `swa, sinks`, by
intervals that exclude zero and at least 0.05. The goal asks for dense attention's accuracy with 512 keys.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.mixers import get_mixer
from dynamask.models import DynamaskConfig, DynamaskForCausalLM
from dynamask.models.window_schedule import check_window_schedule
from dynamask.training.loss import AUXILIARY_WEIGHT
from dynamask_lab.language.engine import windows_by_rank
from dynamask_lab.language.replayed import ReplayedGradients
from dynamask_lab.legacy import config_of_0_1, scheduled_window, set_window
from dynamask_lab.studies.locality.study import wide_with_dense
from dynamask_lab.studies.mqar.data import MqarExamples, mqar_examples
from dynamask_lab.studies.mqar.whole_texts import whole_texts
from dynamask_lab.sweeps.registry import Config, Experiment, Progress, register
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.settings import SHARP, WIDE_FIRST, WINDOWLESS, plain_settings, ranked_by, read_settings

Segment = list[int]
"""[length, pairs, examples]"""

LEARNING_RATES = [float(rate) for rate in np.logspace(-4, -2, 4)]

# The mixture of zoology's `arxiv24_based_figure2`: trained on up to 256 tokens and 64 pairs, tested on four times that.
TRAIN: list[Segment] = [[64, 4, 100_000], [128, 8, 20_000], [256, 16, 20_000], [256, 32, 20_000], [256, 64, 20_000]]
TEST: list[Segment] = [
    *([64, 4, 1000], [64, 8, 1000], [64, 16, 1000], [128, 32, 1000], [256, 64, 1000], [512, 128, 1000]),
    [1024, 256, 1000],
]

_STEP_COST = 1e10
"""Multiplications that take about as long as starting the kernels of one step of a model this small."""


@dataclass(frozen=True)
class MqarConfig:
    """One run.

    Attributes:
        attention: a mixer's name.
        window: keys per query of the mixers that choose; None for those that see everything.
        local, recency: dma's; None: the library's defaults, 0 and 0: the paper's form.
        ranking, rank_power, recency_spread: dma's, see `DynamaskConfig`.
        window_schedule: see `LanguageConfig`; tests are always at the config's own window.
        layer_windows: see `DynamaskConfig`.
        sinks, calibrate_at, slopes: see `LanguageConfig`; with sinks or ranking="learned", the mixers are dynamask's.
        precision: "float32" as in zoology, or "bfloat16": autocast to it.
        width: of the residual stream, d_model.
        heads: query heads, and as many key/value heads.
        layers: decoder layers.
        vocab_size, power, random_fillers: see `mqar_examples`.
        train, test: segments [length, pairs, examples].
        batch_size, batch_tokens: sequences per batch, at most, and tokens per batch, at most.
        epochs: passes over the training segments, at most.
        stop_at: test accuracy that ends the training.
        learning_rate, weight_decay: AdamW's.
        seed: of the weights and the data.

    Raises:
        InvalidInputError: values no model can be built from.
    """

    attention: str
    window: int | None = None
    local: int | None = None
    recency: float | None = None
    ranking: str = "score"
    rank_power: float = 1.0
    recency_spread: float = 1.0
    window_schedule: list[list[float]] = field(default_factory=list)
    layer_windows: list[int] | None = None
    sinks: int = 0
    calibrate_at: float = 0.0
    slopes: list[float] | None = None
    precision: str = "float32"
    width: int = 128
    heads: int = 2
    layers: int = 2
    vocab_size: int = 8192
    power: float = 0.1
    random_fillers: bool = True
    train: list[Segment] = field(default_factory=lambda: TRAIN)
    test: list[Segment] = field(default_factory=lambda: TEST)
    batch_size: int = 256
    batch_tokens: int = 65_536
    epochs: int = 64
    stop_at: float = 0.99
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        get_mixer(self.attention)
        check_window_schedule(self.window_schedule)
        for name in ("width", "heads", "layers", "batch_size", "batch_tokens", "epochs"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise InvalidInputError(
                f"width must be a multiple of twice the heads, for rotary embeddings; got {self.width} and {self.heads}"
            )
        if self.window is None and self.attention not in WINDOWLESS:
            raise InvalidInputError(f"attention={self.attention!r} chooses among keys: give it a window")
        if self.precision not in ("float32", "bfloat16"):
            raise InvalidInputError(f'precision must be "float32" or "bfloat16"; got {self.precision!r}')
        for segment in [*self.train, *self.test]:
            if len(segment) != 3:
                raise InvalidInputError(f"a segment is [length, pairs, examples]; got {segment}")
            if 4 * segment[1] > segment[0]:
                raise InvalidInputError(
                    f"{segment[1]} pairs and their questions need {4 * segment[1]} tokens; the segment {segment} has "
                    f"{segment[0]}: make it longer or the pairs fewer"
                )
        if not self.train or not self.test:
            raise InvalidInputError("train and test need at least one segment [length, pairs, examples] each")

    @classmethod
    def of(cls, config: Config) -> MqarConfig:
        """From plain JSON. Raises InvalidInputError for an unknown setting, with the nearest known one."""
        return read_settings(cls, config, "mqar")

    def plain(self) -> Config:
        """As plain JSON, from which `of` reads it."""
        younger = (
            "ranking",
            "rank_power",
            "recency_spread",
            "window_schedule",
            "layer_windows",
            "sinks",
            "calibrate_at",
            "slopes",
            "precision",
        )
        return plain_settings(self, younger)

    def window_at(self, step: int) -> int | None:
        """Keys per query in that step, the first being 0."""
        if self.window is None:
            return None
        return scheduled_window(self.window, self.window_schedule, step, self.epochs * self.steps(self.train))

    def batch(self, length: int) -> int:
        """Sequences per batch of that length."""
        return max(1, min(self.batch_size, self.batch_tokens // length))

    def steps(self, segments: Sequence[Segment]) -> int:
        """Batches in one pass over the segments."""
        return sum(math.ceil(examples / self.batch(length)) for length, _, examples in segments)


def run_mqar(config: Config, progress: Progress) -> dict[str, Any]:
    """Train one model and test it, on texts that the windows hold whole with PyTorch's attention.

    Args:
        config: fields of `MqarConfig`, as plain JSON.
        progress: told after every few batches.

    Returns:
        "accuracy": share of the test queries whose likeliest next token is the answer, mean over test sequences;
        "slices": the same for each test segment, with its length and pairs; "loss": mean of the last epoch's batches,
        nats per answer; "epochs": trained; "parameters"; "history": loss and accuracy after each epoch.

    Raises:
        InvalidInputError: settings that do not fit together.
    """
    with whole_texts():
        return _run(MqarConfig.of(config), progress)


def _run(settings: MqarConfig, progress: Progress) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # On the device from the beginning: a copy in every step would stall the stream.
    train = [segment.to(device) for segment in _segments(settings, settings.train, split=0)]
    test = [segment.to(device) for segment in _segments(settings, settings.test, split=1)]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        model = build_model(settings).to(device)
    rate, decay = settings.learning_rate, settings.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)
    steps = settings.steps(settings.train)
    history: list[dict[str, Any]] = []
    slices: list[dict[str, Any]] = []

    def loss_of(inputs: Tensor, queries: Tensor, answers: Tensor) -> Tensor:
        with _autocast(settings, device):
            logits, aux_loss = _answers(model, inputs, queries)
            loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
            return loss if aux_loss is None else loss + AUXILIARY_WEIGHT * aux_loss

    own = settings.attention == "mha" or settings.ranking == "learned" or bool(settings.sinks)
    gradients = ReplayedGradients(model, loss_of, record=own)  # those of 0.1 were never recorded
    for epoch in range(settings.epochs):
        model.train()
        total = torch.zeros((), device=device)
        for step, (inputs, queries, answers) in enumerate(_batches(settings, train)):
            taken = epoch * steps + step
            if settings.calibrate_at and taken == round(settings.calibrate_at * settings.epochs * steps):
                _calibrate(model, settings, train, device)
            set_window(model, settings.window_at(taken))
            optimizer.zero_grad()
            total += gradients(inputs, queries, answers)
            optimizer.step()
            if step % 16 == 15:  # reading nothing back from the device, which would stop it at every step
                progress((epoch + (step + 1) / steps) / settings.epochs, _note(history))
        schedule.step()
        set_window(model, settings.window)
        slices = _test(model, settings, test, device)
        weights = [examples for _, _, examples in settings.test]
        accuracy = float(np.average([part["accuracy"] for part in slices], weights=weights))
        history.append({"loss": float(total) / steps, "accuracy": accuracy})
        progress((epoch + 1) / settings.epochs, _note(history))
        if accuracy > settings.stop_at:
            break
    calibrated = {"head_windows": [list(layer) for layer in model.config.head_windows]} if settings.calibrate_at else {}
    return {
        **calibrated,
        **{"accuracy": history[-1]["accuracy"], "slices": slices, "loss": history[-1]["loss"], "epochs": len(history)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "history": history,
    }


def build_model(settings: MqarConfig) -> DynamaskForCausalLM:
    """The model of a run: embeddings, layers of the mixer alone, tied output."""
    own = ("local", "recency", "ranking", "rank_power", "recency_spread") if settings.attention == "dma" else ()
    dma = {name: getattr(settings, name) for name in own}
    if settings.ranking == "learned" or settings.sinks:
        return _native_model(settings)
    window = {} if settings.window is None else {"window": settings.window, "layer_windows": settings.layer_windows}
    shape = config_of_0_1(
        attention=settings.attention,
        **_shape(settings),
        **window,
        **dma,
    )
    return _model_of(shape)


def _native_model(settings: MqarConfig) -> DynamaskForCausalLM:
    """The same of dynamask's mixers, with sinks and learned ranks."""
    config = DynamaskConfig(
        attention=settings.attention,
        windows=settings.window,
        local=settings.local or 0,
        sinks=settings.sinks,
        ranking="learned",
        slopes=None if settings.slopes is None else [settings.slopes] * settings.layers,
        **_shape(settings),
    )
    return _model_of(config)


def _shape(settings: MqarConfig) -> dict[str, Any]:
    """What the configurations of all forms say of a model's size."""
    return {
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.width,
        "intermediate_size": 0,  # an empty feed-forward adds nothing, as zoology's Identity for a state mixer
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "head_dim": settings.width // settings.heads,
        "max_position_embeddings": max(length for length, _, _ in [*settings.train, *settings.test]),
        "rope_theta": 10_000.0,
    }


def _model_of(config: DynamaskConfig) -> DynamaskForCausalLM:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        return DynamaskForCausalLM(config)


@torch.no_grad()
def _calibrate(
    model: DynamaskForCausalLM, settings: MqarConfig, segments: Sequence[MqarExamples], device: torch.device
) -> None:
    """Set windows per key/value head of the same mean, by the ranks of the longest training examples."""
    assert settings.window is not None
    longest = max(segments, key=lambda segment: segment.inputs.shape[1]).inputs
    model.eval()
    with _autocast(settings, device):
        model.config.windows = [*windows_by_rank(model, longest[:8].to(device), settings.window)]
    model.train()


def _autocast(settings: MqarConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bfloat16")


def answer_logits(model: DynamaskForCausalLM, inputs: Tensor, queries: Tensor) -> Tensor:
    """Logits at the queries alone: those of all positions would take the most memory and be thrown away.

    Args:
        model: the model.
        inputs: (B, N) integer tokens.
        queries: (B, P) int64 positions.

    Returns:
        (B, P, vocab_size).
    """
    return _answers(model, inputs, queries)[0]


def _answers(model: DynamaskForCausalLM, inputs: Tensor, queries: Tensor) -> tuple[Tensor, Tensor | None]:
    """`answer_logits`, and the loss of learned ranks where there is one."""
    outputs = model.model(input_ids=inputs, use_cache=False)
    states = outputs.last_hidden_state
    asked = states.gather(1, queries.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    return model.lm_head(asked), getattr(outputs, "aux_loss", None)


def _segments(settings: MqarConfig, segments: Sequence[Segment], split: int) -> list[MqarExamples]:
    """Data of the segments, each from a seed of its own, test seeds never those of training."""
    return [
        mqar_examples(
            examples,
            length,
            pairs,
            vocab_size=settings.vocab_size,
            power=settings.power,
            random_fillers=settings.random_fillers,
            seed=[settings.seed, split, number],
        )
        for number, (length, pairs, examples) in enumerate(segments)
    ]


def _batches(settings: MqarConfig, segments: Sequence[MqarExamples]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs (B, N), queries (B, P) and answers (B, P), segment after segment, as zoology's loader goes."""
    for segment in segments:
        size = settings.batch(segment.inputs.shape[1])
        parts = (segment.inputs.split(size), segment.queries.split(size), segment.answers.split(size))
        yield from zip(*parts, strict=True)


@torch.no_grad()
def _test(
    model: DynamaskForCausalLM, settings: MqarConfig, segments: Sequence[MqarExamples], device: torch.device
) -> list[dict[str, Any]]:
    """Accuracy of each test segment."""
    model.eval()
    found = []
    for segment in segments:
        right = torch.zeros((), dtype=torch.long, device=device)
        for inputs, queries, answers in _batches(settings, [segment]):
            with _autocast(settings, device):
                right += (answer_logits(model, inputs, queries).argmax(-1) == answers).sum()
        shape = {"length": segment.inputs.shape[1], "pairs": segment.answers.shape[1]}
        found.append({**shape, "accuracy": int(right) / segment.answers.numel()})
    return found


def _note(history: Sequence[dict[str, Any]]) -> str:
    return f"accuracy {history[-1]['accuracy']:.3f}" if history else ""


def mqar_cost(config: Config) -> float:
    """Multiplications of the longest the run can take, forward, with something for starting each step."""
    settings = MqarConfig.of(config)

    def per_pass(segments: Sequence[Segment]) -> float:
        total = 0.0
        for length, pairs, examples in segments:
            seen = min(length, settings.window or length)
            per_token = settings.layers * (4 * settings.width**2 + 2 * seen * settings.width)
            total += examples * (length * per_token + pairs * settings.width * settings.vocab_size)
        return total

    trained = 3 * per_pass(settings.train) + 3 * _STEP_COST * settings.steps(settings.train)
    return settings.epochs * (trained + per_pass(settings.test) + _STEP_COST * settings.steps(settings.test))


def mqar_kind(config: Config) -> str:
    """Mixer, width and window: what their runs differ in besides, learning rate and seed, costs no time."""
    settings = MqarConfig.of(config)
    return f"{mixer_name(config)} {settings.width} {settings.window}"


def mixer_name(config: Config) -> str:
    """The mixer as a table shows it: dma's forms apart."""
    parts = [str(config["attention"])]
    if config.get("ranking") == "learned":
        slopes, start = ", slopes" if config.get("slopes") else "", ", from dense" if _starts_dense(config) else ""
        return f"dma, learned{slopes}, head windows{start}" if config.get("calibrate_at") else f"dma, learned{slopes}"
    if config.get("sinks"):
        parts += ["sinks", *(["from dense"] if _starts_dense(config) else [])]
    if config.get("layer_windows"):
        parts.append("uneven windows")
    if config["attention"] != "dma":
        return ", ".join(parts)
    if config.get("local") == 0 and config.get("recency") == 0:
        parts.append("paper")
    if config.get("window_schedule"):
        parts.append("from dense")
    return ", ".join([*parts, *ranked_by(config.get("ranking", "score"), config.get("rank_power", 1.0))])


def _starts_dense(config: Config) -> bool:
    """Whether every key of the longest training examples is seen at first."""
    schedule: list[list[float]] = config.get("window_schedule") or []
    longest: int = max((length for length, *_ in config.get("train") or []), default=0)
    return bool(schedule) and longest > 0 and config["window"] * schedule[0][1] >= longest


@dataclass(frozen=True)
class BestRuns:
    """One mixer at one width and window: the runs of the learning rate with the best mean accuracy, as published.

    Attributes:
        width, window: window 0 where the mixer sees its whole prefix.
        mixer: see `mixer_name`.
        rate: the best learning rate; seeds are averaged before it is chosen.
        runs: its runs, one per seed.
        tried: (rate, seed) of all runs, of which these are the best: two mixers compare fairly where they are equal.
    """

    width: int
    window: int
    mixer: str
    rate: float
    runs: list[Record]
    tried: frozenset[tuple[float, int]]

    @property
    def accuracy(self) -> float:
        """Mean over seeds."""
        return float(np.mean([run.result["accuracy"] for run in self.runs]))

    def slices(self) -> dict[tuple[int, int], float]:
        """(length, pairs) of each test segment -> accuracy, mean over seeds."""
        found: dict[tuple[int, int], list[float]] = defaultdict(list)
        for run in self.runs:
            for part in run.result["slices"]:
                found[part["length"], part["pairs"]].append(part["accuracy"])
        return {shape: float(np.mean(accuracies)) for shape, accuracies in found.items()}


def best_runs(records: Sequence[Record]) -> list[BestRuns]:
    """One entry per mixer, width and window, in order of width, window, name."""
    groups: dict[tuple[int, int, str], dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        config = record.config
        row = (config["width"], config["window"] or 0, mixer_name(config))
        groups[row][config["learning_rate"]].append(record)
    found = []
    for (width, window, name), by_rate in sorted(groups.items()):
        means = {rate: float(np.mean([run.result["accuracy"] for run in runs])) for rate, runs in by_rate.items()}
        best = max(means, key=lambda rate: means[rate])
        tried = frozenset((rate, run.seed) for rate, runs in by_rate.items() for run in runs)
        found.append(BestRuns(width, window, name, best, by_rate[best], tried))
    return found


def mqar_summary(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row per mixer, width and window: accuracies of the best learning rate."""
    rows = []
    for best in best_runs(records):
        rates = len({rate for rate, _ in best.tried})
        cells = {"width": str(best.width), "window": str(best.window or "all"), "mixer": best.mixer}
        cells |= {"rate": f"{best.rate:.1e} of {rates}", "accuracy": f"{best.accuracy:.3f}"}
        cells |= {f"{pairs}/{length}": f"{accuracy:.3f}" for (length, pairs), accuracy in best.slices().items()}
        rows.append(cells)
    return rows


def _sweep(widths: list[int], windows: list[int], rates: list[float], **common: Any) -> list[Config]:
    """Every mixer, dma in five forms and swa in two, at every width, window (where it has one) and learning rate."""
    mixers: list[dict[str, Any]] = [
        *({"attention": "mha"}, {"attention": "mla"}, {"attention": "swa"}, {"attention": "nsa"}),
        *({"attention": "dma"}, {"attention": "dma", "local": 0, "recency": 0.0}),
        {"attention": "dma", "ranking": "attention"},
        {"attention": "dma", **SHARP, **WIDE_FIRST},
        *({"attention": "dma", **SHARP, **WIDE_FIRST, "uneven": True}, {"attention": "swa", "uneven": True}),
    ]
    configs = []
    for width in widths:
        for mixer in mixers:
            for window in [None] if mixer["attention"] in WINDOWLESS else windows:
                for rate in rates:
                    own = {"width": width, "heads": max(1, width // 64), "window": window, "learning_rate": rate}
                    form = dict(mixer)
                    if form.pop("uneven", False) and window is not None:
                        form["layer_windows"] = wide_with_dense(MqarConfig.layers, window)
                    settings = MqarConfig(**{**form, **own, **common})
                    # Defaults are written out, so that a later change of one cannot pass for the same run.
                    configs.append(settings.plain())
    return configs


def _smoke() -> list[Config]:
    """Every mixer once, in seconds on a CPU: shows that it runs, not what it learns."""
    common = {"vocab_size": 128, "train": [[32, 4, 128], [64, 4, 64]], "test": [[32, 4, 64], [64, 8, 32]]}
    return _sweep([32], [16], [1e-2], batch_size=64, epochs=2, **common)


def _probe() -> list[Config]:
    """Which ranks find what will be asked for: eight minutes a run on one CPU core.

    16 pairs in 128 tokens, window 24, of which 8 are local: what is left just holds the pairs.
    """
    common: dict[str, Any] = {"width": 64, "heads": 2, "vocab_size": 512, "batch_size": 64, "epochs": 6}
    common |= {"train": [[64, 4, 10_000], [64, 8, 10_000], [128, 16, 10_000]], "test": [[128, 16, 500]]}
    common |= {"learning_rate": 2e-3, "stop_at": 1.0}
    dma: dict[str, Any] = {"attention": "dma", "window": 24, "local": 8, "recency_spread": 8.0}
    ranked: dict[str, Any] = {**dma, "ranking": "attention"}
    dense_first = {"window_schedule": [[0.0, 6.0], [0.5, 2.0], [0.7, 1.0]]}
    forms: list[dict[str, Any]] = [{"attention": "mha"}, {"attention": "swa", "window": 24}, dma, ranked]
    forms += [{**form, **dense_first} for form in (dma, ranked, {**ranked, "rank_power": 4.0})]
    return [MqarConfig(**{**common, **form}).plain() for form in forms]


def _quick() -> list[Config]:
    """As "small", a quarter of its epochs, the two rates that win there, three widths, three seeds."""
    train, test = _fifth(TRAIN), _fifth(TEST)
    common = {"train": train, "test": test, "epochs": 8}
    widths = [64, 128, 256]
    return [run for seed in (0, 1, 2) for run in _sweep(widths, [64], LEARNING_RATES[1:3], seed=seed, **common)]


def _fifth(segments: Sequence[Segment]) -> list[Segment]:
    return [[length, pairs, examples // 5] for length, pairs, examples in segments]


def _small() -> list[Config]:
    """The published mixture at a fifth of its examples, one width, half the epochs."""
    return _sweep([128], [64], LEARNING_RATES, train=_fifth(TRAIN), test=_fifth(TEST), epochs=32)


def _long() -> list[Config]:
    """As "quick", twice its epochs, trained to 4096 tokens and 256 pairs, with a window that holds those pairs."""
    longer = [[512, 128, 4000], [1024, 256, 2000], [4096, 256, 500]]
    test = [*_fifth(TEST), [2048, 256, 200], [4096, 256, 200]]
    return _sweep([128], [512], LEARNING_RATES[1:3], train=[*_fifth(TRAIN), *longer], test=test, epochs=16)


PUBLISHED_PAIRS = 512
PUBLISHED_WINDOW = 512
PUBLISHED_LENGTHS = (2048, 4096, 8192)
"""The paper reports 1024 tokens, too, which cannot hold 512 pairs and their questions."""
_NATS = (2.0, 16.0)
"""Slopes: how much ranks rise over the longest text, from the first head to the last."""


def published_forms(heads: int) -> list[Config]:
    """Mixer settings of the sweep "published" for that many heads, those that are judged first."""
    sliding: Config = {"attention": "swa", "window": PUBLISHED_WINDOW, "sinks": 4}
    learned = {**sliding, "attention": "dma", "ranking": "learned", "local": 64}
    start: Config = {"window_schedule": [[0.0, 4.0], [0.25, 1.0]]}
    wide = {**start, "calibrate_at": 0.25}
    longest = max(PUBLISHED_LENGTHS)
    nats = np.geomspace(*_NATS, heads) if heads > 1 else [_NATS[0]]
    slopes = [round(8192 * float(each) / longest) / 8192 for each in nats]
    paper: Config = {"attention": "dma", "window": PUBLISHED_WINDOW, "local": 0, "recency": 0.0}
    return [{"attention": "mha"}, {**learned, **wide, "slopes": slopes}, sliding, {**learned, **wide}, paper]


_PUBLISHED_WIDTHS = (128, 64, 256, 32)


def _published() -> list[Config]:
    """512 pairs and a window of 512 keys, as the paper reports, widths 32 to 256, three seeds; autocast to bfloat16.

    Trained on a fifth of the published mixture and on longer segments up to 512 pairs in 8192 tokens. One learning
    rate: that of most forms in "quick" and "long", at the greatest width dense attention's there. The forms that start
    dense come last.
    """
    return [
        _published_run(form, width, seed)
        for forms in (published_forms, dense_start_forms)
        for width in _PUBLISHED_WIDTHS
        for seed in (0, 1, 2)
        for form in forms(max(1, width // 64))
    ]


def _published_run(form: Config, width: int, seed: int, epochs: int = 8) -> Config:
    longer = [[512, 128, 4000], [1024, 256, 2000], [2048, 512, 1000], [4096, 512, 500], [8192, 512, 250]]
    test = [[length, PUBLISHED_PAIRS, 100] for length in PUBLISHED_LENGTHS]
    common: Config = {"train": [*_fifth(TRAIN), *longer], "test": test, "epochs": epochs, "precision": "bfloat16"}
    common["vocab_size"] = 10_240  # more than the longest text, as zoology asks
    common |= {"width": width, "heads": max(1, width // 64), "learning_rate": LEARNING_RATES[1 if width > 128 else 2]}
    return MqarConfig(**{**common, **form, "seed": seed}).plain()


def dense_start_forms(heads: int) -> list[Config]:
    """The sparse forms of "published" with a start from every key: learned ranks, newest keys, ranks with slopes."""
    _, slopes, sliding, learned, _ = published_forms(heads)
    start: Config = {"window_schedule": [[0.0, 16.0], [0.375, 4.0], [0.5, 1.0]]}
    late = {**start, "calibrate_at": 0.5}
    return [{**learned, **late}, {**sliding, **start}, {**slopes, **late}]


def _decide() -> list[Config]:
    """What "published" left open, in the order of its worth: seeds at width 128, a start from every key, widths."""

    def runs(width: int, seeds: Sequence[int], form: str) -> list[Config]:
        heads = max(1, width // 64)
        every = [*published_forms(heads), *dense_start_forms(heads)]
        return [
            run for seed in seeds for run in (_published_run(each, width, seed) for each in every) if named(run, form)
        ]

    def named(run: Config, form: str) -> bool:
        return mixer_name(run) == form

    learned, sliding = "dma, learned, head windows", "swa, sinks"
    slopes = "dma, learned, slopes, head windows"
    order = [
        *runs(128, (1, 2), "mha"),
        *runs(128, (0, 1, 2), f"{learned}, from dense"),
        *runs(128, (1, 2), slopes),
        *(run for width in _PUBLISHED_WIDTHS[1:] for run in runs(width, (0,), "mha")),
        *runs(128, (0, 1, 2), f"{slopes}, from dense"),
        *runs(128, (0, 1, 2), f"{sliding}, from dense"),
        *(run for width in _PUBLISHED_WIDTHS[1:] for run in runs(width, (0,), f"{slopes}, from dense")),
        *runs(128, (1, 2), "dma, paper"),
    ]
    for form in ("dma, paper", f"{sliding}, from dense"):
        order += [run for width in _PUBLISHED_WIDTHS[1:] for run in runs(width, (0,), form)]
    for form, seeds in ((sliding, (1, 2)), (learned, (1, 2))):
        order += runs(128, seeds, form)
    return order


_JUDGED = (
    "dma, learned, slopes, head windows",
    "dma, learned, head windows, from dense",
    "swa, sinks, from dense",
    "dma, paper",
)
"""Of the sizes "widths" and "patient", beside dense attention."""


def _named_run(name: str, width: int, seed: int, epochs: int = 8) -> Config:
    """The run of a form by its name."""
    heads = max(1, width // 64)
    runs = (_published_run(f, width, seed, epochs) for f in (*published_forms(heads), *dense_start_forms(heads)))
    return next(run for run in runs if mixer_name(run) == name)


def _widths() -> list[Config]:
    """What "published" lacked of seeds and widths: dense attention, the control and the plain form of width 128, then
    the sparse forms of the other widths, form by form.

    All runs are among "published". One sparse run stands among those of dense attention, which take less time.
    """
    slopes, level, newest, plain = _JUDGED
    order = [(slopes, 64, 0), *(("mha", width, seed) for width in (64, 32, 256) for seed in (1, 2))]
    order += [(form, width, seed) for form, width in ((newest, 128), (level, 64)) for seed in (1, 2)]
    order += [(slopes, width, 0) for width in (256, 32)]
    order += [(level, width, seed) for seed in (0, 1, 2) for width in (256, 32)]
    order += [(plain, 128, seed) for seed in (1, 2)]
    order += [(slopes, width, seed) for seed in (1, 2) for width in (256, 32, 64)]
    order += [(level, 64, 0), *((newest, width, seed) for seed in (0, 1, 2) for width in (256, 32, 64))]
    order += [(plain, width, 0) for width in (256, 32, 64)]
    return [_named_run(*place) for place in order]


def _patient() -> list[Config]:
    """Twice the epochs: the judged forms of width 128, three seeds.

    In eight epochs dense attention stops at two thirds with one seed of three. Two seeds more of dense attention and of
    the best form of three, named after their interval had included both zero and a loss of interest.
    """
    slopes, level, newest, _ = _JUDGED
    places = [(level, range(5)), (slopes, range(3)), (newest, range(3))]
    return [*(_named_run(name, 128, seed, 16) for name, seeds in places for seed in seeds), *_patient_dense()]


def _patient_dense() -> list[Config]:
    """Dense attention of "patient"."""
    return [_named_run("mha", 128, seed, 16) for seed in range(5)]


def _paper() -> list[Config]:
    """The published mixture, extended to 4096 tokens so that length is trained for, and not guessed at."""
    longer = [[512, 128], [1024, 256], [2048, 256], [4096, 256]]
    train = [*TRAIN, *([*shape, 20_000] for shape in longer)]
    test = [*TEST, *([*shape, 1000] for shape in longer[2:])]
    return _sweep([64, 128, 256, 512], [128, 512], LEARNING_RATES, train=train, test=test)


MQAR = Experiment(
    name="mqar",
    description="multi-query associative recall: accuracy by pairs and length, every mixer, two layers",
    run=run_mqar,
    sizes={
        "smoke": _smoke,
        "probe": _probe,
        "quick": _quick,
        "small": _small,
        "long": _long,
        "decide": _decide,
        "widths": _widths,
        "published": _published,
        "patient-dense": _patient_dense,
        "patient": _patient,  # before "published" on the page: twice its epochs
        "paper": _paper,
    },
    cost=mqar_cost,
    kind=mqar_kind,
    summary=mqar_summary,
)
register(MQAR)
