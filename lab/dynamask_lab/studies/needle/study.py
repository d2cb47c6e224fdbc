"""Needles in a haystack: models trained on a mixture with retrieval examples, asked at up to eight times that length.

Dense attention, dynamic mask attention trained from the start, and dynamic mask attention upcycled: the dense run's
weights with untrained gates, fine-tuned. Tasks are RULER's definitions (`dynamask.evaluation.retrieval`); the answers
are decoded greedily, from the bounded cache where the mask has one, or scored without decoding (`forced`).

The size "far": `dma, learned, windows 16/352`, without slopes, was added after its first nine runs, in which learned
ranks with slopes found hardly more behind the window than newest keys do; levers go with it.

The size "levers", named before it ran: `dma, learned, windows 16/352, from wide` sees every key in its wide layer for a
fifth of the training, after one seed of three without it had found few needles inside the window. It is judged as the
others are, and against the same form without that start; then each lever on this size's forms, three seeds of each
against three seeds of the form without it that read the same mixtures.

Judged in the size "far", named before it ran, over three training seeds: beyond the window and within
the trained length, and beyond that length, exact match of `dma, learned, slopes, windows 16/352` and `dma, learned,
slopes, head windows` against `mha`, and of each lever against the same form without it, by intervals that exclude zero
and at least 5 points. The goal: dense attention's exact match within the trained length at an eighth of its pairs, and
more beyond it. Names were given after two results that choose no lever: learned ranks without slopes find 17% of what
dense attention finds 64% of (size "seeds"), and one wide layer has the lowest loss of text (study `scratch`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynamask.errors import InvalidInputError
from dynamask.evaluation.retrieval import RetrievalScore, evaluate_retrieval
from dynamask.evaluation.retrieval.tasks import check_task
from dynamask.models import DynamaskForCausalLM
from dynamask_lab.language.engine import LanguageConfig, kept_run, language_cost
from dynamask_lab.studies.locality.study import GENTLE, named_rope, named_windows, one_dense_in_four, wide_with_dense
from dynamask_lab.studies.needle.data import MixtureSettings, mixture_tokenizer, prepare_mixture
from dynamask_lab.studies.needle.forced import forced_scores
from dynamask_lab.studies.needle.levers import LEVERS, lever_mixers
from dynamask_lab.sweeps.registry import Config, Experiment, Progress, register
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.settings import SHARP, WIDE_FIRST, plain_settings, ranked_by, read_settings

TASKS = ["single_needle", "multi_key", "multi_value", "multi_query", "passkey", "variable_tracking"]
FROM_WIDE = "from wide"
"""In the name of a form that begins with wider windows, and narrows them without calibration."""
_TRAINED = 0.8
"""Share of a run's progress bar that training takes."""


