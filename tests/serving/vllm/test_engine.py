"""A tiny converted model in vLLM's own engine, beside transformers.

One engine serves all tests of this file, because starting one takes most of the time. It runs in this process, so that
the scheduler can be looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: lab/scripts/vllm_environment.sh makes an environment")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams

Reference = Callable[[list[int], int], list[int]]
Prompts = Callable[..., list[list[int]]]
BLOCKS = 13  # of which vLLM keeps one


@pytest.fixture(scope="module")
def engine(folder: Path, state_bytes: int) -> Iterator[LLM]:
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=4200,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=BLOCKS * state_bytes,
        max_num_batched_tokens=256,
        max_num_seqs=32,
        disable_log_stats=True,
    )
    yield llm
    del llm


def greedy(new: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def core(engine: LLM) -> Any:
    return engine.llm_engine.engine_core.engine_core


def free_blocks(engine: LLM) -> int:
    return int(core(engine).scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


LENGTHS = [1, 2, 3, 5, 8, 9, 15, 16, 17, 23, 24, 31, 40, 41, 56, 57, 63, 64, 65, 100]
LENGTHS += [128, 200, 255, 256, 257, 500, 1000, 1500, 2500, 4000]


def test_thirty_prompts_of_1_to_4000_tokens_continue_as_in_transformers(
    engine: LLM, reference: Reference, make_prompts: Prompts
) -> None:
    texts = make_prompts(LENGTHS)
    assert len(texts) == 30
    outputs = engine.generate([{"prompt_token_ids": text} for text in texts], greedy(24), use_tqdm=False)
    found = [tokens(output) for output in outputs]
    expected = [reference(text, 24) for text in texts]
    assert found == expected
    assert len({tuple(text) for text in expected}) > 25  # continuations differ, so that equality means something


def test_a_sequence_takes_one_block_whatever_its_length(engine: LLM, make_prompts: Prompts) -> None:
    scheduler = core(engine).scheduler
    assert core(engine).vllm_config.cache_config.num_gpu_blocks == BLOCKS
    for name, text in (("short", make_prompts([3])[0]), ("long", make_prompts([3000])[0])):
        engine.llm_engine.add_request(name, {"prompt_token_ids": text}, greedy(3))
        engine.llm_engine.step()
        assert free_blocks(engine) == BLOCKS - 2
        assert [
            len(blocks) for blocks in scheduler.kv_cache_manager.get_block_ids(scheduler.running[0].request_id)
        ] == [1]
        while engine.llm_engine.has_unfinished_requests():
            engine.llm_engine.step()
    assert free_blocks(engine) == BLOCKS - 1


def test_preempted_and_aborted_among_32_mixed_requests(
    engine: LLM, reference: Reference, make_prompts: Prompts
) -> None:
    """More requests than blocks: some wait. All that run are thrown back once, and every fourth is aborted."""
    lengths = [1 + (37 * i) % 300 for i in range(32)]
    texts = dict(zip(map(str, range(32)), make_prompts(lengths, seed=1), strict=True))
    for name, text in texts.items():
        engine.llm_engine.add_request(name, {"prompt_token_ids": text}, greedy(12))
    aborted = {name for name in texts if int(name) % 4 == 3}
    finished: dict[str, list[int]] = {}
    steps = 0
    while engine.llm_engine.has_unfinished_requests():
        for output in engine.llm_engine.step():
            if output.finished:
                finished[output.request_id] = tokens(output)
        steps += 1
        if steps == 4:
            assert core(engine).scheduler.running
            assert core(engine).scheduler.waiting
            engine.reset_prefix_cache(reset_running_requests=True)
        if steps == 6:
            engine.llm_engine.abort_request(sorted(aborted - finished.keys()))
            aborted -= finished.keys()
    assert aborted
    assert finished.keys() == texts.keys() - aborted
    assert finished == {name: reference(texts[name], 12) for name in finished}
    assert free_blocks(engine) == BLOCKS - 1


def test_sampled_continuations_depend_on_the_seed_alone(engine: LLM, make_prompts: Prompts) -> None:
    text = {"prompt_token_ids": make_prompts([70], seed=2)[0]}
    alike = SamplingParams(temperature=1.0, seed=5, max_tokens=16, ignore_eos=True, detokenize=False)
    first, second = (tokens(output) for output in engine.generate([text, text], alike, use_tqdm=False))
    assert first == second
