"""A million tokens on one GPU: chunked prefill into the bounded cache, and what a converted model still finds.

    python lab/scripts/million_tokens_gpu.py --out results.jsonl --model models/smollm2-135m-instruct
    python lab/scripts/million_tokens_gpu.py --parts converted needles --model models/smollm2-135m-instruct
    python lab/scripts/million_tokens_gpu.py --tiny                      # small shapes, on a CPU

Parts. `speed`: the shape of the 1.7b preset with random weights and ranks that differ reads one long text in chunks;
time, the cache's bytes and the peak of memory at every power of two, and the time of a decoded token. `converted` and
`gemma`: the same for a converted SmolLM2-135M, with the windows of examples/data, and for a converted Gemma 3 270M;
where the model's folder is not given, weights are random and the line says so. `needles`: SmolLM2-135M-Instruct,
converted with the trained ranks of examples/data, reads texts with needles at several distances from their end, and is
then asked for each. It was trained on 8192 tokens: it runs as it is and with rotary angles scaled by YaRN, and what it
misses beyond is said as it is. One JSON line per measurement.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model_sizes import SMOLLM2_135M
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from dynamask import BoundedCache, DynamaskForCausalLM
from dynamask.cache import cache_bytes
from dynamask.convert import load_ranks, upcycle
from dynamask.convert.models import set_slopes, set_windows
from dynamask.evaluation.retrieval import Haystack
from dynamask.evaluation.retrieval.words import draw_keys
from dynamask.mixers import RankPredictor
from dynamask.models import preset

RANKS = Path(__file__).parents[2] / "examples" / "data" / "smollm2-135m-instruct.ranks.safetensors"
PARTS = ("speed", "converted", "gemma", "needles")
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
    """Time of prefill of the 1.7b preset's shape."""
    fields: dict[str, Any] = {"windows": 32, "local": 8} if TINY else {"local": 128, "sinks": 4}
    torch.manual_seed(0)
    config = preset("tiny" if TINY else "1.7b", **fields)
    torch.set_default_dtype(DTYPE)
    with DEVICE:
        model = DynamaskForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    scramble(model)
    facts = {"preset": "tiny" if TINY else "1.7b", "windows": fields.get("windows", 2048), "weights": "random"}
    _speed(report, model, longest, seconds, facts)


@torch.inference_mode()
def converted_speed(report: Report, folder: Path | None, longest: int, seconds: float) -> None:
    """Time of prefill of a converted SmolLM2-135M with the windows and slopes of examples/data."""
    if folder is not None:
        model = converted(folder)
    else:
        torch.manual_seed(0)
        model = upcycle(LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)), 256, local=128, sinks=4)
        with safe_open(RANKS, framework="pt") as file:
            notes = file.metadata()
        set_windows(model, json.loads(notes["windows"]))
        set_slopes(model, json.loads(notes["slopes"]))
        model = _ready(model)
        scramble(model)
    facts = {"model": "smollm2-135m-instruct, converted", "weights": "random" if folder is None else "trained"}
    _speed(report, model, longest, seconds, facts | {"budget": model.config.budget})


@torch.inference_mode()
def gemma_speed(report: Report, folder: Path | None, longest: int, seconds: float) -> None:
    """Time of prefill of a converted Gemma 3 270M, 512 keys in every layer."""
    torch.manual_seed(0)
    if folder is not None:
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        shape: dict[str, Any] = {
            "vocab_size": 1024 if TINY else 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
            "max_position_embeddings": 32768,
        }
        dense = Gemma3ForCausalLM(Gemma3TextConfig(**shape))
    model = _ready(upcycle(dense, 512, local=128, sinks=4))
    scramble(model)
    facts = {"model": "gemma-3-270m, converted", "weights": "random" if folder is None else "trained, ranks random"}
    _speed(report, model, longest, seconds, facts | {"budget": model.config.budget})


def converted(folder: Path) -> Any:
    """SmolLM2-135M-Instruct with the trained ranks, windows and slopes of examples/data."""
    model = upcycle(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 256, local=128, sinks=4)
    load_ranks(model, RANKS)
    return _ready(model)


def _ready(model: Any) -> Any:
    model = model.to(DEVICE, DTYPE).eval()
    model.config.trained_ranks = True
    for module in model.modules():
        if isinstance(module, RankPredictor):
            module.float()
    return model


def _speed(report: Report, model: Any, longest: int, seconds: float, facts: dict[str, Any]) -> None:
    """Time of prefill at every power of two, until the time is over."""
    config, chunk = model.config, 128 if TINY else 16384
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
            **facts,
            tokens=done,
            chunk=chunk,
            seconds=taken,
            tokens_per_second=done / taken,
            tokens_per_second_since_last=(done - before) / (taken - seconds_before),
            cache_bytes=cache_bytes(cache),
            peak_bytes=peak(),
            weight_bytes=weights,
        )
        before, seconds_before, mark = done, taken, 2 * mark
        paused = time.perf_counter()
        decoded = _decode_time(model, cache)
        report.line("decode", **facts, tokens=done, ms_per_token=decoded * 1e3)
        peak()
        begun += time.perf_counter() - paused  # what decoding took does not count
        if 2 * taken > seconds:
            break


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
    begun = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = converted(folder)
    trained = model.config.max_position_embeddings
    haystack = Haystack(tokenizer, None)
    _needles(report, model, tokenizer, haystack, lengths[0], "none", quiet=True)  # compiles the kernels
    per_token = 0.0
    for length in lengths:
        for scaling in ("none", "yarn") if length > trained else ("none",):
            if time.perf_counter() - begun + per_token * length > seconds:
                continue
            scale_rotary(model, scaling, length / trained, trained)
            per_token = _needles(report, model, tokenizer, haystack, length, scaling)


