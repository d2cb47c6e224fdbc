"""All stages of a conversion in a row, resumable at any kill: measure, learn ranks, set windows, distil, report."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamask.convert.allocate_windows import allocate_windows
from dynamask.convert.architectures import reason_not_convertible
from dynamask.convert.calibration import CalibrationBlocks, calibration_blocks, open_blocks
from dynamask.convert.distill import distill
from dynamask.convert.learn_ranks import learn_ranks
from dynamask.convert.models import set_slopes, set_windows
from dynamask.convert.planted_facts import LEAST_ROOM, PlantedFacts
from dynamask.convert.progress import Report
from dynamask.convert.report import ConversionReport, Figures, figures_from, measure, plain_card
from dynamask.convert.upcycle import upcycle
from dynamask.convert_settings import Conversion
from dynamask.data import documents
from dynamask.data.tokenizer import opening_tokens
from dynamask.errors import UsageError
from dynamask.lock import locked

_LONGEST_BLOCK = 8192
_HELD_OUT_BLOCKS = 8
_ALLOCATION_BLOCKS = 32
_LOSS_BLOCKS = 8


Say = Callable[[str], None]


def run_conversion(settings: Conversion, *, progress: Report | None = None, say: Say = lambda text: None) -> Any:
    """Convert a model and write it.

    Args:
        settings: what to do.
        progress: see `dynamask.convert.progress.Progress`.
        say: called with one line about what happens.

    Returns:
        The `ConversionReport`, or None for a conversion without texts.

    Raises:
        UsageError, InvalidInputError: settings, a model or texts that do not fit; everything that can be checked is
            checked before the first stage. The target is written whole or not at all.
    """
    tokenizer, block = _checked(settings)
    if not settings.data:
        model = upcycle(
            _load(settings), settings.window, local=settings.local, sinks=settings.sinks,
            dense_layers=settings.dense_layers,
        )  # fmt: skip
        _write(model, tokenizer, None, settings)
        return None
    work = settings.work
    with locked(work.with_name(work.name + ".lock"), f"a conversion to {settings.target}"):
        _open_work(settings, say)
        try:
            report = _run(settings, tokenizer, block, progress, say)
        except Exception as error:
            if not (work / "ranks.pt").exists():  # nothing worth resuming
                shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, OSError):
                raise UsageError(
                    f"cannot write to {work}: {error.strerror or error}. Free some disk space if it is full, and run "
                    "the same command again"
                ) from error
            raise
        shutil.rmtree(work, ignore_errors=True)
    return report


def _calibration(
    settings: Conversion, tokens: Any, tokenizer: Any, block: int, batch: int, seed: int
) -> CalibrationBlocks | PlantedFacts:
    share = 0.5 if settings.calibration == "repeats" else 0.0
    opening = opening_tokens(tokenizer)
    blocks = CalibrationBlocks(tokens, block, batch=batch, repeat_share=share, seed=seed, opening=opening)
    if settings.calibration != "facts":
        return blocks
    return PlantedFacts(blocks, tokenizer, facts=max(1, min(12, block // (2 * LEAST_ROOM))))


def _checked(settings: Conversion) -> tuple[Any, int]:
    """Check everything that needs no weights; return the tokenizer and the block length."""
    from transformers import AutoConfig, AutoTokenizer

    settings.check()
    _check_device(settings.device)
    try:
        config = AutoConfig.from_pretrained(settings.source)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"cannot load a causal LM from {settings.source!r}: {_line(error)}") from error
    reason = reason_not_convertible(config)
    if reason is not None:
        raise UsageError(f"cannot convert {settings.source}: {reason}")
    longest = getattr(config, "max_position_embeddings", None) or _LONGEST_BLOCK
    block = min(_LONGEST_BLOCK, longest) if settings.block is None else settings.block
    if block > longest:
        raise UsageError(f"--block {block} is longer than the model's context of {longest} tokens")
    if settings.data and block < settings.local + settings.sinks + 16:
        raise UsageError(
            f"--block {block} is too short to learn from: keys within local = {settings.local} and sinks = "
            f"{settings.sinks} are kept anyway"
        )
    if settings.calibration == "facts" and block < 2 * LEAST_ROOM:
        raise UsageError(f"--calibration facts needs blocks of at least {2 * LEAST_ROOM} tokens; got --block {block}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.source)
    except Exception as error:  # a dozen kinds, all of which mean that there is none
        tokenizer = None
        if settings.data:
            reason = _line(error).rstrip()
            told = "" if reason.endswith(":") else f" ({reason})"  # transformers' list of files may be empty
            raise UsageError(
                f"{settings.source} has no tokenizer, which --data needs: put the model's tokenizer files into its "
                f"folder{told}"
            ) from error
    _check_disk(settings)
    return tokenizer, block


def _check_device(name: str | None) -> None:
    """Refuse a device that is neither the CPU nor one of the GPUs there are."""
    kind, _, index = (name or "cpu").partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not 0 <= int(index if index.isdecimal() else "-1" if index else "0") < count:
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise UsageError(f"--device must be one of {', '.join(there)}; got {name!r}")


def _check_disk(settings: Conversion) -> None:
    folder = Path(settings.source).expanduser()
    if not folder.is_dir():
        return
    weights = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf"))
    # Distillation keeps float32 weights, two moments of the optimizer and a mean, twice while a state replaces another.
    needed = weights * (17 if settings.distill_steps else 1.2)
    place = settings.target.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UsageError(
            f"{place} has {free / 2**30:.1f} GiB free and the conversion needs about {needed / 2**30:.1f} GiB: free "
            "some, or choose another place"
        )


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _open_work(settings: Conversion, say: Say) -> None:
    work, file = settings.work, settings.work / "settings.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        differing = [name for name, value in settings.identity().items() if before.get(name) != value]
        if differing:
            raise UsageError(
                f"an unfinished conversion with another {', '.join(differing)} lies in {work}: give the same settings "
                "to continue it, or delete the folder"
            )
        say(f"continuing the conversion in {work}")
        return
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _replace(file, json.dumps(settings.identity()).encode())
    except OSError as error:
        raise UsageError(f"cannot write to {work}: {error.strerror or error}") from error


def _replace(file: Path, content: bytes) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, file)


def _run(settings: Conversion, tokenizer: Any, block: int, progress: Report | None, say: Say) -> ConversionReport:
    work = settings.work
    tokens, held_out = _tokens(settings, tokenizer, block, say)
    if settings.window >= block:
        say(f"--window {settings.window} is not below the block of {block} tokens: within it, attention stays dense")
    dense = _load(settings)
    seconds: dict[str, float] = {}
    stage = _Stages(work / "seconds.json", seconds)

    texts = None  # needles are hidden in RULER's noise: the texts given may be code or tables
    before_file = work / "before.json"
    if before_file.exists():
        before = figures_from(json.loads(before_file.read_text(encoding="utf-8")))
    else:
        say("measuring the dense model")
        with stage("measure dense"):
            before = measure(dense, held_out, tokenizer, texts, samples=settings.needles, batch=settings.batch)
        _replace(before_file, json.dumps(asdict(before)).encode())

    torch.manual_seed(settings.seed)
    model = upcycle(
        dense, settings.window, local=settings.local, sinks=settings.sinks, dense_layers=settings.dense_layers
    )
    blocks = _calibration(settings, tokens, tokenizer, block, settings.batch, settings.seed)
    say("learning ranks")
    with stage("ranks"):
        learn_ranks(model, blocks, steps=settings.rank_steps, checkpoint=work / "ranks.pt", progress=progress)
    windows_file = work / "windows.json"
    if windows_file.exists():
        kept = json.loads(windows_file.read_text(encoding="utf-8"))
        set_windows(model, kept["windows"])
        set_slopes(model, kept["slopes"])
    else:
        with stage("windows"):
            batches = max(1, _ALLOCATION_BLOCKS // settings.batch)
            if settings.allocation == "loss":  # a backward pass, whose memory one block decides
                blocks = _calibration(settings, tokens, tokenizer, block, 1, settings.seed)
                batches = _LOSS_BLOCKS
            allocate_windows(
                model, blocks, settings.window, method=settings.allocation, max_batches=batches, progress=progress
            )
        chosen: Any = model.config
        _replace(windows_file, json.dumps({"windows": chosen.windows, "slopes": chosen.slopes}).encode())
    if settings.distill_steps:
        say("distilling")
        with stage("distil"):
            distill(
                model,
                dense,
                _calibration(settings, tokens, tokenizer, block, settings.batch, settings.seed + 1),
                steps=settings.distill_steps,
                learning_rate=settings.distill_rate,
                label_share=settings.label_share,
                start_windows=settings.start_windows,
                checkpoint=work / "distill.pt",
                progress=progress,
            )
    say("measuring the converted model")
    with stage("measure converted"):
        after = measure(model, held_out, tokenizer, texts, samples=settings.needles, batch=settings.batch)
    stored: Any = model.config
    heads = [None if entry is None else list(entry) for entry in stored.head_windows]
    shown = settings.identity() | {"block": block}
    report = ConversionReport(settings.source, shown, heads, stage.seconds, before, after)
    _write(model, tokenizer, report, settings)
    return report


class _Stages:
    """Adds up the seconds of every stage over all runs of a conversion."""

    def __init__(self, file: Path, seconds: dict[str, float]) -> None:
        self.file = file
        self.seconds = json.loads(file.read_text(encoding="utf-8")) if file.exists() else seconds
        self.name, self.began = "", 0.0

    def __call__(self, name: str) -> _Stages:
        self.name = name
        return self

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        spent = time.perf_counter() - self.began
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + spent
        if error[0] is None:
            _replace(self.file, json.dumps(self.seconds).encode())


def _tokens(settings: Conversion, tokenizer: Any, block: int, say: Say) -> tuple[Any, Tensor]:
    """Token ids to train on, and held-out blocks (B, block): the end of the texts."""
    file = settings.work / "tokens.npy"
    if file.exists():
        tokens = np.load(file)
    else:
        say("reading the texts")
        texts = (document.text for document in documents(settings.data))
        try:
            tokens = calibration_blocks(texts, tokenizer, 2, max_tokens=settings.max_tokens).tokens
        except ValueError:
            tokens = np.zeros(0, dtype=np.int64)
        if len(tokens) < 2 * block:
            raise UsageError(
                f"the texts hold {len(tokens)} tokens, fewer than two blocks of {block}, one to learn from and one to "
                f"measure with: give more text, or a smaller --block"
            )
        partial = file.with_name("tokens.partial.npy")
        np.save(partial, tokens)
        os.replace(partial, file)
    count = max(1, min(_HELD_OUT_BLOCKS, len(tokens) // block // 8))
    last = np.array(tokens[len(tokens) - count * block :], dtype=np.int64)
    opening = torch.tensor(opening_tokens(tokenizer), dtype=torch.long)
    held_out = open_blocks(torch.from_numpy(last).view(count, block), opening)
    return tokens[: len(tokens) - count * block], held_out


def _load(settings: Conversion) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(settings.source, dtype="auto")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load a causal LM from {settings.source!r}: {_line(error)}") from error
    broken = [name for name, tensor in model.named_parameters() if not bool(torch.isfinite(tensor).all())]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UsageError(
            f"{settings.source} holds NaN or infinity in {broken[0]}{more}: it computes no numbers to learn from; "
            "download or save the model again"
        )
    device = settings.device or ("cuda" if torch.cuda.is_available() and settings.data else "cpu")
    return model.to(device).eval()


def _write(model: Any, tokenizer: Any, report: ConversionReport | None, settings: Conversion) -> None:
    """Write the target under another name beside it, and rename it when every file is there."""
    partial = settings.target.with_name(f".{settings.target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.to("cpu").save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if report is not None:
            report.save(partial)
        else:
            about = (
                f"Each query sees {settings.window} keys: the first {settings.sinks} and the newest. The ranks are "
                "untrained; `dynamask.convert.learn_ranks` trains them."
            )
            (partial / "README.md").write_text(plain_card(settings.source, about), encoding="utf-8")
        os.rename(partial, settings.target)
    except Exception as error:
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise UsageError(f"cannot write {settings.target}: {_line(error)}") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


__all__ = ["Conversion", "Figures", "run_conversion"]
