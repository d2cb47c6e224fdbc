"""`dynamask evaluate | retrieval | generate`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dynamask.cli.common import (
    Model,
    check_output_file,
    check_sampling,
    check_text,
    console,
    errors,
    progress,
    quiet_libraries,
)
from dynamask.errors import UsageError

_LONGEST_DEFAULT = 2048
"""Tokens of a sequence of a model that no run of dynamask trained, at most."""


def evaluate(
    model: Model,
    data: Annotated[
        list[str] | None, typer.Option(help="Sources to evaluate on; default: the run's own held-out split.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens per sequence; default: the run's own, or what the model is made for.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Most sequences, or questions, to evaluate.")] = None,
    unreadable: Annotated[
        str, typer.Option("--errors", help="With --data: fail at a file, line or row that cannot be read, or skip it.")
    ] = "fail",
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Run these tasks of lm-evaluation-harness instead, separated by commas.")
    ] = None,
    fewshot: Annotated[int | None, typer.Option(help="With --tasks: worked examples before each question.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --tasks: folder with task definitions of your own.")
    ] = None,
) -> None:
    """Compute perplexity, overall and by position in the document, or run benchmark tasks.

    **Examples**

    - `dynamask evaluate runs/tiny`

    - `dynamask evaluate runs/tiny --data notes/ --context 1024 --output figures.json`

    - `dynamask evaluate runs/tiny --tasks piqa,arc_easy` — needs `pip install 'dynamask-attention[eval]'`

    - `dynamask evaluate runs/tiny --tasks plurals --include-path examples/multiple_choice` — a task of your own
    """
    import tempfile

    from dynamask.data.sources import check_sources
    from dynamask.training.folder import check_run, corpus_folder

    for name, value, least in (("context", context, 2), ("batch-size", batch_size, 1), ("limit", limit, 1)):
        if value is not None and value < least:
            raise UsageError(f"--{name} must be at least {least}; got {value}")
    check_output_file(output)
    if tasks is not None:
        if data:
            raise UsageError("--tasks bring their own data: give either --tasks or --data")
        _evaluate_tasks(model, tasks, include_path, fewshot, limit, batch_size, output)
        return
    if fewshot is not None or include_path is not None:
        raise UsageError("--fewshot and --include-path belong to --tasks: name the tasks to run")
    if data:
        check_run(model)
        check_sources(data)
    else:
        corpus_folder(model)
        check_run(model)
    quiet_libraries()
    from dynamask.data import PackedDataset, prepare
    from dynamask.evaluation import perplexity_by_position
    from dynamask.training import open_corpus, open_run

    held_out = None if data else open_corpus(model)  # before the model, which takes longer
    loaded, tokenizer = open_run(model)
    length = _context(loaded.config, model, context)
    with tempfile.TemporaryDirectory() as scratch:
        if data:
            tokenizer.save_pretrained(f"{scratch}/tokenizer")
            corpus = prepare(
                data,
                f"{scratch}/corpus",
                vocab_size=len(tokenizer),
                tokenizer=f"{scratch}/tokenizer",
                validation=0.0,
                errors=unreadable,
                progress=progress,
            )
            if skipped := corpus.index["skipped"]:
                errors.print(f"left out {len(skipped)}, such as: {escape(skipped[0])}", soft_wrap=True)
            blocks = PackedDataset(corpus, "train", length)
        else:
            assert held_out is not None
            blocks = PackedDataset(held_out, "validation", length)
        result = perplexity_by_position(loaded, blocks, batch_size=batch_size, limit=limit, progress=progress)
    table = Table("position in document", "tokens", "perplexity", title=f"perplexity {result.perplexity:.2f}")
    for row in result.to_dict()["buckets"]:
        shown = f"{row['perplexity']:.2f}" if row["perplexity"] else "-"
        table.add_row(f"{row['from']} to {row['to'] - 1}", str(row["tokens"]), shown)
    console.print(table)
    if output:
        output.write_text(json.dumps(result.to_dict(), indent=1))


def _context(config: Any, model: str, given: int | None) -> int:
    """Tokens of a sequence: as given, as the run was trained, or as many as the model is made for, up to a limit."""
    from dynamask.training.folder import run_settings

    longest = getattr(config, "max_position_embeddings", None)
    if given is not None:
        if longest is not None and given > longest:
            errors.print(
                f"--context {given} is longer than the model's max_position_embeddings={longest}: later positions are "
                "ones that it was not made for"
            )
        return given
    settings = run_settings(model)
    if settings is not None and settings.context is not None:
        return settings.context
    return min(longest or _LONGEST_DEFAULT, _LONGEST_DEFAULT)


def _evaluate_tasks(
    model: str,
    tasks: str,
    include_path: Path | None,
    fewshot: int | None,
    limit: int | None,
    batch_size: int,
    output: Path | None,
) -> None:
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks names no task: give some, separated by commas, such as piqa,arc_easy")
    quiet_libraries()
    try:
        from dynamask.evaluation.harness import evaluate_tasks
    except ImportError as error:
        raise UsageError(str(error)) from error
    results = evaluate_tasks(
        model, names, include_path=include_path, num_fewshot=fewshot, limit=limit, batch_size=batch_size
    )
    table = Table("task", "metric", "value", "± standard error")
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, float) and kind and not metric.endswith("_stderr"):
                deviation = metrics.get(f"{metric}_stderr,{kind}")
                shown = f"{deviation:.4f}" if isinstance(deviation, float) else "-"
                table.add_row(escape(task), metric, f"{value:.4f}", shown)
    console.print(table)
    if output:
        kept = {key: results.get(key) for key in ("results", "n-shot", "n-samples", "versions")}
        output.write_text(json.dumps(kept, indent=1, default=str))


def retrieval(
    model: Model,
    output: Annotated[Path, typer.Option(help="JSON lines to write, for `dynamask report needle`.")],
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens of prompt and answer; repeatable; default: 512, 1024.")
    ] = None,
    depths: Annotated[int, typer.Option(help="Number of depths, spread evenly from the beginning to the end.")] = 5,
    samples: Annotated[int, typer.Option(help="Examples per task, length and depth.")] = 10,
    task: Annotated[list[str] | None, typer.Option(help="Task; repeatable; default: all of them.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Sources of the haystack; default: RULER's noise.")] = None,
    name: Annotated[str | None, typer.Option(help="Name in pictures; default: the folder's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per call of generate().")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the examples.")] = 0,
) -> None:
    """Measure retrieval from far back: needles, a passkey, variable tracking, after RULER.

    **Tasks**: single_needle, multi_key, multi_value, multi_query, passkey, variable_tracking.

    **Example**: `dynamask retrieval runs/tiny --length 512 --length 1024 --task passkey --output tiny.jsonl`, then
    `dynamask report needle tiny.jsonl dense.jsonl`
    """
    from dynamask.data.sources import check_sources, documents
    from dynamask.evaluation.retrieval import TASKS, check_task
    from dynamask.training.folder import check_run, open_run

    if depths < 1:
        raise UsageError(f"--depths must be at least 1; got {depths}")
    for each in task or ():
        check_task(each)
    check_output_file(output)
    check_run(model)
    check_sources(data or ())
    quiet_libraries()
    import torch

    from dynamask.evaluation.retrieval import evaluate_retrieval, write_scores

    loaded, tokenizer = open_run(model)
    scores = evaluate_retrieval(
        loaded.to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer,
        length or [512, 1024],
        [i / max(1, depths - 1) for i in range(depths)],
        samples,
        tasks=task or list(TASKS),
        documents=(document.text for document in documents(data)) if data else None,
        seed=seed,
        batch_size=batch_size,
        name=name or Path(model).name,
        progress=progress,
    )
    table = Table("task", "length", "exact match", "values found")
    for kind in dict.fromkeys((score.task, score.length) for score in scores):
        rows = [score for score in scores if (score.task, score.length) == kind]
        means = [sum(getattr(score, metric) for score in rows) / len(rows) for metric in ("exact", "recall")]
        table.add_row(kind[0], str(kind[1]), *(f"{mean:.1%}" for mean in means))
    console.print(table)
    write_scores(scores, output)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue; special tokens spelled out in it count as such.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampling; 0: greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a text, from the model's own cache: bounded, for dynamic mask and sliding-window attention.

    **Example**: `dynamask generate runs/tiny "def main():" --max-new-tokens 200`
    """
    from dynamask.training.folder import check_run, open_run

    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1; got {max_new_tokens}")
    check_sampling(temperature, top_p)
    check_text(prompt, "the prompt")
    check_run(model)
    quiet_libraries()
    import torch
    from transformers import TextStreamer, set_seed

    from dynamask.cache import cache_bytes
    from dynamask.data.tokenizer import opening_tokens

    loaded, tokenizer = open_run(model)
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = [*opening_tokens(tokenizer, prompt), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise UsageError("the prompt is empty: give at least one character to continue")
    tokens = torch.tensor([ids], device=loaded.device)
    set_seed(seed % 2**32)  # what numpy takes
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    start = time.perf_counter()
    output = loaded.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        return_dict_in_generate=True,
        **sampling,
    )
    seconds = time.perf_counter() - start
    made = output.sequences.shape[1] - len(ids)
    held = cache_bytes(output.past_key_values)
    errors.print(f"{made} tokens, {made / seconds:.1f} tokens/s, cache {held / 1024:.0f} KiB", highlight=False)
