"""lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness) over dynamask models.

Its own "hf" model already loads them once `import dynamask` has registered the transformers classes. The model
registered here, "dynamask", is that one, and does two things more: it takes the folder of a run, and it scores without
building caches.

    python -m dynamask.evaluation.harness --model dynamask --model_args pretrained=FOLDER --tasks piqa

is the harness's own command line with that model in it: the harness has no plug-ins, and plain `lm_eval` cannot know
it.

Raises:
    ImportError: on import, where the harness is not installed; the message names what to install.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dynamask  # noqa: F401 -- registers the Auto classes
from dynamask.errors import UsageError, did_you_mean
from dynamask.training import model_folder

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f"benchmark tasks need lm-evaluation-harness ({error}): pip install 'dynamask-attention[eval]'"
    ) from error


@register_model("dynamask")
class DynamaskLM(HFLM):
    """The harness's transformers model, for the folder of a run, a saved causal LM or a hub name.

    Args:
        pretrained: the folder or name.
        **kwargs: those of HFLM: dtype, batch_size, device, max_length, ...
    """

    def __init__(self, pretrained: Any, **kwargs: Any) -> None:
        kwargs.setdefault("backend", "causal")  # the harness knows the decoders of transformers' own list by themselves
        super().__init__(str(model_folder(pretrained)) if isinstance(pretrained, str | Path) else pretrained, **kwargs)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Compute logits (B, N, vocab) of tokens (B, N), padded on the right, without a cache."""
        configured, self.model.config.use_cache = self.model.config.use_cache, False
        try:
            return super()._model_call(inps, attn_mask, labels)
        finally:
            self.model.config.use_cache = configured


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
) -> dict[str, Any]:
    """Run the harness's tasks on a model.

    Args:
        model: folder of a finished run, of a saved causal LM, or a hub name.
        tasks: names or patterns ("mmlu", "arc_*") of the harness, or of include_path.
        include_path: folder with task definitions of one's own, in YAML.
        num_fewshot: worked examples before each question; None: the task's number.
        limit: questions per task; for trying things out, never for figures to report.
        batch_size: sequences per forward pass.
        device: None: the GPU where there is one.

    Returns:
        What `lm_eval.simple_evaluate` returns, without the samples: "results" has a dictionary of metrics per task.

    Raises:
        UsageError: a task the harness does not know, or data that could not be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"there is no folder {include_path} with task definitions")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if not manager.match_tasks([task]):
            raise UsageError(
                f"the harness knows no task {task!r}{did_you_mean(task, manager.all_tasks)}: `lm_eval ls tasks` lists "
                "them all; your own need --include-path FOLDER"
            )
    try:
        return simple_evaluate(
            model="dynamask",
            model_args={"pretrained": model},
            tasks=manager.match_tasks(list(tasks)),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            # Left to itself, the harness asks for CUDA even where there is none.
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            log_samples=False,
        )
    except (OSError, ConnectionError) as error:
        raise UsageError(
            f"the model or the data of {', '.join(tasks)} could not be loaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}): check the folder and the connection; finished downloads are kept"
        ) from error


def main() -> None:
    """Run the harness's command line with the model "dynamask" registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