@dataclass(frozen=True)
class NeedleConfig:
    """One run: a model, and, for dense attention with `upcycle_steps`, the dynamic mask models made of it.

    Attributes:
        attention, window, local, recency, recency_spread, score_form, gate_init, gate_rate, ranking, rank_power,
            window_schedule, layer_attention, layer_windows, rope_layers, sinks, calibrate_at, slopes: see
            `LanguageConfig`.
        lever: for length, see `levers`; "drope" spends the last fifth of the steps without rotary embedding.
        forced: score answers in one pass over prompt and answer, see `forced_scores`.
        upcycle_steps: steps of fine-tuning after the gates are added; 0: no upcycling.
        upcycle_window: keys per query of the upcycled model.
        upcycle_rankings: its `ranking`, one model for each.
        upcycle_spread: of the slopes that ranks with ranking="attention" start from, see `recency_spread`.
        layers, width, heads, groups, feed_forward, steps, batch_tokens, learning_rate, compile: see `LanguageConfig`.
        source, vocab_size, share: see `MixtureSettings`.
        text_tokens: of plain text in the mixture, which is read as often as the steps ask for.
        shortest: tokens of the shortest retrieval example.
        context: tokens of a training sequence; the longest example takes half of it, so that most are not cut.
        tasks: trained on and tested.
        lengths: tested, in tokens of prompt and answer.
        depths: tested, shares of the haystack.
        samples: per task, length and depth.
        prompt_tokens: of the prompts decoded together, at most, and one prompt at least.
        seed: of weights, data order, examples.

    Raises:
        InvalidInputError: settings that do not fit together.
    """

    attention: str
    window: int | None = None
    local: int | None = None
    recency: float | None = None
    recency_spread: float = 1.0
    score_form: str = "exp"
    gate_init: str = "gate"
    gate_rate: float = 1.0
    ranking: str = "score"
    rank_power: float = 1.0
    window_schedule: list[list[float]] = field(default_factory=list)
    layer_attention: list[str] | None = None
    layer_windows: list[int] | None = None
    rope_layers: list[bool] | None = None
    sinks: int = 0
    calibrate_at: float = 0.0
    slopes: list[float] | None = None
    lever: str = ""
    forced: bool = False
    upcycle_steps: int = 0
    upcycle_window: int | None = None
    upcycle_rankings: list[str] = field(default_factory=lambda: ["score"])
    upcycle_spread: float = 1.0
    layers: int = 6
    width: int = 384
    heads: int = 6
    groups: int = 3
    feed_forward: int = 1024
    source: str = "stdlib"
    vocab_size: int = 4096
    text_tokens: int = 4_000_000
    share: float = 0.5
    shortest: int = 400
    context: int = 1024
    steps: int = 3000
    batch_tokens: int = 32_768
    learning_rate: float = 2e-3
    compile: bool = True
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096, 8192])
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    samples: int = 8
    prompt_tokens: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            check_task(task)
        if not (self.tasks and self.lengths and self.depths) or self.samples < 1:
            raise InvalidInputError("give at least one task, length, depth and sample to test")
        if self.upcycle_steps and (self.attention != "mha" or self.upcycle_window is None):
            raise InvalidInputError(
                f"upcycling starts from attention='mha' and needs an upcycle_window; got {self.attention!r} and "
                f"{self.upcycle_window}"
            )
        if self.lever and (self.lever not in LEVERS or self.attention not in ("mha", "dma")):
            raise InvalidInputError(
                f"lever is one of {', '.join(LEVERS)} of attention 'mha' or 'dma'; got {self.lever!r} and "
                f"{self.attention!r}"
            )
        if self.lever and not (self.forced and self.upcycle_steps == 0):
            raise InvalidInputError("a lever needs forced=True, and no upcycling")
        if not 0 < self.shortest <= self.context // 2:
            raise InvalidInputError(
                f"examples take from {self.shortest} tokens to half of the context, {self.context // 2}: make the "
                "context longer or the shortest example shorter"
            )
        self.language("")

    @classmethod
    def of(cls, config: Config) -> NeedleConfig:
        """From plain JSON. Raises InvalidInputError for an unknown setting, with the nearest known one."""
        return read_settings(cls, config, "needle")

    def plain(self) -> Config:
        """As plain JSON, from which `of` reads it."""
        younger: tuple[str, ...] = (
            "ranking",
            "rank_power",
            "window_schedule",
            "layer_attention",
            "layer_windows",
            "rope_layers",
        )
        younger = (*younger, "sinks", "calibrate_at", "slopes", "lever", "forced")
        return plain_settings(self, (*younger, "upcycle_rankings", "upcycle_spread"))

    @property
    def mixture(self) -> MixtureSettings:
        """What it trains on. All runs of a seed read the same."""
        return MixtureSettings(
            source=self.source,
            tokens=self.text_tokens,
            vocab_size=self.vocab_size,
            share=self.share,
            shortest=self.shortest,
            longest=self.context // 2,
            tasks=tuple(self.tasks),
            seed=self.seed,
        )

    def language(self, corpus: str) -> LanguageConfig:
        """The training run."""
        shared = {entry.name for entry in dataclasses.fields(self)} & {
            entry.name for entry in dataclasses.fields(LanguageConfig)
        }
        return LanguageConfig(
            **{name: getattr(self, name) for name in shared},
            corpus=corpus,
            length=self.context,
            validation_tokens=32 * self.context,
            keep_model=True,
        )

    def upcycled(self, corpus: str, ranking: str) -> LanguageConfig:
        """The fine-tuning run of the dense model with gates, at a tenth of the rate the dense one peaked at.

        Without recency, as `convert.upcycle`: up to `upcycle_window` tokens it starts as exactly the dense model.
        """
        return dataclasses.replace(
            self.language(corpus),
            attention="dma",
            layer_attention=None,
            layer_windows=None,
            window=self.upcycle_window,
            local=None if self.upcycle_window is None else self.upcycle_window // 2,
            recency=0.0,
            steps=self.upcycle_steps,
            learning_rate=self.learning_rate / 10,
            gate_rate=10.0 * self.gate_rate,
            rank_rate=10.0,
            ranking=ranking,
            rank_recency=1.0 / (self.upcycle_window or 1) if ranking == "attention" else None,
            recency_spread=self.upcycle_spread if ranking == "attention" else 1.0,
        )


