"""A million tokens on one GPU: chunked prefill into the bounded cache, and what a converted model still finds.

    python lab/scripts/million_tokens_gpu.py --out results.jsonl --model models/smollm2-135m-instruct
    python lab/scripts/million_tokens_gpu.py --tiny                      # small shapes, on a CPU

Two parts. `speed`: the shape of the 1.7b preset with random weights and ranks that differ reads one long text in
chunks; time, the cache's bytes and the peak of memory at every power of two, and the time of a decoded token.
`needles`: SmolLM2-135M-Instruct, converted with the trained ranks of examples/data, reads texts with needles at several
distances from their end, and is then asked for each. It was trained on 8192 tokens: what it misses beyond is said as it
is. Runs without the model leave the second part out. One JSON line per measurement.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamask import BoundedCache, DynamaskForCausalLM
from dynamask.cache import cache_bytes
from dynamask.convert import load_ranks, upcycle
from dynamask.evaluation.retrieval import Haystack
from dynamask.evaluation.retrieval.words import draw_keys
from dynamask.mixers import RankPredictor
from dynamask.models import preset

RANKS = Path(__file__).parents[2] / "examples" / "data" / "smollm2-135m-instruct.ranks.safetensors"
TINY = "--tiny" in sys.argv
DEVICE = torch.device("cpu" if TINY else "cuda")
DTYPE = torch.float32 if TINY else torch.bfloat16


class Report:
    """Lines on standard output and in a file."""

    def __init__(self, out: Path | None) -> None:
        self.file = out.open("a", encoding="utf-8") if out is not None else None
        self.device = "cpu" if TINY else torch.cuda.get_device_name()

    def line(self, kind: str, **facts: Any) -> None:
        """Write a measurement."""
        facts = {"kind": kind, "device": self.device, "torch": torch.__version__} | facts
        text = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in facts.items()})
        print(text, flush=True)
        if self.file is not None:
            self.file.write(text + "\n")
            self.file.flush()


def synchronize() -> None:
    """Wait for the GPU."""
    if not TINY:
        torch.cuda.synchronize()


def peak() -> int:
    """Return the most bytes allocated since the last call."""
    if TINY:
        return 0
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def scramble(model: Any) -> None:
    """Let the ranks of a model with random weights differ."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    for module in model.modules():
        if isinstance(module, RankPredictor):
            weight = module.down.weight.data
            weight.copy_(torch.randn(weight.shape, generator=generator, device=weight.device))


