"""Train a small model from Python: the same run that `dynamask train` makes, then evaluate and generate."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dynamask.data import PackedDataset
from dynamask.evaluation import perplexity_by_position
from dynamask.training import TrainConfig, open_corpus, open_run, train

with tempfile.TemporaryDirectory() as folder:
    texts = Path(folder) / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"Verse {i}.\n" + "The rain in Spain stays mainly in the plain.\n" * 12)
    config = TrainConfig(
        preset="tiny",
        model={"vocab_size": 400, "num_hidden_layers": 2, "windows": 16, "attention": "dma"},
        data=[str(texts)],
        output=f"{folder}/run",
        context=64,
        batch_size=4,
        steps=30,
        warmup=3,
        validation=0.2,
    )
    result = train(config, quiet=True)
    print(f"validation perplexity {result.perplexity:.2f}")
    model, tokenizer = open_run(config.output)
    figures = perplexity_by_position(model, PackedDataset(open_corpus(config.output), "validation", 64))
    for bucket in figures.to_dict()["buckets"]:
        print(f"positions {bucket['from']:3d} to {bucket['to'] - 1:3d}: {bucket['tokens']:5d} tokens")
    inputs = tokenizer("The rain in", return_tensors="pt")
    output = model.generate(inputs["input_ids"], max_new_tokens=12, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(output[0]))
