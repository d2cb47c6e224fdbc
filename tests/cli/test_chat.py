"""`dynamask chat`: turns over one bounded cache, templates that change earlier turns, pipes, and a real terminal."""

from __future__ import annotations

import copy
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

from dynamask import InvalidInputError
from dynamask.cli.conversation import Conversation
from dynamask.data import train_tokenizer
from dynamask.data.tokenizer import opening_tokens
from tests.cli.conftest import Command
from tests.conftest import tiny_model

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TRIMS = PLAIN.replace(
    "{{ m.content }}", "{{ m.content | trim | replace(' ', '_') if m.role == 'assistant' else m.content }}"
)
REWRITES = "{{ messages | length }}" + PLAIN


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["all work and no play makes jack a dull boy. [user][assistant] " * 4], 300)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(vocab_size=300, windows=[[6, 20], [9, 30]])


def conversation(model: Any, tokenizer: Any, template: str | None, **settings: Any) -> Conversation:
    tokenizer.chat_template = template
    return Conversation(model, tokenizer, **{"max_new_tokens": 8, "temperature": 0, **settings})


@pytest.mark.parametrize("template", [PLAIN, pytest.param(None, marks=pytest.mark.slow)], ids=["template", "none"])
def test_the_cache_carries_over_and_only_new_tokens_are_read(model: Any, tokenizer: Any, template: str | None) -> None:
    talk = conversation(model, tokenizer, template)
    pieces: list[str] = []
    first = talk.ask("all work and no play", pieces.append)
    assert "".join(pieces) == first.text
    before = len(talk.ids)
    second = talk.ask("makes jack a dull boy")
    # The last token of the first answer was not in the cache yet.
    assert second.read == len(talk.ids) - second.made - before + 1
    assert talk.read_again == 0
    given = torch.tensor([talk.ids[: len(talk.ids) - second.made]])
    with torch.no_grad():
        whole = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=8, do_sample=False)
    assert talk.ids == whole[0].tolist()
    if template:
        text = tokenizer.decode(talk.ids, clean_up_tokenization_spaces=False)
        assert text.startswith("[user]all work and no play<|endoftext|>\n[assistant]")
        assert "\n[user]makes jack a dull boy<|endoftext|>\n[assistant]" in text
    assert talk.cache.layers[0].seen >= len(talk.ids) - 1
    assert 0 < talk.dense_bytes == (len(talk.ids) - 1) * 2 * 2 * 2 * 8 * 8  # layers, heads, key and value, D, bytes
    talk.reset()
    assert (talk.ids, talk.cache_bytes, talk.messages) == ([], 0, [])
    assert talk.ask("all work and no play").text == first.text


def test_the_first_text_begins_with_the_special_tokens_of_the_tokenizer(model: Any, tokenizer: Any) -> None:
    opened = copy.deepcopy(tokenizer)
    end = opened.eos_token_id
    opened.add_special_tokens({"bos_token": "<s>"})
    bos = 5  # the tiny model has no row for a new token
    opened.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", bos), ("<|endoftext|>", end)]
    )
    text = "all work <|endoftext|>"
    assert opened(text)["input_ids"][:: len(opened(text)["input_ids"]) - 1] == [bos, end]
    talk = conversation(model, opened, None, max_new_tokens=1)
    for _ in range(2):
        talk.ask(text)
        assert talk.ids[:-1] == opened(text)["input_ids"][:-1], "as the tokenizer begins, without its end"
        first = len(talk.ids)
        talk.ask("no play")
        assert talk.ids[first:-1] == opened("\nno play", add_special_tokens=False)["input_ids"]
        talk.reset()
    templated = conversation(model, opened, PLAIN, max_new_tokens=1)
    templated.ask(text)
    assert bos not in templated.ids[:-1]
    assert opening_tokens(opened, text) == [bos]
    assert (opening_tokens(opened, ""), opening_tokens(tokenizer, text)) == ([], [])


