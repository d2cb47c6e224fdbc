"""The whole of dynamask in a few minutes on a CPU, on text that every machine has.

Trains a tiny DMA model, one that spends as many keys unevenly over its layers, and a tiny dense (MHA) model on the
sources of Python's standard library, with the same data, seed and steps; compares their perplexity; generates from
the bounded cache; shows that the cache does not grow; and draws which keys stay alive in which head. Run it with
`make demo`, or `python examples/demo.py`.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import set_seed

from dynamask.cache import cache_bytes
from dynamask.data import PackedDataset
from dynamask.evaluation import perplexity_by_position
from dynamask.inspect import draw_curves, draw_live_keys, layer_expiry
from dynamask.mixers import DynamicMaskGate
from dynamask.models import new_cache
from dynamask.training import TrainConfig, open_corpus, open_run, train

console = Console(width=100)

MODELS = {
    "dma": {"attention": "dma"},
    "dma-uneven": {"attention": "dma", "layer_windows": "uneven"},
    "mha": {"attention": "mha"},
}


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps of each model")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for runs and pictures")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    begin = time.perf_counter()

    perplexities = {}
    for name, attention in MODELS.items():
        console.rule(f"training tiny with {name}")
        config = TrainConfig(
            preset="tiny",
            model=dict(attention),
            data=["stdlib"],
            output=str(folder / name),
            corpus=str(folder / "corpus"),
            context=512,
            batch_size=4,
            steps=arguments.steps,
            warmup=arguments.steps // 10,
            learning_rate=2e-3,
            save_every=max(1, arguments.steps // 3),
        )
        started = time.perf_counter()
        train(config, progress=lambda stream, what: track(stream, what, transient=True))
        seconds = time.perf_counter() - started
        model, _ = open_run(config.output)
        blocks = PackedDataset(open_corpus(config.output), "validation", config.context)
        perplexities[name] = (perplexity_by_position(model, blocks, limit=64), model, seconds)

    table = Table(
        "attention", "keys per query", "perplexity", "late in a document", "training", title="\nheld-out text"
    )
    for name, (result, model, seconds) in perplexities.items():
        windows = model.config.layer_windows
        keys = "all" if name == "mha" else f"at most {model.config.window}"
        if windows is not None:
            keys = f"{'/'.join(map(str, sorted(set(windows))))}, {sum(windows) // len(windows)} on average"
        late = result.to_dict()["buckets"][-1]
        table.add_row(
            name,
            keys,
            f"{result.perplexity:.1f}",
            f"{late['perplexity']:.1f} (from token {late['from']})",
            f"{seconds:.0f} s",
        )
    console.print(table)
    _control(perplexities["dma"][0].perplexity, folder)

    console.rule("a continuation, from the bounded cache")
    model, tokenizer = open_run(folder / "dma")
    prompt = "def read(self, size=-1):\n    "
    inputs = tokenizer(prompt, return_tensors="pt")
    set_seed(0)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=120,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        pad_token_id=tokenizer.eos_token_id,
    )
    console.print(tokenizer.decode(output[0]), markup=False, highlight=False)

    console.rule("memory of the cache as the context grows")
    dense, _ = open_run(folder / "mha")
    table = Table("context, tokens", "DMA, bounded cache", "MHA, full cache")
    tokens = PackedDataset(open_corpus(folder / "dma"), "train", 4096)[0]["input_ids"][None]
    caches = {"dma": new_cache(model.config), "mha": new_cache(dense.config)}
    with torch.no_grad():
        done = 0
        for context in (64, 256, 1024, 2048, 4096):
            for name, net in (("dma", model), ("mha", dense)):
                net(tokens[:, done:context], past_key_values=caches[name], use_cache=True, logits_to_keep=1)
            done = context
            table.add_row(str(context), *(f"{cache_bytes(cache) / 1024:.0f} KiB" for cache in caches.values()))
    console.print(table)

    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    pictures = [draw_live_keys(model, tokenizer, text, folder / "live_keys.png")]
    pictures.append(draw_curves([str(folder / name) for name in MODELS], folder / "curves.png"))
    console.print("pictures: " + ", ".join(str(picture) for picture in pictures))
    console.print(f"done in {time.perf_counter() - begin:.0f} s")


def _control(trained: float, folder: Path) -> None:
    """Say how much of DMA's figure its choice of keys accounts for: the comparison above is not about that alone."""
    model, tokenizer = open_run(folder / "dma")
    text = tokenizer(Path(textwrap.__file__).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, :360]
    expiry = layer_expiry(model, text)
    position = torch.arange(expiry.shape[-1])
    sliding = (position + model.config.window).clamp(max=len(position))
    moved = (expiry != sliding).float().mean().item()
    for module in model.modules():
        if isinstance(module, DynamicMaskGate):
            torch.nn.init.zeros_(module.gate)
    blocks = PackedDataset(open_corpus(folder / "dma"), "validation", 512)
    without = perplexity_by_position(model, blocks, limit=64).perplexity
    console.print(
        "Read with care: DMA also learns a penalty per token of distance, which MHA here has not. With the gates that "
        f"choose keys set to zero, DMA's perplexity is {without:.2f} instead of {trained:.2f}, and {moved:.1%} of its "
        "keys live other than in a sliding window. After so few steps, a difference from MHA says little about "
        "choosing keys."
    )


if __name__ == "__main__":
    main()