@torch.inference_mode()
def read(model: Any, text: Tensor, cache: Any, chunk: int) -> Any:
    """Read (B, N) tokens into a cache, chunk by chunk."""
    for part in text.split(chunk, dim=1):
        model(input_ids=part.to(DEVICE), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.inference_mode()
def speed(report: Report, longest: int, seconds: float) -> None:
    """Time of prefill at every power of two, until the time is over."""
    chunk = 128 if TINY else 16384
    fields: dict[str, Any] = {"windows": 32, "local": 8} if TINY else {"local": 128, "sinks": 4}
    torch.manual_seed(0)
    config = preset("tiny" if TINY else "1.7b", **fields)
    torch.set_default_dtype(DTYPE)
    with DEVICE:
        model = DynamaskForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    scramble(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(config.vocab_size, (1, longest), generator=generator)
    read(model, text[:, : 2 * chunk], BoundedCache(config), chunk)  # compiles the kernels
    cache = BoundedCache(config)
    synchronize()
    peak()
    begun, done, mark = time.perf_counter(), 0, 1024 if TINY else 131072
    before, seconds_before = 0, 0.0
    while done < longest:
        read(model, text[:, done : done + chunk], cache, chunk)
        done += chunk
        if done < mark:
            continue
        synchronize()
        taken = time.perf_counter() - begun
        report.line(
            "prefill",
            preset="tiny" if TINY else "1.7b",
            tokens=done,
            chunk=chunk,
            windows=fields.get("windows", 2048),
            seconds=taken,
            tokens_per_second=done / taken,
            tokens_per_second_since_last=(done - before) / (taken - seconds_before),
            cache_bytes=cache_bytes(cache),
            peak_bytes=peak(),
            weight_bytes=weights,
        )
        before, seconds_before, mark = done, taken, 2 * mark
        decoded = _decode_time(model, cache)
        report.line("decode", tokens=done, ms_per_token=decoded * 1e3)
        if time.perf_counter() - begun > seconds:
            break
        begun += time.perf_counter() - begun - taken  # what decoding took does not count


def _decode_time(model: Any, cache: Any) -> float:
    """Seconds per token of greedy decoding from a copy of the cache."""
    own, step = copy.deepcopy(cache), torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    for count in range(24):
        if count == 8:
            synchronize()
            begun = time.perf_counter()
        step = model(input_ids=step, past_key_values=own, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    synchronize()
    return (time.perf_counter() - begun) / 16


def needles(report: Report, folder: Path, lengths: list[int], seconds: float) -> None:
    """Needles at several distances from the end of texts of several lengths."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    begun = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = upcycle(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 256, local=128, sinks=4)
    load_ranks(model, RANKS)
    model = model.to(DEVICE, DTYPE).eval()
    for module in model.modules():
        if isinstance(module, RankPredictor):
            module.float()
    haystack = Haystack(tokenizer, None)
    for length in lengths:
        distances = [d for d in (512, 1024, 2048, 4096, 8192, 32768, 131072, 524288) if d < length - 64]
        _needles(report, model, tokenizer, haystack, length, distances)
        if time.perf_counter() - begun > seconds:
            break


def _needles(report: Report, model: Any, tokenizer: Any, haystack: Haystack, length: int, distances: list[int]) -> None:
    rows, chunk = 2 if TINY else 4, 256 if TINY else 16384

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    texts, asked = [], []
    for row in range(rows):
        rng = random.Random(f"{length} {row}")
        keys = draw_keys(rng, len(distances))
        numbers = [str(rng.randrange(10**6, 10**7)) for _ in distances]
        head = encode(
            "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz "
            "you about the numbers afterwards.\n"
        )
        text, _ = haystack.cut(length - len(head), rng)
        text = head + text
        for key, number, distance in zip(keys, numbers, distances, strict=True):
            needle = encode(f"\nOne of the special magic numbers for {key} is: {number}.\n")
            text[length - distance : length - distance + len(needle)] = needle
        texts.append(text[:length])
        asked.append(list(zip(keys, numbers, strict=True)))
    started = time.perf_counter()
    cache = read(model, torch.tensor(texts), model._new_cache(), chunk)
    synchronize()
    taken = time.perf_counter() - started
    found = dict.fromkeys(distances, 0)
    for place, distance in enumerate(distances):
        for row in range(rows):
            key, number = asked[row][place]
            question = encode(
                f"\nWhat is the special magic number for {key} mentioned in the provided text? The special magic "
                f"number for {key} mentioned in the provided text is"
            )
            own = copy.deepcopy(cache)
            own.batch_select_indices(torch.tensor([row], device=DEVICE))
            found[distance] += number in _answer(model, tokenizer, own, question)
    report.line(
        "needles",
        model="smollm2-135m-instruct, converted",
        tokens=length,
        texts=rows,
        seconds=taken,
        tokens_per_second=rows * length / taken,
        cache_bytes_per_text=cache_bytes(cache) // rows,
        found_by_distance_from_the_end={str(d): found[d] / rows for d in distances},
    )


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any, cache: Any, question: list[int]) -> str:
    step, made = torch.tensor([question], device=DEVICE), []
    for _ in range(10):
        step = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        made.append(int(step))
    return str(tokenizer.decode(made))


def main() -> int:
    """Run both parts; return 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct; without it no needles")
    parser.add_argument("--longest", type=int, default=4096 if TINY else 2 << 20)
    parser.add_argument("--seconds", type=float, default=75, help="begin no new power of two of a part after that")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    arguments = parser.parse_args()
    report, failed = Report(arguments.out), 0
    lengths = [1024, 2048] if TINY else [8192, 131072, 1048576]
    parts: list[tuple[str, Any]] = [("speed", lambda: speed(report, arguments.longest, arguments.seconds))]
    if arguments.model is not None and arguments.model.is_dir():
        parts.append(("needles", lambda: needles(report, arguments.model, lengths, arguments.seconds)))
    else:
        print(f"# no model at {arguments.model}: no needles", flush=True)
    for name, run in parts:
        begun = time.perf_counter()
        try:
            run()
        except Exception:
            failed = 1
            print(f"{name} failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        print(f"# {name}: {time.perf_counter() - begun:.1f} s", flush=True)
        if not TINY:
            torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    sys.exit(main())