@pytest.mark.slow
def test_templates_that_change_earlier_turns(model: Any, tokenizer: Any) -> None:
    trims = conversation(model, tokenizer, TRIMS)
    trims.ask("all work")
    kept = list(trims.ids)
    trims.ask("no play")
    assert trims.ids[: len(kept)] == kept, "only the answer reads differently: what the cache holds stays"
    assert trims.read_again == 0
    assert tokenizer.decode(trims.ids[len(kept) :]).removeprefix("<|endoftext|>").startswith("\n[user]no play")
    rewrites = conversation(model, tokenizer, REWRITES)
    rewrites.ask("all work")
    again = rewrites.ask("no play")
    assert rewrites.read_again == 1
    assert again.read == len(rewrites.ids) - again.made, "all is read again"
    assert tokenizer.decode(rewrites.ids).startswith("3[user]all work")


@pytest.mark.slow
def test_a_stopped_answer_stays_and_the_next_turn_goes_on(model: Any, tokenizer: Any) -> None:
    talk = conversation(model, tokenizer, PLAIN)
    calls = iter([False, False, True])
    answer = talk.ask("all work", stop=lambda: next(calls))
    assert (answer.stopped, answer.made) == (True, 2)
    nothing = talk.ask("jack", stop=lambda: True)
    assert (nothing.stopped, nothing.made, nothing.read) == (True, 0, 0)
    last = talk.ask("no play")
    given = torch.tensor([talk.ids[: len(talk.ids) - last.made]])
    with torch.no_grad():
        whole = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=8, do_sample=False)
    assert talk.ids == whole[0].tolist()
    text = tokenizer.decode(talk.ids)
    assert text.count("[user]") == 3
    assert text.index("[user]jack") < text.index("[user]no play")


def test_system_messages_sampling_and_dense_models(tokenizer: Any) -> None:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    ).eval()
    with pytest.raises(InvalidInputError, match="chat template"):
        conversation(dense, tokenizer, None, system="be brief")
    talk = conversation(dense, tokenizer, PLAIN, system="be brief", temperature=1.0, top_p=0.5)
    assert talk.ask("all work").made > 0
    assert tokenizer.decode(talk.ids).startswith("[system]be brief")
    assert talk.cache_bytes == talk.dense_bytes > 0, "a dense model's cache keeps every key"
    greedy = conversation(dense, tokenizer, PLAIN, temperature=1.0, top_p=1e-9)
    assert greedy.ask("no play").text == conversation(dense, tokenizer, PLAIN).ask("no play").text
    with pytest.raises(InvalidInputError, match="empty"):
        conversation(dense, tokenizer, None).ask("")


def test_pipes(dynamask: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"all work\n/help\n\n/nosuch\n/reset\nno play\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    done = dynamask("chat", str(run / "run"), "--temperature", "0", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "this model has no chat template" in done.stderr
    assert "Ctrl-D   end" in done.stderr
    assert "there is no command /nosuch" in done.said
    assert done.stderr.count("tokens/s") == 2
    assert "cache" in done.stderr
    assert "all keys: " in done.stderr
    assert dynamask("chat", str(run / "run"), "--top-p", "0").returncode == 2
    assert "needs a chat template" in dynamask("chat", str(run / "run"), "--system", "x").said


class Terminal:
    """A command in a pseudo-terminal of 24 rows."""

    def __init__(self, *arguments: str) -> None:
        self.mine, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "LINES": "24", "COLUMNS": "100"}
        command = [sys.executable, "-m", "dynamask", *arguments]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.mine, text.encode())

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Read until the text has come."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.mine], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self.mine, 4096).decode(errors="replace")
            except OSError:  # the process has ended
                assert text in self.seen, self.seen
        self.seen = self.seen.split(text, 1)[1]


@pytest.mark.slow
def test_a_terminal(run: Path) -> None:
    terminal = Terminal("chat", str(run / "run"), "--max-new-tokens", "100000", "--temperature", "1", "--seed", "0")
    try:
        terminal.wait_for("\x1b[1;23r")  # the last row is reserved
        terminal.wait_for("0 tokens · cache")
        terminal.wait_for("> ")
        terminal.type("all work\n")
        terminal.wait_for("answering")
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.wait_for("stopped")
        terminal.wait_for("tokens/s")
        terminal.wait_for("> ")
        terminal.type("/help\n")
        terminal.wait_for("forget the conversation")
        terminal.wait_for("> ")
        terminal.type("\x04")
        terminal.wait_for("\x1b[r")  # the terminal is as it was
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.mine)