def run_needle(config: Config, progress: Progress) -> dict[str, Any]:
    """Train, upcycle if asked to, and test.

    Args:
        config: fields of `NeedleConfig`, as plain JSON.
        progress: see `run_language`: what it raises during training ends the call with the state saved; during testing,
            with the trained models kept.

    Returns:
        "scores": `RetrievalScore` as dictionaries, the model named by `needle_name`; "loss": by model; "exact": mean
        exact match by model, over all that was tested; "parameters"; "corpus" and its "corpus_content"; "seconds";
        "head_windows" where they were calibrated.

    Raises:
        InvalidInputError, UsageError: see `NeedleConfig`, `prepare_mixture`.
    """
    settings = NeedleConfig.of(config)
    corpus = prepare_mixture(settings.mixture)
    if settings.lever:
        return _run_lever(config, settings, corpus, progress)
    stages = [(needle_name(config), settings.language(corpus))]
    if settings.upcycle_steps:
        stages += [
            (upcycled_name(each, settings.rank_power), settings.upcycled(corpus, each))
            for each in settings.upcycle_rankings
        ]
    part = 1.0 / len(stages)
    scores: list[RetrievalScore] = []
    losses: dict[str, float | None] = {}
    seconds, parameters = 0.0, 0
    trained: dict[str, Any] = {}
    models: list[Path] = []
    for number, (name, language) in enumerate(stages):
        begun = number * part
        trained, model = kept_run(
            language.plain(),
            lambda share, note, begun=begun: progress(begun + part * _TRAINED * share, note),  # type: ignore[misc]
            models[0] if models else None,  # what is upcycled is upcycled from the dense one
        )
        models.append(model)
        losses[name] = trained["loss"]
        seconds += trained["seconds"]
        parameters = parameters or sum(trained["parameters"][kind] for kind in ("embedding", "non_embedding"))
        start = time.perf_counter()
        scores += _test(settings, model, corpus, name, progress, begun + part * _TRAINED, part * (1 - _TRAINED))
        seconds += time.perf_counter() - start
    for model in models:
        shutil.rmtree(model.parent, ignore_errors=True)
    return {
        "scores": [dataclasses.asdict(score) for score in scores],
        "loss": losses,
        "exact": {name: float(np.mean([s.exact for s in scores if s.model == name])) for name in losses},
        "parameters": parameters,
        "corpus": corpus,
        "corpus_content": trained["corpus_content"],
        "seconds": seconds,
        **_found_windows(trained),
    }


