"""What a run's folder holds: its settings, its model, its corpus."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamask.errors import UsageError
from dynamask.hub import check_local_or_hub
from dynamask.training.checkpointing import checkpoints
from dynamask.training.config import TrainConfig

if TYPE_CHECKING:
    from dynamask.data import Corpus
    from dynamask.models import DynamaskForCausalLM

SETTINGS = "train.yaml"


def model_folder(name: str | Path) -> Path:
    """Return where the model of a run's folder lies: its `model` folder; anything else as it is."""
    folder = Path(name)
    return folder / "model" if (folder / "model" / "config.json").exists() else folder


def check_run(model_dir: str | Path) -> None:
    """Refuse what holds no model, as far as names tell: before the imports that opening it needs.

    Raises:
        UsageError: no such folder, a file, an unfinished run, or a folder without a configuration.
    """
    check_local_or_hub(model_dir, "folder")
    folder = model_folder(model_dir)
    if folder.is_file():
        raise UsageError(f"cannot load a model from {model_dir}: it is a file; give the folder of a run or of a model")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UsageError(f"cannot load a model from {model_dir}: {_what_is_missing(folder)}")


def open_run(model_dir: str | Path) -> tuple[DynamaskForCausalLM, Any]:
    """Open model and tokenizer of a finished run (its folder, or the `model` folder in it), or of any causal LM.

    Args:
        model_dir: folder, or a name on the hub, `owner/name`.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        UsageError: nothing there that can be loaded; the message tells an unfinished run and a missing tokenizer.
    """
    check_run(model_dir)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder(model_dir)
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder))
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise UsageError(
            f"cannot load a model from {model_dir!s}: {_first_line(error)}. Give the folder of a finished run "
            "(dynamask train output=FOLDER) or a saved causal LM"
        ) from error
    words: Path | None = folder
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("*.model")):
        words = _tokenizer_of_checkpoint(folder)
    if words is None:
        raise UsageError(
            f"{model_dir} holds a model without a tokenizer (no tokenizer.json): save one into the same folder"
        )
    try:
        return model.eval(), AutoTokenizer.from_pretrained(str(words))
    except Exception as error:
        raise UsageError(f"cannot load the tokenizer of {model_dir!s}: {_first_line(error)}") from error


def _tokenizer_of_checkpoint(folder: Path) -> Path | None:
    """Where the tokenizer of a run's checkpoint lies: in the run's corpus. None of another folder."""
    settings = run_settings(folder.parent) if folder in checkpoints(folder.parent) else None
    if settings is None:
        return None
    words = Path(settings.corpus or folder.parent / "corpus") / "tokenizer"
    return words if words.is_dir() else None


def open_corpus(model_dir: str | Path) -> Corpus:
    """Open the corpus a run was trained on.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    place = corpus_folder(model_dir)
    from dynamask.data import Corpus

    return Corpus.open(place)


def corpus_folder(model_dir: str | Path) -> Path:
    """Return where the corpus of a run lies. Raises UsageError where there is none."""
    check_local_or_hub(model_dir, "folder")
    settings = run_settings(model_dir)
    if settings is None:
        raise UsageError(f"{model_dir} is not a run of dynamask train, so it has no held-out texts: give some (--data)")
    place = Path(settings.corpus or run_folder(model_dir) / "corpus")
    if not place.exists():
        raise UsageError(f"the corpus of {model_dir} is gone ({place}): give texts (--data)")
    return place


def run_settings(model_dir: str | Path) -> TrainConfig | None:
    """Read the settings of a run; None of a folder or name that is no run. Raises UsageError for a damaged file."""
    settings = run_folder(model_dir) / SETTINGS
    return TrainConfig.load(settings) if settings.exists() else None


def run_folder(model_dir: str | Path) -> Path:
    """Return the folder of the run that a folder or its `model` folder belongs to."""
    folder = Path(model_dir)
    return folder.parent if folder.name == "model" and (folder.parent / SETTINGS).exists() else folder


def _what_is_missing(folder: Path) -> str:
    found = checkpoints(folder)
    if found:
        return (
            f"the run is not finished (its newest checkpoint is {found[-1].name}): run the same dynamask train command "
            f"again to continue it, or give {found[-1]}"
        )
    if (folder / SETTINGS).exists():
        return "the run is not finished, and has no checkpoint yet: run the same dynamask train command again"
    return (
        "it has no config.json. Give the folder of a finished run (dynamask train output=FOLDER) or a saved causal LM"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
