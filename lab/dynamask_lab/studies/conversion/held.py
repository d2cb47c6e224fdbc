"""Bytes of the whole cache of a model of which only some layers are converted.

    python -m dynamask_lab.studies.conversion.held --model MODEL --state STATE --out rows.jsonl

The caches are those that a model of the same layers, heads and windows fills, with hidden states of a few channels:
what a cache holds depends on keys alone. Dense caches are read at a short length and counted on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from dynamask.cache import BoundedCache, cache_bytes
from dynamask.convert import set_slopes, set_windows
from dynamask_lab.studies.conversion.forms import upcycled

LENGTHS = (8192, 32768)
_READ = 1024


@torch.no_grad()
def _bytes(model: Any, cache: Any, length: int) -> int:
    for start in range(0, length, 512):
        tokens = torch.zeros(1, min(512, length - start), dtype=torch.long)
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return int(cache_bytes(cache))


def dense_bytes(model: Any, length: int) -> int:
    """Bytes of a dense model's cache: layers that slide keep their window, the others one more key per token."""
    few, more = (_bytes(model, DynamicCache(config=model.config), read) for read in (_READ, 2 * _READ))
    return few + (more - few) // _READ * (length - _READ)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "state", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    config = AutoConfig.from_pretrained(arguments.model)
    config.hidden_size = config.intermediate_size = 16
    config.vocab_size, config.pad_token_id = 64, 0
    dense = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    common = {"study": "conversion cache", "model": arguments.model.name}
    rows: list[dict[str, Any]] = [
        common | {"budget": None, "length": length, "bytes": dense_bytes(dense, length)} for length in LENGTHS
    ]
    for file in sorted(arguments.state.glob("windows-*-hidden-seed0-loss-learned-slopes.json")):
        kept = json.loads(file.read_text())
        budget = int(file.name.split("-")[1])
        model = upcycled(dense, budget)
        set_windows(model, kept["windows"])
        set_slopes(model, kept["slopes"])
        ranked = model.config.ranked_layers
        cache = BoundedCache(model.config)
        longest = max(window for layer in kept["windows"] for window in layer)
        found = _bytes(model, cache, longest)  # from there on it holds no more
        alone = sum(int(layer.num_bytes) for index, layer in enumerate(cache.layers) if index in ranked)
        rows += [common | {"budget": budget, "length": length, "bytes": found, "global": alone} for length in LENGTHS]
    with open(arguments.out, "a", encoding="utf-8") as file_out:
        file_out.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