def scale_rotary(model: Any, scaling: str, factor: float, trained: int) -> None:
    """Scale the rotary angles of a Llama for a text `factor` times as long as those it was trained on."""
    rotary, config = model.model.rotary_emb, copy.deepcopy(model.config)
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    if scaling != "none":
        config.rope_parameters |= {
            "rope_type": scaling,
            "factor": factor,
            "original_max_position_embeddings": trained,
        }
    model.model.rotary_emb = type(rotary)(config).to(DEVICE)


@torch.inference_mode()
def _needles(
    report: Report,
    model: Any,
    tokenizer: Any,
    haystack: Haystack,
    length: int,
    scaling: str,
    *,
    quiet: bool = False,
) -> float:
    """Write what is found; return the seconds that a token of the length took, of all texts together."""
    begun = time.perf_counter()
    rows, chunk = 2 if TINY else 8, 256 if TINY else 16384
    places = (256, 512, 1024, 2048, 4096, 6144, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 983040)
    distances = [d for d in places if d < length - 64]

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def question(key: str) -> list[int]:
        return encode(
            f"\nWhat is the special magic number for {key} mentioned in the provided text? The special magic number "
            f"for {key} mentioned in the provided text is"
        )

    head = encode(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n"
    )
    drawn = random.Random(0)
    by_length: dict[int, list[str]] = {}
    for key in dict.fromkeys(draw_keys(drawn, 400)):
        by_length.setdefault(len(question(key)), []).append(key)
    keys = max(by_length.values(), key=len)  # questions of one length make one batch
    texts, asked, expected = [], [], []
    for row in range(rows):
        rng = random.Random(f"{length} {row}")
        text, _ = haystack.cut(length - len(head), rng)
        text = head + text
        for key, distance in zip(rng.sample(keys, len(distances)), distances, strict=True):
            number = str(rng.randrange(10**6, 10**7))
            needle = encode(f"\nOne of the special magic numbers for {key} is: {number}.\n")
            text[length - distance : length - distance + len(needle)] = needle
            asked.append(question(key))
            expected.append(number)
        texts.append(text)
    whole = torch.tensor(texts)
    synchronize()
    peak()
    started = time.perf_counter()
    cache = read(model, whole, model._new_cache(), chunk)
    synchronize()
    taken, most = time.perf_counter() - started, peak()
    per_text = cache_bytes(cache) // rows
    cache.batch_select_indices(torch.arange(rows, device=DEVICE).repeat_interleave(len(distances)))
    answers = _answers(model, tokenizer, cache, asked)
    found = dict.fromkeys(distances, 0)
    for index, (answer, number) in enumerate(zip(answers, expected, strict=True)):
        found[distances[index % len(distances)]] += number in answer
    each = (time.perf_counter() - begun) / length
    if quiet:
        return each
    report.line(
        "needles",
        model="smollm2-135m-instruct, converted",
        rotary_scaling=scaling,
        tokens=length,
        texts=rows,
        seconds=taken,
        tokens_per_second=rows * length / taken,
        cache_bytes_per_text=per_text,
        peak_bytes=most,
        found_by_distance_from_the_end={str(d): found[d] / rows for d in distances},
        answers_of_the_first_text=answers[: len(distances)],
    )
    return each


def _answers(model: Any, tokenizer: Any, cache: Any, questions: list[list[int]]) -> list[str]:
    step, made = torch.tensor(questions, device=DEVICE), []
    for _ in range(10):
        output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        step = output.logits[:, -1:].argmax(-1)
        made.append(step)
    return [str(text) for text in tokenizer.batch_decode(torch.cat(made, 1))]


def main() -> int:
    """Run the parts; return 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct; without it no needles")
    parser.add_argument("--gemma", type=Path, help="folder of Gemma 3 270M")
    parser.add_argument("--longest", type=int, default=4096 if TINY else 2 << 20)
    parser.add_argument("--seconds", type=float, default=75, help="begin nothing of a part that would end after that")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    arguments = parser.parse_args()
    report, failed = Report(arguments.out), 0
    lengths = [512, 1024] if TINY else [8192, 131072, 1048576, 32768, 524288]
    folders = {
        name: path if path is not None and path.is_dir() else None
        for name, path in (("model", arguments.model), ("gemma", arguments.gemma))
    }
    runs: dict[str, Callable[[], None]] = {
        "speed": lambda: speed(report, arguments.longest, arguments.seconds),
        "converted": lambda: converted_speed(report, folders["model"], arguments.longest, arguments.seconds),
        "gemma": lambda: gemma_speed(report, folders["gemma"], arguments.longest, arguments.seconds),
    }
    if (folder := folders["model"]) is not None:
        runs["needles"] = lambda: needles(report, folder, lengths, arguments.seconds)
    for name in arguments.parts:
        if name not in runs:
            print(f"# {name}: no model at {arguments.model}", flush=True)
            continue
        begun = time.perf_counter()
        try:
            runs[name]()
        except Exception:
            failed = 1
            print(f"{name} failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        print(f"# {name}: {time.perf_counter() - begun:.1f} s", flush=True)
        gc.collect()
        if not TINY:
            torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    sys.exit(main())
