"""`dynamask inspect`: where its text comes from, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from dynamask.data import load_tokenizer
from tests.cli.conftest import Command


def data(page: Path) -> dict[str, Any]:
    inner = page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    return dict(json.loads(inner))


def test_a_text_a_file_and_standard_input(
    dynamask: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    done = dynamask("inspect", str(run / "run"), "all work and no play", "--tokens", "3", "--out", str(page))
    assert done.returncode == 0, done.stderr
    assert "3 of them generated" in done.stdout
    shown = data(page)
    assert "".join(shown["tokens"]).startswith("all work and no play")
    assert len(shown["tokens"]) == shown["prompt"] + 3
    assert shown["model"] == "run"

    text = tmp_path / "text.md"
    text.write_text("jack is a dull boy", encoding="utf-8")
    assert dynamask("inspect", str(run / "run"), str(text), "-o", str(page)).returncode == 0
    assert "".join(data(page)["tokens"]) == "jack is a dull boy"

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"dull boys")))
    cut = dynamask("inspect", str(run / "run"), "-", "--limit", "2", "-o", str(page))
    assert cut.returncode == 0, cut.stderr
    assert "reads the first 2 of" in cut.said
    assert len(data(page)["tokens"]) == 2


def test_a_text_begins_as_the_tokenizer_begins_it_and_a_chat_template_does_not(
    dynamask: Command, run: Path, tmp_path: Path
) -> None:
    folder, page = tmp_path / "opened", tmp_path / "page.html"
    shutil.copytree(run / "run" / "model", folder)
    tokenizer = load_tokenizer(folder)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.save_pretrained(folder)
    for arguments, text in (([], f"{end}dull boy"), (["--chat"], "[dull boy]")):
        done = dynamask("inspect", str(folder), "dull boy", *arguments, "-o", str(page))
        assert done.returncode == 0, done.stderr
        assert "".join(data(page)["tokens"]) == text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nosuch.txt"], "there is no file nosuch.txt"),
        (["a text", "--tokens", "-1"], "--tokens must be at least 0"),
        (["a text", "--limit", "0"], "--limit must be at least 1"),
        (["a text", "--out", "nosuch/page.html"], "there is no folder nosuch"),
        (["a text", "--chat"], "has no chat template"),
        ([""], "the text is empty"),
        ([" \n\t "], "the text is empty: give at least one character that is not a blank"),
        ([str(Path(__file__).parent)], "is a folder: give a text file, the text itself, or - for standard input"),
        (["caf\udce9"], "the text is not UTF-8"),
    ],
)
def test_mistakes_end_with_one_line(dynamask: Command, run: Path, arguments: list[str], complaint: str) -> None:
    done = dynamask("inspect", str(run / "run"), *arguments)
    assert done.returncode == 2
    assert complaint in done.said