def _run_lever(config: Config, settings: NeedleConfig, corpus: str, progress: Progress) -> dict[str, Any]:
    """The same with a lever, see `lever_mixers`: "drope" is two trainings, the others are one."""
    language = settings.language(corpus)
    initial: Path | None = None
    first_part: dict[str, Any] = {}
    seconds = 0.0
    if settings.lever == "drope":
        first = settings.steps - settings.steps // 5
        first_part, initial = kept_run(
            dataclasses.replace(language, steps=first).plain(), lambda share, note: progress(0.6 * share, note)
        )
        seconds += first_part["seconds"]
        windows = first_part.get("head_windows")
        language = dataclasses.replace(
            language,
            steps=settings.steps - first,
            learning_rate=settings.learning_rate / 4,
            layer_windows=windows or language.layer_windows,
            calibrate_at=0.0,
            window_schedule=[],
        )
    name = needle_name(config)
    # Inductor of torch 2.11 fails on some layers with a lever: those run as they are.
    with lever_mixers(settings.lever), torch._dynamo.config.patch(suppress_errors=True):
        begun = 0.6 if initial else 0.0
        trained, model = kept_run(
            language.plain(), lambda share, note: progress(begun + (_TRAINED - begun) * share, note), initial
        )
        start = time.perf_counter()
        scores = _test(settings, model, corpus, name, progress, _TRAINED, 1 - _TRAINED)
    seconds += trained["seconds"] + time.perf_counter() - start
    for folder in filter(None, (initial, model)):
        shutil.rmtree(folder.parent, ignore_errors=True)
    return {
        "scores": [dataclasses.asdict(score) for score in scores],
        "loss": {name: trained["loss"]},
        "exact": {name: float(np.mean([score.exact for score in scores]))},
        "parameters": sum(trained["parameters"][kind] for kind in ("embedding", "non_embedding")),
        "corpus": corpus,
        "corpus_content": trained["corpus_content"],
        "seconds": seconds,
        **_found_windows(first_part or trained),
    }


def _found_windows(trained: Mapping[str, Any]) -> dict[str, Any]:
    """The windows per head that a training found, where it calibrated them."""
    return {"head_windows": trained["head_windows"]} if "head_windows" in trained else {}


