"""Fill the compilers' caches for the study `conversion`, before the model's weights are there.

    python lab/scripts/conversion_warm.py [--device cuda]

Distils a model of SmolLM2-135M's shape with random weights for two steps, recorded and compiled, then answers from its
cache, so that trainings and evaluations that start later find their kernels on the disk.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from model_sizes import SMOLLM2_135M
from transformers import AutoModelForCausalLM, LlamaConfig

from dynamask.convert import distill
from dynamask_lab.studies.conversion.forms import upcycled
from dynamask_lab.studies.conversion.measure import Form, token_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--block", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layers", type=int, default=SMOLLM2_135M["num_hidden_layers"])
    arguments = parser.parse_args()
    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {what}", flush=True)

    warnings.simplefilter("always")
    config = LlamaConfig(**(SMOLLM2_135M | {"num_hidden_layers": arguments.layers}))
    dense = AutoModelForCausalLM.from_config(config).to(arguments.device, torch.bfloat16).eval()
    model = upcycled(dense, max(256, arguments.block // 16), copy_weights=True)
    config = model.config
    config.slopes = [[0.001] * config.num_key_value_heads for _ in range(config.num_hidden_layers)]
    say("made")
    block = torch.randint(0, SMOLLM2_135M["vocab_size"], (arguments.batch, arguments.block))
    compiled = arguments.device != "cpu"
    distill(model, dense, [block, block], steps=2, train_embeddings=False, average_share=0.0, compiled=compiled)
    say("distilled")
    with torch.no_grad():
        token_losses(model.eval(), block[:, : arguments.block].to(arguments.device))
        form = Form("converted", model)
        tokens = block[:1, :1024].repeat(25 if compiled else 2, 1).to(arguments.device)
        cache, _ = form.read(tokens)
        for position in range(tokens.shape[1], tokens.shape[1] + 6):
            form.go_on(cache, tokens[:, :1], position)
    say("answered")


if __name__ == "__main__":
    main()
