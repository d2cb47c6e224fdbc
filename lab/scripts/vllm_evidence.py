"""Measure a converted model in vLLM: outputs beside transformers', sequences that fit, tokens per second.

    python lab/scripts/vllm_evidence.py CONVERTED DENSE OUT.json [--dtype float32] [--memory 2147483648] ...

CONVERTED and DENSE are folders of the converted and of the dense model, with a tokenizer. Both are served by the same
vLLM with the same settings and the same memory for keys and values, one after the other, in this process. Run it in the
environment that `lab/scripts/vllm_environment.sh` makes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch

import dynamask  # noqa: F401 -- lets the Auto classes open converted models without asking


def served(folder: str, arguments: argparse.Namespace) -> Any:
    """Start vLLM on a model."""
    from vllm import LLM

    return LLM(
        folder,
        dtype=arguments.dtype,
        max_model_len=arguments.context,
        kv_cache_memory_bytes=arguments.memory,
        max_num_batched_tokens=arguments.chunk,
        max_num_seqs=arguments.sequences,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )


def capacity(engine: Any) -> dict[str, float]:
    """How many sequences of the whole context fit, by vLLM's own cache configuration."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    core = engine.llm_engine.engine_core.engine_core
    config = core.scheduler.kv_cache_config
    return {
        "blocks": config.num_blocks,
        "cache_bytes": max(tensor.size for tensor in config.kv_cache_tensors),
        "sequences": get_max_concurrency_for_kv_cache_config(core.vllm_config, config),
    }


def speed(engine: Any, prompts: list[list[int]], new: int) -> dict[str, float]:
    """Seconds of all requests at once, after one request that warms the engine up."""
    from vllm import SamplingParams

    options = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": each} for each in prompts]
    engine.generate(requests[:1], options, use_tqdm=False)
    start, used = time.perf_counter(), time.process_time()
    outputs = engine.generate(requests, options, use_tqdm=False)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    assert all(len(output.outputs[0].token_ids) == new for output in outputs)
    count = len(prompts)
    return {
        "requests": count,
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": new * count,
        "seconds": seconds,
        "cpu_seconds": used,  # of this process: what is left of a comparison on a busy machine
        "new_tokens_per_second": new * count / seconds,
    }


def agreement(engine: Any, folder: str, prompts: list[list[int]], new: int, dtype: str) -> list[dict[str, Any]]:
    """Greedy continuations beside transformers'; where they part, how close transformers' two best tokens were."""
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    options = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": each} for each in prompts], options, use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    rows = []
    for prompt, output in zip(prompts, outputs, strict=True):
        found = list(output.outputs[0].token_ids)
        made = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        expected = made.sequences[0, len(prompt) :].tolist()
        same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), new)
        row = {"prompt": len(prompt), "equal": found == expected, "equal_tokens": same}
        if same < new:
            best = made.logits[same][0].topk(2).values
            row["margin"] = float(best[0] - best[1])
        rows.append(row)
    return rows


def main() -> None:
    """Measure, and write one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("converted")
    parser.add_argument("dense")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, help="a text file for the prompts; default: tokens at random")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory", type=int, default=2 << 30, help="bytes for keys and values")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a step at most")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--compare", type=int, nargs="*", default=[], help="lengths of prompts to compare")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.converted)
    if arguments.text is None:
        ids = torch.randint(3, tokenizer.vocab_size, (1 << 17,), generator=torch.Generator().manual_seed(0)).tolist()
    else:
        ids = tokenizer(arguments.text.read_text(encoding="utf-8"))["input_ids"]
    half = arguments.prompt // 2
    lengths = [half + half * i // max(arguments.sequences - 1, 1) for i in range(arguments.sequences)]
    prompts = [ids[97 * i :][:length] for i, length in enumerate(lengths)]
    result: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(arguments).items()}}
    for name, folder in (("converted", arguments.converted), ("dense", arguments.dense)):
        engine = served(folder, arguments)
        result[name] = {"capacity": capacity(engine)}
        if name == "converted" and arguments.compare:
            chosen = [ids[1000 * i :][:length] for i, length in enumerate(arguments.compare)]
            result["agreement"] = agreement(engine, folder, chosen, arguments.new, arguments.dtype)
            arguments.out.write_text(json.dumps(result, indent=1))
        result[name] |= speed(engine, prompts, arguments.new) if arguments.sequences else {}
        arguments.out.write_text(json.dumps(result, indent=1))
        del engine
        gc.collect()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