def _test(
    settings: NeedleConfig, folder: Path, corpus: str, name: str, progress: Progress, begun: float, share: float
) -> list[RetrievalScore]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = DynamaskForCausalLM.from_pretrained(folder).to(device).eval()
    tokenizer = mixture_tokenizer(corpus)
    scores: list[RetrievalScore] = []
    cells = [(task, length) for task in settings.tasks for length in settings.lengths]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        for number, (task, length) in enumerate(cells):
            score = forced_scores if settings.forced else evaluate_retrieval
            scores += score(
                model,
                tokenizer,
                [length],
                settings.depths,
                settings.samples,
                tasks=[task],
                seed=settings.seed,
                # A dense model's cache of the longest prompts is what memory runs out of.
                batch_size=max(1, settings.prompt_tokens // length),
                name=name,
            )
            # Not "done" before the result is returned: whoever listens may stop a run that is not.
            progress(begun + share * (number + 1) / (len(cells) + 1), f"{name}: {task} at {length}")
    return scores


def needle_name(config: Config) -> str:
    """The model as tables and pictures show it: dma's forms apart."""
    lever = [str(config["lever"])] if config.get("lever") else []
    if config["context"] != NeedleConfig.context and config.get("forced"):
        lever.append("longer examples")
    if config.get("ranking") == "learned":
        learned = ["dma", "learned", *(["slopes"] if config.get("slopes") else [])]
        learned += named_windows(config.get("layer_windows"), config["window"])
        if config.get("calibrate_at"):
            learned.append("head windows")
        elif config.get("window_schedule"):
            learned.append(FROM_WIDE)
        return ", ".join([*learned, *lever])
    parts = [str(config["attention"])]
    if config.get("sinks"):
        parts.append("sinks")
    if config.get("layer_attention"):
        parts.append("one layer in four dense")
    parts += named_windows(config.get("layer_windows"), config["window"])
    parts += named_rope(config.get("rope_layers"))
    if config["attention"] != "dma":
        return ", ".join([*parts, *lever])
    if config.get("local") == 0 and config.get("recency") == 0:
        parts.append("paper")
    if config.get("gate_init") == "delta":
        parts.append("gentle")
    if config.get("window_schedule"):
        parts.append("from dense")
    return ", ".join([*parts, *ranked_by(config.get("ranking", "score"), config.get("rank_power", 1.0))])


def upcycled_name(ranking: str, power: float) -> str:
    """The model made of a dense one."""
    return ", ".join(["dma, upcycled", *ranked_by(ranking, power)])


def needle_cost(config: Config) -> float:
    """Operations of training and of reading the prompts."""
    settings = NeedleConfig.of(config)
    training = language_cost(settings.language("").plain())
    upcycled = settings.upcycle_rankings if settings.upcycle_steps else []
    training += sum(language_cost(settings.upcycled("", each).plain()) for each in upcycled)
    prompts = len(settings.tasks) * len(settings.depths) * settings.samples * sum(settings.lengths)
    return training + (1 + len(upcycled)) * 2.0 * settings.language("").parameters * prompts


def needle_kind(config: Config) -> str:
    """Mechanism and shape."""
    settings = NeedleConfig.of(config)
    return f"{needle_name(config)} {settings.layers}x{settings.width} {settings.context} {settings.window}"


def mean_scores(records: Sequence[Record]) -> list[RetrievalScore]:
    """The runs' scores, those of several seeds as one."""
    found: dict[tuple[str, str, int, float], list[RetrievalScore]] = defaultdict(list)
    for record in records:
        for row in record.result["scores"]:
            score = RetrievalScore(**row)
            found[score.model, score.task, score.length, score.depth].append(score)
    return [
        RetrievalScore(
            *cell,
            exact=float(np.mean([score.exact for score in scores])),
            recall=float(np.mean([score.recall for score in scores])),
            samples=sum(score.samples for score in scores),
        )
        for cell, scores in found.items()
    ]


def needle_summary(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row per model and task: exact match by length, mean over depths and seeds."""
    cells: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for score in mean_scores(records):
        cells[score.model, score.task][score.length].append(score.exact)
    return [
        {"model": model, "task": task}
        | {str(length): f"{np.mean(by_length[length]):.1%}" for length in sorted(by_length)}
        for (model, task), by_length in cells.items()
    ]


def _forms(window: int, upcycle_steps: int) -> tuple[Config, Config, Config]:
    """Dense attention and, made of it, dma whose ranks learn who is looked at sharply; dma by default; the paper's."""
    default = {"attention": "dma", "window": window, "local": window // 2, "recency": 1.0 / window}
    dense = {"attention": "mha", "upcycle_steps": upcycle_steps, "upcycle_window": window}
    dense |= {"upcycle_rankings": ["attention"], "upcycle_spread": 8.0, "rank_power": 4.0}
    return dense, default, {**default, "local": 0, "recency": 0.0}


def _sweep(seeds: Sequence[int], window: int, upcycle_steps: int, **common: Any) -> list[Config]:
    """Dense attention and what is upcycled from it; dma by default, with gentle gates, in the paper's form, and with
    ranks that learn from attention, windows that shrink, dense layers between, or windows wider in some layers."""
    dense, default, paper = _forms(window, upcycle_steps)
    ranked = {**default, "ranking": "attention"}
    layers = common.get("layers", NeedleConfig.layers)
    mixed = {"layer_attention": one_dense_in_four("dma", layers)}
    uneven = {"layer_windows": wide_with_dense(layers, window)}
    models: list[dict[str, Any]] = [
        {**dense, "upcycle_rankings": ["score", "attention"]},
        *(default, {**default, **GENTLE}, paper),
        *({**default, **WIDE_FIRST}, {**ranked, **WIDE_FIRST}, ranked, {**ranked, **GENTLE}),
        {**default, **SHARP, **WIDE_FIRST},
        *({**default, **mixed}, {**ranked, **GENTLE, **mixed}),
        {"attention": "swa", "window": window, "layer_attention": one_dense_in_four("swa", layers)},
        {**default, **SHARP, **WIDE_FIRST, **uneven},
        {"attention": "swa", "window": window, **uneven},
    ]
    return _runs(models, seeds, common)


def _far_sweep(seeds: Sequence[int], window: int, upcycle_steps: int, **common: Any) -> list[Config]:
    """What may carry beyond the training length: the forms that find needles within it, with rotary embeddings in all
    layers and without them where a layer looks far; dense attention and what is upcycled from it; dma by default and in
    the paper's form."""
    dense, default, paper = _forms(window, upcycle_steps)
    layers = common.get("layers", NeedleConfig.layers)
    windows = wide_with_dense(layers, window)
    uneven = {"layer_windows": windows}
    near = {"rope_layers": [own <= window for own in windows]}
    found = {**default, **SHARP, **WIDE_FIRST}
    sliding = {"attention": "swa", "window": window, **uneven}
    models: list[dict[str, Any]] = [
        dense,
        *({**found, **uneven, **near}, {**found, **uneven}, found),
        *({"attention": "mha", **near}, {**sliding, **near}, sliding),
        *(default, paper),
    ]
    return _runs(models, seeds, common)


def _runs(models: Sequence[dict[str, Any]], seeds: Sequence[int], common: dict[str, Any]) -> list[Config]:
    return [NeedleConfig(**{**common, **model, "seed": seed}).plain() for seed in seeds for model in models]


def _smoke() -> list[Config]:
    """Everything once, in seconds on a CPU: shows that it runs, not what it learns."""
    shape = {"layers": 1, "width": 32, "heads": 2, "groups": 1, "feed_forward": 48, "vocab_size": 1024}
    data = {"text_tokens": 20_000, "shortest": 220, "context": 440, "tasks": ["passkey"], "batch_tokens": 440}
    test = {"lengths": [256, 512], "depths": [0.0, 1.0], "samples": 1}
    common = {"steps": 2, **shape, **data, **test}
    far = _far_sweep([0], 32, 2, **{**common, "layers": 2})  # one layer alone could not be of two kinds
    return [*_sweep([0], 32, 2, **common), *(config for config in far if config.get("rope_layers"))]


def _quick() -> list[Config]:
    """As "small", half the steps, three tasks, to 4096 tokens: minutes of a large GPU."""
    tasks = ["passkey", "single_needle", "multi_key"]
    test = {"tasks": tasks, "lengths": [512, 1024, 2048, 4096], "depths": [0.0, 0.5, 1.0]}
    return _sweep([0], 128, 300, steps=1500, shortest=300, **test)


def _seeds() -> list[Config]:
    """Three training seeds of the deciding forms, 48 samples a cell: 10M parameters at 1024 tokens, tested to 8192."""
    tasks = ["single_needle", "multi_key"]
    test = {"tasks": tasks, "lengths": [512, 1024, 2048, 4096, 8192], "depths": [0.0, 0.25, 0.5, 0.75, 1.0]}
    window = 64
    sliding: dict[str, Any] = {"attention": "swa", "window": window, "sinks": 4}
    wide: dict[str, Any] = {"window_schedule": [[0.0, 4.0], [0.25, 1.0]]}
    learned = {**sliding, **wide, "attention": "dma", "ranking": "learned", "local": 16, "calibrate_at": 0.25}
    models: list[dict[str, Any]] = [{"attention": "mha"}, learned, {**sliding, **wide}]
    return _runs(models, [0, 1, 2], {"steps": 1500, "shortest": 300, "samples": 48, **test})


def far_forms(lever: str = "") -> list[Config]:
    """Model settings of the size "far", without and with a lever: an eighth of dense attention's pairs at 1024 tokens.

    Windows 16 in five layers and 352 in the fourth see 11% of the pairs, 64 in every layer 12%. Slopes: one and eight
    nats over the wide window, and a number between for the third head.
    """
    sliding: Config = {"attention": "swa", "window": 64, "sinks": 4}
    wide: Config = {"window_schedule": [[0.0, 4.0], [0.25, 1.0]]}
    one: Config = {"window": 72, "layer_windows": [16, 16, 16, 352, 16, 16]}
    slopes = [round(8192 * nats / 352) / 8192 for nats in (1, 3, 8)]
    learned: Config = {**sliding, "attention": "dma", "ranking": "learned", "slopes": slopes}
    dense, chosen = {"attention": "mha"}, {**learned, **one, "local": 12}
    level = {**chosen, "slopes": None}
    if lever:
        return [{**form, "lever": lever} for form in (level, dense)]
    return [dense, chosen, {**sliding, **one}, level, {**learned, **wide, "local": 16, "calibrate_at": 0.25}]


_FAR: Config = {"steps": 1500, "shortest": 300, "samples": 50, "forced": True, "tasks": ["single_needle", "multi_key"]}


def _by_form(models: Sequence[Config], **common: Any) -> list[Config]:
    """Three training seeds of a form before the next form."""
    return [run for model in models for run in _runs([model], [0, 1, 2], {**_FAR, **common})]


def _far() -> list[Config]:
    """The forms that decide, then one lever at a time; three training seeds, 50 samples a cell, to 8192 tokens.

    All runs of "levers" are among them.
    """
    dense, chosen, sliding, level, by_head = far_forms()
    first = [*_by_form([dense, chosen, sliding, level]), *_by_form([level], context=2048)]
    levers = {lever: far_forms(lever) for lever in LEVERS}
    alone = _by_form([levers["drope"][0], levers["forget"][0], levers["ssmax"][0], by_head])
    return [
        *first,
        *alone,
        *_by_form([dense], context=2048),
        *_by_form([forms[1] for forms in levers.values()]),
        *_by_form([_from_wide()]),
    ]


def _from_wide() -> Config:
    """The form without slopes, every key in its wide layer for a fifth of the training, and wider narrow layers."""
    return {**far_forms()[3], "window_schedule": [[0.0, 16.0], [0.2, 1.0]]}


def _levers() -> list[Config]:
    """The form without slopes, without and with each lever; then dense attention; then a start from wide windows.

    Three training seeds of a form before the next form: what a lever is compared with reads the same mixture.
    """
    level = far_forms()[3]
    dense: Config = {"attention": "mha"}
    levers: list[Config] = [{"lever": "forget"}, {"lever": "ssmax"}, {"context": 2048}, {"lever": "drope"}]
    sparse = [level, *({**level, **lever} for lever in levers)]
    return _by_form([*sparse, dense, *({**dense, **lever} for lever in levers), _from_wide()])


def _levers_smoke() -> list[Config]:
    """Every form of "levers" for a few steps: shows on a GPU that it runs."""
    kept = {json.dumps(run | {"seed": 0}): run for run in _levers()}
    short = {"steps": 30, "lengths": [512], "samples": 1, "depths": [0.5], "tasks": ["single_needle"], "seed": 0}
    return [NeedleConfig.of({**run, **short}).plain() for run in kept.values()]


def _small() -> list[Config]:
    """12M parameters at 1024 tokens, tested to 8192; window 128."""
    return _sweep([0], 128, 600)


def _long() -> list[Config]:
    """10M parameters, 20 tokens each, at 4096 tokens, tested to 32768; window 512; real corpora."""
    data = {"source": "code+text", "text_tokens": 16_000_000, "context": 4096, "steps": 1500, "batch_tokens": 131_072}
    tasks = ["passkey", "single_needle", "multi_key", "variable_tracking"]
    return _far_sweep([0], 512, 500, **data, tasks=tasks, lengths=[1024, 2048, 4096, 8192, 16384, 32768])


def _paper() -> list[Config]:
    """25M parameters at 4096 tokens, tested to 32768; window 512, two seeds, corpora of `lab/scripts/corpora.py`."""
    shape = {"layers": 8, "width": 512, "heads": 8, "groups": 4, "feed_forward": 1408, "batch_tokens": 131_072}
    data = {"source": "code+text", "text_tokens": 100_000_000, "context": 4096, "steps": 8000, "learning_rate": 1.5e-3}
    test = {"lengths": [1024, 2048, 4096, 8192, 16384, 32768], "depths": [i / 8 for i in range(9)], "samples": 20}
    return _sweep([0, 1], 512, 1500, **shape, **data, **test)


NEEDLE = Experiment(
    name="needle",
    description="retrieval by length and depth, to eight times the training length: mha, dma, dma upcycled",
    run=run_needle,
    sizes={
        "smoke": _smoke,
        "quick": _quick,
        "seeds": _seeds,
        "levers-smoke": _levers_smoke,
        "levers": _levers,
        "far": _far,
        "small": _small,
        "long": _long,
        "paper": _paper,
    },
    cost=needle_cost,
    kind=needle_kind,
    summary=needle_summary,
    interruptible=True,
    trains_language_models=True,
)
register(NEEDLE)
